"""The search by group testing: the plain search's result where a larger blocked set never raises
the score, a checked result or the exact one elsewhere."""

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import event, example, given, settings
from hypothesis import strategies as st
from test_exact_search import CAPTION, CASES, ROWS, MadeUp, statistics_of

from benchmarks.synthetic import SyntheticScore, needed_neurons
from utils.activation_statistics import Statistics, z_scores
from utils.bisect_search import localize_by_bisection
from utils.decisions import locate
from utils.exact_search import LOOKAHEAD, Question, localize_exactly
from utils.files import Prompt
from utils.localization import (
    Outcome,
    Search,
    Thresholds,
    UndecidedError,
    candidates,
    kept_rows,
    localize,
)
from utils.neuron_sets import NeuronSet, size
from utils.noise_difference import NoiseSettings
from utils.scoring import Detector, Finding, MemorizationScore
from utils.stable_diffusion import Model, encode_prompt

Function = Callable[[NeuronSet], float]
WIDTHS = st.lists(st.integers(1, 12), min_size=1, max_size=4)


def drawn(widths: list[int], seed: int) -> tuple[list[torch.Tensor], list[torch.Tensor], list]:
    """Activations, z-scores and a weight for every neuron, none below 0 and half of them 0."""
    generator = torch.Generator().manual_seed(seed)
    a = [torch.rand(width, generator=generator) for width in widths]
    z = [torch.rand(width, generator=generator) * 8 for width in widths]
    weights = [(torch.rand(width, generator=generator) - 0.5).clamp(min=0) for width in widths]
    return a, z, [weight.tolist() for weight in weights]


def additive(weights: list[list[float]]) -> Function:
    return lambda neurons: (
        1.0 - sum(weights[layer][i] for layer, row in enumerate(neurons) for i in row)
    )


def saturated(weights: list[list[float]]) -> Function:
    """Only the strongest neuron of a layer counts: the others back it up."""
    return lambda neurons: (
        1.0
        - sum(
            max((weights[layer][i] for i in row), default=0.0) for layer, row in enumerate(neurons)
        )
    )


def rounded(weights: list[list[float]]) -> Function:
    """Steps of 0.2, so that scores land on thresholds."""
    score = additive(weights)
    return lambda neurons: math.ceil(score(neurons) * 5) / 5


@given(
    widths=WIDTHS,
    seed=st.integers(0, 10_000),
    tau=st.one_of(st.floats(0.05, 0.95), st.sampled_from([0.2, 0.4, 0.6, 0.8])),
    kind=st.sampled_from([additive, saturated, rounded]),
    search=st.sampled_from([Search(), Search(use_theta=False), Search(use_top_k=False)]),
)
@settings(max_examples=200, deadline=None)
def test_plain_result_where_the_assumption_holds(
    widths: list[int], seed: int, tau: float, kind: Callable[..., Function], search: Search
) -> None:
    a, z, weights = drawn(widths, seed)
    asked = {"search": search, "thresholds": Thresholds(tau, tau, tau)}
    plain = localize(a, z, SyntheticScore(kind(weights)), **asked)
    found = localize_by_bisection(a, z, SyntheticScore(kind(weights)), **asked)
    assert found == plain and not found.check_failed
    event(f"fell back to the last try: {plain.fell_back}")


@pytest.mark.parametrize(("tau", "neurons"), [(0.35, 33), (-1.0, 40)])
def test_selection_goes_on_beyond_the_tries_that_are_asked_together(
    tau: float, neurons: int
) -> None:
    """By the 34th try, and never: then the last one counts."""
    a = [torch.arange(40.0, 0, -1)]
    asked = {"search": Search(use_theta=False), "thresholds": Thresholds(tau, tau, tau)}
    score = additive([[0.02] * 40])
    plain = localize(a, a, SyntheticScore(score), **asked)
    assert plain.fell_back == (tau < 0)
    assert size(plain.initial) == neurons > LOOKAHEAD
    for fast in (localize_exactly, localize_by_bisection):
        assert replace(fast(a, a, SyntheticScore(score), **asked), check_failed=False) == plain


@pytest.mark.parametrize("failed", [False, True])
def test_a_search_that_was_made_again_is_told(failed: bool) -> None:
    class Told:
        def find(self, *_: Any, **__: Any) -> Finding:
            neurons = [[1], []]
            outcome = Outcome(neurons, 0.2, neurons, 0.2, fell_back=False, check_failed=failed)
            return Finding(torch.tensor([0.9]), [0, 1], outcome, 3)

    statistics = Statistics([torch.zeros(4)] * 2, [torch.ones(4)] * 2)
    decision = locate(
        Told(),  # type: ignore[arg-type]
        Prompt(0, "a caption"),
        statistics,
        search=Search(),
        thresholds=Thresholds(0.4, 0.4, 0.4),
        method="bisect",
        report=lambda *_: None,
    )
    assert decision.searched_again == failed
    assert decision.cells[0] == decision.cells[2] == "[[1], []]"


@given(
    widths=WIDTHS,
    seed=st.integers(0, 10_000),
    tau=st.floats(0.05, 0.95),
    relative=st.sampled_from([None, 0.2]),
)
@settings(max_examples=200, deadline=None)
def test_elsewhere_the_exact_result_or_one_that_passes_the_check(
    widths: list[int], seed: int, tau: float, relative: float | None
) -> None:
    """Weights below 0: some neurons raise the score when they are switched off."""
    a, z, weights = drawn(widths, seed)
    weights = [[weight - 0.1 for weight in layer] for layer in weights]
    asked = {"search": Search(relative=relative), "thresholds": Thresholds(tau, tau, tau)}
    score = SyntheticScore(additive(weights))
    found = localize_by_bisection(a, z, score, **asked)
    exact = localize_exactly(a, z, SyntheticScore(additive(weights)), **asked)
    event(f"check failed: {found.check_failed}")
    if found.check_failed:
        assert (found.initial, found.refined) == (exact.initial, exact.refined)
        assert found.refined_score == exact.refined_score
        return
    assert (found.initial, found.initial_score) == (exact.initial, exact.initial_score)

    def allowed(neurons: NeuronSet) -> bool:
        if relative is not None:
            change = abs(score(neurons) - found.initial_score)
            return change / (abs(found.initial_score) + 1e-9) < relative
        return score(neurons) < (found.initial_score if found.fell_back else tau)

    assert found.refined == found.initial or allowed(found.refined)
    for layer, columns in enumerate(found.refined):
        for neuron in columns:
            fewer = [list(other) for other in found.refined]
            fewer[layer].remove(neuron)
            assert not allowed(fewer)


class RowsScore(SyntheticScore):
    """The largest of several rows' scores, whose guesses look at rows that were the largest once.

    Like ``FastScore``: the latest reference evaluation's row is looked at from then on.
    """

    def __init__(self, rows: list[Function]) -> None:
        super().__init__(lambda neurons: max(row(neurons) for row in rows))
        self.rows, self.seen, self.wrong = rows, {0}, 0

    def reference(self, neurons: NeuronSet) -> float:
        self.seen.add(max(range(len(self.rows)), key=lambda row: self.rows[row](neurons)))
        return self(neurons)

    def guess(
        self, neurons: NeuronSet, question: Question, ahead: Iterable[Sequence[NeuronSet]] = ()
    ) -> bool:
        guessed = question.holds(max(self.rows[row](neurons) for row in self.seen))
        self.wrong += guessed != question.holds(self(neurons))
        return guessed


@given(
    widths=WIDTHS, seed=st.integers(0, 10_000), tau=st.floats(0.05, 0.95), rows=st.integers(2, 7)
)
@settings(max_examples=200, deadline=None)
def test_wrong_guesses_are_found_out(widths: list[int], seed: int, tau: float, rows: int) -> None:
    """Every row has weights of its own: a set can be low enough for one and not for another."""
    a, z, weights = drawn(widths, seed)
    functions = [additive(weights), *(additive(drawn(widths, seed + r)[2]) for r in range(1, rows))]
    asked = {"search": Search(), "thresholds": Thresholds(tau, tau, tau)}
    score = RowsScore(functions)
    plain = localize(a, z, RowsScore(functions), **asked)
    found = localize_by_bisection(a, z, score, **asked)
    event(f"wrong guesses: {score.wrong > 0}, check failed: {found.check_failed}")
    assert replace(found, check_failed=False) == plain


def test_a_failed_check_is_said_and_the_exact_search_decides() -> None:
    """Neuron 0 has to stay while neuron 2 is off, and neuron 1 likewise; once 2 is given back,
    0 is needed no more, which neither search looks at again, but the check does."""
    allowed = [{0, 1, 2}, {0, 1}, {1}]

    def score(neurons: NeuronSet) -> float:
        return 0.1 if set(neurons[0]) in allowed else 0.9

    a, z = [torch.zeros(3)], [torch.full((3,), 9.0)]
    asked = {"search": Search(), "thresholds": Thresholds(0.5, 0.5, 0.5)}
    found = localize_by_bisection(a, z, SyntheticScore(score), **asked)
    assert found.check_failed and found.refined == [[0, 1]]
    assert found.refined == localize(a, z, score, **asked).refined


def test_a_score_that_is_not_finite_passes_through() -> None:
    def score(neurons: NeuronSet) -> float:
        if size(neurons) == 2:
            raise UndecidedError("not finite")
        return 1.0 - 0.3 * size(neurons)

    with pytest.raises(UndecidedError):
        localize_by_bisection(
            [torch.zeros(4)],
            [torch.full((4,), 9.0)],
            SyntheticScore(score),
            search=Search(),
            thresholds=Thresholds(0.5, 0.5, 0.5),
        )


@pytest.mark.parametrize(("n", "k"), [(100, 1), (100, 10), (1000, 1), (1000, 10), (1000, 50)])
def test_evaluations_grow_with_the_needed_neurons_not_with_the_candidates(n: int, k: int) -> None:
    """k log2(n / k), with as many again to spare: halving finds a place, groups that are given back
    and the check come on top."""
    generator = torch.Generator().manual_seed(n + k)
    a, z, function = needed_neurons(n, k, 7, generator)
    score = SyntheticScore(function)
    found = localize_by_bisection(
        a, z, score, search=Search(), thresholds=Thresholds(0.3, 0.3, 0.3)
    )
    assert size(found.initial) == n and size(found.refined) == k and not found.check_failed
    assert score.evaluations < 2 * k * math.log2(n / k) + 3 * k + 20


@given(
    seed=st.integers(0, 10_000),
    width=st.integers(1, 24),
    max_sets=st.integers(1, 8),
    share=st.floats(0.02, 2.0),
    tau=st.floats(0.05, 0.95),
)
@settings(max_examples=50, deadline=None)
def test_what_is_asked_ahead_saves_passes_and_changes_nothing(
    seed: int, width: int, max_sets: int, share: float, tau: float
) -> None:
    """Against rows so dear that none is looked at before its turn."""
    outcomes, passes = [], []
    made_up = MadeUp(seed, width)
    options: Any = {"search": Search(min_theta=3.0), "thresholds": Thresholds(tau, tau, tau)}
    for ahead in (True, False):
        made_up.made = 0
        _, fast = made_up.scores(range(4), max_sets=max_sets, one_row_share=share)
        if not ahead:
            fast._worth_a_look = lambda *_: []
        outcomes.append(localize_by_bisection(made_up.activations, made_up.z, fast, **options))
        passes.append(made_up.made)
    assert outcomes[0] == outcomes[1]
    assert passes[0] <= passes[1]
    event(f"saved: {passes[0] < passes[1]}")


@given(
    seed=st.integers(0, 10_000),
    width=st.integers(1, 12),
    raised=st.sampled_from([0.2, 0.5, 0.8]),
    max_sets=st.integers(1, 8),
    tau=st.floats(0.2, 0.9),
)
@example(seed=40, width=10, raised=0.8, max_sets=1, tau=0.8145)
@example(seed=133, width=10, raised=0.5, max_sets=1, tau=0.53765)
@settings(max_examples=100, deadline=None)
def test_the_pace_of_the_device_decides_nothing(
    seed: int, width: int, raised: float, max_sets: int, tau: float
) -> None:
    """Also where a larger set may have the higher score, so that wrong guesses can pass the
    check."""
    made_up = MadeUp(seed, width)
    made_up.weight = made_up.weight - raised * made_up.weight.roll(1, dims=2)
    options: Any = {"search": Search(min_theta=3.0), "thresholds": Thresholds(tau, tau, tau)}
    found = []
    for sets, share in ((1, 0.1), (max_sets, 0.4), (1, 1.0)):
        _, fast = made_up.scores(range(4), max_sets=sets, one_row_share=share)
        found.append(localize_by_bisection(made_up.activations, made_up.z, fast, **options))
    assert found[0] == found[1] == found[2]
    event(f"check failed: {found[0].check_failed}")


@pytest.mark.parametrize(("share", "fewer"), [(0.9, True), (0.05, False)])
def test_sets_are_looked_at_ahead_where_rows_are_cheap_in_a_batch(
    share: float, fewer: bool
) -> None:
    """One pass answers a question and the next ones, whatever its own answer is."""
    made_up = MadeUp(0, 1)
    sets: list[NeuronSet] = [
        [[0] if layer == own else [] for layer in range(3)] for own in range(3)
    ]
    _, fast = made_up.scores(range(4), max_sets=4, one_row_share=share)
    question = Question(lambda score: score < 0.5, (0.5,))
    fast.reference([[0], [0], [0]])
    made_up.made = 0
    fast.guess(sets[0], question, [sets[1:]])
    assert made_up.made == 1
    for neurons in sets[1:]:
        fast.guess(neurons, question)
    assert made_up.made == (1 if fewer else 3)


@pytest.mark.parametrize("case", CASES, ids=[case[0] for case in CASES])
def test_on_a_random_model(small_model: Callable[..., Model], case: tuple[Any, ...]) -> None:
    """The plain search's set, the exact one's after a failed check, or one that passes it."""
    _, architecture, noise, options, factor, sets, quantile = case
    model, search = small_model(architecture), Search(**options)
    detector = Detector(model, NoiseSettings(**noise), rows=ROWS, seed=1, factor=factor)
    detector.sets_per_pass = sets
    conditioning = encode_prompt(model, CAPTION)
    pairwise = detector.pairwise(CAPTION)
    tau = float(pairwise.sort().values[-2]) - 1e-6
    statistics = statistics_of(model)
    activations = model.value_reader.activations(conditioning.embedding[0])
    last = next(j for j in itertools.count() if search.is_last(j, 96))
    widest = candidates(
        activations, z_scores(activations, statistics), search.theta(last), search.k(last)
    )
    score = MemorizationScore(
        lambda neurons: detector._difference(conditioning, neurons),
        detector._unblocked(conditioning),
        kept_rows(pairwise, ROWS, tau),
    )
    lowest = score(widest)
    level = lowest + quantile * (1 - lowest)
    plain, found = (
        detector.find(
            CAPTION,
            statistics,
            search=search,
            thresholds=Thresholds(tau, level, level),
            method=method,
        ).outcome
        for method in ("plain", "bisect")
    )
    assert plain is not None and found is not None
    assert (found.initial, found.initial_score) == (plain.initial, plain.initial_score)
    if found.check_failed:
        assert (found.refined, found.refined_score) == (plain.refined, plain.refined_score)
        return
    limit = found.initial_score if found.fell_back else level

    def allowed(neurons: NeuronSet) -> bool:
        if search.relative is not None:
            scale = abs(found.initial_score) + 1e-9
            return abs(score(neurons) - found.initial_score) / scale < search.relative
        return score(neurons) < limit

    assert found.refined_score == score(found.refined)
    assert found.refined == found.initial or allowed(found.refined)
    for layer, columns in enumerate(found.refined):
        for neuron in columns:
            fewer = [list(other) for other in found.refined]
            fewer[layer].remove(neuron)
            assert not allowed(fewer)
