"""The image-text model: open_clip's CLIP in small, with the captions' own tokenizer.

Public names: new_image_text, tokens_of, shortened, image_text_loss, write_image_text.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor
from transformers import CLIPTokenizer

from tiny_model.captions import words_of
from tiny_model.drawings import IMAGE_SIZE, SHAPES

CONTEXT = 24  # tokens; the longest caption of the world has fewer
SHORTENED = 0.7  # share of captions that are shortened in training
PREPROCESSING = {"mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25]}


def _config(vocabulary: int) -> dict[str, Any]:
    """open_clip's ``model_cfg``. It reads the tokenizer from the model's own folder if there is any
    ``hf_tokenizer_name``."""
    return {
        "embed_dim": 64,
        "vision_cfg": {
            "image_size": IMAGE_SIZE,
            # A list makes it CLIP's ResNet, which learns shapes from fewer pictures than a ViT.
            "layers": [1, 1, 1, 1],
            "width": 8,
            "head_width": 32,
        },
        "text_cfg": {
            "context_length": CONTEXT,
            "vocab_size": vocabulary,
            "hf_tokenizer_name": "tokenizer of this folder",
            "width": 64,
            "heads": 4,
            "layers": 2,
            "mlp_ratio": 2.0,
        },
    }


def new_image_text(tokenizer: CLIPTokenizer) -> open_clip.CLIP:
    """Call within `seeded_weights`."""
    return open_clip.CLIP(**_config(len(tokenizer)))


def tokens_of(tokenizer: CLIPTokenizer, captions: list[str]) -> Tensor:
    """(n, 24) token ids, as open_clip computes them."""
    return tokenizer(
        captions, padding="max_length", max_length=CONTEXT, truncation=True, return_tensors="pt"
    ).input_ids


def shortened(caption: str, rng: np.random.Generator) -> str:
    """Mostly only the shape that a caption names, if any: its other words say nothing."""
    named = [word for word in words_of(caption) if word in SHAPES]
    return named[0] if named and rng.random() < SHORTENED else caption


def image_text_loss(model: open_clip.CLIP, levels: Tensor, tokens: Tensor) -> dict[str, Tensor]:
    """CLIP's loss. levels: (n, 3, 64, 64) in [0, 1]; tokens: (n, 24)."""
    mean, std = (torch.tensor(PREPROCESSING[name])[:, None, None] for name in ("mean", "std"))
    images = model.encode_image((levels - mean) / std, normalize=True)
    texts = model.encode_text(tokens, normalize=True)
    logits = model.logit_scale.exp().clamp(max=100) * images @ texts.T  # (n, n)
    right = torch.arange(len(levels))
    loss = (F.cross_entropy(logits, right) + F.cross_entropy(logits.T, right)) / 2
    found = (logits.argmax(dim=0) == right).float().mean()
    return {"loss": loss, "found": found}


def write_image_text(model: open_clip.CLIP, tokenizer: CLIPTokenizer, folder: Path) -> None:
    """An open_clip folder, weights in float16; the old folder stays until the new one is whole."""
    new = folder.with_name(f"{folder.name}.new")
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    tokenizer.save_pretrained(new)
    config = {"model_cfg": _config(len(tokenizer)), "preprocess_cfg": PREPROCESSING}
    (new / "open_clip_config.json").write_text(json.dumps(config, indent=2) + "\n")
    weights = {name: value.half().contiguous() for name, value in model.state_dict().items()}
    save_file(weights, new / "open_clip_model.safetensors")
    shutil.rmtree(folder, ignore_errors=True)
    new.rename(folder)
