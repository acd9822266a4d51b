"""The same localization as the plain one, decision by decision, with much less computation.

Why the result is the same. Alg. 3 and 4 ask one kind of question, in a fixed order: is the score
of this neuron set on that side of a threshold? A fast evaluation answers it; where it comes within
``margin`` of the threshold, the reference evaluation (``MemorizationScore``) answers instead, and
the margin is at least ten times what batching and replay change. Scores that are written, or
become a threshold themselves, are reference evaluations always. Questions asked ahead of their
turn (the next nested sets of a batch) are only used up to the first answer that the plain search
would have acted on.

Where the time is saved:
- replay: a pass restarts where the first changed value layer acts (``utils.replay``);
- only the seed rows that count are computed;
- one seed row first: a score is the largest over rows, so one row clearly above the threshold
settles
  the question (``ssim.ssim_floor`` bounds what the other rows can change about its score);
- several sets in one batch, where the device gains from larger batches.
Public: ``FastScore``, ``localize_exactly``.
"""

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from utils.localization import (
    Outcome,
    Report,
    Score,
    Search,
    Thresholds,
    candidates,
)
from utils.neuron_sets import NeuronSet, size
from utils.replay import Recording, Replay
from utils.ssim import dynamic_ranges, ssim, ssim_floor

LOOKAHEAD = 16  # sets made ready before their turn


@dataclass(frozen=True)
class Question:
    """A yes-or-no question about a score, which changes its answer at ``borders`` only."""

    holds: Callable[[float], bool]
    borders: tuple[float, ...]

    def clear(self, score: float, margin: float) -> bool:
        """Whether a fast evaluation of the score answers it."""
        return all(abs(score - border) > margin for border in self.borders)

    def clear_above(self, floor: float, margin: float) -> bool:
        """Whether a lower bound of the score answers it: it is above all borders."""
        return all(floor - border > margin for border in self.borders)


class FastScore:
    """Answers questions about one prompt's memorization scores.

    ``passes(sets, rows)`` makes one U-Net pass of len(sets) x len(rows) batch rows, set after set,
    and returns the noise differences, (sets, rows, C, H, W). ``reference`` is the prompt's
    ``MemorizationScore`` over the seed rows ``rows``, ``unblocked`` the n noise differences that it
    compares with.
    """

    def __init__(
        self,
        passes: Callable[[Sequence[NeuronSet], Sequence[int]], torch.Tensor],
        reference: Score,
        unblocked: torch.Tensor,
        rows: Sequence[int],
        replay: Replay,
        *,
        halves: int,
        margin: float,
        max_sets: int,
    ) -> None:
        self._passes = passes
        self._reference = reference
        self._all_rows = len(unblocked)
        self._rows = list(rows)
        self._unblocked = unblocked[self._rows]
        self._ranges = dynamic_ranges(self._unblocked)
        self._replay = replay
        self._halves = halves
        self._margin = margin
        self._max_sets = max_sets
        self._sets = 1  # sets per batch: grows while answers are yes, shrinks at a no
        self._base: _Base | None = None
        self._loudest = 0  # index into rows: whose score was the largest lately
        self._above = 1.0  # how often a single row settled the question lately

    def reference(self, neurons: NeuronSet) -> float:
        """The reference evaluation; later passes restart from it where they can."""
        with self._replay.recording(rows=self._all_rows, halves=self._halves) as recording:
            score = self._reference(neurons)
        if recording.outputs:  # empty where the score was known already
            self._base = _Base(neurons, recording, self._rows)
        return score

    def expect(self, above: float) -> None:
        """How likely a single row is to settle the coming questions, to begin with."""
        self._above = above

    def leading(self, sets: Sequence[NeuronSet], question: Question) -> int:
        """How many of the sets, from the first on, get a yes before the first no."""
        passed = 0
        while passed < len(sets):
            if self._one_row_first():
                floor = self._floor(sets[passed])
                if question.clear_above(floor, self._margin):
                    self._note(settled=True)
                    if not question.holds(floor):
                        return passed
                    passed += 1
                    continue
            batch = sets[passed : passed + self._sets]
            scores, recording = self._scores(batch)
            for position, (neurons, score) in enumerate(zip(batch, scores, strict=True)):
                self._note(settled=question.clear_above(score, self._margin))
                if not question.clear(score, self._margin):
                    score = self._reference(neurons)
                if not question.holds(score):
                    self._sets = max(1, self._sets // 2)
                    return passed
                passed += 1
                first = position * len(self._rows)
                self._base = _Base(neurons, recording, range(first, first + len(self._rows)))
            self._sets = min(self._max_sets, 2 * self._sets)
        return passed

    def _one_row_first(self) -> bool:
        """Whether the rows that a settled question saves outweigh the row that an open one
        costs."""
        return self._above * (len(self._rows) - 1) > 1.5

    def _note(self, *, settled: bool) -> None:
        self._above += 0.2 * (settled - self._above)

    def _floor(self, neurons: NeuronSet) -> float:
        """A lower bound of the score, from one seed row."""
        row = self._loudest
        with self._restarted([neurons], [row]):
            difference = self._passes([neurons], [self._rows[row]])[0]
        return ssim_floor(self._unblocked[row : row + 1], difference, self._ranges).item()

    def _scores(self, sets: Sequence[NeuronSet]) -> tuple[list[float], Recording]:
        """The scores of all sets from one pass, and the pass itself."""
        rows = range(len(self._rows))
        everything = self._replay.recording(rows=len(sets) * len(rows), halves=self._halves)
        with self._restarted(sets, rows), everything as recording:
            differences = self._passes(sets, self._rows)
        if self._base is not None:
            recording.complete(self._base.recording, self._base.batch(len(sets), rows))
        per_row = ssim(self._unblocked.expand_as(differences), differences)  # (sets, rows)
        self._loudest = int(per_row[0].argmax())
        return per_row.amax(dim=1).tolist(), recording

    def _restarted(
        self, sets: Sequence[NeuronSet], rows: Sequence[int]
    ) -> contextlib.AbstractContextManager[None]:
        """Lets the pass in the block start at the first value layer in which a set differs from the
        recorded one."""
        base = self._base
        if base is None:
            return contextlib.nullcontext()
        layer = min(_first_difference(base.neurons, neurons) for neurons in sets)
        return self._replay.replaying(base.recording, layer, base.batch(len(sets), rows))


@dataclass(frozen=True)
class _Base:
    """A recorded pass that others restart from: its set, and where each kept row is in its
    batch."""

    neurons: NeuronSet
    recording: Recording
    rows: Sequence[int]

    def batch(self, sets: int, rows: Sequence[int]) -> list[int]:
        """The recorded rows that a batch of so many sets over these kept rows stands for."""
        return [self.rows[row] for _ in range(sets) for row in rows]


def _first_difference(first: NeuronSet, second: NeuronSet) -> int:
    """The first value layer in which two sets differ; the last one if none does."""
    for layer, (a, b) in enumerate(zip(first, second, strict=True)):
        if set(a) != set(b):
            return layer
    return len(first) - 1


def localize_exactly(
    activations: Sequence[torch.Tensor],
    z: Sequence[torch.Tensor],
    score: FastScore,
    *,
    search: Search,
    thresholds: Thresholds,
    report: Report = lambda stage, left: None,
) -> Outcome:
    """What ``localize`` returns, from fewer and smaller U-Net passes. Raises UndecidedError like
    it."""
    initial, fell_back = _initial_selection(
        activations, z, score, search, thresholds.initial, report
    )
    initial_score = score.reference(initial)
    threshold = initial_score if fell_back else thresholds.refinement
    if search.relative is None:
        question = Question(lambda reached: reached < threshold, (threshold,))
    else:
        scale, allowed = abs(initial_score) + 1e-9, search.relative
        question = Question(
            lambda reached: abs(reached - initial_score) / scale < allowed,
            (initial_score - allowed * scale, initial_score + allowed * scale),
        )

    kept = initial
    layers = [(layer, kept[layer]) for layer in reversed(range(len(kept))) if kept[layer]]
    score.expect(above=0.5)
    kept = _dropped(kept, layers, score, question, lambda left: report("layers", left))
    neurons = [(layer, [i]) for layer in reversed(range(len(kept))) for i in kept[layer]]
    score.expect(above=0.2)
    kept = _dropped(kept, neurons, score, question, lambda left: report("neurons", left))
    return Outcome(
        initial=[sorted(layer) for layer in initial],
        initial_score=initial_score,
        refined=[sorted(layer) for layer in kept],
        refined_score=score.reference(kept),
        fell_back=fell_back,
    )


def _initial_selection(
    activations: Sequence[torch.Tensor],
    z: Sequence[torch.Tensor],
    score: FastScore,
    search: Search,
    threshold: float,
    report: Report,
) -> tuple[NeuronSet, bool]:
    """Alg. 3: (candidates in refinement's order, whether it fell back)."""
    still_above = Question(lambda reached: reached > threshold, (threshold,))
    widest = max(len(a) for a in activations)
    score.expect(above=1.0)
    first = 0
    while True:
        last = first
        while last < first + LOOKAHEAD - 1 and not search.is_last(last, widest):
            last += 1
        tries = [
            candidates(activations, z, search.theta(j), search.k(j)) for j in range(first, last + 1)
        ]
        report("selection", size(tries[0]))
        above = score.leading(tries, still_above)
        if above < len(tries):
            return tries[above], False
        if search.is_last(last, widest):
            return tries[-1], True
        first = last + 1


def _dropped(
    kept: NeuronSet,
    items: Sequence[tuple[int, Sequence[int]]],
    score: FastScore,
    question: Question,
    report: Callable[[int], None],
) -> NeuronSet:
    """Alg. 4: gives back each item, (layer, neurons), that the score does not need, in order.

    The sets asked about are nested, each without one item more; the item at the first no stays, and
    the question goes on behind it.
    """
    position = 0
    while position < len(items):
        report(size(kept))
        nested: list[NeuronSet] = []
        for layer, neurons in items[position : position + LOOKAHEAD]:
            rest = [list(columns) for columns in (nested[-1] if nested else kept)]
            rest[layer] = [index for index in rest[layer] if index not in neurons]
            nested.append(rest)
        passed = score.leading(nested, question)
        if passed:
            kept = nested[passed - 1]
        position += passed if passed == len(nested) else passed + 1
    return kept
