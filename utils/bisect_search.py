"""Localization for long candidate lists: refinement by group testing, checked at its end.

Where a larger blocked set never raises the score, a group of neurons can be given back at once if
the score stays below the threshold without all of them, and the first of a group that cannot is
found by halving, and the check asks for each kept neuron once more: about k (log2(n / k) + 2)
evaluations for k needed neurons of n candidates, fewer than n where less than a sixth is needed.
Under that assumption the result is that of the plain search. It need not hold, so the result is
checked: the score is below the threshold, and above it without any one of the kept neurons. Where
the check fails, the exact search refines the prompt instead, and the outcome says so. A result that
passes is a set as Alg. 4 wants it, but where the assumption fails it may be another one than that
of the plain search.

Selection, questions, evaluations and margins are those of ``utils.exact_search``.
Public: ``localize_by_bisection``.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from utils.exact_search import Answers, Question, Start, dropped_one_by_one, refine, select, without
from utils.localization import Outcome, Report, Search, Thresholds
from utils.neuron_sets import NeuronSet, size

ROUNDS = 8  # of guessing, before the check decides


def localize_by_bisection(
    activations: Sequence[torch.Tensor],
    z: Sequence[torch.Tensor],
    score: Answers,
    *,
    search: Search,
    thresholds: Thresholds,
    report: Report = lambda stage, left: None,
) -> Outcome:
    """What ``localize`` returns where a larger blocked set never raises the score. Elsewhere either
    that (``check_failed`` is set), or another set that passes the check. Raises UndecidedError
    like it."""
    start = select(activations, z, score, search=search, thresholds=thresholds, report=report)
    refined = _refined_in_groups(start, score, report)
    if refined is not None:
        report("check", size(refined))
        if _all_needed(start, refined, score):
            return start.outcome(refined, score)
    refined = refine(start, score, dropped_one_by_one, report)
    return replace(start.outcome(refined, score), check_failed=True)


def _refined_in_groups(start: Start, score: Answers, report: Report) -> NeuronSet | None:
    """Gives back what the score does not need, if a larger set never scores higher; None where the
    score does not allow what any of the rounds gave back.

    Guesses are enough on the way: a no is certain (to an absolute threshold), and a yes to the set
    that is left at the end means that all others were right. After a no to that one, the row that
    it comes from is among those that the next round looks at. Before the first round it is that of
    the initial set.
    """
    for _ in range(ROUNDS):
        refined = refine(start, score, _group_testing, report)
        given_back = size(refined) < size(start.initial)
        if not given_back or start.droppable.holds(score.reference(refined)):
            return refined
    return None


def _all_needed(start: Start, refined: NeuronSet, score: Answers) -> bool:
    """Whether the score does not allow that any kept neuron is given back besides."""
    singles = [(layer, [i]) for layer, columns in enumerate(refined) for i in columns]
    score.expect(above=1.0)
    fewer = [without(refined, [single]) for single in reversed(singles)]
    return score.leading(fewer, start.droppable.opposite) == len(fewer)


def _group_testing(
    kept: NeuronSet,
    items: Sequence[tuple[int, Sequence[int]]],
    score: Answers,
    question: Question,
    report: Callable[[int], None],
) -> NeuronSet:
    """What is left of ``kept`` when a group test of the items is done."""
    test = _GroupTest(kept, items)
    while not test.done:
        report(size(test.kept))
        test = test.after(score.guess(test.asked, question, test.ahead()))
    return test.kept


@dataclass(frozen=True)
class _GroupTest:
    """A group test between two questions. Each asks whether a set without the next items is
    allowed: a yes to a whole group gives all of it back; after a no, the first item that has to
    stay is found by halving, and those before it are given back. A group is as long as the mean
    distance of needed items so far, at first the whole list."""

    kept: NeuronSet
    items: Sequence[tuple[int, Sequence[int]]]
    position: int = 0  # of the next item
    needed: int = 0
    allowed: int = 0  # items from there on of which is known that they may be given back together,
    refused: int | None = None  # and that they may not; None: nothing is, the group is asked about

    @property
    def done(self) -> bool:
        """Whether no item is left to ask about."""
        return self.position == len(self.items)

    @property
    def asked(self) -> NeuronSet:
        """The set that is asked about."""
        return self._without_next(self._count)

    def after(self, answer: bool) -> "_GroupTest":
        """The test after the answer."""
        count = self._count
        if self.refused is None and answer:
            return _GroupTest(
                self._without_next(count), self.items, self.position + count, self.needed
            )
        halved = replace(self, allowed=count) if answer else replace(self, refused=count)
        assert halved.refused is not None
        if halved.refused - halved.allowed > 1:
            return halved
        left, behind = self._without_next(halved.allowed), self.position + halved.refused
        return _GroupTest(left, self.items, behind, self.needed + 1)

    def ahead(self) -> Iterator[list[NeuronSet]]:
        """The sets asked about after this one: the two that follow its answers, the four that
        follow theirs, and so on."""
        tests = [self]
        while tests:
            following = [test.after(answer) for test in tests for answer in (True, False)]
            tests = [test for test in following if not test.done]
            yield [test.asked for test in tests]

    @property
    def _count(self) -> int:
        """How many of the next items the question is about."""
        if self.refused is not None:
            return (self.allowed + self.refused) // 2
        left = len(self.items) - self.position
        return min(left, _power_of_two(self.position / self.needed)) if self.needed else left

    def _without_next(self, count: int) -> NeuronSet:
        return without(self.kept, self.items[self.position : self.position + count])


def _power_of_two(value: float) -> int:
    """The largest power of two that is not above a value of at least 1."""
    return 1 << (int(value).bit_length() - 1)
