"""Memorization score: multi-scale SSIM of two noise differences (paper Sec. 3.1, Wang et al. 2003).

Public: ``number_of_scales``, ``ssim``, ``pairwise_ssim``,
``dynamic_ranges``, ``ssim_floor``.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass

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


@functools.lru_cache(maxsize=64)  # on a GPU, making it anew takes as long as using it
def _window(size: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """The Gaussian window at each of ``size`` places of a reflect-padded line, (size, size): column
    j has the weights of the pixels that place j sees."""
    offsets = torch.arange(TAPS, dtype=dtype, device=device) - MARGIN
    window = torch.exp(-(offsets**2) / (2 * SIGMA**2))
    pixels = torch.eye(size, dtype=dtype, device=device)
    padded = F.pad(pixels, (MARGIN, MARGIN), mode="reflect")
    return padded.unfold(1, TAPS, 1) @ (window / window.sum())


def _blur(images: torch.Tensor) -> torch.Tensor:
    """Gaussian window over (..., H, W) on reflect-padded input, same size out. The window is a
    product, so that two multiplications of matrices do it, many times faster than a convolution
    with one channel."""
    height, width = images.shape[-2:]
    along_lines = images @ _window(width, images.dtype, images.device)
    return (along_lines.mT @ _window(height, images.dtype, images.device)).mT


@dataclass(frozen=True)
class _Windows:
    """Windowed moments of two batches of images, maps of shape (..., n, C, H, W) each."""

    mean_1: torch.Tensor
    mean_2: torch.Tensor
    variances: torch.Tensor  # their sum, each clamped at 0
    covariance: torch.Tensor

    @classmethod
    def of(cls, first: torch.Tensor, second: torch.Tensor) -> "_Windows":
        moments = torch.stack([first, second, first * first, second * second, first * second])
        mean_1, mean_2, square_1, square_2, product = _blur(moments)
        variance_1 = (square_1 - mean_1**2).clamp(min=0)
        variance_2 = (square_2 - mean_2**2).clamp(min=0)
        return cls(mean_1, mean_2, variance_1 + variance_2, product - mean_1 * mean_2)

    def contrast(self, span: torch.Tensor) -> torch.Tensor:
        """The contrast-structure term for a dynamic range."""
        c2 = (K2 * span) ** 2
        return (2 * self.covariance + c2) / (self.variances + c2)

    def luminance(self, span: torch.Tensor) -> torch.Tensor:
        """The luminance term for a dynamic range."""
        c1 = (K1 * span) ** 2
        return (2 * self.mean_1 * self.mean_2 + c1) / (self.mean_1**2 + self.mean_2**2 + c1)


def _span(images: torch.Tensor) -> torch.Tensor:
    """Dynamic range of each comparison, (..., n, C, H, W) -> (..., 1, 1, 1, 1)."""
    group = (-4, -3, -2, -1)
    return images.amax(dim=group, keepdim=True) - images.amin(dim=group, keepdim=True)


def _inside(contrast: torch.Tensor) -> torch.Tensor:
    """The mean contrast-structure term of all scales but the last: without the padded rim."""
    return contrast[..., MARGIN:-MARGIN, MARGIN:-MARGIN].mean(dim=(-3, -2, -1))


def ssim(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Scores of n pairs of rows, (..., n, C, H, W) twice -> (..., n), float32.

    The dynamic range of each scale is the largest of the n rows of either argument: the last batch
    dimension is one comparison, those before it are comparisons evaluated at once without effect on
    each other. A negative mean term counts as 0; NaN stays NaN. InputError below 6 pixels.
    """
    scales = number_of_scales(*first.shape[-2:])
    score = torch.ones(first.shape[:-3], dtype=first.dtype, device=first.device)
    for scale in range(scales):
        span = torch.maximum(_span(first), _span(second))
        windows = _Windows.of(first, second)
        contrast = windows.contrast(span)
        if scale == scales - 1:
            term = (windows.luminance(span) * contrast).mean(dim=(-3, -2, -1))
        else:
            term = _inside(contrast)
            first, second = _halved(first), _halved(second)
        score = score * term.clamp(min=0) ** (WEIGHT / scales)
    return score


def dynamic_ranges(differences: torch.Tensor) -> list[torch.Tensor]:
    """What one comparison's (n, C, H, W) first argument contributes to the range of each scale."""
    ranges = []
    for _ in range(number_of_scales(*differences.shape[-2:])):
        ranges.append(_span(differences))
        differences = _halved(differences)
    return ranges


def ssim_floor(
    first: torch.Tensor, second: torch.Tensor, ranges: Sequence[torch.Tensor]
) -> torch.Tensor:
    """A lower bound of what ``ssim`` gives these rows, (k, C, H, W) twice -> (k,), as part of a
    larger comparison of noise differences whose first argument has these ``dynamic_ranges``.

    The true range R lies between that and 1, the range of the scaled differences themselves. The
    contrast-structure term rises with R, since twice a covariance is at most the sum of the
    variances, and so does the luminance term, which is at most 1; their product at a pixel is
    therefore least at the smallest R where the contrast is positive, and no less than the smallest
    contrast times the largest luminance where it is negative.
    """
    scales = len(ranges)
    floor = torch.ones(first.shape[:-3], dtype=first.dtype, device=first.device)
    for scale, span in enumerate(ranges):
        windows = _Windows.of(first, second)
        contrast = windows.contrast(span)
        if scale == scales - 1:
            largest = windows.luminance(torch.ones_like(span))
            factor = torch.where(contrast >= 0, windows.luminance(span), largest)
            term = (factor * contrast).mean(dim=(-3, -2, -1))
        else:
            term = _inside(contrast)
            first, second = _halved(first), _halved(second)
        floor = floor * term.clamp(min=0) ** (WEIGHT / scales)
    return floor


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
