"""The benchmarks of calibration and precision count what they say they count."""

import argparse
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy import stats

from benchmarks import benchmark_calibration as calibration
from benchmarks import benchmark_precision as precision
from benchmarks import benchmark_processes as processes
from utils.files import read_prompts, read_table, write_table
from utils.stable_diffusion import Model

NULL = 20


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
    assert (found.prompts, found.decisions) == (1, 2 + len(asked.sets))
    assert len(found.cells()) + 2 == len(precision.COLUMNS)
    noise = max(found.batching, found.replay, found.single_rows)
    if dtype == "float32":
        assert found.to_float32 == 0 and found.flips == 0 and found.same_answers == 1
        assert noise < 1e-5
    else:
        assert 0 < found.to_float32 < 0.1
        assert found.same_answers == (found.flips == 0)


def by_two_processes(
    folder: Path, patch: pytest.MonkeyPatch, cells: Callable[[processes.Way], str]
) -> list[dict[str, str]]:
    """The table of three ways whose runs take 10 s to start and then 2 s a prompt, shared by what
    does it; ``cells`` is what a way finds."""

    def run(way: processes.Way, args: object, dataset: Path, output: Path) -> float:
        prompts = read_prompts(dataset)
        rows = [[prompt.caption, cells(way)] for prompt in prompts]
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
    assert [row["same_sets"] for row in (one, threads, two)] == ["1.000", "0.000", "1.000"]
    with pytest.raises(AssertionError, match="wrote other bytes"):
        by_two_processes(tmp_path / "b", monkeypatch, lambda way: f"[[{way.processes}]]")
