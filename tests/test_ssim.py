"""The memorization score against torchmetrics and scikit-image, and its own rules."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from skimage.metrics import structural_similarity
from torch.nn.functional import avg_pool2d
from torchmetrics.functional.image import (
    multiscale_structural_similarity_index_measure,
    structural_similarity_index_measure,
)

from utils.errors import InputError
from utils.ssim import (
    _Windows,
    dynamic_ranges,
    number_of_scales,
    pairwise_ssim,
    ssim,
    ssim_floor,
)

BETAS = {3: (0.33, 0.33, 0.33), 2: (0.495, 0.495), 1: (0.99,)}
SIZES = [
    # case in words, height, width, scales
    ("Stable Diffusion v1", 64, 64, 3),
    ("Stable Diffusion v2 at 768", 96, 96, 3),
    ("smallest of three scales, odd", 41, 41, 3),
    ("one below three scales", 40, 40, 2),
    ("two scales", 32, 32, 2),
    ("smallest of two scales, odd", 21, 21, 2),
    ("one below two scales", 20, 20, 1),
    ("the tiny model", 16, 16, 1),
    ("not square, the smaller side decides", 64, 42, 3),
    ("smallest that torchmetrics takes at three scales", 44, 44, 3),
    ("not square, wide", 24, 70, 2),
    ("odd on both sides", 47, 53, 3),
]


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(shape, generator=generator)


def test_a_variance_is_never_below_zero() -> None:
    """Squares of nearly equal large values leave what rounding makes of them."""
    flat = 100 + 1e-3 * noise(1, 1, 16, 16)
    windows = _Windows.of(flat, flat)
    assert (windows.covariance < 0).any(), "rounding shows here"
    assert (windows.variances >= 0).all()


def alike(*shape: int, amount: float = 0.3) -> tuple[torch.Tensor, torch.Tensor]:
    """Two batches that are alike to some amount, in [0, 1], each row more than the last."""
    first, other = noise(*shape, seed=1), noise(*shape, seed=2)
    weight = torch.linspace(amount, 1, shape[0]).view(-1, 1, 1, 1)
    return first, weight * first + (1 - weight) * other


def by_torchmetrics(first: torch.Tensor, second: torch.Tensor, scales: int) -> torch.Tensor:
    window = {"sigma": 1.5, "kernel_size": 11, "data_range": None, "reduction": "none"}
    if scales < 3 or min(first.shape[-2:]) >= 44:
        return multiscale_structural_similarity_index_measure(
            first, second, betas=BETAS[scales], normalize="relu", **window
        )
    # From 41 to 43 pixels three scales fit, though torchmetrics' own check refuses them.
    score = torch.ones(len(first))
    for scale in range(scales):
        if scale == scales - 1:
            term = structural_similarity_index_measure(first, second, **window)
        else:
            _, term = structural_similarity_index_measure(
                first, second, return_contrast_sensitivity=True, **window
            )
        score = score * torch.relu(term) ** BETAS[scales][scale]
        first, second = avg_pool2d(first, 2), avg_pool2d(second, 2)
    return score


@pytest.mark.parametrize(
    ("height", "width", "scales"), [c[1:] for c in SIZES], ids=[c[0] for c in SIZES]
)
def test_equals_torchmetrics(height: int, width: int, scales: int) -> None:
    assert number_of_scales(height, width) == scales
    first, second = alike(4, 4, height, width)
    expected = by_torchmetrics(first, second, scales)
    assert 0.05 < expected.min() < 0.95  # the comparison says something
    torch.testing.assert_close(ssim(first, second), expected, atol=2e-6, rtol=0)


@pytest.mark.parametrize("size", [6, 7, 10])
def test_one_scale_below_eleven_pixels(size: int) -> None:
    """Smaller than torchmetrics lets its multi-scale form be; its single-scale form takes them."""
    first, second = alike(4, 4, size, size)
    expected = structural_similarity_index_measure(
        first, second, sigma=1.5, kernel_size=11, data_range=None, reduction="none"
    )
    torch.testing.assert_close(ssim(first, second), expected**0.99, atol=2e-6, rtol=0)


@pytest.mark.parametrize(("height", "width"), [(5, 5), (5, 64), (64, 5), (1, 1)])
def test_refuses_what_is_too_small(height: int, width: int) -> None:
    images = noise(2, 4, height, width)
    with pytest.raises(InputError, match=f"{height}x{width} are too small"):
        ssim(images, images)


def test_one_scale_equals_scikit_image() -> None:
    """It pads otherwise; it sees images that are reflected by hand, and its map is cut back."""
    first, second = alike(3, 1, 20, 20)
    span = max(float(x.max() - x.min()) for x in (first, second))
    for row in range(3):
        padded = [np.pad(x[row, 0].double().numpy(), 5, mode="reflect") for x in (first, second)]
        _, full = structural_similarity(
            *padded,
            data_range=span,
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
            truncate=3.5,
            full=True,
        )
        expected = full[5:-5, 5:-5].mean() ** 0.99
        # One dynamic range for the batch: a row alone has a smaller one.
        assert ssim(first, second)[row].item() == pytest.approx(expected, abs=2e-6)


def test_channels_are_averaged_like_scikit_image() -> None:
    first, second = alike(1, 3, 20, 20)
    span = max(float(x.max() - x.min()) for x in (first, second))
    padded = [
        np.pad(x[0].numpy(), ((0, 0), (5, 5), (5, 5)), mode="reflect") for x in (first, second)
    ]
    _, full = structural_similarity(
        *padded,
        data_range=span,
        gaussian_weights=True,
        sigma=1.5,
        use_sample_covariance=False,
        channel_axis=0,
        full=True,
    )
    expected = full[:, 5:-5, 5:-5].mean() ** 0.99
    assert ssim(first, second).item() == pytest.approx(expected, abs=2e-6)


def test_dynamic_range_is_the_largest_of_either_batch() -> None:
    """A row with a larger range, in either argument, changes the other rows' scores."""
    first, second = alike(3, 4, 20, 20)
    first, second = first * 0.5, second * 0.5
    alone = ssim(first[:2], second[:2])
    for louder in (
        (first * torch.tensor([1, 1, 2.0]).view(3, 1, 1, 1), second),
        (first, second * torch.tensor([1, 1, 2.0]).view(3, 1, 1, 1)),
    ):
        together = ssim(*louder)
        assert (together[:2] - alone).abs().min() > 1e-3
        torch.testing.assert_close(together, by_torchmetrics(*louder, 1), atol=2e-6, rtol=0)


@settings(max_examples=25, deadline=None)
@given(
    comparisons=st.integers(1, 4),
    rows=st.integers(1, 4),
    size=st.sampled_from([8, 21, 24]),
    seed=st.integers(0, 10_000),
    scale=st.floats(0.1, 10),
)
def test_batching_comparisons_never_changes_a_score(
    comparisons: int, rows: int, size: int, seed: int, scale: float
) -> None:
    first = noise(comparisons, rows, 2, size, size, seed=seed)
    second = 0.5 * first + 0.5 * noise(comparisons, rows, 2, size, size, seed=seed + 1)
    # Comparisons with different dynamic ranges: mixing them up would show.
    factors = (scale ** torch.arange(comparisons)).view(-1, 1, 1, 1, 1)
    first, second = first * factors, second * factors
    together = ssim(first, second)
    alone = torch.stack([ssim(a, b) for a, b in zip(first, second, strict=True)])
    torch.testing.assert_close(together, alone, atol=1e-6, rtol=0)


@pytest.mark.parametrize("size", [64, 32, 16])
def test_identical_is_one_and_order_does_not_matter(size: int) -> None:
    first, second = alike(4, 4, size, size)
    torch.testing.assert_close(ssim(first, first), torch.ones(4), atol=1e-5, rtol=0)
    torch.testing.assert_close(ssim(first, second), ssim(second, first), atol=1e-6, rtol=0)


@pytest.mark.parametrize("size", [64, 32, 16])
def test_negative_mean_term_counts_as_zero(size: int) -> None:
    """The inverse picture has a negative covariance everywhere: a fractional power would be NaN."""
    first, second = alike(2, 4, size, size)
    score = ssim(first, torch.stack([1 - first[0], second[1]]))
    assert score[0].item() == 0.0
    assert score[1].item() > 0.1


@pytest.mark.parametrize("size", [64, 32, 16])
def test_nan_stays_nan(size: int) -> None:
    first, second = alike(2, 4, size, size)
    broken = second.clone()
    broken[0, 0, 3, 3] = torch.nan
    assert torch.isnan(ssim(first, broken)[0])
    assert torch.isnan(ssim(broken, first)[0])


def test_all_pairs_are_one_comparison_in_order() -> None:
    images = 0.5 * noise(1, 4, 24, 24, seed=1) + 0.5 * noise(4, 4, 24, 24, seed=2)
    images[2:] *= 0.3  # quiet rows: a pair of them alone has a smaller range
    scores = pairwise_ssim(images)
    order = [(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)]
    expected = by_torchmetrics(
        images[[i for i, _ in order]], images[[j for _, j in order]], scales=2
    )
    torch.testing.assert_close(scores, expected, atol=2e-6, rtol=0)
    assert abs(scores[5] - ssim(images[2:3], images[3:4])[0]) > 1e-3


@settings(max_examples=30, deadline=None)
@given(
    size=st.sampled_from([16, 24, 44]),
    seed=st.integers(0, 10_000),
    weight=st.floats(-1, 1),
    contrast=st.floats(0.05, 1),
)
def test_one_row_bounds_the_score_from_below(
    size: int, seed: int, weight: float, contrast: float
) -> None:
    """``ssim_floor`` of a row alone is never above the row's score within its comparison."""
    first = noise(3, 2, size, size, seed=seed)
    mixed = weight * (first - 0.5) + (1 - abs(weight)) * (
        noise(3, 2, size, size, seed=seed + 1) - 0.5
    )
    second = (0.5 + contrast * mixed).clamp(0, 1)
    second[2] = noise(2, size, size, seed=seed + 2)
    scores = ssim(first, second)
    ranges = dynamic_ranges(first)
    for row in range(3):
        floor = ssim_floor(first[row : row + 1], second[row : row + 1], ranges).item()
        assert floor <= scores[row].item() + 2e-6


def test_one_row_bounds_the_score_where_luminance_decides() -> None:
    """Dark rows that differ by an offset: the score rises with the comparison's dynamic range."""
    first = 0.02 * noise(2, 2, 16, 16)
    second = first + 0.02
    ranges = dynamic_ranges(first)
    floor = ssim_floor(first[:1], second[:1], ranges).item()
    scores = []
    for loudest in (0.1, 0.3, 1.0):  # a row beside it sets the range
        second[1] = loudest * noise(2, 16, 16, seed=1)
        scores.append(ssim(first, second)[0].item())
    assert scores == sorted(scores) and scores[0] < scores[2] - 0.01
    assert 0.5 < floor <= scores[0]
