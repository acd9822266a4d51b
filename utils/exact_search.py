"""The same localization as the plain one, decision by decision, with much less computation.

Why the result is the same. Alg. 3 and 4 ask one kind of question, in a fixed order: is the score
of this neuron set on that side of a threshold? A fast evaluation answers it; where it comes within
``margin`` of the threshold, the reference evaluation (``MemorizationScore``) answers instead, and
the margin is at least ten times what batching and replay change (measured on a CPU). Scores that
are written, or become a threshold themselves, are reference evaluations always. Questions asked
ahead of their turn (the next sets of a batch) are only used up to the first answer that the plain
search would have acted on. One thing is not seen: a value that is not finite in a seed row that
nothing looked at, at any set but the unblocked one, whose rows are all looked at, and the initial
and the refined one, whose rows that count are.

Where the time is saved:
- replay: a pass restarts where the first changed value layer acts, and takes what it reads from the
  text alone as it was (``utils.replay``). The reference evaluation restarts from the latest pass of
  the same batch, one set and all seed rows, or from the unblocked one, which is of it too, so that
  it gets the bits that it would compute;
- only the seed rows that count are computed;
- one seed row first: a score is the largest over rows, so one row clearly above the threshold
  settles the question (``ssim.ssim_floor`` bounds what the other rows can change about its score);
- several sets in one batch: of one row each while scores are likely to be above the threshold, of
  all rows where the device gains from larger batches;
- no set is evaluated twice to the same end, and the reference evaluation is made at once where its
  score would have to be written next.
Public: ``Question``, ``Answers``, ``Dropping``, ``RowScores``, ``FastScore``, ``Start``,
``without``, ``dropped_one_by_one``, ``select``, ``refine``, ``localize_exactly``.
"""

import contextlib
import functools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol, overload

import torch

from utils.localization import (
    Outcome,
    Report,
    Search,
    Thresholds,
    candidates,
)
from utils.neuron_sets import NeuronSet, SetKey, set_key, size
from utils.replay import Recording, Replay
from utils.ssim import dynamic_ranges, ssim, ssim_floor

LOOKAHEAD = 16  # sets made ready before their turn
# After a fall-back, neurons without effect land on the threshold itself: where a fast evaluation is
# this often too close to it, which costs a reference evaluation besides, that is made at once.
OFTEN_CLOSE = 0.4
# How often a try of selection stays above the threshold: so low that a CPU, where one row costs a
# third of all, asks the reference at once, which the last try needs anyway.
TRY_ABOVE = 0.2
EXPECTED_NEEDED = 4.0  # neurons that refinement keeps, before anything is known of a prompt


@dataclass(frozen=True)
class Question:
    """A yes-or-no question about a score, which changes its answer at ``borders`` only."""

    holds: Callable[[float], bool]
    borders: tuple[float, ...]
    written: bool = False  # the score of the set that gets a no will be written

    def clear(self, score: float, margin: float) -> bool:
        """Whether a fast evaluation of the score answers it."""
        return all(abs(score - border) > margin for border in self.borders)

    def clear_above(self, floor: float, margin: float) -> bool:
        """Whether a lower bound of the score answers it: it is above all borders."""
        return all(floor - border > margin for border in self.borders)

    @property
    def opposite(self) -> "Question":
        """The question whose yes is this one's no."""
        return Question(lambda score: not self.holds(score), self.borders)


class Answers(Protocol):
    """What a search asks: a prompt's ``FastScore``, or a score function made up for a test."""

    def reference(self, neurons: NeuronSet) -> float:
        """The score that is written."""

    def expect(self, above: float) -> None:
        """Tells how many of the coming scores to expect above their threshold, 0 to 1."""

    def leading(
        self,
        sets: Sequence[NeuronSet],
        question: Question,
        refused: Callable[[int], Sequence[NeuronSet]] | None = None,
    ) -> int:
        """How many of the sets, from the first on, get a yes before the first no. ``refused(i)``
        are the sets that the search will ask about after a no to the i-th, each if all those before
        it get a no as well."""

    def guess(
        self, neurons: NeuronSet, question: Question, ahead: Iterable[Sequence[NeuronSet]] = ()
    ) -> bool:
        """A likely answer. It is certain where the score lies above the question's borders.
        ``ahead``: one set of each of these lists is likely to be guessed about next, one after the
        other."""


class RowScores(Protocol):
    """``MemorizationScore``: a score and which of the kept rows it comes from."""

    loudest: int

    def __call__(self, neurons: NeuronSet) -> float:
        """The reference evaluation; afterwards ``loudest`` is its row."""


class FastScore:
    """Answers questions about one prompt's memorization scores.

    ``passes(sets, rows)`` makes one U-Net pass of len(sets) x len(rows) batch rows, set after set,
    and returns the noise differences, (sets, rows, C, H, W). ``reference`` is the prompt's
    ``MemorizationScore`` over the seed rows ``rows``, ``unblocked`` the n noise differences that it
    compares with, ``recording`` the pass that they come from. ``one_row_share`` is the time of a
    pass over one row by that over all n. ``max_sets`` falls where so many do not fit into memory.
    """

    def __init__(
        self,
        passes: Callable[[Sequence[NeuronSet], Sequence[int]], torch.Tensor],
        reference: RowScores,
        unblocked: torch.Tensor,
        rows: Sequence[int],
        replay: Replay,
        recording: Recording,
        *,
        margin: float,
        max_sets: int,
        one_row_share: float,
    ) -> None:
        self._passes = passes
        self._reference = reference
        self._all_rows = len(unblocked)
        self._rows = list(rows)
        self._unblocked = unblocked[self._rows]
        self._ranges = dynamic_ranges(self._unblocked)
        self._replay = replay
        self._halves = recording.halves
        self._margin = margin
        self.max_sets = max_sets
        further_row = max(0.0, 1 - one_row_share) / max(1, self._all_rows - 1)
        others = further_row * (len(self._rows) - 1)
        self._one_row_share = one_row_share / (one_row_share + others)  # by one over the kept rows
        self._further_row = further_row / one_row_share  # in a batch, by a pass over one row
        self._sets = 1  # sets per batch: grows while answers are yes, shrinks at a no
        self._above = 1.0  # how often a single row settled the question lately
        self._close = 0.0  # how often a fast evaluation over all rows left it open lately
        # Indices into rows: whose score was the largest in some evaluation, the latest one last.
        self._suspects: list[int] = []
        self._witnesses: list[int] = []  # of them, those of the evaluations that a search asked for
        # What passes restart from: the pass with nothing off, or the latest recorded one; reference
        # evaluations from the latest of their own kind, over one set and all seed rows.
        self._unchanged = _Base([[] for _ in range(replay.layers)], recording, self._rows)
        self._base = self._whole = self._unchanged
        self._earliest = replay.layers  # value layer that a pass since the last reference began at
        self._restarts: dict[SetKey, _Base] = {}  # those that the last pass over all rows made
        # What is known of the sets asked about: reference scores, fast ones, rows' lower bounds.
        self._written: dict[SetKey, float] = {}
        self._loudest: dict[SetKey, int] = {}
        self._scores: dict[SetKey, float] = {}
        self._floors: dict[SetKey, dict[int, float]] = {}

    def reference(self, neurons: NeuronSet) -> float:
        """The reference evaluation; later passes restart from it where they can, and later guesses
        look at the row that its score comes from."""
        score = self._whole_pass(neurons)
        row = self._loudest[set_key(neurons)]
        if row not in self._witnesses:
            self._witnesses.append(row)
        return score

    def _whole_pass(self, neurons: NeuronSet) -> float:
        """The reference evaluation; later passes restart from it where they can, and its row is
        looked at first."""
        if self._known_by_reference(neurons):
            return self._written[set_key(neurons)]
        base, begins = self._start(self._whole, [neurons])
        every_row = range(self._all_rows)
        with (
            self._replay.replaying(base.recording, begins, every_row),
            self._replay.recording(rows=self._all_rows, halves=self._halves) as recording,
        ):
            self._write(neurons)
        recording.complete(base.recording, every_row)
        self._base = self._whole = _Base(neurons, recording, self._rows)
        self._earliest = self._replay.layers
        self._suspect(self._loudest[set_key(neurons)])
        return self._written[set_key(neurons)]

    def _known_by_reference(self, neurons: NeuronSet) -> bool:
        key = set_key(neurons)
        if not any(neurons) and key not in self._written:
            self._write(neurons)  # needs no pass
        return key in self._written

    def _write(self, neurons: NeuronSet) -> None:
        key = set_key(neurons)
        self._written[key] = self._reference(neurons)
        self._loudest[key] = self._reference.loudest

    def expect(self, above: float) -> None:
        """How likely a single row is to settle the coming questions, to begin with."""
        self._above = above

    def leading(
        self,
        sets: Sequence[NeuronSet],
        question: Question,
        refused: Callable[[int], Sequence[NeuronSet]] | None = None,
    ) -> int:
        """How many of the sets, from the first on, get a yes before the first no."""
        leads_on = question.holds(math.inf)  # a single row can only settle what leads on
        for position, neurons in enumerate(sets):
            answer = self._known(neurons, question)
            looked_at = bool(self._floors.get(set_key(neurons)))
            if answer is None and not looked_at and self._one_row_first():
                after = sets[position + 1 :] if leads_on else refused(position) if refused else ()
                self._look_at_one_row([neurons, *after[: self._single_rows() - 1]])
                answer = self._known(neurons, question)
                self._note(settled=answer is not None)
            if answer is None:
                self._look_at_all_rows(sets[position:], question, grow=position > 0)
                answer = self._known(neurons, question)
                self._close += 0.2 * ((answer is None) - self._close)
            if answer is None:
                answer = question.holds(self._whole_pass(neurons))
            if not answer:
                self._sets = max(1, self._sets // 2)
                return position
            self._base = self._restarts.get(set_key(neurons), self._base)
        return len(sets)

    def guess(
        self, neurons: NeuronSet, question: Question, ahead: Iterable[Sequence[NeuronSet]] = ()
    ) -> bool:
        """The answer that the witnesses give: the rows that the scores of the reference evaluations
        come from which the search asked for. It is certain where they lie above the question's
        borders, and where it would be close. Other rows have no say, whatever was looked at before
        its turn: what is found must not depend on the device's pace, and does not but where the
        rounding of a batch carries a row across the far end of the margin."""
        if not any(neurons):
            return question.holds(self._whole_pass(neurons))  # needs no pass
        floors = self._floors.setdefault(set_key(neurons), {})
        missing = [row for row in self._witnesses if row not in floors]
        if missing:
            self._look_at_rows([neurons, *self._worth_a_look(ahead, missing)], missing)
        highest = max((floors[row] for row in self._witnesses), default=-math.inf)
        if math.isfinite(highest) and question.clear(highest, self._margin):
            return question.holds(highest)
        return self.leading([neurons], question) == 1

    def _known(self, neurons: NeuronSet, question: Question) -> bool | None:
        """The answer, if what was evaluated before gives it."""
        key = set_key(neurons)
        if self._known_by_reference(neurons):
            return question.holds(self._written[key])
        if key in self._scores and question.clear(self._scores[key], self._margin):
            return question.holds(self._scores[key])
        floor = max(self._floors.get(key, {}).values(), default=-math.inf)
        if question.clear_above(floor, self._margin):
            return question.holds(floor)
        return None

    def _one_row_first(self) -> bool:
        """Whether the pass over all rows that a settled question saves outweighs the pass over one
        row that an open one costs."""
        return self._above > self._one_row_share

    def _suspect(self, row: int) -> None:
        if row in self._suspects:
            self._suspects.remove(row)
        self._suspects.append(row)

    def _note(self, *, settled: bool) -> None:
        self._above += 0.2 * (settled - self._above)

    def _single_rows(self) -> int:
        """How many sets to look at in one row each: one more pays while all before it are likelier
        to be settled by their rows than its own row costs."""
        most = len(self._rows) * self.max_sets
        count = 1
        while count < most and self._above**count > self._further_row:
            count += 1
        return count

    def _worth_a_look(
        self, ahead: Iterable[Sequence[NeuronSet]], rows: Sequence[int]
    ) -> list[NeuronSet]:
        """Sets to look at in a pass over these rows before they are guessed about: their rows cost
        less in it than the pass that each is likely to save."""
        most = len(self._rows) * self.max_sets // len(rows) - 1
        beside = len(rows) * self._further_row
        alone = 1 + (len(rows) - 1) * self._further_row
        chosen: list[NeuronSet] = []
        for sets in ahead:
            if len(chosen) + len(sets) > most or beside * len(sets) > alone:
                break
            chosen += [
                neurons
                for neurons in sets
                if not self._known_by_reference(neurons)
                and not self._floors.get(set_key(neurons), {}).keys() >= set(rows)
            ]
        return chosen

    def _look_at_one_row(self, sets: Sequence[NeuronSet]) -> None:
        """Lower bounds of the sets' scores, from one seed row."""
        self._look_at_rows(sets, self._suspects[-1:] or [0])

    def _look_at_rows(self, sets: Sequence[NeuronSet], rows: Sequence[int]) -> None:
        """Lower bounds of the sets' scores from some of the rows."""
        made = self._pass(sets, rows, record=False)
        if made is None:
            self._look_at_rows(sets[: len(sets) // 2], rows)
            return
        differences, _ = made
        unblocked = self._unblocked[list(rows)].expand_as(differences)
        floors = ssim_floor(unblocked, differences, self._ranges).tolist()  # sets x rows
        for neurons, of_set in zip(sets, floors, strict=True):
            known = self._floors.setdefault(set_key(neurons), {})
            known.update(zip(rows, of_set, strict=True))
            if not all(map(math.isfinite, known.values())):  # no row may settle such a set
                known.update(dict.fromkeys(range(len(self._rows)), -math.inf))

    def _look_at_all_rows(
        self, sets: Sequence[NeuronSet], question: Question, *, grow: bool
    ) -> None:
        """The score of the first set, and of some of the next ones where that pays."""
        if grow:
            self._sets = min(self.max_sets, 2 * self._sets)
        # Over the same rows the reference evaluation is hardly slower, and leaves nothing open.
        reference_pays = len(self._rows) == self._all_rows or self._close > OFTEN_CLOSE
        if question.written or (self._sets == 1 and reference_pays):
            score = self._whole_pass(sets[0])
            self._note(settled=question.clear_above(score, self._margin))
            return
        batch = sets[: self._sets]
        rows = range(len(self._rows))
        # Refinement goes backwards twice: what a layer's passes of the second time restart from is
        # what the first time left, so that hardly any more recordings are needed.
        _, begins = self._start(self._base, batch)
        made = self._pass(batch, rows, record=begins < self._earliest)
        if made is None:
            self._look_at_all_rows(sets, question, grow=False)
            return
        differences, recording = made
        per_row = ssim(self._unblocked.expand_as(differences), differences)  # (sets, rows)
        self._suspect(int(per_row[0].argmax()))
        for neurons, score in zip(batch, per_row.amax(dim=1).tolist(), strict=True):
            self._scores[set_key(neurons)] = score
        if recording is not None:
            self._earliest = begins
            starts = range(0, recording.rows, len(rows))
            self._restarts = {
                set_key(neurons): _Base(neurons, recording, range(start, start + len(rows)))
                for neurons, start in zip(batch, starts, strict=True)
            }
        self._note(settled=question.clear_above(self._scores[set_key(sets[0])], self._margin))

    def _pass(
        self, sets: Sequence[NeuronSet], rows: Sequence[int], *, record: bool
    ) -> tuple[torch.Tensor, Recording | None] | None:
        """A pass over some of the kept rows: its noise differences and, if asked for, its
        recording. None if it does not fit into memory: no pass is larger than half of it from now
        on. Nothing of the failed pass is held then."""
        base, begins = self._start(self._base, sets)
        batch = base.batch(len(sets), rows)
        recording: Recording | None = None
        try:
            with contextlib.ExitStack() as contexts:
                contexts.enter_context(self._replay.replaying(base.recording, begins, batch))
                if record:
                    recording = contexts.enter_context(
                        self._replay.recording(rows=len(batch), halves=self._halves)
                    )
                differences = self._passes(sets, [self._rows[row] for row in rows])
            if recording is not None:
                recording.complete(base.recording, batch)
            return differences, recording
        except torch.OutOfMemoryError:
            if len(sets) == 1:
                raise
        del recording
        self.max_sets = max(1, len(sets) * len(rows) // 2 // len(self._rows))
        self._sets = min(self._sets, self.max_sets)
        self._restarts = {}
        torch.cuda.empty_cache()
        return None

    def _start(self, latest: "_Base", sets: Sequence[NeuronSet]) -> tuple["_Base", int]:
        """Which recorded pass to restart from, the latest or the one with nothing off, and at which
        value layer: the first in which one of the sets differs from the recorded one, as late as
        can be."""
        starts = [
            (base, min(_first_difference(base.neurons, neurons) for neurons in sets))
            for base in (latest, self._unchanged)
        ]
        return max(starts, key=lambda start: start[1])


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


@dataclass(frozen=True)
class Start:
    """Where refinement begins: the initial set in refinement's order, its score, whether selection
    fell back, and what is asked about a smaller set."""

    initial: NeuronSet
    score: float
    fell_back: bool
    droppable: Question

    def outcome(self, refined: NeuronSet, score: Answers) -> Outcome:
        """The prompt's outcome, with the refined set's reference score."""
        return Outcome(
            initial=[sorted(layer) for layer in self.initial],
            initial_score=self.score,
            refined=[sorted(layer) for layer in refined],
            refined_score=score.reference(refined),
            fell_back=self.fell_back,
        )


# (set, items to give back in order, each (layer, neurons), whom to ask, what) -> set without those
# that the score does not need. ``report`` hears how many neurons are left before evaluations.
Dropping = Callable[
    [NeuronSet, Sequence[tuple[int, Sequence[int]]], Answers, Question, Callable[[int], None]],
    NeuronSet,
]


def localize_exactly(
    activations: Sequence[torch.Tensor],
    z: Sequence[torch.Tensor],
    score: Answers,
    *,
    search: Search,
    thresholds: Thresholds,
    report: Report = lambda stage, left: None,
) -> Outcome:
    """What ``localize`` returns, from fewer and smaller U-Net passes. Raises UndecidedError like
    it."""
    start = select(activations, z, score, search=search, thresholds=thresholds, report=report)
    return start.outcome(refine(start, score, dropped_one_by_one, report), score)


def select(
    activations: Sequence[torch.Tensor],
    z: Sequence[torch.Tensor],
    score: Answers,
    *,
    search: Search,
    thresholds: Thresholds,
    report: Report,
) -> Start:
    """Alg. 3, and the threshold that refinement gets from it."""
    initial, fell_back = _initial_selection(
        activations, z, score, search, thresholds.initial, report
    )
    reached = score.reference(initial)
    if search.relative is None:
        threshold = reached if fell_back else thresholds.refinement
        droppable = Question(lambda score: score < threshold, (threshold,))
    else:
        scale, allowed = abs(reached) + 1e-9, search.relative
        droppable = Question(
            lambda score: abs(score - reached) / scale < allowed,
            (reached - allowed * scale, reached + allowed * scale),
        )
    return Start(initial, reached, fell_back, droppable)


class _Made(Sequence[NeuronSet]):
    """Sets that are made when they are asked for, which most of those made ready never are."""

    def __init__(self, make: Callable[[int], NeuronSet], tries: range) -> None:
        self._make, self._tries = make, tries

    def __len__(self) -> int:
        return len(self._tries)

    @overload
    def __getitem__(self, place: int) -> NeuronSet: ...
    @overload
    def __getitem__(self, place: slice) -> "_Made": ...
    def __getitem__(self, place: int | slice) -> "NeuronSet | _Made":
        if isinstance(place, slice):
            return _Made(self._make, self._tries[place])
        return self._make(self._tries[place])


def _initial_selection(
    activations: Sequence[torch.Tensor],
    z: Sequence[torch.Tensor],
    score: Answers,
    search: Search,
    threshold: float,
    report: Report,
) -> tuple[NeuronSet, bool]:
    """Alg. 3: (candidates in refinement's order, whether it fell back)."""
    still_above = Question(lambda reached: reached > threshold, (threshold,), written=True)
    widest = max(len(a) for a in activations)
    made = functools.cache(lambda j: candidates(activations, z, search.theta(j), search.k(j)))
    score.expect(above=TRY_ABOVE)
    first = 0
    while True:
        last = first
        while last < first + LOOKAHEAD - 1 and not search.is_last(last, widest):
            last += 1
        tries = _Made(made, range(first, last + 1))
        report("selection", size(tries[0]))
        above = score.leading(tries, still_above)
        if above < len(tries):
            return tries[above], False
        if search.is_last(last, widest):
            return tries[-1], True
        first = last + 1


def refine(start: Start, score: Answers, dropped: Dropping, report: Report) -> NeuronSet:
    """Alg. 4: gives back whole layers, then single neurons, last layer first."""
    kept = start.initial
    backwards = list(reversed(range(len(kept))))
    layers = [(layer, kept[layer]) for layer in backwards if kept[layer]]
    score.expect(above=0.5)
    kept = dropped(kept, layers, score, start.droppable, lambda left: report("layers", left))
    neurons = [(layer, [i]) for layer in backwards for i in kept[layer]]
    score.expect(above=min(0.8, EXPECTED_NEEDED / max(1, len(neurons))))
    return dropped(kept, neurons, score, start.droppable, lambda left: report("neurons", left))


def without(kept: NeuronSet, items: Sequence[tuple[int, Sequence[int]]]) -> NeuronSet:
    """A set with these items, (layer, neurons), given back."""
    rest = [list(columns) for columns in kept]
    for layer, neurons in items:
        rest[layer] = [index for index in rest[layer] if index not in neurons]
    return rest


def dropped_one_by_one(
    kept: NeuronSet,
    items: Sequence[tuple[int, Sequence[int]]],
    score: Answers,
    question: Question,
    report: Callable[[int], None],
) -> NeuronSet:
    """Gives back each item that the score does not need, in order.

    The sets asked about are nested, each without one item more; the item at the first no stays, and
    the question goes on behind it.
    """
    position = 0
    while position < len(items):
        report(size(kept))
        ahead = items[position : position + LOOKAHEAD]
        nested = [without(kept, ahead[: count + 1]) for count in range(len(ahead))]

        def refused(
            count: int, kept: NeuronSet = kept, position: int = position
        ) -> list[NeuronSet]:
            """What is asked about while nothing more can be given back than the first items."""
            begin = position + count
            left = without(kept, items[position:begin])
            return [without(left, [item]) for item in items[begin + 1 : begin + LOOKAHEAD]]

        passed = score.leading(nested, question, refused)
        if passed:
            kept = nested[passed - 1]
        position += passed if passed == len(nested) else passed + 1
    return kept
