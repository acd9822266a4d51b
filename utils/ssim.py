"""Memorization score: multi-scale SSIM of two noise differences (paper Sec. 3.1, Wang et al. 2003).

Public: ``number_of_scales``, ``ssim``, ``pairwise_ssim``.
"""

import torch
import torch.nn.functional as F

from utils.errors import InputError
from utils.thresholds import pairs

WEIGHT = 0.99  # three scales of 0.33 in the published score; split over as many as fit
K1, K2 = 0.01, 0.03
SIGMA, TAPS = 1.5, 11
MARGIN = TAPS // 2
SMALLEST_SIDE = {3: 41, 2: 21, 1: 6}  # scales -> what a noise difference must measure at least


def number_of_scales(height: int, width: int) -> int:
    """Scales that fit a noise difference of this size. InputError below 6 pixels."""
    side = min(height, width)
    for scales, smallest in SMALLEST_SIDE.items():
        if side >= smallest:
            return scales
    raise InputError(
        f"latents of {height}x{width} are too small to score; {SMALLEST_SIDE[1]} pixels at least"
    )


def _blur(images: torch.Tensor) -> torch.Tensor:
    """Gaussian window over (B, 1, H, W) on reflect-padded input, same size out."""
    offsets = torch.arange(TAPS, dtype=images.dtype, device=images.device) - MARGIN
    window = torch.exp(-(offsets**2) / (2 * SIGMA**2))
    window = window / window.sum()
    padded = F.pad(images, (MARGIN,) * 4, mode="reflect")
    return F.conv2d(padded, torch.outer(window, window)[None, None])


def _terms(first: torch.Tensor, second: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(..., n, C, H, W) twice -> maps of the full SSIM and of its contrast-structure term."""
    group = (-4, -3, -2, -1)
    spans = [
        x.amax(dim=group, keepdim=True) - x.amin(dim=group, keepdim=True) for x in (first, second)
    ]
    # One dynamic range for all rows of a comparison: scores must not depend on what else is
    # evaluated.
    span = torch.maximum(*spans)
    moments = torch.stack([first, second, first * first, second * second, first * second])
    flat = moments.reshape(-1, 1, *moments.shape[-2:])
    mean_1, mean_2, square_1, square_2, product = _blur(flat).reshape(moments.shape)
    variance_1 = (square_1 - mean_1**2).clamp(min=0)
    variance_2 = (square_2 - mean_2**2).clamp(min=0)
    covariance = product - mean_1 * mean_2
    c1, c2 = (K1 * span) ** 2, (K2 * span) ** 2
    contrast = (2 * covariance + c2) / (variance_1 + variance_2 + c2)
    luminance = (2 * mean_1 * mean_2 + c1) / (mean_1**2 + mean_2**2 + c1)
    return luminance * contrast, contrast


def ssim(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Scores of n pairs of rows, (..., n, C, H, W) twice -> (..., n), float32.

    The dynamic range of each scale is the largest of the n rows of either argument: the last batch
    dimension is one comparison, those before it are comparisons evaluated at once without effect on
    each other. A negative mean term counts as 0; NaN stays NaN. InputError below 6 pixels.
    """
    scales = number_of_scales(*first.shape[-2:])
    score = torch.ones(first.shape[:-3], dtype=first.dtype, device=first.device)
    for scale in range(scales):
        full, contrast = _terms(first, second)
        if scale == scales - 1:
            term = full.mean(dim=(-3, -2, -1))
        else:
            inside = contrast[..., MARGIN:-MARGIN, MARGIN:-MARGIN]
            term = inside.mean(dim=(-3, -2, -1))
            first, second = _halved(first), _halved(second)
        score = score * term.clamp(min=0) ** (WEIGHT / scales)
    return score


def _halved(images: torch.Tensor) -> torch.Tensor:
    """2x2 means; an odd last row or column is dropped."""
    flat = images.reshape(-1, *images.shape[-3:])
    pooled = F.avg_pool2d(flat, 2)
    return pooled.reshape(*images.shape[:-2], *pooled.shape[-2:])


def pairwise_ssim(differences: torch.Tensor) -> torch.Tensor:
    """Scores of all pairs of n rows, (n, C, H, W) -> (n (n - 1) / 2,); all pairs are one
    comparison."""
    first, second = zip(*pairs(len(differences)), strict=True)
    return ssim(differences[list(first)], differences[list(second)])
