"""Localization of the neurons that make a prompt memorized (paper Alg. 2 to 4), one set at a time.

This is the plain, sequential form that reads like the paper: every decision is a reference
evaluation. It knows nothing of the model: a ``Score`` maps a neuron set to the memorization score
with that set deactivated.
Public: ``Search``, ``Thresholds``, ``Outcome``, ``UndecidedError``, ``kept_rows``, ``candidates``,
``localize``.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from utils.neuron_sets import NeuronSet, size
from utils.thresholds import pairs

if TYPE_CHECKING:
    import torch

Score = Callable[[NeuronSet], float]
Report = Callable[[str, int], None]  # (stage, candidates left)


@dataclass(frozen=True)
class Search:
    """The search's settings; defaults are the paper's (Sec. 3.2, B.3)."""

    initial_theta: float = 5.0
    theta_step: float = 0.25
    min_theta: float = 1.0
    initial_k: int = 0
    use_theta: bool = True
    use_top_k: bool = True
    relative: float | None = None  # refinement by relative change of the score instead

    def theta(self, j: int) -> float:
        """theta of the j-th try; computed from j, so that no rounding adds up."""
        return self.initial_theta - j * self.theta_step if self.use_theta else math.inf

    def k(self, j: int) -> int:
        """Top neurons per layer of the j-th try."""
        return self.initial_k + j if self.use_top_k else 0

    def is_last(self, j: int, widest: int) -> bool:
        """Whether no further try follows the j-th: theta would reach its minimum, or k would exceed
        the widest layer."""
        theta_ends = self.use_theta and self.theta(j + 1) <= self.min_theta
        k_ends = self.use_top_k and self.k(j + 1) > widest
        return theta_ends or k_ends


@dataclass(frozen=True)
class Thresholds:
    """tau (paper Sec. 3.1), once for each of its three uses."""

    pairwise: float
    initial: float
    refinement: float


@dataclass(frozen=True)
class Outcome:
    """What localization found for a memorized prompt."""

    initial: NeuronSet
    initial_score: float
    refined: NeuronSet
    refined_score: float
    fell_back: bool
    check_failed: bool = False  # --search bisect: its result failed its check, so exact refined it


class UndecidedError(ArithmeticError):
    """A noise difference or score is not finite: the prompt can be called neither memorized nor
    not."""


def kept_rows(pairwise: "torch.Tensor", rows: int, threshold: float) -> list[int]:
    """Seed rows whose best pairwise score is strictly above the threshold; ``pairwise`` has one
    score for each of ``thresholds.pairs(rows)``. Raises UndecidedError for a score that is not
    finite."""
    best = [-math.inf] * rows
    for (i, j), score in zip(pairs(rows), pairwise.tolist(), strict=True):
        if not math.isfinite(score):
            raise UndecidedError("a pairwise score is not finite")
        best[i], best[j] = max(best[i], score), max(best[j], score)
    return [row for row in range(rows) if best[row] > threshold]


def candidates(
    activations: Sequence["torch.Tensor"], z: Sequence["torch.Tensor"], theta: float, k: int
) -> NeuronSet:
    """Alg. 2: per layer the neurons with z > theta and the k of largest activation.

    In refinement's order: by z alone, rising index; then the top ones, falling activation (ties:
    the lower index first). A neuron in both groups counts as a top one.
    """
    import torch

    chosen = []
    for a, z_layer in zip(activations, z, strict=True):
        # torch.topk promises no order among equals; a stable sort does.
        top = torch.sort(a, descending=True, stable=True).indices[:k].tolist()
        above = torch.nonzero(z_layer > theta).flatten().tolist()
        chosen.append([index for index in above if index not in top] + top)
    return chosen


def _initial_selection(
    activations: Sequence["torch.Tensor"],
    z: Sequence["torch.Tensor"],
    score: Score,
    search: Search,
    threshold: float,
    report: Report,
) -> tuple[NeuronSet, float, bool]:
    """Alg. 3: lowers theta and raises k until the score is at or below the threshold.
    Returns (candidates in refinement's order, their score, whether it fell back)."""
    widest = max(len(a) for a in activations)
    j = 0
    while True:
        tried = candidates(activations, z, search.theta(j), search.k(j))
        report("selection", size(tried))
        reached = score(tried)
        if reached <= threshold:
            return tried, reached, False
        if search.is_last(j, widest):
            return tried, reached, True
        j += 1


def _refine(
    initial: NeuronSet,
    initial_score: float,
    score: Score,
    search: Search,
    threshold: float,
    report: Report,
) -> NeuronSet:
    """Alg. 4: re-activates whole layers, then single neurons, last layer first, and drops what the
    score does not need. Every decision builds on the ones before it."""

    def droppable(remaining: NeuronSet) -> bool:
        reached = score(remaining)
        if search.relative is not None:
            return abs(reached - initial_score) / (abs(initial_score) + 1e-9) < search.relative
        return reached < threshold

    kept = [list(layer) for layer in initial]
    for layer in reversed(range(len(kept))):
        if kept[layer]:
            report("layers", size(kept))
            without = [[] if other == layer else kept[other] for other in range(len(kept))]
            if droppable(without):
                kept = without
    for layer in reversed(range(len(kept))):
        for neuron in list(kept[layer]):
            report("neurons", size(kept))
            without = [list(other) for other in kept]
            without[layer].remove(neuron)
            if droppable(without):
                kept = without
    return kept


def localize(
    activations: Sequence["torch.Tensor"],
    z: Sequence["torch.Tensor"],
    score: Score,
    *,
    search: Search,
    thresholds: Thresholds,
    report: Report = lambda stage, left: None,
) -> Outcome:
    """Initial selection and refinement of one memorized prompt.

    ``score`` must return the same float for the same set; it raises UndecidedError for a score
    that is not finite, which passes through. ``report`` hears of every evaluation before it is
    made.
    """
    initial, initial_score, fell_back = _initial_selection(
        activations, z, score, search, thresholds.initial, report
    )
    # After the fall-back the threshold was never reached; what was reached replaces it (Alg. 3).
    threshold = initial_score if fell_back else thresholds.refinement
    refined = _refine(initial, initial_score, score, search, threshold, report)
    return Outcome(
        initial=[sorted(layer) for layer in initial],
        initial_score=initial_score,
        refined=[sorted(layer) for layer in refined],
        refined_score=score(refined),
        fell_back=fell_back,
    )
