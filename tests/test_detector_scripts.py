"""The detector and attribution scripts as a user runs them, on the shipped and a small model."""

import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import workspace
from PIL import Image
from sklearn.metrics import roc_auc_score

from utils.errors import InputError
from utils.files import read_table
from utils.paper_runs import DISENTANGLEMENT, STEPS
from utils.word_pictures import draw_words

ROOT = Path(__file__).resolve().parent.parent
FEW = ("--samples_per_prompt=1", "--num_inference_steps=2")


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "metrics" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


Run = Callable[..., int]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Run:
    """(script, options) -> exit code, in this process."""

    def started(name: str, *options: object) -> int:
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, options)])
        module = script(name)
        return module.main(module.parse_args())

    return started


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to work in, with a small random model and prompts, two of them equal."""
    workspace.save_model(tmp_path / "model", broken=True)
    (tmp_path / "prompts.csv").write_text(workspace.MEMORIZED, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def cells(path: Path) -> list[dict[str, str]]:
    return read_table(path)[1]


# The way to the ROC curve, on the shipped model.


@pytest.mark.parametrize(
    ("detector", "further"),
    [
        ("text_conditional_noise", "Score First Step"),
        ("attention_entropy", "Score E"),
        ("pairwise_ssim", None),
    ],
)
def test_from_prompts_to_auroc(
    detector: str, further: str | None, run: Run, tmp_path: Path
) -> None:
    few = ("--samples_per_prompt=2",) if detector == "pairwise_ssim" else FEW
    files = {}
    for kind in ("memorized", "unmemorized"):
        files[kind] = tmp_path / f"{kind}.csv"
        prompts = ROOT / f"prompts/tiny_{kind}_prompts.csv"
        options = (f"--prompts={prompts}", "--rows=2-5", f"-o={files[kind]}", "--device=cpu", *few)
        code = run("compute_detector_scores", f"--detector={detector}", "--version=tiny", *options)
        assert code == 0
    columns = ["Row", "Caption", "Score", *([further] if further else [])]
    assert read_table(files["memorized"])[0] == columns
    assert [row["Row"] for row in cells(files["memorized"])] == ["2", "3", "4", "5"]
    for column in columns[2:]:
        output = tmp_path / f"detection {column}.csv"
        options = [f"--{kind}={path}" for kind, path in files.items()]
        options += [f"--score_column={column}", f"-o={output}", "--bootstrap=100"]
        assert run("compute_detection", *options) == 0
        scores = [[float(row[column]) for row in cells(path)] for path in files.values()]
        found = json.loads(output.with_suffix(".json").read_text())["detection"]["all"]
        area = roc_auc_score([1] * 4 + [0] * 4, np.concatenate(scores))
        assert found["auroc"] == pytest.approx(area, abs=1e-12)
    if detector == "pairwise_ssim":
        assert found["auroc"] == 1.0, "the shipped model memorizes these"


def test_scores_of_two_detectors_are_not_compared(run: Run, place: Path) -> None:
    for detector in ("text_conditional_noise", "attention_entropy"):
        options = ("--version=model", "--prompts=prompts.csv", "--rows=0-1", "--device=cpu", *FEW)
        run("compute_detector_scores", f"--detector={detector}", *options, f"-o={detector}.csv")
    with pytest.raises(ValueError, match="measured with detector = attention_entropy"):
        run(
            "compute_detection",
            "--memorized=text_conditional_noise.csv",
            "--unmemorized=attention_entropy.csv",
        )


# One run.

NOISE = ("--detector=text_conditional_noise", "--version=model", "--prompts=prompts.csv")


def test_equal_captions_undecided_ones_and_a_run_that_was_cut_off(run: Run, place: Path) -> None:
    prompts = place / "prompts.csv"
    prompts.write_text(prompts.read_text().replace("grey cat", "grey ~ cat"))
    assert run("compute_detector_scores", *NOISE, *FEW, "--device=cpu", "-o=a/a.csv") == 1
    whole = (place / "a/a.csv").read_bytes()
    table = cells(place / "a/a.csv")
    assert [row["Caption"] for row in table] == [
        "A lighthouse, winter",
        "NA",
        'Tea; "enamel" sign',
        " null ",
        "NA",
        "grey ~ cat on a red chair",
    ]
    assert table[1]["Score"] == table[4]["Score"] != table[0]["Score"]
    assert table[5]["Score"] == table[5]["Score First Step"] == ""
    record = json.loads((place / "a/a.json").read_text())
    assert record["undecided_rows"] == [5] and record["finished"]
    assert record["scores"]["Score"]["all"]["missing"] == 1
    # Again: nothing to do, and the same answer.
    options = (*NOISE, *FEW, "--device=cpu", "-o=a/a.csv", "--continue_run")
    assert run("compute_detector_scores", *options) == 1
    # Killed within its fourth row.
    end = [i for i, byte in enumerate(whole) if byte == ord("\n")][3]
    (place / "a/a.csv").write_bytes(whole[: end + 5])
    record["finished"] = False
    (place / "a/a.json").write_text(json.dumps(record))
    assert run("compute_detector_scores", *options) == 1
    assert (place / "a/a.csv").read_bytes() == whole
    # Other rows give these rows their scores all the same.
    assert (
        run("compute_detector_scores", *NOISE, *FEW, "--device=cpu", "--rows=2,4", "-o=b.csv") == 0
    )
    assert cells(place / "b.csv") == [table[2], table[4]]


def test_two_processes_write_what_one_writes(run: Run, warm: workspace.Warm, place: Path) -> None:
    options = (*NOISE, *FEW, "--device=cpu", "--rows=0-4")
    assert run("compute_detector_scores", *options, "-o=alone.csv") == 0
    script = ROOT / "metrics/compute_detector_scores.py"
    done = warm.together(script, *options, "-o=shared.csv", cwd=place)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Loading model") == 1
    assert (place / "shared.csv").read_bytes() == (place / "alone.csv").read_bytes()
    assert not list(place.glob(".shared.csv*"))


def test_dry_runs_write_nothing(run: Run, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = workspace.tree(place)
    assert run("compute_detector_scores", *NOISE, "--device=cpu", "--dry_run") == 0
    assert run("attribute_tokens", *NOISE[1:], "--device=cpu", "--dry_run") == 0
    said = capsys.readouterr().out
    assert "results/detectors/text_conditional_noise_model_prompts.csv" in said
    assert "results/attribution/model_prompts.csv" in said and "estimated time" in said
    assert workspace.tree(place) == before


# Token attribution.


def test_attribution_writes_tokens_and_pictures(run: Run, place: Path) -> None:
    prompts = place / "prompts.csv"
    prompts.write_text(prompts.read_text().replace("grey cat", "grey ~ cat"))
    options = (*NOISE[1:], *FEW, "--device=cpu", "--rows=1-2,4-5", "-o=t/tokens.csv")
    assert run("attribute_tokens", *options) == 1
    header, table = read_table(place / "t/tokens.csv")
    assert header == ["Row", "Position", "Token", "Score"]
    own = {row: [r for r in table if r["Row"] == row] for row in ("1", "2", "4", "5")}
    assert [r["Token"] for r in own["1"]] == ["n", "a</w>"]
    assert [r["Position"] for r in own["1"]] == ["1", "2"]
    assert "".join(r["Token"] for r in own["2"]).replace("</w>", " ") == 'tea ; " enamel " sign '
    assert [r["Score"] for r in own["1"]] == [r["Score"] for r in own["4"]] and not own["5"]
    assert all(float(r["Score"]) > 0 for r in table)
    assert json.loads((place / "t/tokens.json").read_text())["undecided_rows"] == [5]
    names = [f"row_{row:04d}.png" for row in (1, 2, 4)]
    assert sorted(path.name for path in (place / "t/tokens").iterdir()) == names
    whole = (place / "t/tokens.csv").read_bytes(), (place / "t/tokens/row_0002.png").read_bytes()
    # What was lost is made anew, to the same bytes.
    (place / "t/tokens/row_0002.png").unlink()
    assert run("attribute_tokens", *options, "--continue_run") == 1
    assert (place / "t/tokens/row_0002.png").read_bytes() == whole[1]
    (place / "t/tokens.csv").unlink()
    (place / "t/tokens/row_0002.png").unlink()
    assert run("attribute_tokens", *options, "--continue_run") == 1
    assert (place / "t/tokens.csv").read_bytes() == whole[0]
    assert (place / "t/tokens/row_0002.png").read_bytes() == whole[1]


def test_a_picture_of_words_is_read_in_grey(tmp_path: Path) -> None:
    words = [("low", 0.1), ("middle", 0.5), ("high", 1.0), ("word" * 60, 0.3)]
    draw_words(words, tmp_path / "words.png", scale="what it is")
    with Image.open(tmp_path / "words.png") as picture:
        grey = np.asarray(picture.convert("L")).astype(int)
    assert grey.shape[1] > 900, "a long word is not cut off"
    # Just inside the upper left corner of each box, left of its letters.
    left, backgrounds = 20, []
    for _ in range(3):
        backgrounds.append(grey[24, left + 4])
        row = grey[24, left + 2 :]
        left += 2 + int(np.argmax(row == 255)) + 8
    assert backgrounds == sorted(backgrounds, reverse=True) and len(set(backgrounds)) == 3
    bar = grey[-20 - 14, 20:280]
    assert (np.diff(bar) <= 0).all() and bar[0] - bar[-1] > 120
    draw_words([], tmp_path / "none.png", scale="what it is")


# Refusals.

DETECTOR, ATTRIBUTION = "compute_detector_scores", "attribute_tokens"
TOKENS = NOISE[1:]
REFUSED: dict[str, tuple[str, tuple[str, ...], str]] = {
    "no such file": (DETECTOR, (*NOISE[:2], "--prompts=gone.csv"), "gone.csv: no such file"),
    "no such row": (DETECTOR, (*NOISE, "--rows=99"), "no row 99"),
    "no such column": (DETECTOR, (*NOISE, "--caption_column=Text"), "--caption_column"),
    "unknown detector": (DETECTOR, ("--detector=magic", *NOISE[1:]), "'attention_entropy'"),
    "unknown model": (DETECTOR, (NOISE[0], "--version=none", NOISE[2]), "--version none"),
    "protocol without effect": (DETECTOR, (*NOISE, "--protocol=paper"), "no effect"),
    "no guidance": (DETECTOR, (*NOISE, "--guidance_scale=1"), "above 1"),
    "no image": (DETECTOR, (*NOISE, "--samples_per_prompt=0"), "is not within 1"),
    "no pair": (
        DETECTOR,
        ("--detector=pairwise_ssim", *NOISE[1:], "--samples_per_prompt=1"),
        "at least two images",
    ),
    "output exists": (DETECTOR, (*NOISE, "-o=prompts.csv"), "exists already"),
    "output is the record": (DETECTOR, (*NOISE, "-o=a.json"), "name of the record"),
    "attribution without guidance": (ATTRIBUTION, (*TOKENS, "--guidance_scale=1"), "give more"),
    "attribution with a protocol": (ATTRIBUTION, (*TOKENS, "--protocol=paper"), "no effect"),
    "pictures' folder has the table's name": (ATTRIBUTION, (*TOKENS, "-o=a"), "folder"),
    "attribution over another output": (ATTRIBUTION, (*TOKENS, "-o=prompts.csv"), "exists already"),
}


def test_more_steps_than_timesteps_are_refused_before_anything_is_written(
    run: Run, place: Path
) -> None:
    path = place / "model/scheduler/scheduler_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "num_train_timesteps": 40}))
    before = workspace.tree(place)
    for name, options in (
        (DETECTOR, NOISE),
        (ATTRIBUTION, TOKENS),
        ("compute_disentanglement", TOKENS),
    ):
        with pytest.raises(InputError, match="50 steps asked for, but the model has 40 timesteps"):
            run(name, *options, "--device=cpu")
    assert workspace.tree(place) == before


def test_the_tables_take_what_the_metrics_do_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, options, wanted in (
        ("compute_disentanglement", (), DISENTANGLEMENT),
        (DETECTOR, NOISE, {"num_inference_steps": STEPS}),
    ):
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *options])
        given = vars(script(name).parse_args())
        assert {option: given[option] for option in wanted} == wanted


def test_refusals_are_one_line_before_torch_and_write_nothing(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (place / "guard").mkdir()
    (place / "guard/torch.py").write_text("raise SystemExit('torch was imported')")
    monkeypatch.setenv("PYTHONPATH", str(place / "guard"))
    before = workspace.tree(place)
    for case, (name, options, said) in REFUSED.items():
        path = ROOT / "metrics" / f"{name}.py"
        done = workspace.run(path, *options, "--device=cpu", cwd=place)
        assert done.returncode == 2 and done.stdout == "", f"{case}: {done.stderr}"
        assert said in done.stderr and done.stderr.count("\n") == 1, f"{case}: {done.stderr}"
    guarded = workspace.run(ROOT / f"metrics/{DETECTOR}.py", *NOISE, "--device=cpu", cwd=place)
    assert guarded.returncode == 1 and "torch was imported" in guarded.stderr
    assert workspace.tree(place) == before
