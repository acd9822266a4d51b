"""Alg. 2 to 4 on scores made up for the purpose: every rule of selection and refinement.

Both forms of the search are tried where a rule can be stated by a score alone: the plain one here,
the exact one against it.
"""

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

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
from utils.thresholds import pairs


def levels(tau: float, **others: float) -> Thresholds:
    return Thresholds(**{"pairwise": tau, "initial": tau, "refinement": tau, **others})


class Score:
    """1 minus the weights of the neurons switched off; remembers what it was asked."""

    def __init__(self, weights: list[list[float]], base: float = 1.0) -> None:
        self.weights, self.base = weights, base
        self.asked: list[NeuronSet] = []

    def of(self, neurons: NeuronSet) -> float:
        total = sum(self.weights[l][i] for l, layer in enumerate(neurons) for i in layer)
        return self.base - total

    def __call__(self, neurons: NeuronSet) -> float:
        self.asked.append([list(layer) for layer in neurons])
        return self.of(neurons)


def vectors(*layers: list[float]) -> list[torch.Tensor]:
    return [torch.tensor(layer, dtype=torch.float32) for layer in layers]


# Rows that count.


def test_kept_rows_by_hand() -> None:
    """Best pair of each row: 0 and 2 have 0.5, 1 has 0.4, 3 has 0.3."""
    scores = torch.tensor([0.4, 0.5, 0.1, 0.2, 0.3, 0.1], dtype=torch.float64)
    assert pairs(4) == [(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)]
    assert kept_rows(scores, 4, 0.2) == [0, 1, 2, 3]
    assert kept_rows(scores, 4, 0.3) == [0, 1, 2]  # strictly above
    assert kept_rows(scores, 4, 0.4) == [0, 2]
    assert kept_rows(scores, 4, 0.5) == []


@settings(max_examples=50, deadline=None)
@given(rows=st.integers(2, 7), data=st.data())
def test_kept_rows_are_those_of_some_pair_above(rows: int, data: st.DataObject) -> None:
    values = data.draw(
        st.lists(st.floats(0, 1, width=32), min_size=len(pairs(rows)), max_size=len(pairs(rows)))
    )
    tau = data.draw(st.floats(0, 1))
    kept = kept_rows(torch.tensor(values), rows, tau)
    above = {
        row for pair, value in zip(pairs(rows), values, strict=True) if value > tau for row in pair
    }
    assert kept == sorted(above)
    assert len(kept) != 1, "a pair keeps both of its rows"


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_pairwise_score_that_is_not_finite_leaves_undecided(value: float) -> None:
    for tau in (0.0, 2.0):
        with pytest.raises(UndecidedError):
            kept_rows(torch.tensor([0.5, value, 0.1]), 3, tau)


# Candidates (Alg. 2).


def test_candidates_by_hand() -> None:
    a = vectors([0.1, 0.9, 0.5, 0.7, 0.3], [1.0, 2.0])
    z = vectors([9.0, 6.0, 5.0, 2.0, 7.0], [0.0, 0.0])
    assert candidates(a, z, 5.0, 0) == [[0, 1, 4], []]  # z of 5.0 is not above 5
    # z alone by rising index, then the top two by falling activation; 1 is in both: a top one.
    assert candidates(a, z, 5.0, 2) == [[0, 4, 1, 3], [1, 0]]
    assert candidates(a, z, math.inf, 1) == [[1], [1]]
    assert candidates(a, z, 5.0, 99) == [[1, 3, 2, 4, 0], [1, 0]]


@settings(max_examples=100, deadline=None)
@given(
    width=st.integers(1, 12),
    theta=st.floats(0.5, 6),
    k=st.integers(0, 14),
    seed=st.integers(0, 10_000),
    coarse=st.booleans(),
)
def test_candidates_are_the_union_without_doubles(
    width: int, theta: float, k: int, seed: int, coarse: bool
) -> None:
    generator = torch.Generator().manual_seed(seed)
    a = torch.rand(width, generator=generator)
    if coarse:  # many ties
        a = (a * 3).round()
    z = torch.rand(width, generator=generator) * 8
    (chosen,) = candidates([a], [z], theta, k)
    top = sorted(range(width), key=lambda i: (-a[i].item(), i))[:k]
    above = {i for i in range(width) if z[i] > theta}
    assert chosen == sorted(above - set(top)) + top


# Initial selection (Alg. 3).


def test_selection_lowers_theta_and_raises_k_together() -> None:
    """The pairs tried: (5, 0), (4.75, 1), ... until the score is at or below the threshold."""
    a = vectors([0.4, 0.3, 0.2, 0.1])
    z = vectors([0.0, 0.0, 4.6, 4.9])
    score = Score([[0.1, 0.1, 0.25, 0.1]])
    found = localize(a, z, score, search=Search(), thresholds=levels(0.5))
    # j=0: none. j=1 (4.75, 1): [3, 0] -> 0.8. j=2 (4.5, 2): [2, 3, 0, 1] -> 0.45.
    assert score.asked[:3] == [[[]], [[3, 0]], [[2, 3, 0, 1]]]
    assert found.initial == [[0, 1, 2, 3]]
    assert found.initial_score == pytest.approx(0.45) and not found.fell_back


def test_selection_is_done_at_the_threshold_itself() -> None:
    score = Score([[0.5]])
    found = localize(vectors([1.0]), vectors([9.0]), score, search=Search(), thresholds=levels(0.5))
    assert found.initial == [[0]] and found.initial_score == 0.5 and not found.fell_back
    assert score.asked[0] == [[0]]


def tried(search: Search, widths: list[int], *, z: float = 0.0) -> tuple[list[NeuronSet], Outcome]:
    """All sets tried when nothing ever lowers the score."""
    a = [torch.arange(width, 0, -1).float() for width in widths]
    score = Score([[0.0] * width for width in widths])
    found = localize(
        a,
        [torch.full((width,), z) for width in widths],
        score,
        search=search,
        thresholds=levels(0.5),
    )
    assert found.fell_back
    # refinement starts with the last layer that has candidates
    layers_and_neurons = sum(bool(layer) for layer in found.initial) + size(found.initial)
    selection = len(score.asked) - layers_and_neurons - 1
    return score.asked[:selection], found


def test_thetas_tried_by_default_are_5_to_1_25() -> None:
    search = Search()
    sets, found = tried(search, [40])
    assert [size(s) for s in sets] == list(range(16))  # k = 0 .. 15
    assert [search.theta(j) for j in range(16)] == [5 - 0.25 * j for j in range(16)]
    assert found.initial == [list(range(15))]
    assert [search.is_last(j, 40) for j in range(16)] == [False] * 15 + [True]


STOPS = [
    # case in words, search, widths, number of candidates of each try
    ("k exceeds the widest layer", Search(), [3, 5], [0, 2, 4, 6, 7, 8]),
    ("initial k beyond it: one try", Search(initial_k=9), [3, 5], [8]),
    ("no theta: k alone ends it", Search(use_theta=False), [3, 2], [0, 2, 4, 5]),
    ("no theta, min_theta plays no role", Search(use_theta=False, min_theta=99), [2], [0, 1, 2]),
    ("no top k: theta alone ends it", Search(use_top_k=False), [2], [0] * 16),
    ("theta starts at its minimum: one try", Search(initial_theta=1.0), [30], [0]),
    ("theta starts below its minimum: one try", Search(initial_theta=0.5), [30], [0]),
    ("min_theta 4: at 4 it stops", Search(min_theta=4.0), [30], [0, 1, 2, 3]),
    ("a step that leaps over the minimum", Search(theta_step=3.0), [30], [0, 1]),
    ("initial k 2, min_theta 4.5", Search(initial_k=2, min_theta=4.5), [30], [2, 3]),
]


@pytest.mark.parametrize(
    ("search", "widths", "sizes"), [c[1:] for c in STOPS], ids=[c[0] for c in STOPS]
)
def test_selection_stops(search: Search, widths: list[int], sizes: list[int]) -> None:
    sets, found = tried(search, widths)
    assert [size(s) for s in sets] == sizes
    assert size(found.initial) == sizes[-1], "the candidates just tried"


def test_no_theta_selects_nobody_by_z() -> None:
    sets, _ = tried(Search(use_theta=False), [3], z=1e30)
    assert [size(s) for s in sets] == [0, 1, 2, 3]
    assert candidates(vectors([1.0]), vectors([math.inf]), math.inf, 0) == [[]]


def test_no_top_k_ignores_initial_k() -> None:
    sets, _ = tried(Search(use_top_k=False, initial_k=3, initial_theta=2, theta_step=0.5), [4])
    assert [size(s) for s in sets] == [0, 0]


def test_theta_is_computed_from_j_so_that_no_rounding_adds_up() -> None:
    """0.1 a hundred times is not 10; 7 - 60 * 0.1 is 1.0 exactly."""
    search = Search(initial_theta=7.0, theta_step=0.1, use_top_k=False)
    assert search.theta(60) == 7.0 - 60 * 0.1
    added = 7.0
    for _ in range(60):
        added -= 0.1
    assert added != search.theta(60)
    sets, _ = tried(search, [1])
    assert len(sets) == 60


# Refinement (Alg. 4).


def refine(
    weights: list[list[float]],
    tau: float,
    *,
    search: Search | None = None,
    refinement: float | None = None,
) -> tuple[Outcome, Score]:
    """Everything is selected at once, by z; the score is additive."""
    score = Score(weights)
    widths = [len(layer) for layer in weights]
    found = localize(
        [torch.zeros(width) for width in widths],
        [torch.full((width,), 9.0) for width in widths],
        score,
        search=search or Search(),
        thresholds=levels(tau, refinement=tau if refinement is None else refinement),
    )
    return found, score


def test_layers_first_then_neurons_last_to_first_each_on_the_ones_before() -> None:
    found, score = refine([[0.3, 0.0], [0.25, 0.25], [0.05]], 0.5)
    # all: 0.15. Without layer 2: 0.2, dropped. Without layer 1 too: 0.7, kept.
    # Without layer 0: 0.5, not strictly below, kept. Neurons of layer 1: 0.45 dropped, 0.7 kept;
    # of layer 0: 0.75 kept; 0.45 dropped.
    assert score.asked == [
        [[0, 1], [0, 1], [0]],
        [[0, 1], [0, 1], []],
        [[0, 1], [], []],
        [[], [0, 1], []],
        [[0, 1], [1], []],
        [[0, 1], [], []],
        [[1], [1], []],
        [[0], [1], []],
        [[0], [1], []],
    ]
    assert found.refined == [[0], [1], []]
    assert found.refined_score == pytest.approx(0.45)
    assert found.initial_score == pytest.approx(0.15)


def test_dropped_only_if_strictly_below() -> None:
    """The score lands on the threshold itself: the neuron stays."""
    found, _ = refine([[0.5, 0.25]], 0.5)
    # without neuron 0: 0.75, stays; without neuron 1: 0.5, not below, stays
    assert found.refined == [[0, 1]]
    found, _ = refine([[0.5, 0.25]], math.nextafter(0.5, 1))
    assert found.refined == [[0]]


def test_layer_without_candidates_is_skipped() -> None:
    score = Score([[0.6], [0.0], [0.0]])
    z = vectors([9.0], [0.0], [9.0])
    localize(vectors([0.0], [0.0], [0.0]), z, score, search=Search(), thresholds=levels(0.5))
    asked = score.asked[1:]
    assert asked == [[[0], [], []], [[], [], []], [[], [], []], [[0], [], []]]


def test_neurons_are_tried_in_refinements_order() -> None:
    """Those by z alone by rising index, then the top ones by falling activation."""
    a = vectors([0.1, 0.9, 0.2, 0.8])
    z = vectors([9.0, 9.0, 9.0, 0.0])
    score = Score([[0.01] * 4], base=0.535)
    search = Search(initial_k=2)
    found = localize(a, z, score, search=search, thresholds=levels(0.5))
    assert score.asked[0] == [[0, 2, 1, 3]]
    removed = [
        next(iter({0, 1, 2, 3} - set(asked[0]))) for asked in score.asked[2:] if len(asked[0]) == 3
    ]
    assert removed[0] == 0
    # 0.495 with all four; without any one 0.505: nothing can be dropped, all are tried in order.
    assert removed == [0, 2, 1, 3]
    assert found.refined == [[0, 1, 2, 3]]


def test_refinement_does_not_use_the_score_that_selection_ended_with() -> None:
    """It ended at 0.1; the threshold stays 0.5, so up to 0.5 neurons are given back."""
    found, _ = refine([[0.3, 0.3, 0.3]], 0.5)
    assert found.initial_score == pytest.approx(0.1)
    assert size(found.refined) == 2
    found, _ = refine([[0.3, 0.3, 0.3]], 0.5, refinement=0.3)
    assert size(found.refined) == 3


def test_after_the_fall_back_the_score_reached_is_the_threshold_even_if_its_flag_was_given() -> (
    None
):
    weights = [[0.2, 0.1, 0.0, 0.0]]
    for refinement in (0.5, 0.9, 0.1):
        score = Score(weights)
        found = localize(
            vectors([0.4, 0.3, 0.2, 0.1]),
            vectors([0.0] * 4),
            score,
            search=Search(),
            thresholds=levels(0.5, refinement=refinement),
        )
        assert found.fell_back and found.initial == [[0, 1, 2, 3]]
        # Neurons without effect land exactly on the threshold: not below it, none is dropped.
        assert found.refined == [[0, 1, 2, 3]]
        assert found.initial_score == found.refined_score == pytest.approx(0.7)


def test_after_the_fall_back_neurons_that_raise_the_score_are_dropped() -> None:
    score = Score([[0.25, -0.125, 0.125, 0.0]])
    found = localize(
        vectors([0.4, 0.3, 0.2, 0.1]),
        vectors([0.0] * 4),
        score,
        search=Search(),
        thresholds=levels(0.5),
    )
    assert found.fell_back and found.initial_score == 0.75
    # 1 raises the score: without it 0.625. Then 2 would bring it back to 0.75 itself: it stays.
    # 3 changes nothing and leaves it at 0.625, below: it goes.
    assert found.refined == [[0, 2]] and found.refined_score == 0.625


RELATIVE = [
    # case in words, weights, initial score, share, refined
    ("nothing within the share", [[0.3, 0.3]], 0.1, [[0, 1]]),
    ("small ones within it", [[0.3, 0.02, 0.3]], 0.1, [[0, 2]]),
    ("changes add up against the initial score", [[0.3, 0.03, 0.03, 0.3]], 0.1, [[0, 2, 3]]),
    ("a rise counts as much as a fall", [[0.6, -0.3]], 0.1, [[0, 1]]),
]


@pytest.mark.parametrize(
    ("weights", "share", "refined"), [c[1:] for c in RELATIVE], ids=[c[0] for c in RELATIVE]
)
def test_relative_option_compares_with_the_initial_sets_score(
    weights: list[list[float]], share: float, refined: NeuronSet
) -> None:
    found, _ = refine(weights, 0.9, search=Search(relative=share))
    assert found.refined == refined


def test_relative_option_replaces_the_absolute_test_for_layers_too() -> None:
    """Layer 1 could go by the absolute test (0.5 < 0.9), but changes the score from 0.3 by 0.2."""
    found, _ = refine([[0.5], [0.2]], 0.9, search=Search(relative=0.5))
    assert found.refined == [[0], [0]]
    found, _ = refine([[0.5], [0.2]], 0.9)
    assert size(found.refined) == 1


def test_relative_option_at_a_score_of_zero() -> None:
    """1e-9 keeps the quotient finite: a set that changes nothing at 0 is dropped."""
    score: Callable[[NeuronSet], float] = lambda neurons: 0.0  # noqa: E731
    found = localize(
        vectors([0.0, 0.0]),
        vectors([9.0, 9.0]),
        score,
        search=Search(relative=0.1),
        thresholds=levels(0.5),
    )
    assert found.initial == [[0, 1]] and found.refined == [[]]


def test_undecided_passes_through() -> None:
    def score(neurons: NeuronSet) -> float:
        if size(neurons) == 1:
            raise UndecidedError("not finite")
        return 1.0 - 0.3 * size(neurons)

    with pytest.raises(UndecidedError):
        localize(
            vectors([0.0, 0.0]),
            vectors([9.0, 9.0]),
            score,
            search=Search(),
            thresholds=levels(0.5),
        )


def test_report_hears_of_every_evaluation() -> None:
    heard: list[tuple[str, int]] = []
    score = Score([[0.3, 0.0], [0.3]])
    localize(
        vectors([0.0, 0.0], [0.0]),
        vectors([9.0, 9.0], [9.0]),
        score,
        search=Search(),
        thresholds=levels(0.5),
        report=lambda stage, left: heard.append((stage, left)),
    )
    assert [stage for stage, _ in heard] == ["selection", "layers", "layers"] + ["neurons"] * 3
    assert heard[0] == ("selection", 3)
    assert len(heard) == len(score.asked) - 1  # the last one scores what was found


# Properties.

layer_sizes = st.lists(st.integers(1, 6), min_size=1, max_size=4)


def random_case(widths: list[int], seed: int) -> tuple[list, list, list]:
    """Activations, z-scores and weights without ties."""
    generator = torch.Generator().manual_seed(seed)
    a = [torch.rand(w, generator=generator) for w in widths]
    z = [torch.rand(w, generator=generator) * 8 for w in widths]
    weights = [(torch.rand(w, generator=generator) * 0.4 - 0.05).tolist() for w in widths]
    return a, z, weights


@settings(max_examples=100, deadline=None)
@given(
    widths=layer_sizes,
    seed=st.integers(0, 10_000),
    tau=st.floats(0.05, 0.95),
    relative=st.sampled_from([None, 0.2]),
)
def test_properties_of_what_is_found(
    widths: list[int], seed: int, tau: float, relative: float | None
) -> None:
    a, z, weights = random_case(widths, seed)
    score = Score(weights)
    search = Search(relative=relative)
    found = localize(a, z, score, search=search, thresholds=levels(tau))
    for refined, initial, width in zip(found.refined, found.initial, widths, strict=True):
        assert refined == sorted(set(refined)) and initial == sorted(set(initial))
        assert set(refined) <= set(initial) <= set(range(width))
    assert found.fell_back == (found.initial_score > tau)
    assert found.refined_score == pytest.approx(score.of(found.refined), abs=1e-9)
    if relative is None:
        limit = found.initial_score if found.fell_back else tau
        assert found.refined_score < limit or found.refined == found.initial
        # Nothing that remains can be given back on its own, where neurons only lower the score.
        if all(weight >= 0 for layer in weights for weight in layer):
            for l, layer in enumerate(found.refined):
                for neuron in layer:
                    less = [list(other) for other in found.refined]
                    less[l].remove(neuron)
                    assert score.of(less) >= limit - 1e-9
    else:
        change = abs(found.refined_score - found.initial_score)
        assert found.refined == found.initial or change < relative * (
            abs(found.initial_score) + 1e-9
        )


@settings(max_examples=100, deadline=None)
@given(widths=layer_sizes, seed=st.integers(0, 10_000), tau=st.floats(0.05, 0.95), data=st.data())
def test_numbering_of_neurons_plays_no_role_among_the_top_ones(
    widths: list[int], seed: int, tau: float, data: st.DataObject
) -> None:
    """Without z (the order of its neurons is by index), what is found moves with a permutation."""
    a, z, weights = random_case(widths, seed)
    orders = [data.draw(st.permutations(range(w))) for w in widths]
    search = Search(use_theta=False)
    found = localize(a, z, Score(weights), search=search, thresholds=levels(tau))
    moved = localize(
        [x[list(order)] for x, order in zip(a, orders, strict=True)],
        [x[list(order)] for x, order in zip(z, orders, strict=True)],
        Score([[w[i] for i in order] for w, order in zip(weights, orders, strict=True)]),
        search=search,
        thresholds=levels(tau),
    )
    # Sums in another order may round otherwise; no decision may hang on the last bit.
    assume(abs(found.initial_score - tau) > 1e-6)
    for attribute in ("initial", "refined"):
        back = [
            sorted(order[i] for i in layer)
            for layer, order in zip(getattr(moved, attribute), orders, strict=True)
        ]
        assert back == getattr(found, attribute)


@settings(max_examples=60, deadline=None)
@given(widths=layer_sizes, seed=st.integers(0, 10_000), tau=st.floats(0.1, 0.9), data=st.data())
def test_initial_set_moves_with_a_permutation(
    widths: list[int], seed: int, tau: float, data: st.DataObject
) -> None:
    a, z, weights = random_case(widths, seed)
    orders = [data.draw(st.permutations(range(w))) for w in widths]
    found = localize(a, z, Score(weights), search=Search(), thresholds=levels(tau))
    assume(abs(found.initial_score - tau) > 1e-6)
    moved = localize(
        [x[list(order)] for x, order in zip(a, orders, strict=True)],
        [x[list(order)] for x, order in zip(z, orders, strict=True)],
        Score([[w[i] for i in order] for w, order in zip(weights, orders, strict=True)]),
        search=Search(),
        thresholds=levels(tau),
    )
    back = [sorted(o[i] for i in layer) for layer, o in zip(moved.initial, orders, strict=True)]
    assert back == found.initial


@settings(max_examples=60, deadline=None)
@given(widths=layer_sizes, seed=st.integers(0, 10_000), tau=st.floats(0.1, 0.9))
def test_neurons_that_nothing_hangs_on_are_never_found(
    widths: list[int], seed: int, tau: float
) -> None:
    """Weight 0 and selected by threshold, so giving it back leaves the score below: dropped."""
    a, z, weights = random_case(widths, seed)
    weights = [[max(w, 0.0) for w in layer] for layer in weights]
    found = localize(a, z, Score(weights), search=Search(), thresholds=levels(tau))
    assume(not found.fell_back and found.initial_score < tau - 1e-6)
    assert all(weights[l][i] > 0 for l, layer in enumerate(found.refined) for i in layer)
