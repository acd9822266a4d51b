"""What may happen to a picture before it is compared: random ones to train on, fixed ones to
measure with.

Public names: altered, recompressed, cropped, recoloured, turned, as_generated.
"""

import io

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

# Level (0 to 255) that a colour channel may be shifted by when a picture is recoloured.
LEAST_SHIFT, LARGEST_SHIFT = 20.0, 40.0
KEPT_SIDE = 0.9  # of width and of height, when a picture is cropped by 10%
QUALITY = 50  # of JPEG, when a picture is recompressed
TURNED_HUE = 30.0  # degrees


# --- at random, to train on ----------------------------------------------------------------------


def altered(pictures: np.ndarray, rng: np.random.Generator) -> Tensor:
    """One random alteration of each picture, each stronger than what must be borne: cropped,
    recoloured, blurred or sharpened, noisy, recompressed.

    pictures: (n, H, W, 3) uint8. Returns (n, 3, H, W) float32 in [0, 1].
    """
    levels = torch.from_numpy(np.array(pictures)).permute(0, 3, 1, 2).float() / 255
    levels = _random_windows(levels, rng)
    levels = _random_colours(levels, rng)
    levels = _random_sharpness(levels, rng)
    count = len(levels)
    noise = rng.standard_normal(levels.shape, dtype=np.float32)
    amount = rng.uniform(0, 0.04, (count, 1, 1, 1)).astype(np.float32)
    levels = (levels + torch.from_numpy(noise * amount)).clamp(0, 1)
    return _random_jpeg(levels, rng)


def _random_windows(levels: Tensor, rng: np.random.Generator) -> Tensor:
    """A window of 78 to 100% of each side, anywhere, drawn out to the whole picture."""
    sides = rng.uniform(0.78, 1.0, (len(levels), 2))
    centres = rng.uniform(-1, 1, (len(levels), 2)) * (1 - sides)
    scale_and_place = np.zeros((len(levels), 2, 3), dtype=np.float32)
    scale_and_place[:, [0, 1], [0, 1]] = sides
    scale_and_place[:, :, 2] = centres
    grid = F.affine_grid(torch.from_numpy(scale_and_place), list(levels.shape), align_corners=False)
    return F.grid_sample(levels, grid, padding_mode="border", align_corners=False)


def _random_colours(levels: Tensor, rng: np.random.Generator) -> Tensor:
    """Hue turned, saturation, contrast and the level of each channel changed; clipped, as a
    picture of too much contrast is."""
    count = len(levels)
    matrices = np.stack(
        [_colour_matrix(rng.uniform(-45, 45), np.exp(rng.uniform(-0.5, 0.5))) for _ in range(count)]
    )
    mixed = torch.einsum("nij,njhw->nihw", torch.from_numpy(matrices.astype(np.float32)), levels)
    contrast = np.exp(rng.uniform(-0.5, 0.6, (count, 1, 1, 1)))
    shift = rng.uniform(-0.22, 0.22, (count, 3, 1, 1))
    middle = 0.5 + torch.from_numpy(shift.astype(np.float32))
    return ((mixed - 0.5) * torch.from_numpy(contrast.astype(np.float32)) + middle).clamp(0, 1)


def _colour_matrix(degrees: float, saturation: float) -> np.ndarray:
    """(3, 3): turns colours around the grey axis and moves them from or to it."""
    axis = np.full((3, 3), 1 / 3)
    cross = np.asarray([[0, -1, 1], [1, 0, -1], [-1, 1, 0]]) / np.sqrt(3)
    angle = np.deg2rad(degrees)
    turned = np.cos(angle) * (np.eye(3) - axis) + np.sin(angle) * cross
    return axis + saturation * turned


def _random_sharpness(levels: Tensor, rng: np.random.Generator) -> Tensor:
    """Between twice blurred by 3 x 3 and sharpened by half as much."""
    blurred = levels
    for _ in range(2):
        blurred = F.avg_pool2d(F.pad(blurred, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    amount = rng.uniform(-0.5, 1, (len(levels), 1, 1, 1)).astype(np.float32)
    return torch.lerp(levels, blurred, torch.from_numpy(amount)).clamp(0, 1)


def _random_jpeg(levels: Tensor, rng: np.random.Generator) -> Tensor:
    """Half of the pictures recompressed with a quality of 20 to 90."""
    pixels = (levels * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy().copy()
    for at in np.flatnonzero(rng.random(len(pixels)) < 0.5):
        pixels[at] = _jpeg(Image.fromarray(pixels[at]), int(rng.integers(20, 91)))
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255


def _jpeg(picture: Image.Image, quality: int) -> Image.Image:
    file = io.BytesIO()
    picture.save(file, "jpeg", quality=quality)
    return Image.open(file)


# --- one at a time, to measure with --------------------------------------------------------------


def recompressed(picture: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Written as JPEG and read again. The generator is not used: it is what all of these take."""
    return _jpeg(picture, QUALITY)


def cropped(picture: Image.Image, rng: np.random.Generator) -> Image.Image:
    """A window of 90% of the width and of the height, anywhere."""
    width, height = (round(KEPT_SIDE * side) for side in picture.size)
    left = int(rng.integers(picture.width - width + 1))
    top = int(rng.integers(picture.height - height + 1))
    return picture.crop((left, top, left + width, top + height))


def recoloured(picture: Image.Image, rng: np.random.Generator) -> Image.Image:
    """The level of each channel shifted up or down on its own."""
    shift = rng.uniform(LEAST_SHIFT, LARGEST_SHIFT, 3) * rng.choice([-1, 1], 3)
    return _clipped(np.asarray(picture, dtype=float) + shift)


def turned(picture: Image.Image, rng: np.random.Generator) -> Image.Image:
    """The hue of every colour turned, to the one side or the other."""
    matrix = _colour_matrix(TURNED_HUE * rng.choice([-1, 1]), 1.0)
    return _clipped(np.asarray(picture, dtype=float) @ matrix.T)


def as_generated(picture: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Blurred a little and of 1.4 times the contrast, as the small model generates it."""
    side = picture.width * 5 // 8
    blurred = picture.resize((side, side), Image.Resampling.BILINEAR)
    back = blurred.resize(picture.size, Image.Resampling.BILINEAR)
    return _clipped((np.asarray(back, dtype=float) - 127.5) * 1.4 + 127.5)


def _clipped(levels: np.ndarray) -> Image.Image:
    return Image.fromarray(np.clip(levels.round(), 0, 255).astype(np.uint8))
