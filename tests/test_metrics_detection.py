"""Detection against scikit-learn, on files of scripts 2 and 3; classification into VM, TM, none."""

import importlib.util
import json
import os
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
from hypothesis.extra import numpy as hnp
from PIL import Image
from sklearn import metrics as sklearn

from utils import detection_metrics as detection
from utils.errors import InputError

ROOT = Path(__file__).resolve().parent.parent


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "metrics" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(name: str, *flags: object, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, flags)])
    module = script(name)
    args = module.parse_args()
    assert module.main(args) == 0
    return json.loads(args.output.with_suffix(".json").read_text())


# Few distinct values: ties between and within the kinds.
TIED = hnp.arrays(np.float64, st.integers(1, 60), elements=st.integers(0, 12).map(lambda n: n / 12))


@given(TIED, TIED)
@settings(max_examples=150, deadline=None)
def test_every_figure_is_scikit_learns(memorized: np.ndarray, others: np.ndarray) -> None:
    labels = np.append(np.ones(len(memorized)), np.zeros(len(others)))
    scores = np.append(memorized, others)
    fpr, tpr, thresholds = sklearn.roc_curve(labels, scores, drop_intermediate=False)
    curve = detection.roc(memorized, others)
    assert curve.fpr == pytest.approx(fpr, abs=1e-12)
    assert curve.tpr == pytest.approx(tpr, abs=1e-12)
    assert curve.thresholds.tolist() == thresholds.tolist()
    found = detection.evaluate(memorized, others)
    assert found["auroc"] == pytest.approx(sklearn.roc_auc_score(labels, scores), abs=1e-12)
    best = max(sklearn.accuracy_score(labels, scores >= level) for level in thresholds)
    assert found["accuracy"] == pytest.approx(best, abs=1e-12)
    level = detection.best_accuracy(curve)[1]
    assert sklearn.accuracy_score(labels, scores >= level) == pytest.approx(best, abs=1e-12)
    for level in (0.0, 0.25, 0.3, 1.0, 2.0):
        right = sklearn.accuracy_score(labels, scores >= level)
        assert detection.accuracy_at(curve, level) == pytest.approx(right, abs=1e-12)
    assert found["tpr_at_1_fpr_below"] == pytest.approx(tpr[np.where(fpr < 0.01)[0][-1]])
    distance = np.abs(fpr - 0.01)
    nearest = tpr[np.isclose(distance, distance.min(), atol=1e-12)]
    assert (
        found["tpr_at_1_fpr_nearest"] in nearest.round(15)
        or np.isclose(nearest, found["tpr_at_1_fpr_nearest"]).any()
    )


def test_the_two_readings_of_tpr_at_one_percent() -> None:
    """500 other prompts: four false positives are below 1%, five are exactly 1%."""
    others = np.concatenate([[0.9, 0.8, 0.7, 0.6, 0.5], np.full(495, 0.1)])
    memorized = np.array([0.95, 0.85, 0.75, 0.65, 0.55, 0.45, 0.05])
    curve = detection.roc(memorized, others)
    found = detection.tpr_at_fpr(curve)
    assert found == {"below": 5 / 7, "nearest": 6 / 7}
    # 50 others: 0 and 2% are equally far from 1%, and the lower one counts.
    curve = detection.roc(memorized, np.concatenate([[0.9], np.full(49, 0.1)]))
    assert detection.tpr_at_fpr(curve) == {"below": 1 / 7, "nearest": 1 / 7}


def test_separated_and_equal_scores() -> None:
    apart = detection.evaluate(np.array([0.8, 0.9]), np.array([0.1, 0.2, 0.3]))
    assert set(apart.values()) == {1.0}
    same = detection.evaluate(np.full(4, 0.5), np.full(4, 0.5))
    assert same["auroc"] == 0.5 and same["tpr_at_1_fpr_below"] == 0
    with pytest.raises(ValueError, match="finite"):
        detection.roc(np.array([np.nan]), np.array([0.1]))


def test_the_interval_holds_its_value_and_forgets_the_order() -> None:
    generator = np.random.default_rng(3)
    memorized, others = generator.normal(1.5, 1, 80), generator.normal(0, 1, 120)
    found = detection.bootstrap(memorized, others, resamples=500)
    assert found == detection.bootstrap(memorized[::-1], others[::-1], resamples=500)
    value = detection.evaluate(memorized, others)["auroc"]
    low, high = found["auroc"]
    assert low < value < high
    # Hanley and McNeil's standard error of the area.
    q1, q2 = value / (2 - value), 2 * value**2 / (1 + value)
    spread = value * (1 - value) + 79 * (q1 - value**2) + 119 * (q2 - value**2)
    assert high - low == pytest.approx(2 * 1.96 * np.sqrt(spread / 80 / 120), rel=0.2)


def test_the_interval_of_the_accuracy_is_of_one_threshold() -> None:
    """Of 2 against 1 and 3 nothing is called memorized; resamples that another threshold would
    tell apart do not make the accuracy larger."""
    found = detection.bootstrap(np.array([2.0]), np.array([1.0, 3.0]), resamples=200)
    assert found["accuracy"] == pytest.approx([2 / 3, 2 / 3])
    assert found["auroc"] == [0.0, 1.0]


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Any]:
    """A scan of memorized prompts (ranked, one undecided) and a threshold file of others."""
    generator = np.random.default_rng(1)
    types = ["VM"] * 20 + ["TM"] * 20
    scores = np.append(generator.normal(0.8, 0.08, 20), generator.normal(0.45, 0.1, 20)).round(6)
    lines = [f"caption {i};u;{scores[i]:.6f};3;{i}\n" for i in np.argsort(-scores) if i != 7]
    scan = tmp_path / "scan.csv"
    scan.write_text("Caption;URL;Score;Seed Rows;Row\n" + "".join(lines) + "caption 7;u;;;7\n")
    prompts = tmp_path / "prompts.csv"
    prompts.write_text(
        "Caption;URL;type\n" + "".join(f"caption {i};u;{t}\n" for i, t in enumerate(types))
    )
    pairs = torch.tensor(generator.uniform(0, 0.6, (30, 6)), dtype=torch.float32)
    pairs[4, 2] = torch.nan
    torch.save({"scores": pairs, "rows": torch.arange(30)}, tmp_path / "others.pt")
    decided = [i for i in range(40) if i != 7]
    return {
        "flags": [
            f"--memorized={scan}",
            f"--unmemorized={tmp_path / 'others.pt'}",
            f"-p={prompts}",
            f"-o={tmp_path / 'out/detection.csv'}",
            "--bootstrap=200",
        ],
        "all": scores[decided],
        "VM": scores[[i for i in decided if i < 20]],
        "TM": scores[20:],
        "others": np.delete(pairs.max(dim=1).values.numpy(), 4),
        "folder": tmp_path,
    }


def test_detection_from_the_files_of_scripts_2_and_3(
    files: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = run("compute_detection", *files["flags"], monkeypatch=monkeypatch)
    for kind in ("all", "VM", "TM"):
        labels = np.append(np.ones(len(files[kind])), np.zeros(len(files["others"])))
        scores = np.append(files[kind], files["others"])
        values = found["detection"][kind]
        assert values["memorized"] == len(files[kind]) and values["unmemorized"] == 29
        area = sklearn.roc_auc_score(labels, scores)
        assert values["auroc"] == pytest.approx(area, abs=1e-12)
        right = sklearn.accuracy_score(labels, scores >= found["common_threshold"])
        assert values["accuracy_at_common"] == pytest.approx(right, abs=1e-12)
        low, high = values["intervals"]["auroc"]
        assert low <= values["auroc"] <= high
    assert found["detection"]["all"]["accuracy"] == found["detection"]["all"]["accuracy_at_common"]
    assert found["missing"] == {
        str(files["folder"] / "scan.csv"): ["row 7"],
        str(files["folder"] / "others.pt"): ["row 4"],
    }
    # What the paper's tables ask of this record.
    assert [Path(name).name for name in found["inputs"]][:2] == ["scan.csv", "others.pt"]
    assert found["settings"]["score_column"] == "Score"
    assert found["settings"]["caption_column"] == "Caption"
    folder = files["folder"] / "out"
    rows = (folder / "detection.csv").read_text().splitlines()
    assert len(rows) == 1 + 40 + 30
    assert sum(row.endswith(";") for row in rows) == 2, "what is undecided has an empty score"
    for kind in ("roc", "histogram"):
        with Image.open(folder / f"detection_{kind}.png") as picture:
            assert picture.width > 500 and len(set(picture.convert("L").getdata())) > 2
    said = capsys.readouterr().out
    assert "AUROC" in said and "against 29 unmemorized prompts" in said


def test_detection_refuses_what_cannot_be_compared(
    files: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = files["folder"]
    before = sorted(folder.rglob("*"))

    def refusal(*flags: str) -> str:
        with pytest.raises(InputError) as caught:
            run("compute_detection", *files["flags"], *flags, monkeypatch=monkeypatch)
        return str(caught.value)

    assert "--score_column" in refusal("--score_column=Other")
    (folder / "bad.csv").write_text("Score\nhigh\n")
    assert "'high'" in refusal(f"--memorized={folder / 'bad.csv'}")
    (folder / "bad.csv").write_text("Score;Row\n0.5;\u0662\n")
    assert "in column 'Row' is not a whole" in refusal(f"--memorized={folder / 'bad.csv'}")
    (folder / "bad.csv").write_text("Score;other\n0.5;0\n")
    assert "cannot be told apart" in refusal(f"--memorized={folder / 'bad.csv'}")
    (folder / "bad.csv").write_text("Score;Row\n0.5;40\n")
    assert "has no row 40" in refusal(f"--memorized={folder / 'bad.csv'}")
    (folder / "bad.csv").write_text("Score;Row;Caption\n0.5;3;caption 4\n")
    assert "row 3 has another caption" in refusal(f"--memorized={folder / 'bad.csv'}")
    (folder / "bad.csv").write_text("Score;Row\n;0\n")
    assert "no prompt in it has a score" in refusal(f"--memorized={folder / 'bad.csv'}")
    (folder / "bad.pt").write_bytes(b"no tensors")
    assert "not a file of script 2" in refusal(f"--memorized={folder / 'bad.pt'}")
    for name, protocol in (("scan", "published"), ("others", "paper")):
        record = {"settings": {"protocol": protocol}, "model": {"sha256": "1"}}
        (folder / f"{name}.json").write_text(json.dumps(record))
    assert "protocol" in refusal()
    for field in (
        "num_inference_steps",
        "guidance_scale",
        "exchanged_guidance",
        "dtype",
        "samples_per_prompt",
    ):
        for name, value in (("scan", 1), ("others", 2)):
            record = {"settings": {field: value}, "model": {"sha256": "1"}}
            (folder / f"{name}.json").write_text(json.dumps(record))
        assert field in refusal()
    record = {"settings": {"protocol": "published"}, "model": {"sha256": "1"}}
    (folder / "scan.json").write_text(json.dumps(record))
    record = {"settings": {"protocol": "published"}, "model": {"sha256": "2"}}
    (folder / "others.json").write_text(json.dumps(record))
    assert "model sha256" in refusal()
    (folder / "others.json").write_text(json.dumps({**record, "finished": False}))
    assert "others.pt: the run is not finished" in refusal()
    made = {folder / name for name in ("bad.csv", "bad.pt", "scan.json", "others.json")}
    assert set(folder.rglob("*")) - set(before) == made


def test_a_column_that_nothing_is_read_from_is_refused(
    files: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    without_prompts = [flag for flag in files["flags"] if not flag.startswith("-p=")]
    pairs = f"--memorized={files['folder'] / 'others.pt'}"
    for flags, said in (
        (["--caption_column=Caption"], "--caption_column has no effect without -p"),
        ([pairs, "--score_column=Score"], "--score_column has no effect without a CSV"),
    ):
        with pytest.raises(InputError, match=said):
            run("compute_detection", *without_prompts, *flags, monkeypatch=monkeypatch)
    assert not (files["folder"] / "out").exists()


def test_killed_while_it_writes_it_goes_on(
    files: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between any two of its files; in the end all have the bytes of a run that was not killed."""
    run("compute_detection", *files["flags"], monkeypatch=monkeypatch)
    folder = files["folder"] / "out"
    whole = {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix != ".json"}
    for files_written in range(1, 4):
        for path in folder.iterdir():
            path.unlink()
        left = iter(range(files_written))

        def replace(*paths: Path, own: Any = os.replace, left: Any = left) -> None:
            if next(left, None) is None:
                raise KeyboardInterrupt
            own(*paths)

        with monkeypatch.context() as killed:
            killed.setattr(os, "replace", replace)
            with pytest.raises(KeyboardInterrupt):
                run("compute_detection", *files["flags"], monkeypatch=monkeypatch)
        assert len(list(folder.iterdir())) == files_written
        run("compute_detection", *files["flags"], "--continue_run", monkeypatch=monkeypatch)
        assert whole.items() <= {path.name: path.read_bytes() for path in folder.iterdir()}.items()


# Classification.


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """Prompts: a copy, unlike pictures, no training image, not memorized, undecided, no picture."""
    types = ("VM", "VM", "TM", "TM", "TM", "VM")
    lines = [f"caption {i};u{i};{t}\n" for i, t in enumerate(types)]
    (tmp_path / "prompts.csv").write_text("Caption;URL;type\n" + "".join(lines))
    names = [f"img_{r:04d}_{s:02d}.jpg" for r in range(5) for s in range(2)]
    metric_models.save_pictures(tmp_path / "shown", dict(zip(names, range(10), strict=True)))
    originals: dict[str, object] = {f"{r:04d}_first_image.jpg": ("o", r) for r in (1, 3, 4, 5)}
    originals["0000_first_image.jpg"] = 1  # the picture of row 0, sample 1
    metric_models.save_pictures(tmp_path / "originals", originals)
    seen = [f"caption {i};u{i};0.5;{n};{i}\n" for i, n in enumerate((2, 2, 2, 0, "", 2))]
    (tmp_path / "scan.csv").write_text("Caption;URL;Score;Seed Rows;Row\n" + "".join(seen[::-1]))
    return tmp_path


def test_types_of_memorization(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = metric_models.save_torchscript(place / "sscd.pt")
    flags = [f"-f={place / 'shown'}", f"-r={place / 'originals'}", f"-p={place / 'prompts.csv'}"]
    flags += [f"--sscd_weights={weights}", "--device=cpu", "--workers=0"]
    scan, out = f"--scores={place / 'scan.csv'}", f"-o={place / 'types.csv'}"
    name = "classify_memorization"
    found = run(name, *flags, scan, out, monkeypatch=monkeypatch)
    rows = [line.split(";") for line in (place / "types.csv").read_text().splitlines()]
    assert rows[0] == ["Caption", "URL", "type", "Max SSCD", "Samples", "Row"]
    assert [row[2] for row in rows[1:]] == ["VM", "TM", "", "none", "", ""]
    assert rows[1][3] == "1.000000" and rows[3][3] == "" and rows[6][4] == "0"
    assert found["types"] == {"VM": 1, "TM": 1, "none": 1, "unknown": 3}
    assert found["against_prompt_file"]["VM"] == {"VM": 1, "TM": 1, "none": 0, "unknown": 1}
    assert found["undecided_rows"] == [4]
    assert found["missing"][str(place / "originals")] == ["row 2"]
    # Without the scan nothing is "none"; a result file of script 3 says the same as its scan.
    found = run(name, *flags, f"-o={place / 'more.csv'}", monkeypatch=monkeypatch)
    assert found["types"].keys() == {"VM", "TM", "unknown"} and found["types"]["unknown"] == 2
    for line in (place / "more.csv").read_text().splitlines()[1:]:
        kind, largest = line.split(";")[2:4]
        assert kind == ("" if not largest else "VM" if float(largest) > 0.7 else "TM")
    sets = ["[[1]]", "[[1]]", "[[1]]", "[[]]", "", "[[1]]"]
    scores = [0.2, 0.2, 0.2, 0, "", 0.2]
    cells = [
        f"caption {i};u;{s};{x};{s};{x};{i}\n"
        for i, (s, x) in enumerate(zip(sets, scores, strict=True))
    ]
    head = "Caption;URL;Initial Neurons;Initial SSIM;Refined Neurons;Refined SSIM;Row\n"
    (place / "results.csv").write_text(head + "".join(cells))
    scan, out = f"--scores={place / 'results.csv'}", f"-o={place / 'again.csv'}"
    run(name, *flags, scan, out, monkeypatch=monkeypatch)
    assert (place / "again.csv").read_bytes() == (place / "types.csv").read_bytes()
    (place / "scan.csv").write_text(
        (place / "scan.csv").read_text().replace("caption 3", "another")
    )
    with pytest.raises(InputError, match="another caption"):
        run(
            name,
            *flags,
            f"--scores={place / 'scan.csv'}",
            f"-o={place / 'x.csv'}",
            monkeypatch=monkeypatch,
        )
