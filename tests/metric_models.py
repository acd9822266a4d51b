"""Small random networks in the formats of the real ones, and folders of pictures."""

import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image

WIDTH = 8  # of an embedding


class PooledColours(torch.nn.Module):
    """Pictures of any size -> the mean of each of 4 x 4 fields, mixed by a random matrix.
    In float64: what it says can be computed again to the last digits."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = torch.nn.Linear(48, WIDTH, bias=False, dtype=torch.float64)

    def forward(self, pictures: torch.Tensor) -> torch.Tensor:
        fields = torch.nn.functional.adaptive_avg_pool2d(pictures.double(), [4, 4])
        return self.mix(fields.flatten(1)).float()


def save_torchscript(path: Path, *, seed: int = 0) -> Path:
    """A TorchScript file as SSCD's are, and as ``--feature_model`` takes."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = PooledColours()
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.jit.script(network).save(str(path))
    return path


def save_open_clip(folder: Path, *, seed: int = 0) -> Path:
    """An open_clip folder: configuration and random weights, 32-pixel pictures."""
    import open_clip

    model = {
        "embed_dim": WIDTH,
        "vision_cfg": {
            "image_size": 32,
            "layers": 1,
            "width": 32,
            "patch_size": 8,
            "head_width": 16,
        },
        "text_cfg": {
            "context_length": 16,
            "vocab_size": 49408,
            "width": 16,
            "heads": 2,
            "layers": 1,
        },
    }
    preprocess = {"mean": [0.48, 0.46, 0.41], "std": [0.27, 0.26, 0.28]}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = open_clip.CLIP(**model)
    folder.mkdir(parents=True)
    config = {"model_cfg": model, "preprocess_cfg": preprocess}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    torch.save(network.state_dict(), folder / "open_clip_pytorch_model.bin")
    return folder


def picture(seed: object, *, size: tuple[int, int] = (24, 20)) -> Image.Image:
    """A random picture of 4 x 4 coloured fields; equal seeds give equal pictures."""
    generator = np.random.default_rng(list(repr(seed).encode()))
    fields = generator.integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(fields).resize(size, Image.Resampling.NEAREST)


def save_pictures(folder: Path, names: dict[str, object]) -> Path:
    """File name -> seed of its picture."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, seed in names.items():
        picture(seed).save(folder / name, quality=95)
    return folder
