"""From embeddings to one score for each prompt: cosine similarities, and what is kept of them.

All cosines are float64. What is missing stays missing: a similarity needs both of its pictures, a
prompt without similarities has no score (None).
Public: ``cosine``, ``same_sample``, ``to_all``, ``to_nearest``, ``between_samples``,
``to_caption``, ``STATISTICS``, ``score``.
"""

from collections.abc import Callable, Mapping, Sequence

import numpy as np

Samples = Mapping[int, np.ndarray]  # sample number -> embedding (d,)
COPY_THRESHOLD = 0.7  # paper C.1: SSCD above it is a copy


def cosine(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Cosine similarities of the rows of (n, d) and (m, d): (n, m) float64."""
    unit = [v / np.linalg.norm(v, axis=1, keepdims=True) for v in (first, second)]
    return unit[0] @ unit[1].T


def _stack(vectors: Sequence[np.ndarray]) -> np.ndarray:
    return np.stack(vectors).astype(np.float64)


def same_sample(images: Samples, references: Samples) -> np.ndarray:
    """SSCD_Gen's similarities: each picture with the reference of the same sample number, that is
    of the same seed. (samples in both,)"""
    both = sorted(images.keys() & references.keys())
    if not both:
        return np.empty(0)
    first, second = ([samples[number] for number in both] for samples in (images, references))
    return np.diagonal(cosine(_stack(first), _stack(second)))


def to_all(images: Samples, references: Sequence[np.ndarray]) -> np.ndarray:
    """Similarities of each picture with each of the prompt's references, (samples, references);
    either number may be 0."""
    if not images or not references:
        return np.empty((len(images), len(references)))
    return cosine(_stack([images[number] for number in sorted(images)]), _stack(references))


def to_nearest(images: Samples, references: Sequence[np.ndarray]) -> np.ndarray:
    """SSCD_Orig's similarities: each picture with the nearest of the prompt's references.
    (samples,), or (0,) without references."""
    if not images or not references:
        return np.empty(0)
    return to_all(images, references).max(axis=1)


def between_samples(images: Samples) -> np.ndarray:
    """Diversity's similarities: all pairs of a prompt's pictures. (n (n - 1) / 2,)"""
    if len(images) < 2:
        return np.empty(0)
    vectors = _stack([images[number] for number in sorted(images)])
    return cosine(vectors, vectors)[np.triu_indices(len(vectors), k=1)]


def to_caption(images: Samples, caption: np.ndarray | None) -> np.ndarray:
    """Alignment's similarities: each picture with the caption. (samples,)"""
    return to_nearest(images, [] if caption is None else [caption])


def _share_above(level: float) -> Callable[[np.ndarray], float]:
    return lambda similarities: float(np.mean(similarities > level))


# What is kept of a prompt's similarities. The median of an even number is the mean of the middle
# two (torch.median, which the published scripts call, takes the lower one).
STATISTICS: dict[str, Callable[[np.ndarray], float]] = {
    "Median": lambda similarities: float(np.median(similarities)),
    "Max": lambda similarities: float(np.max(similarities)),
    # Of all where there are fewer than three.
    "Top-3 Mean": lambda similarities: float(np.mean(np.sort(similarities)[-3:])),
    "Share Above 0.5": _share_above(0.5),
    "Share Above 0.7": _share_above(COPY_THRESHOLD),
}


def score(similarities: np.ndarray, statistic: str) -> float | None:
    """One of ``STATISTICS`` of a prompt's similarities; None where there are none."""
    return STATISTICS[statistic](similarities) if similarities.size else None
