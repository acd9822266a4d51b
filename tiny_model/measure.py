"""Measuring a model that has been written: the memorization score and copies, by brute force.

Public names: DETECTION_SEED, GENERATION_SEED, TinyModel, load_model, noise, silenced,
noise_difference, pairwise_scores, same_seed_score, generate, copy_similarity.

Nothing here comes from `utils`: this is the ruler that our localization is held against. Neurons
are switched off by zeroing their rows of the `to_v` weights, the plainest way there is.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, StableDiffusionPipeline
from torch import Tensor

from tiny_model.autoencoder import to_pixels
from tiny_model.planting import NeuronSet, value_layers
from tiny_model.text_encoder import embed

SEED_ROWS = 10
DETECTION_SEED, GENERATION_SEED = 1, 2
STEPS = 50
SCORED_STEP = 1  # of the 50: the second, as published
SSIM_POWER = 0.99  # one scale


@dataclass(frozen=True)
class TinyModel:
    """A loaded pipeline in float32; its U-Net's weights change inside `silenced` only."""

    pipeline: StableDiffusionPipeline

    def text(self, captions: list[str]) -> Tensor:
        return embed(self.pipeline.tokenizer, self.pipeline.text_encoder, captions)


def load_model(folder: Path) -> TinyModel:
    pipeline = StableDiffusionPipeline.from_pretrained(str(folder), dtype=torch.float32)
    pipeline.unet.eval().requires_grad_(False)
    return TinyModel(pipeline)


def noise(seed: int, rows: int = SEED_ROWS) -> Tensor:
    """Initial noises of every prompt, (rows, 4, 16, 16)."""
    return torch.randn(rows, 4, 16, 16, generator=torch.Generator().manual_seed(seed))


@contextmanager
def silenced(model: TinyModel, neurons: NeuronSet) -> Iterator[None]:
    """The neurons' rows of `to_v` are zero inside, and as they were after."""
    weights = [to_v.weight for to_v, _ in value_layers(model.pipeline.unet)]
    kept = [weight.detach().clone() for weight in weights]
    try:
        with torch.no_grad():
            for weight, columns in zip(weights, neurons, strict=True):
                weight[columns] = 0
        yield
    finally:
        with torch.no_grad():
            for weight, before in zip(weights, kept, strict=True):
                weight.copy_(before)


@torch.no_grad()
def noise_difference(model: TinyModel, text: Tensor, initial: Tensor) -> Tensor:
    """Scaled noise differences (n, 4, 16, 16) of one prompt. text: (1, 77, width)."""
    scheduler = DDIMScheduler.from_config(model.pipeline.scheduler.config)
    scheduler.set_timesteps(STEPS)
    timestep = scheduler.timesteps[SCORED_STEP]
    alpha = scheduler.alphas_cumprod[timestep]
    predicted = model.pipeline.unet(initial, timestep, text.expand(len(initial), -1, -1)).sample
    difference = alpha.sqrt() * predicted + (1 - alpha).sqrt() * initial - initial
    low = difference.amin(dim=(2, 3), keepdim=True)
    high = difference.amax(dim=(2, 3), keepdim=True)
    return (difference - low) / (high - low)


def _window_mean(pictures: Tensor) -> Tensor:
    """Gaussian 11 x 11 average, sigma 1.5, on reflected borders; channels are separate."""
    taps = torch.exp(-0.5 * ((torch.arange(11) - 5) / 1.5) ** 2)
    taps = taps / taps.sum()
    channels = pictures.shape[1]
    padded = F.pad(pictures, (5, 5, 5, 5), mode="reflect")
    across = F.conv2d(padded, taps.view(1, 1, 1, 11).repeat(channels, 1, 1, 1), groups=channels)
    return F.conv2d(across, taps.view(1, 1, 11, 1).repeat(channels, 1, 1, 1), groups=channels)


def ssim(first: Tensor, second: Tensor) -> Tensor:
    """Scores (n,) of n pairs of noise differences (n, 4, 16, 16), compared as two batches."""
    span = max((batch.max() - batch.min()).item() for batch in (first, second))
    c1, c2 = (0.01 * span) ** 2, (0.03 * span) ** 2
    mean1, mean2 = _window_mean(first), _window_mean(second)
    variance1 = (_window_mean(first * first) - mean1 * mean1).clamp(min=0)
    variance2 = (_window_mean(second * second) - mean2 * mean2).clamp(min=0)
    covariance = _window_mean(first * second) - mean1 * mean2
    luminance = (2 * mean1 * mean2 + c1) / (mean1**2 + mean2**2 + c1)
    structure = (2 * covariance + c2) / (variance1 + variance2 + c2)
    return (luminance * structure).mean(dim=(1, 2, 3)).clamp(min=0) ** SSIM_POWER


def pairwise_scores(differences: Tensor) -> Tensor:
    """Scores of all pairs i < j, (n (n - 1) / 2,)."""
    first, second = torch.triu_indices(len(differences), len(differences), offset=1)
    return ssim(differences[first], differences[second])


def same_seed_score(differences: Tensor, blocked: Tensor, threshold: float) -> float:
    """Largest score of one seed without and with neurons off, over the rows that are memorized.

    A row counts if its best pairwise score is above the threshold; if none is, all rows count.
    """
    pairs = pairwise_scores(differences)
    best = torch.zeros(len(differences))
    for row, other, score in zip(
        *torch.triu_indices(len(differences), len(differences), offset=1), pairs, strict=True
    ):
        best[row] = max(best[row], score)
        best[other] = max(best[other], score)
    kept = best > threshold
    if not kept.any():
        kept[:] = True
    return ssim(differences[kept], blocked[kept]).max().item()


@torch.no_grad()
def generate(
    model: TinyModel, captions: list[str], initial: Tensor, *, guidance: float = 7.0
) -> tuple[np.ndarray, Tensor]:
    """Pictures (n, 64, 64, 3) uint8 and latents (n, 4, 16, 16) by DDIM, a caption per noise."""
    pipeline = model.pipeline
    latents = pipeline(
        captions,
        latents=initial,
        num_inference_steps=STEPS,
        guidance_scale=guidance,
        output_type="latent",
    ).images
    decoded = pipeline.vae.decode(latents / pipeline.vae.config.scaling_factor).sample
    return to_pixels(decoded), latents


def copy_similarity(pictures: np.ndarray, reference: np.ndarray, fixed: np.ndarray) -> np.ndarray:
    """Pixel correlation (n,) of pictures (n, 64, 64, 3) with a reference over its fixed part."""
    first = pictures[:, fixed].reshape(len(pictures), -1).astype(float)
    second = reference[fixed].reshape(-1).astype(float)
    first = first - first.mean(axis=1, keepdims=True)
    second = second - second.mean()
    lengths = np.linalg.norm(first, axis=1) * np.linalg.norm(second)
    return first @ second / np.maximum(lengths, 1e-9)
