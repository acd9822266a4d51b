"""What the benchmarks count and compare is what they say."""

import argparse
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats
from small_models import TEXT_WIDTH

from benchmarks import benchmark_calibration as calibration
from benchmarks import benchmark_full_size as full_size
from benchmarks import benchmark_generation as generation
from benchmarks import benchmark_localization as localization
from benchmarks import benchmark_precision as precision
from benchmarks import benchmark_processes as processes
from benchmarks import full_size_model, report
from utils.errors import InputError
from utils.files import read_prompts, read_table, write_table
from utils.localization import Outcome
from utils.passes import Graphs
from utils.stable_diffusion import Model

NULL = 20
WITH_NEURONS = 3  # prompts of a run that stands in for script 3's


def plain_draws(trained: np.ndarray, never: np.ndarray, level: float, count: int) -> list[float]:
    """Realised rates by scipy, over draws of its own."""
    random = np.random.default_rng(99)
    rates = []
    for _ in range(count):
        scores = np.array([random.choice(row) for row in random.permutation(never)])
        null, tested = scores[:NULL], np.append(scores[NULL:], trained)
        p = [(1 + (null >= score).sum()) / (NULL + 1) for score in tested]
        found = stats.false_discovery_control(p) <= level
        rates.append(found[: -len(trained)].sum() / max(1, found.sum()))
    return rates


def test_draws_count_what_is_found_wrongly_and_rightly() -> None:
    random = np.random.default_rng(0)
    never, trained = random.uniform(0, 0.5, (30, 3)), np.full(6, 0.9)

    def found(level: float | None, memorized: int = 6) -> calibration.Draws:
        return calibration.draws(
            trained, never, null=NULL, memorized=memorized, level=level, count=400
        )

    # 16 are tested, the smallest p is 1 / 21: at 0.05 all would have to have it, at 0.2 four.
    assert found(0.05).power.mean() == 0
    assert found(0.2).power.mean() == 1 and found(0.2, memorized=2).power.mean() < 0.5
    fixed = found(None)
    assert fixed.power.mean() == 1 and fixed.false.mean() == 0
    expected = plain_draws(trained, never, 0.2, 400)
    spread = (np.var(expected) / 400 + found(0.2).false.var() / 400) ** 0.5
    assert abs(found(0.2).false.mean() - np.mean(expected)) < 4 * spread
    cells = calibration.line(fixed, NULL, 10, 6, "-")
    assert len(cells) + 1 == len(calibration.COLUMNS) and cells[-1] == "1.000"


def test_drawings_are_new_and_the_same_every_time(tmp_path: Path) -> None:
    captions = ["Living leaf with case and snow", "Moon festival wallpaper"]
    for name in ("one", "two"):
        calibration.draw_pictures(tmp_path / name, captions, 3)
    drawn = [{p.name: p.read_bytes() for p in (tmp_path / n).iterdir()} for n in ("one", "two")]
    assert drawn[0] == drawn[1] and len(set(drawn[0].values())) == 6
    assert sorted(drawn[0])[0] == "img_0000_00.jpg"
    with Image.open(tmp_path / "one" / "img_0000_00.jpg") as picture:
        assert picture.size == (64, 64)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_precision_is_compared_with_float32(dtype: str, small_model: Callable[..., Model]) -> None:
    model = small_model("sd1")
    asked = precision.ask(model, "a caption", precision.ordinary(model), 2, None)
    assert asked.sets and len(asked.sets) == len(asked.scores) and asked.rows == [0, 1]
    asked = replace(asked, sets=asked.sets[:6], scores=asked.scores[:6])  # bfloat16 is slow here
    args = argparse.Namespace(samples=2, sets=2)
    found = precision.Found()
    other = model if dtype == "float32" else precision.in_precision(model, dtype)
    precision.compare(other, asked, args, 1e-5, found)
    assert (found.prompts, found.decisions) == (1, len(asked.sets))  # all seed rows count
    assert len(found.cells()) + 2 == len(precision.COLUMNS)
    noise = max(found.batching, found.replay, found.single_rows)
    if dtype == "float32":
        assert found.to_float32 == 0 and found.flips == 0 and found.same_answers == 1
        assert noise < 1e-5
    else:
        assert 0 < found.to_float32 < 0.1
        assert found.same_answers == (found.flips == 0)


def test_which_seed_rows_count_is_a_decision_where_there_is_a_threshold(
    small_model: Callable[..., Model],
) -> None:
    model = small_model("sd1")
    asked = precision.ask(model, "a caption", precision.ordinary(model), 2, None)
    asked = replace(asked, sets=asked.sets[:1], scores=asked.scores[:1])
    for pairwise, decisions, flips in ((precision.EVERY_ROW, 1, 0), (2.0, 3, 2)):
        found = precision.Found()
        args = argparse.Namespace(samples=2, sets=1)
        precision.compare(model, replace(asked, pairwise=pairwise), args, 1e-5, found)
        assert (found.decisions, found.flips) == (decisions, flips)


def test_all_fast_ways_restart_as_those_of_the_search(small_model: Callable[..., Model]) -> None:
    model = small_model("sd1")
    one = precision.Evaluations(model, "a caption", 2)
    sets: list[list[list[int]]] = [[[] for _ in model.value_layers] for _ in range(2)]
    sets[0][1], sets[1][-1] = [1, 5], [0, 2]
    runs: list[int] = []
    before_all_layers = model.unet.down_blocks[0].resnets[0].conv1
    handle = before_all_layers.register_forward_hook(lambda *_: runs.append(1))
    try:
        wanted = torch.stack([one.whole(neurons) for neurons in sets])
        assert len(runs) == 2
        ways = [
            one.together(sets),
            torch.stack([one.alone(neurons) for neurons in sets]),
            torch.stack([one.row_by_row(neurons) for neurons in sets]),
        ]
        assert len(runs) == 2
    finally:
        handle.remove()
    for found in ways:
        torch.testing.assert_close(found, wanted, atol=1e-4, rtol=0)


def by_two_processes(
    folder: Path, patch: pytest.MonkeyPatch, cells: Callable[[processes.Way], str]
) -> list[dict[str, str]]:
    """The table of three ways whose runs take 10 s to start and then 2 s a prompt, shared by what
    does it; ``cells`` is what a way finds for the first prompts, nothing is found for the rest."""

    def run(way: processes.Way, args: object, dataset: Path, output: Path) -> float:
        prompts = read_prompts(dataset)
        found = [cells(way) if prompt.row < WITH_NEURONS else "[[]]" for prompt in prompts]
        rows = [[prompt.caption, neurons] for prompt, neurons in zip(prompts, found, strict=True)]
        write_table(output, ["Caption", "Refined Neurons"], rows)
        return 10.0 * way.processes + 2.0 * len(prompts) / (way.processes * way.threads)

    patch.setattr(processes, "run", run)
    options = ("--prompts=12", "--repeats=1", f"-o={folder / 'results'}")
    patch.setattr("sys.argv", ["benchmark_processes.py", *options])
    processes.main(processes.parse_args())
    return read_table(folder / "results" / "processes.csv")[1]


def test_a_second_process_is_compared_without_and_with_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, threads, two = by_two_processes(tmp_path, monkeypatch, lambda way: f"[[{way.threads}]]")
    assert [row["ratio"] for row in (one, threads, two)] == ["1.00", "2.00", "2.00"]
    # 14 s of 34 s, 12 s of 22 s, 22 s of 32 s are the start.
    assert [row["ratio_with_start"] for row in (one, threads, two)] == ["1.00", "1.55", "1.06"]
    assert [row["start_seconds"] for row in (one, threads, two)] == ["14.0", "12.0", "22.0"]
    assert [row["same_bytes"] for row in (one, threads, two)] == ["yes", "no", "yes"]
    assert [row["with_neurons"] for row in (one, threads, two)] == ["3", "3", "3"]
    assert [row["same_sets"] for row in (one, threads, two)] == ["1.000", "0.000", "1.000"]
    with pytest.raises(AssertionError, match="wrote other bytes"):
        by_two_processes(tmp_path / "b", monkeypatch, lambda way: f"[[{way.processes}]]")


def test_prompts_without_neurons_in_either_way_are_not_the_same_sets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def found(way: processes.Way) -> str:
        return "[[7]]" if way.threads == 2 else "[[]]"

    one, threads, two = by_two_processes(tmp_path, monkeypatch, found)
    assert [row["with_neurons"] for row in (one, threads, two)] == ["0", "3", "0"]
    assert [row["same_sets"] for row in (one, threads, two)] == ["", "0.000", ""]


def test_full_size_passes_are_timed_when_they_are_played(
    small_model: Callable[..., Model], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a GPU plays them: those before the capture, and the captured one, do not count."""
    model, played, timed = small_model("sd1"), [0], []

    def capture(work: Callable[[], None]) -> Callable[[], None]:
        def play() -> None:
            played[0] += 1
            work()

        return play

    def seconds_of(work: Callable[[], object], device: str) -> float:
        before = played[0]
        work()
        timed.append(played[0] - before)
        return 1.0

    monkeypatch.setattr("utils.passes.changes_of", partial(Graphs, capture=capture))
    monkeypatch.setattr(report, "seconds_of", seconds_of)
    monkeypatch.setattr(full_size_model, "full_size_model", lambda device, dtype: model)
    monkeypatch.setattr(full_size_model, "matrix_rate", lambda *_: 1e12)
    monkeypatch.setattr(full_size_model, "TEXT", (77, TEXT_WIDTH))
    args = argparse.Namespace(device="cpu", dtype=None, batches=[2, 3], repeats=2)
    table = full_size.timings(args, whole=1e9)
    assert [row[0] for row in table.rows] == ["2", "3"]
    # For each batch whole passes and such from the mid block on: the last one that does not count,
    # and two that do.
    assert timed == [1] * (2 * 2 * 3)
    assert "forward" not in vars(model.unet)


def test_the_first_pictures_of_each_batch_do_not_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs: list[int] = []

    def seconds_of(work: "partial[None]", device: str) -> float:
        batch = work.args[2]
        runs.append(batch)
        return (9.0 if runs.count(batch) == 1 else 1.0) / batch

    monkeypatch.setattr(report, "seconds_of", seconds_of)
    monkeypatch.setattr("utils.stable_diffusion.load_model", lambda *_, **__: None)
    options = ("--prompts=4", "--batches=2", "--repeats=1", "--device=cpu")
    monkeypatch.setattr(
        "sys.argv", ["benchmark_generation.py", *options, f"-o={tmp_path / 'results'}"]
    )
    generation.main(generation.parse_args())
    assert sorted(runs) == [1, 1, 2, 2]
    _, rows = read_table(tmp_path / "results" / "generation.csv")
    assert [row["seconds"] for row in rows] == ["1.000", "0.500"]
    assert [row["ratio_to_one_prompt"] for row in rows] == ["1.00", "2.00"]


def test_a_threshold_of_zero_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[float] = []

    class NothingMemorized:
        def __init__(self, *_: object, tau: float, **__: object) -> None:
            taken.append(tau)

        def runs(self, *_: object) -> dict[str, localization.Run]:
            return {}

    for name in (
        "utils.records.check_statistics_record",
        "utils.activation_statistics.load_statistics",
        "utils.stable_diffusion.load_model",
    ):
        monkeypatch.setattr(name, lambda *_, **__: None)
    monkeypatch.setattr(localization, "Contest", NothingMemorized)
    options = ("--threshold=0", "--prompts=1", "--device=cpu", f"-o={tmp_path / 'results'}")
    monkeypatch.setattr("sys.argv", ["benchmark_localization.py", *options])
    with pytest.raises(InputError, match=r"memorized at 0\.0000"):
        localization.main(localization.parse_args())
    assert taken == [0]


def test_the_two_searches_of_a_prompt_are_told_apart(tmp_path: Path) -> None:
    runs = {"exact": localization.Run(3, 30, 0.5, Outcome([[1, 2]], 0.1, [[1]], 0.2, False))}
    selections = {"usual": {0: runs, 4: runs}, "lengthened": {0: runs}}
    localization.write_prompts(tmp_path / "prompts.csv", selections)
    _, rows = read_table(tmp_path / "prompts.csv")
    found = [(row["Row"], row["selection"], row["candidates"]) for row in rows]
    assert found == [("0", "usual", "2"), ("4", "usual", "2"), ("0", "lengthened", "2")]
