"""Calibrated classification: p-values and q-values from their definitions, and what they keep."""

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import metric_models
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy import stats
from workspace import run as command

from utils import calibration
from utils.errors import InputError

ROOT = Path(__file__).resolve().parent.parent

# Few distinct values, so that many are equal.
P_VALUES = st.lists(st.integers(1, 20).map(lambda n: n / 20), min_size=1, max_size=30)
SCORES = st.lists(st.integers(0, 9).map(lambda n: n / 9), min_size=1, max_size=30)


def plain_step_up(p: list[float], level: float) -> set[int]:
    """Benjamini and Hochberg as in their paper: the largest k with p_(k) <= k level / n."""
    order = sorted(range(len(p)), key=lambda i: p[i])
    largest = 0
    for k, i in enumerate(order, start=1):
        if p[i] <= k * level / len(p) + 1e-12:
            largest = k
    return set(order[:largest])


@given(P_VALUES, st.sampled_from([0.01, 0.05, 0.1, 0.35, 0.9]))
@settings(max_examples=200, deadline=None)
def test_discoveries_are_the_step_up_procedures(p: list[float], level: float) -> None:
    q = calibration.q_values(p)
    assert q == pytest.approx(stats.false_discovery_control(p, method="bh"), abs=1e-12)
    found = np.flatnonzero(calibration.discoveries(q, level)).tolist()
    assert set(found) == plain_step_up(p, level)


@given(P_VALUES, st.randoms())
@settings(max_examples=100, deadline=None)
def test_q_values_follow_their_prompts_and_never_cross(p: list[float], random: Any) -> None:
    q = calibration.q_values(p)
    order = list(range(len(p)))
    random.shuffle(order)
    assert calibration.q_values([p[i] for i in order]) == pytest.approx(q[order], abs=0)
    assert all((p[i] < p[j]) <= (q[i] <= q[j]) for i in order for j in order)
    assert all(q[i] == q[j] for i in order for j in order if p[i] == p[j])
    assert (q >= np.array(p) - 1e-15).all() and (q <= 1).all()


@given(st.integers(0, 9).map(lambda n: n / 9), SCORES, st.randoms())
@settings(max_examples=100, deadline=None)
def test_a_p_value_is_a_rank(score: float, null: list[float], random: Any) -> None:
    expected = (1 + sum(other >= score for other in null)) / (1 + len(null))
    assert calibration.p_value(score, np.array(null)) == expected
    shuffled = random.sample(null, len(null))
    assert calibration.p_value(score, np.array(shuffled)) == expected
    assert calibration.p_value(score + 0.05, np.array(null)) <= expected
    assert calibration.p_value(score, np.array(null) + 0.05) >= expected


def test_what_is_equal_to_six_digits_is_a_tie() -> None:
    """A score that is written and read again has six digits."""
    assert calibration.p_value(0.123457, np.array([0.1234567])) == 1.0


def test_a_p_value_needs_numbers() -> None:
    for score, null in ((0.5, []), (np.nan, [0.1]), (0.5, [np.nan])):
        with pytest.raises(ValueError, match="finite"):
            calibration.p_value(score, np.array(null))


@pytest.mark.parametrize("fdr", [0.01, 0.05, 0.1, 0.2, 0.3])
def test_the_smallest_null_is_where_a_discovery_begins(fdr: float) -> None:
    m = calibration.smallest_null(fdr)
    for size, reachable in ((m, True), (m - 1, False)):
        p = calibration.p_value(1.0, np.zeros(size)) if size else 1.0
        assert calibration.discoveries(calibration.q_values([p] * 7), fdr).all() == reachable
    for tested, null in ((24, 126), (10, 199), (1, 500), (50, 99)):
        needed = calibration.needed_together(tested, null, fdr)
        for top, found in ((needed, True), (needed - 1, False)):
            if 0 < top <= tested:
                p = [1 / (null + 1)] * top + [1.0] * (tested - top)
                q = calibration.q_values(p)
                assert calibration.discoveries(q, fdr).any() == found


def test_the_null_has_as_many_samples_and_references_as_the_prompt() -> None:
    generator = np.random.default_rng(0)
    matrices = [generator.random(shape) for shape in ((4, 3), (4, 1), (2, 3))]
    numbers = [[0, 1, 2, 3], [0, 1, 2, 3], [1, 3]]
    known = [calibration.Compared(*pair) for pair in zip(numbers, matrices, strict=True)]
    null = calibration.null_of_pictures(known)
    assert null([0, 1, 2, 3], 3).tolist() == [matrices[0].max()]
    assert null([0, 1], 1).tolist() == [m[:2, 0].max() for m in matrices[:2]]
    # of the same noises, wherever they stand
    expected = [m[[1, 3], 0].max() for m in matrices[:2]] + [matrices[2][:, 0].max()]
    assert null([1, 3], 1).tolist() == expected
    assert null([4], 1).size == 0
    null = calibration.null_of_scores([0.25, 0.5], [4, 2])
    assert null([0, 5], 1).tolist() == [0.25, 0.5]
    assert null([0, 1, 2], 1).tolist() == [0.25] and null([0], 2).size == 0


def test_a_noise_that_is_near_to_anything_makes_no_finding() -> None:
    """Sample 1 is nearer to all references than sample 0; a prompt that has it alone is compared
    with those."""
    never = [calibration.Compared([0, 1], np.array([[0.1], [0.5 + i / 100]])) for i in range(30)]
    alone = calibration.Compared([1], np.array([[0.6]]))
    found, summary = calibration.calibrate([alone], calibration.null_of_pictures(never), 0.2)
    assert found[0][0] == f"{(1 + 20) / 31:.6f}" and found[0][2] == "not shown"
    assert summary["null"] == 30


def test_a_prompt_whose_null_is_too_small_is_refused() -> None:
    never = [calibration.Compared([0, 1], np.full((2, 1), 0.1)) for _ in range(18)]
    never += [calibration.Compared([1], np.full((1, 1), 0.1)) for _ in range(2)]
    null = calibration.null_of_pictures(never)
    one = calibration.Compared([1], np.ones((1, 1)))
    both = calibration.Compared([0, 1], np.ones((2, 1)))
    nothing = calibration.Compared([], np.empty((0, 1)))
    found, summary = calibration.calibrate([one, nothing], null, 0.05)
    assert (found[0][2], found[1][2]) == ("memorized", "")
    assert (summary["null"], summary["tested"]) == (20, 1)
    with pytest.raises(InputError, match="18 never-trained prompts have samples 0, 1 and 1 ref"):
        calibration.calibrate([one, both], null, 0.05)
    found, summary = calibration.calibrate([one, both], null, 0.2)
    assert summary["null"] == 18 and summary["smallest_p"] == 1 / 19


def test_as_many_are_found_together_as_are_said_and_not_all_of_the_smallest_p() -> None:
    """Thirty with the second smallest p, of 74 tested against 100."""
    assert calibration.needed_together(74, 100, 0.05) == 15
    q = calibration.q_values([2 / 101] * 30 + [1.0] * 44)
    assert calibration.discoveries(q, 0.05).sum() == 30


def test_the_realised_rate_is_within_the_nominal_one_and_something_is_found() -> None:
    """Scores with ties, one null for all prompts of a draw, as it is used."""
    generator = np.random.default_rng(7)
    level, draws, never, memorized = 0.1, 1500, 30, 10
    false, power = [], []
    for _ in range(draws):
        null = generator.normal(0, 1, 99).round(1)
        scores = np.append(generator.normal(0, 1, never), generator.normal(3, 1, memorized))
        p = [calibration.p_value(score, null) for score in scores.round(1)]
        found = calibration.discoveries(calibration.q_values(p), level)
        false.append(found[:never].sum() / max(1, found.sum()))
        power.append(found[never:].mean())
    error = np.std(false) / np.sqrt(draws)
    # Expected: the share of never-trained prompts times the level, a little less by ties.
    assert np.mean(false) <= level * never / (never + memorized) + 3 * error
    assert np.mean(false) > level / 3, "and it is not an empty promise"
    assert np.mean(power) > 0.4


# The script.


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "metrics" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(name: str, *flags: object, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    argv = [f"{name}.py", *map(str, flags), "--device=cpu", "--workers=0"]
    monkeypatch.setattr(sys, "argv", argv)
    module = script(name)
    args = module.parse_args()
    assert module.main(args) == 0
    return json.loads(args.output.with_suffix(".json").read_text())


NULL = 24  # never-trained references


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """Prompts 0 to 3 (a copy; unlike pictures; no training image; a copy of the second of two
    training images, one sample missing), and a null of unlike pictures."""
    lines = [f"caption {i};u{i};VM\n" for i in range(4)]
    (tmp_path / "prompts.csv").write_text("Caption;URL;type\n" + "".join(lines))
    lines = [f"never {i};u\n" for i in range(NULL)]
    (tmp_path / "never.csv").write_text("Caption;URL\n" + "".join(lines))
    shown: dict[str, object] = {
        f"img_{r:04d}_{s:02d}.jpg": (r, s) for r in range(4) for s in range(2)
    }
    del shown["img_0003_00.jpg"]
    metric_models.save_pictures(tmp_path / "shown", shown)
    originals: dict[str, object] = {f"{r:04d}_first_image.jpg": ("o", r) for r in (1, 3)}
    originals["0000_first_image.jpg"] = (0, 1)
    originals["0003_second_image.jpg"] = (3, 1)
    metric_models.save_pictures(tmp_path / "originals", originals)
    rows = range(NULL)
    names = {f"img_{r:04d}_{s:02d}.jpg": ("n", r, s) for r in rows for s in range(2)}
    metric_models.save_pictures(tmp_path / "null", names)
    fresh = {f"{r:04d}_{nth}_image.jpg": ("f", r, nth) for r in rows for nth in ("first", "second")}
    metric_models.save_pictures(tmp_path / "fresh", fresh)
    metric_models.save_torchscript(tmp_path / "sscd.pt")
    return tmp_path


def flags(place: Path, *more: object, out: str = "types") -> list[object]:
    return [
        f"-f={place / 'shown'}",
        f"-r={place / 'originals'}",
        f"-p={place / 'prompts.csv'}",
        f"--sscd_weights={place / 'sscd.pt'}",
        f"-o={place / out}.csv",
        *more,
    ]


def pictures(place: Path) -> list[str]:
    return [f"--null={place / 'null'}", f"--null_reference={place / 'fresh'}"]


def vectors(place: Path, folder: str, names: list[str]) -> list[np.ndarray]:
    """What the network says of pictures decoded and resized here, each of length 1."""
    network = torch.jit.load(str(place / "sscd.pt"))
    found = []
    for name in names:
        with Image.open(place / folder / name) as file:
            image = file.convert("RGB").resize((320, 320), Image.Resampling.BILINEAR)
        pixels = (np.asarray(image) / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
        batch = torch.tensor(pixels.transpose(2, 0, 1), dtype=torch.float32)[None]
        vector = network(batch)[0].detach().double().numpy()
        found.append(vector / np.linalg.norm(vector))
    return found


def largest(place: Path, shown: list[str], references: list[str], *folders: str) -> float:
    first, second = (
        vectors(place, folder, names)
        for folder, names in zip(folders, (shown, references), strict=True)
    )
    return max(float(a @ b) for a in first for b in second)


def cells(path: Path) -> list[dict[str, str]]:
    head, *rows = (line.split(";") for line in path.read_text().splitlines())
    return [dict(zip(head, row, strict=True)) for row in rows]


def test_p_and_q_values_beside_the_fixed_class(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = flags(place, "--calibrated", *pictures(place), "--fdr=0.15")
    found = run("classify_memorization", *options, monkeypatch=monkeypatch)

    def null(samples: list[int], references: int) -> list[float]:
        kinds = ("first", "second")[:references]
        return [
            largest(
                place,
                [f"img_{r:04d}_{s:02d}.jpg" for s in samples],
                [f"{r:04d}_{nth}_image.jpg" for nth in kinds],
                *("null", "fresh"),
            )
            for r in range(NULL)
        ]

    folders = ("shown", "originals")
    one = largest(
        place, [f"img_0001_{s:02d}.jpg" for s in range(2)], ["0001_first_image.jpg"], *folders
    )
    kinds = ("0003_first_image.jpg", "0003_second_image.jpg")
    three = largest(place, ["img_0003_01.jpg"], list(kinds), *folders)
    scores = [(1.0, null([0, 1], 1)), (one, null([0, 1], 1)), (three, null([1], 2))]
    p = [(1 + sum(other >= score - 1e-6 for other in some)) / (1 + NULL) for score, some in scores]
    assert p[0] == p[2] == 1 / (1 + NULL) < p[1]
    q = stats.false_discovery_control(p, method="bh")
    rows = cells(place / "types.csv")
    shown = [(float(rows[i]["P Value"]), float(rows[i]["Q Value"])) for i in (0, 1, 3)]
    assert shown == [pytest.approx(pair, abs=2e-6) for pair in zip(p, q, strict=True)]
    assert [row["Decision"] for row in rows] == [
        "memorized",
        "memorized" if q[1] <= 0.15 else "not shown",
        "",
        "memorized",
    ]
    assert rows[2]["P Value"] == rows[2]["Q Value"] == "", "no training image, no p-value"
    assert [row["type"] for row in rows][::3] == ["VM", "VM"] and rows[2]["type"] == ""
    known = found["calibration"]
    assert (known["tested"], known["of_prompts"], known["null"]) == (3, 4, NULL)
    assert known["smallest_p"] == 1 / (1 + NULL)
    assert known["memorized"] == sum(row["Decision"] == "memorized" for row in rows)
    said = capsys.readouterr().out
    assert "3 of 4 prompts have pictures and a reference" in said
    assert f"smallest p {1 / (1 + NULL):.4f}" in said
    # Without it nothing changes but the columns that are missing.
    run("classify_memorization", *flags(place, out="plain"), monkeypatch=monkeypatch)
    head = list(cells(place / "plain.csv")[0])
    assert cells(place / "plain.csv") == [{name: row[name] for name in head} for row in rows]
    assert list(rows[0]) == [*head, "P Value", "Q Value", "Decision"]


def test_a_null_from_a_table_ranks_like_its_pictures(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The table that compute_sscd_orig writes for the null's pictures; one reference counts."""
    common = [f"--sscd_weights={place / 'sscd.pt'}", "--num_ref_samples=1"]
    orig = [f"-f={place / 'null'}", f"-r={place / 'fresh'}", f"-p={place / 'never.csv'}"]
    table = place / "null_scores.csv"
    run("compute_sscd_orig", *orig, *common, f"-o={table}", monkeypatch=monkeypatch)
    options = flags(place, "--calibrated", f"--null={table}", "--fdr=0.2", common[1], out="table")
    run("classify_memorization", *options, monkeypatch=monkeypatch)
    options = flags(place, "--calibrated", *pictures(place), "--fdr=0.2", "--num_ref_samples=1")
    run("classify_memorization", *options, monkeypatch=monkeypatch)
    table_rows, picture_rows = cells(place / "table.csv"), cells(place / "types.csv")
    same = ("Max SSCD", "P Value", "Decision")
    for row in (0, 1, 2):  # row 3 has one sample, where the table's null is that of two
        assert [table_rows[row][name] for name in same[:2]] == [
            picture_rows[row][name] for name in same[:2]
        ]
    assert float(table_rows[3]["P Value"]) >= float(picture_rows[3]["P Value"])
    # A null of another network is refused.
    record = json.loads(table.with_suffix(".json").read_text())
    record["model"]["sscd nemo"]["sha256"] = "0" * 64
    table.with_suffix(".json").write_text(json.dumps(record))
    options = flags(place, "--calibrated", f"--null={table}", common[1], out="other")
    with pytest.raises(InputError, match="another network"):
        run("classify_memorization", *options, monkeypatch=monkeypatch)


@pytest.mark.parametrize(("row", "seeds"), [("²", "2"), ("0", "²"), ("1" * 10, "2")])
def test_rows_of_a_scan_are_whole_numbers(tmp_path: Path, row: str, seeds: str) -> None:
    """A superscript is a digit to Python, and no number."""
    scan = tmp_path / "scan.csv"
    text = f"Caption;URL;Score;Seed Rows;Row\na;;0.5;{seeds};{row}\n"
    scan.write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match="must be whole numbers"):
        script("classify_memorization").read_seen(scan, [])


def test_bad_input_is_said_and_nothing_is_written(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (place / "few.csv").write_text("Max;Samples;Row\n0.1;2;0\n;0;1\n0.2;2;2\n")
    (place / "odd.csv").write_text("Max;Samples;Row\nhigh;2;0\n")
    (place / "negative.csv").write_text("Max;Samples;Row\n0.1;-1;0\n")
    (place / "narrow.csv").write_text("Score;Row\n0.1;0\n")
    (place / "one.csv").write_text("Max;Samples;Row\n" + "".join(f"0.1;1;{i}\n" for i in range(30)))
    metric_models.save_pictures(place / "mixed", {"0000_first_image.jpg": (0, 1)})
    null = f"--null={place / 'null'}"
    cases: dict[str, tuple[list[str], str]] = {
        "no null": (["--calibrated"], "--calibrated needs --null"),
        "a null alone": ([null], "--null has no effect without --calibrated"),
        "a level alone": (["--fdr=0.1"], "--fdr has no effect without --calibrated"),
        "no references": (["--calibrated", null], "--null_reference"),
        "references of a table": (
            ["--calibrated", f"--null={place / 'one.csv'}", f"--null_reference={place / 'fresh'}"],
            "--null_reference has no effect",
        ),
        "several references and a table": (
            ["--calibrated", f"--null={place / 'one.csv'}", "--num_samples=1"],
            "add --num_ref_samples=1",
        ),
        "not there": (["--calibrated", f"--null={place / 'nothing'}"], "nothing"),
        "no such column": (["--calibrated", f"--null={place / 'narrow.csv'}"], "narrow.csv"),
        "not a number": (["--calibrated", f"--null={place / 'odd.csv'}"], "'high'"),
        "samples below 0": (["--calibrated", f"--null={place / 'negative.csv'}"], "'-1'"),
        "too few": (
            ["--calibrated", f"--null={place / 'few.csv'}"],
            "2 never-trained references; no p-value can be below 0.3333, and --fdr=0.05 needs 19",
        ),
        "too few samples": (
            ["--calibrated", f"--null={place / 'one.csv'}"],
            "--num_samples=1",
        ),
        "a training image": (
            ["--calibrated", null, f"--null_reference={place / 'mixed'}"],
            "is a training image",
        ),
    }
    before = sorted(place.rglob("*"))
    for case, (options, said) in cases.items():
        with pytest.raises(InputError) as caught:
            run("classify_memorization", *flags(place, *options), monkeypatch=monkeypatch)
        assert said in str(caught.value), f"{case}: {caught.value}"
    done = command(
        ROOT / "metrics" / "classify_memorization.py",
        *map(str, flags(place, "--calibrated", f"--null={place / 'few.csv'}")),
        cwd=place,
    )
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "needs 19" in done.stderr
    assert sorted(place.rglob("*")) == before
