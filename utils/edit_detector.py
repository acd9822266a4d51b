"""Who has only the edited checkpoint: can he tell which rows were edited? A detector for that.

Each statistic is one number a row (neuron), compared with the others of its layer: how many robust
standard deviations (1.4826 times the median absolute deviation) it lies from the layer's median. A
row's score is its most conspicuous statistic. Nothing but the weights of one checkpoint is read.
Public: ``STATISTICS``, ``DETECTORS``, ``row_statistics``, ``conspicuousness``, ``score_rows``.
"""

from collections.abc import Mapping, Sequence

import numpy as np

# Of a row of ``to_v``, and last of the column of ``to_out`` that it is written with.
STATISTICS = {
    "norm": "Euclidean length of the row",
    "zeros": "number of weights that are exactly 0",
    "similarity": "largest absolute cosine with another row of the layer",
    "kurtosis": "fourth moment of the row's weights over the square of their second",
    "column": "Euclidean length of the column of to_out",
}
# An edit changes rows alone, so the first asks what it hides; the second asks whether the neuron
# can be found all the same.
DETECTORS: Mapping[str, tuple[str, ...]] = {
    "rows": ("norm", "zeros", "similarity", "kurtosis"),
    "rows and columns": tuple(STATISTICS),
}
MAD_TO_STD = 1.4826  # of a normal distribution
CEILING = 1e6  # where the layer's rows agree and this one does not


def row_statistics(value: np.ndarray, output: np.ndarray) -> dict[str, np.ndarray]:
    """``value`` (n, D), the weight of ``to_v``; ``output`` (m, n), that of ``to_out``; both finite
    -> each of ``STATISTICS`` (n,), float64. A row of zeros is like no other (similarity 0) and has
    kurtosis 0."""
    value, output = value.astype(np.float64), output.astype(np.float64)
    norms = np.linalg.norm(value, axis=1)
    units = value / np.where(norms > 0, norms, 1)[:, None]
    cosines = np.abs(units @ units.T)
    np.fill_diagonal(cosines, 0)
    squares = (value**2).mean(axis=1)
    fourth = (value**4).mean(axis=1)
    return {
        "norm": norms,
        "zeros": (value == 0).sum(axis=1).astype(np.float64),
        "similarity": cosines.max(axis=1),
        "kurtosis": np.divide(fourth, squares**2, out=np.zeros_like(fourth), where=squares > 0),
        "column": np.linalg.norm(output, axis=0),
    }


def conspicuousness(values: np.ndarray) -> np.ndarray:
    """Robust |z| of each of (n,) values among them, 0 to ``CEILING``; where more than half of them
    are equal, the farthest has ``CEILING`` and the others in proportion."""
    distance = np.abs(values - np.median(values))
    spread = MAD_TO_STD * np.median(distance)
    if spread == 0:
        return CEILING * distance / max(distance.max(), np.finfo(float).tiny)
    return np.minimum(distance / spread, CEILING)


def score_rows(
    statistics: Mapping[str, np.ndarray], names: Sequence[str]
) -> tuple[np.ndarray, list[str]]:
    """(score (n,), the statistic that gave it) of each row of one layer, by the named statistics;
    the first of several that agree."""
    each = np.stack([conspicuousness(statistics[name]) for name in names])
    best = each.argmax(axis=0)
    return each.max(axis=0), [names[i] for i in best]
