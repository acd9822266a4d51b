"""How well scores tell memorized from other prompts: ROC, AUROC, accuracy, TPR at 1% FPR.

A prompt is called memorized if its score is at or above the threshold; higher is more memorized.
Public: ``Curve``, ``roc``, ``auroc``, ``best_accuracy``, ``accuracy_at``, ``tpr_at_fpr``,
``evaluate``, ``bootstrap``.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

LEVEL = 0.01  # false positive rate at which papers quote the true positive rate


@dataclass(frozen=True)
class Curve:
    """A ROC curve: one point for every distinct score, thresholds falling from infinity (nothing is
    called memorized) to the lowest score (everything is). Counts are whole numbers."""

    thresholds: np.ndarray
    false_positives: np.ndarray
    true_positives: np.ndarray

    @property
    def fpr(self) -> np.ndarray:
        """Share of the other prompts that are called memorized, at each threshold."""
        return self.false_positives / self.false_positives[-1]

    @property
    def tpr(self) -> np.ndarray:
        """Share of the memorized prompts that are called so, at each threshold."""
        return self.true_positives / self.true_positives[-1]


def roc(memorized: np.ndarray, others: np.ndarray) -> Curve:
    """The curve of scores (n,) and (m,). ValueError if either is empty or not finite."""
    scores = np.concatenate([memorized, others]).astype(np.float64)
    if not len(memorized) or not len(others) or not np.isfinite(scores).all():
        raise ValueError("a ROC curve needs finite scores of both kinds")
    order = np.argsort(-scores, kind="stable")
    ranked, positive = scores[order], order < len(memorized)
    last = np.append(np.flatnonzero(np.diff(ranked)), len(ranked) - 1)  # of each run of ties
    hits = np.cumsum(positive)[last]
    return Curve(
        np.append(np.inf, ranked[last]),
        np.append(0, last + 1 - hits),
        np.append(0, hits),
    )


def auroc(curve: Curve) -> float:
    """Area under the curve: the chance that a memorized prompt outscores another one, ties
    counted half."""
    return float(np.trapezoid(curve.tpr, curve.fpr))


def _accuracies(curve: Curve) -> np.ndarray:
    right = curve.true_positives + curve.false_positives[-1] - curve.false_positives
    return right / (curve.true_positives[-1] + curve.false_positives[-1])


def best_accuracy(curve: Curve) -> tuple[float, float]:
    """(share of prompts called rightly, threshold) at the threshold where that share is largest,
    the highest such. Infinite where calling nothing memorized is best."""
    accuracies = _accuracies(curve)
    best = int(np.argmax(accuracies))
    return float(accuracies[best]), float(curve.thresholds[best])


def accuracy_at(curve: Curve, threshold: float) -> float:
    """Share of prompts called rightly with this threshold."""
    # The last point whose own threshold is not lower calls the same prompts memorized.
    point = int(np.flatnonzero(curve.thresholds >= threshold)[-1])
    return float(_accuracies(curve)[point])


def tpr_at_fpr(curve: Curve, level: float = LEVEL) -> dict[str, float]:
    """The true positive rate at a false positive rate, in the two readings in use: ``below``, at
    the last point whose FPR is less than ``level``; ``nearest``, where |FPR - level| is least.

    Of several points with that FPR the one of highest TPR counts; of two FPRs equally near, the
    lower one.
    """
    fpr, tpr = curve.fpr, curve.tpr
    # Rounded: 0.02 - 0.01 and 0.01 - 0 must be equally far.
    distance = np.round(np.abs(fpr - level), 12)
    nearest = fpr[int(np.argmin(distance))]
    return {
        "below": float(tpr[np.flatnonzero(fpr < level)[-1]]),
        "nearest": float(tpr[np.flatnonzero(fpr == nearest)[-1]]),
    }


def evaluate(memorized: np.ndarray, others: np.ndarray) -> dict[str, float]:
    """``auroc``, ``accuracy`` (at its best threshold), ``tpr_at_1_fpr_below`` and
    ``tpr_at_1_fpr_nearest``."""
    curve = roc(memorized, others)
    readings = {f"tpr_at_1_fpr_{name}": value for name, value in tpr_at_fpr(curve).items()}
    return {"auroc": auroc(curve), "accuracy": best_accuracy(curve)[0], **readings}


def bootstrap(
    memorized: np.ndarray,
    others: np.ndarray,
    *,
    resamples: int = 2000,
    seed: int = 0,
    level: float = 0.95,
) -> Mapping[str, list[float]]:
    """Percentile intervals [low, high] of everything in ``evaluate``; memorized and other prompts
    are resampled apart, with a generator of its own. The order of scores changes nothing.

    The accuracy is that at the threshold which is best for the scores as they are: chosen anew in
    each resample it would rise above the truth. Where no resample differs (an AUROC of 1, say) an
    interval has no width: what other prompts would give is then not known, not certain.
    """
    generator = np.random.default_rng(seed)
    groups = [np.sort(memorized), np.sort(others)]
    _, threshold = best_accuracy(roc(*groups))
    found = []
    for _ in range(resamples):
        drawn = [group[generator.integers(0, len(group), len(group))] for group in groups]
        fixed = {"accuracy": accuracy_at(roc(*drawn), threshold)}
        found.append({**evaluate(*drawn), **fixed})
    ends = ((1 - level) / 2, (1 + level) / 2)
    return {
        name: [float(end) for end in np.quantile([one[name] for one in found], ends)]
        for name in found[0]
    }
