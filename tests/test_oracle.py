"""The localization as a whole against ``oracle.py``, which shares no line with it.

The model is a random one in which text matters, on 16 x 16 latents. Its thresholds are chosen per
prompt from the oracle's own scores, so that each case is of the kind that it is meant to be; that
it is, is asserted.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from oracle import Oracle
from small_models import small_pipeline

from utils.activation_statistics import Statistics
from utils.localization import Search, Thresholds
from utils.noise_difference import NoiseSettings
from utils.scoring import Detector, Finding
from utils.stable_diffusion import load_model
from utils.value_layers import find_value_layers
from utils.versions import resolve

ROWS, SEED = 4, 1
THINGS = ("house", "tree", "river", "stone", "cloud")
HOLD_OUT = [f"an ordinary picture of a {thing}" for thing in THINGS]
# How much louder the text speaks through each value layer's attention and transformer.
ATTENTION = (30, 30, 100, 100, 300, 300, 300)
TRANSFORMER = (1, 1, 1, 1, 3, 10, 100)
ROUNDING = 2e-6  # no decision of a case may be nearer to its threshold


@dataclass(frozen=True)
class World:
    oracle: Oracle
    detector: Detector
    means: list[np.ndarray]
    stds: list[np.ndarray]

    def ours(self, caption: str, method: str, search: Search, thresholds: Thresholds) -> Finding:
        statistics = Statistics(
            [torch.from_numpy(mean) for mean in self.means],
            [torch.from_numpy(std) for std in self.stds],
        )
        return self.detector.find(
            caption, statistics, search=search, thresholds=thresholds, method=method
        )


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    pipeline = small_pipeline("sd1", seed=0)
    factors = zip(find_value_layers(pipeline.unet), ATTENTION, TRANSFORMER, strict=True)
    with torch.no_grad():
        for name, attention, transformer in factors:
            pipeline.unet.get_submodule(name.rpartition(".")[0]).to_out[0].weight *= attention
            outer = name.partition(".transformer_blocks")[0]
            pipeline.unet.get_submodule(outer).proj_out.weight *= transformer
        pipeline.unet.conv_out.weight *= 10
    folder = tmp_path_factory.mktemp("oracle") / "model"
    pipeline.save_pretrained(folder)
    oracle = Oracle(folder, ROWS, SEED)
    activations = [oracle.activation(oracle.text(caption)) for caption in HOLD_OUT]
    layers = [np.stack(layer) for layer in zip(*activations, strict=True)]
    model = load_model(resolve(str(folder)), device="cpu", dtype="float32")
    return World(
        oracle,
        Detector(model, NoiseSettings(), rows=ROWS, seed=SEED),
        [layer.mean(axis=0) for layer in layers],
        [layer.std(axis=0, ddof=1) for layer in layers],
    )


@dataclass(frozen=True)
class Case:
    """A prompt, how its levels follow from the oracle's scores, and what kind of result it has."""

    kind: str
    caption: str
    search: Search
    # Share of the way from 1 (nothing blocked) to the first try's score: the levels of two steps.
    initial: float = 0.9
    refinement: float = 0.8
    pairwise: Callable[[list[float]], float] = lambda scores: min(scores) / 2


def fewer_rows(scores: list[float]) -> float:
    """Between the best pair and the next: two rows remain."""
    best, second = sorted(scores)[-1:-3:-1]
    return (best + second) / 2


SHORT = Search(initial_theta=10.0, theta_step=0.5, min_theta=8.0, initial_k=1)
NEVER = Search(initial_theta=20.0, min_theta=19.25, initial_k=2)
CASES = [
    Case("threshold", "caption 0 alpha", SHORT),
    Case("threshold", "a caption of another kind", SHORT, initial=1.1, refinement=1.05),
    Case("fall-back", "old maps", NEVER, initial=99),
    Case("fall-back", "Portrait of a woman", NEVER, initial=99),
    Case("unmemorized", "caption 4 epsilon", Search(), pairwise=lambda scores: 2 * max(scores)),
    Case("fewer rows", "caption 5 zeta", SHORT, pairwise=fewer_rows),
]


def levels(world: World, case: Case) -> Thresholds:
    """The case's three thresholds, from the oracle alone."""
    scores = world.oracle.pairwise(case.caption)
    pairwise = case.pairwise(scores)
    if case.kind == "unmemorized":
        return Thresholds(pairwise, 0.5, 0.5)
    # Every score is low enough for these levels: one try, and all layers go at once.
    first = world.oracle.find(
        case.caption,
        (world.means, world.stds),
        tau_pairwise=pairwise,
        tau_initial=2.0,
        tau_refinement=2.0,
        theta=case.search.initial_theta,
        k=case.search.initial_k,
    )
    fall = 1 - first["initial_score"]
    assert fall > 1e-4, "blocking must matter"
    return Thresholds(pairwise, 1 - case.initial * fall, 1 - case.refinement * fall)


@pytest.fixture(scope="module")
def solved(world: World) -> Callable[[int], tuple[Thresholds, dict[str, Any]]]:
    """The oracle's answer to a case, computed once for both of our methods."""
    known: dict[int, tuple[Thresholds, dict[str, Any]]] = {}

    def solve(number: int) -> tuple[Thresholds, dict[str, Any]]:
        if number not in known:
            case = CASES[number]
            thresholds = levels(world, case)
            found = world.oracle.find(
                case.caption,
                (world.means, world.stds),
                tau_pairwise=thresholds.pairwise,
                tau_initial=thresholds.initial,
                tau_refinement=thresholds.refinement,
                theta=case.search.initial_theta,
                step=case.search.theta_step,
                min_theta=case.search.min_theta,
                k=case.search.initial_k,
            )
            known[number] = thresholds, found
        return known[number]

    return solve


def assert_is_of_its_kind(kind: str, found: dict[str, Any]) -> None:
    assert found["closest"] > ROUNDING, "a decision of this case hangs on rounding; change it"
    if kind == "unmemorized":
        assert not found["memorized"]
        return
    assert found["memorized"]
    initial, refined = (sum(map(len, found[name])) for name in ("initial", "refined"))
    assert 0 < refined < initial, "refinement both keeps and drops"
    if kind == "threshold":
        assert not found["fell_back"] and len(found["rows"]) == ROWS
        assert sum(bool(layer) for layer in found["refined"]) >= 2, "neurons in several layers"
    if kind == "fall-back":
        assert found["fell_back"] and initial >= 30
    if kind == "fewer rows":
        assert 0 < len(found["rows"]) < ROWS


@pytest.mark.parametrize("method", ["plain", "exact"])
@pytest.mark.parametrize("number", range(len(CASES)), ids=[f"{c.kind}: {c.caption}" for c in CASES])
def test_finds_what_the_oracle_finds(
    world: World,
    solved: Callable[[int], tuple[Thresholds, dict[str, Any]]],
    number: int,
    method: str,
) -> None:
    case = CASES[number]
    thresholds, expected = solved(number)
    assert_is_of_its_kind(case.kind, expected)
    found = world.ours(case.caption, method, case.search, thresholds)
    np.testing.assert_allclose(found.pairwise.numpy(), expected["pairwise"], atol=1e-5)
    assert found.rows == expected["rows"]
    if case.kind == "unmemorized":
        assert found.outcome is None and found.evaluations == 1
        return
    assert found.outcome is not None
    assert found.outcome.initial == expected["initial"]
    assert found.outcome.refined == expected["refined"]
    assert found.outcome.fell_back == expected["fell_back"]
    assert found.outcome.initial_score == pytest.approx(expected["initial_score"], abs=1e-5)
    assert found.outcome.refined_score == pytest.approx(expected["refined_score"], abs=1e-5)


def test_the_oracle_is_independent() -> None:
    source = (Path(__file__).parent / "oracle.py").read_text(encoding="utf-8")
    imports = [line for line in source.splitlines() if line.startswith(("import ", "from "))]
    assert imports and not any("utils" in line or "small_models" in line for line in imports)
