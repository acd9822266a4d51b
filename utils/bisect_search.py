"""Localization for long candidate lists: refinement by group testing, checked at its end.

Where a larger blocked set never raises the score, a group of neurons can be given back at once if
the score stays below the threshold without all of them, and the first of a group that cannot is
found by halving: about k log2(n / k) evaluations for k needed neurons of n candidates instead of n.
Under that assumption the result is that of the plain search. It need not hold, so the result is
checked: the score is below the threshold, and above it without any one of the kept neurons. Where
the check fails, the exact search refines the prompt instead, and the outcome says so. A result that
passes is a set as Alg. 4 wants it, but where the assumption fails it may be another one than that
of the plain search.

Selection, questions, evaluations and margins are those of ``utils.exact_search``.
Public: ``localize_by_bisection``.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from utils.exact_search import Answers, Question, Start, dropped_one_by_one, refine, select, without
from utils.localization import Outcome, Report, Search, Thresholds
from utils.neuron_sets import NeuronSet, size

ROUNDS = 4  # of guessing, before the check decides


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
    refined = refine(start, score, _dropped_in_groups, report)
    report("check", size(refined))
    if _passes_check(start, refined, score):
        return start.outcome(refined, score)
    refined = refine(start, score, dropped_one_by_one, report)
    return replace(start.outcome(refined, score), check_failed=True)


def _passes_check(start: Start, refined: NeuronSet, score: Answers) -> bool:
    """Whether the score allows all that was given back (nothing was: there is nothing to allow),
    and no kept neuron besides."""
    given_back = size(refined) < size(start.initial)
    if given_back and not start.droppable.holds(score.reference(refined)):
        return False
    singles = [(layer, [i]) for layer, columns in enumerate(refined) for i in columns]
    score.expect(above=1.0)
    fewer = [without(refined, [single]) for single in reversed(singles)]
    return score.leading(fewer, start.droppable.opposite) == len(fewer)


def _dropped_in_groups(
    kept: NeuronSet,
    items: Sequence[tuple[int, Sequence[int]]],
    score: Answers,
    question: Question,
    report: Callable[[int], None],
) -> NeuronSet:
    """Gives back the items that the score does not need, in order, if a larger set never scores
    higher.

    Guesses are enough on the way: a no is certain, and a yes to the set that is left at its end
    means that all others were right. After a no to that one, the row that it comes from is among
    those that the next round looks at.
    """
    for _ in range(ROUNDS):
        left = _group_testing(kept, items, score, question, report)
        if left == kept or question.holds(score.reference(left)):
            break
    return left


def _group_testing(
    kept: NeuronSet,
    items: Sequence[tuple[int, Sequence[int]]],
    score: Answers,
    question: Question,
    report: Callable[[int], None],
) -> NeuronSet:
    """Without the next ``group`` items: a yes gives back all of them; after a no, the first of them
    that has to stay is found by halving, and those before it are given back. A group is as long as
    the mean distance of needed items so far, at first the whole list."""

    def allows(count: int) -> bool:
        report(size(kept))
        return score.guess(without(kept, items[position : position + count]), question)

    position = needed = 0
    while position < len(items):
        left = len(items) - position
        group = min(left, _power_of_two(position / needed)) if needed else left
        if allows(group):
            kept = without(kept, items[position : position + group])
            position += group
            continue
        allowed, refused = 0, group
        while refused - allowed > 1:
            middle = (allowed + refused) // 2
            if allows(middle):
                allowed = middle
            else:
                refused = middle
        kept = without(kept, items[position : position + allowed])
        position += refused
        needed += 1
    return kept


def _power_of_two(value: float) -> int:
    """The largest power of two that is not above a value of at least 1."""
    return 1 << (int(value).bit_length() - 1)
