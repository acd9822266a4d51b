"""The copy detector: pictures of any size to unit vectors, alike for altered copies of a picture.

Trained without labels: two alterations of a picture belong together, all other pictures of the
batch do not (InfoNCE), and no two pictures may come close (the spreading of SSCD and of KoLeo).
Public names: CopyDetector, detector_loss, write_detector.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tiny_model.drawings import IMAGE_SIZE

WIDTHS = (24, 48, 80, 96)  # channels at 32, 16, 8 and 4 pixels a side
EMBEDDING = 64  # fewer than the demo has pictures, or FID's covariance would be singular
TEMPERATURE = 0.05  # SSCD's
SPREAD_WEIGHT = 1.0


class _Block(nn.Module):
    """Two 3 x 3 convolutions beside a shortcut; halves the side."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(inputs, outputs, 3, stride=2, padding=1, bias=False)
        self.first_norm = nn.GroupNorm(8, outputs)
        self.second = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.second_norm = nn.GroupNorm(8, outputs)
        self.shortcut = nn.Conv2d(inputs, outputs, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        inner = F.relu(self.first_norm(self.first(x)))
        inner = self.second_norm(self.second(inner))
        return F.relu(inner + self.shortcut(F.avg_pool2d(x, 2)))


class CopyDetector(nn.Module):
    """(n, 3, H, W) in any range and normalisation -> (n, 64), of length 1.

    Brought to 64 x 64 and standardised per picture and channel: so it does not matter at which size
    and with which mean and std a protocol feeds it, or whether levels are up to 1 or to 255.
    """

    def __init__(self) -> None:
        super().__init__()
        self.side = IMAGE_SIZE  # TorchScript sees attributes, not globals
        self.stem = nn.Conv2d(3, WIDTHS[0], 5, stride=2, padding=2)
        self.blocks = nn.Sequential(
            *(_Block(WIDTHS[at], WIDTHS[at + 1]) for at in range(len(WIDTHS) - 1))
        )
        # Flat, not pooled: what lies where tells drawings of the same shapes apart.
        self.head = nn.Linear(WIDTHS[-1] * 16, EMBEDDING)

    def forward(self, pictures: Tensor) -> Tensor:
        size = [self.side, self.side]
        x = F.interpolate(pictures.float(), size=size, mode="bilinear", antialias=True)
        x = x - x.mean(dim=(2, 3), keepdim=True)
        spread = x.square().mean(dim=(2, 3), keepdim=True).sqrt()
        # A channel that hardly varies is not drawn out to noise.
        x = x / torch.maximum(spread, 0.2 * spread.amax(dim=1, keepdim=True) + 1e-6)
        x = self.blocks(F.relu(self.stem(x)))  # (n, 96, 4, 4)
        return F.normalize(self.head(x.flatten(1)), dim=1)


def detector_loss(detector: CopyDetector, first: Tensor, second: Tensor) -> dict[str, Tensor]:
    """first, second: two alterations of the same pictures, (n, 3, 64, 64) each."""
    vectors = detector(torch.cat([first, second]))
    similarity = vectors @ vectors.T  # (2 n, 2 n)
    count = len(first)
    partner = torch.arange(2 * count).roll(count)
    itself = torch.eye(2 * count, dtype=torch.bool)
    contrast = F.cross_entropy((similarity / TEMPERATURE).masked_fill(itself, -torch.inf), partner)
    # Distance to the nearest other picture, whichever alteration of it.
    other = similarity.masked_fill(itself | itself.roll(count, 0), -1.0).amax(dim=1)
    spread = -0.5 * torch.log(2 - 2 * other + 1e-6).mean()
    copies = similarity[torch.arange(2 * count), partner].mean()
    return {
        "loss": contrast + SPREAD_WEIGHT * spread,
        "contrast": contrast,
        "spread": spread,
        "copies": copies,
        "nearest": other.mean(),
    }


def write_detector(detector: CopyDetector, path: Path) -> None:
    """As TorchScript, float32, in the format of SSCD's published networks."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".writing")
    torch.jit.script(detector.eval()).save(str(temporary))
    temporary.replace(path)
