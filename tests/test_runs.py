"""runs/paper.sh and runs/tiny.sh: commands that parse, in an order that works; how they run. And
what runs/demo_report.py makes of a demo."""

import argparse
import importlib.util
import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
from PIL import Image
from report_runs import picture

from utils import generation, mitigations
from utils.decisions import SCAN_COLUMNS
from utils.errors import InputError
from utils.files import write_table
from utils.images import image_name
from utils.neuron_sets import RESULT_COLUMNS, Result, result_cells
from utils.paper_plan import (
    command_for,
    counts_of_most_frequent,
    output_of,
    planned,
    shares_of_pruning,
)
from utils.paper_runs import PaperRuns
from utils.paper_settings import BLOCKED, BLOCKS, PAPER_PROTOCOL, SETTINGS, most_frequent, pruning
from utils.versions import resolve

ROOT = Path(__file__).resolve().parent.parent
VERSIONS = ("tiny", "v1-4", "v2-1")
# Options that name something to read.
READS = ("-f=", "-r=", "-p=", "-d=", "--prompts=", "--statistics=", "--threshold_file=")
READS += ("--memorized=", "--unmemorized=", "--unmemorized_prompts=", "--sscd_weights=")
READS += ("--clip_model=", "--originals=")
# Settings -> their options, where those have another name.
OPTIONS = {
    "theta_step": "theta_reduction_per_step",
    "use_top_k": "no_top_k",
    "use_theta": "no_theta",
    "relative": "rel_threshold_refinement",
}
DOWNLOADED = ("prompts/", "original_images")  # what prompts/download.py fetches


@pytest.fixture(scope="module")
def plans() -> dict[str, list[str]]:
    return {version: planned(version) for version in VERSIONS}


def script(path: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location("script", ROOT / path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("version", VERSIONS)
def test_every_command_parses(
    version: str, plans: dict[str, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the script's own parser; what script 4 is asked for, by its own checks of combinations."""
    loaded: dict[str, ModuleType] = {}
    for command in plans[version]:
        python, path, *options = shlex.split(command)
        assert python == "python"
        loaded.setdefault(path, script(path))
        monkeypatch.setattr(sys, "argv", [path, *options])
        args = loaded[path].parse_args()  # SystemExit names the option otherwise
        assert isinstance(args, argparse.Namespace)
        if path.startswith("4_"):
            generation.chosen_mode(args)
            generation.chosen_mitigation(args)
        if Path(path).stem != "download" and not path.startswith(("metrics/make_", "runs/")):
            assert args.continue_run, f"done stages would not be skipped: {command}"


@pytest.mark.parametrize("version", VERSIONS)
def test_every_input_is_there_before_it_is_read(version: str, plans: dict[str, list[str]]) -> None:
    source = resolve(version)
    made: set[Path] = set()
    for command in plans[version]:
        words = shlex.split(command)
        inputs = [Path(w.partition("=")[2]) for w in words if w.startswith(READS)]
        if "download.py" not in command:
            needs = {"2_": [], "3_": [source.threshold], "4_": []}
            inputs += next((n for start, n in needs.items() if f" {start}" in command), [])
        for path in inputs:
            downloaded = version != "tiny" and str(path).startswith(DOWNLOADED)
            assert path in made or downloaded or (ROOT / path).exists(), f"{path}: {command}"
        if (output := output_of(command, source)) is not None:
            made.add(output)


@pytest.mark.parametrize("version", VERSIONS)
def test_every_row_of_the_tables_has_its_command(version: str, plans: dict[str, list[str]]) -> None:
    """The names that the tables read are those that the plan writes, with the settings that the
    tables check."""
    plan, source = plans[version], resolve(version)
    runs = PaperRuns(source, "published", Path(), [], Path())
    settings = [s for table in SETTINGS.values() for row in table.values() for s in row[:1]]
    settings += [*BLOCKS.values(), PAPER_PROTOCOL]
    assert len(shares_of_pruning(plan)) == 2
    settings += [pruning(share)[1] for share in shares_of_pruning(plan)]
    settings += [most_frequent(k, holdout=h) for k in counts_of_most_frequent(plan) for h in (0, 1)]
    written = {output_of(command, source): command for command in plan}

    def has(command: str, name: str, value: object, usual: object = None) -> bool:
        """Whether the command gives the option this value, or, the usual one, does not name it."""
        option = f"--{OPTIONS.get(name, name)}"
        if value == usual:
            return f"{option}=" not in command and option not in shlex.split(command)
        if isinstance(value, bool):
            return option in shlex.split(command)
        return f"{option}={value:g}" in command if isinstance(value, float | int) else False

    usual = {**BLOCKED.search, "mitigation": None}
    for setting in settings:
        pictures = written[runs.folder(setting.run)]
        for name, value in setting.pictures.items():
            if name == "mitigation_options":
                assert mitigation_options(pictures) == value, setting.run
                continue
            if name == "mode":
                found = value is None or f"--{value}" in pictures
            elif name == "mitigation" and value:
                found = f"--mitigation={value}" in pictures
            elif name == "k":
                found = value is None or f"={value}" in pictures
            else:
                found = has(pictures, name, value, usual.get(name))
            assert found, f"{setting.run}: {name} = {value}"
        if setting.neurons:
            search = written[runs.neurons_path(setting.neurons)]
            for name, value in setting.search.items():
                assert has(search, name, value, usual[name]), f"{setting.run}: {name} = {value}"
        metrics = ["sscd_gen", "diversity", "alignment"]
        if "holdout" not in setting.run:
            metrics.append("sscd_orig")
        for metric in metrics:
            assert runs.metric_path(metric, setting.run) in written


def mitigation_options(command: str) -> dict[str, object]:
    """All options of a command's method, as its record will have them."""
    words = dict(word.partition("=")[::2] for word in shlex.split(command))
    name = words["--mitigation"]
    settings = mitigations.parse(name, words.get("--mitigation_options"))
    return mitigations.described(name, settings)["mitigation_options"]


def stand_in(folder: Path, codes: dict[str, int]) -> Path:
    """A `python` that only writes down what it was asked for, and ends with a script's code. In
    sh, since a run asks two hundred times."""
    program, asked = folder / "python", shlex.quote(str(folder / "asked"))
    ends = "".join(f"*{shlex.quote(name)}*) exit {code} ;;\n" for name, code in codes.items())
    program.write_text(
        f"#!/bin/sh\n{{ printf '%s\\037' \"$@\"; echo; }} >> {asked}\n"
        f'echo "said by $1"\ncase "$*" in\n{ends}*) exit 0 ;;\nesac\n'
    )
    program.chmod(0o755)
    return program


def asked(folder: Path) -> list[list[str]]:
    return [line.split("\x1f")[:-1] for line in (folder / "asked").read_text().splitlines()]


@pytest.fixture
def tiny(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    def run(codes: dict[str, int], **more: str) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "FOLDER": str(tmp_path / "paper"), "LAUNCH": "", **more}
        return subprocess.run(
            ["sh", str(ROOT / "runs/tiny.sh"), str(stand_in(tmp_path, codes))],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )

    return run


def test_a_run_does_what_its_plan_says(
    tiny: Callable[..., subprocess.CompletedProcess[str]],
    tmp_path: Path,
    plans: dict[str, list[str]],
) -> None:
    done = tiny({})
    assert done.returncode == 0, done.stderr
    plan = [shlex.split(command)[1:] for command in plans["tiny"]]
    ended = asked(tmp_path)
    assert [line[:-1] for line in ended[-3:]] == [line[:-1] for line in plan[-3:]]
    assert ended[:-3] == plan[:-3]
    log = (tmp_path / "paper/log.txt").read_text()
    assert log.count("said by") == len(plan)
    assert done.stdout.count("\n") == len(plan) and "said by" not in done.stdout


def test_gaps_do_not_stop_a_run_but_show_at_its_end(
    tiny: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    done = tiny({"tiny_wanda": 1})
    assert done.returncode == 1
    assert asked(tmp_path)[-1][0] == "runs/collect.py"


def test_all_that_a_run_made_is_collected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Records of files and of folders; a download has none."""
    plan = [
        "python prompts/download.py prompts",
        "python 2_compute_pairwise_ssim.py -o=statistics/s.pt",
        "python 4_generate_images.py -o=generated_images/a",
        "python 4_generate_images.py -o=generated_images/not_made",
    ]
    monkeypatch.chdir(tmp_path)
    for record in ("statistics/s.json", "generated_images/a/config.json"):
        Path(record).parent.mkdir(parents=True)
        Path(record).write_text('{"settings": {}}')
    collect = script("runs/collect.py")
    monkeypatch.setattr(collect, "planned", lambda version: plan)
    assert collect.main(argparse.Namespace(version="v1-4", output=Path("out"))) == 0
    assert "4 commands, 2 records" in capsys.readouterr().out
    records = {str(p.relative_to("out")) for p in Path("out/records").rglob("*.json")}
    assert records == {"records/statistics/s.json", "records/generated_images/a/config.json"}
    assert Path("out/plan.txt").read_text().splitlines() == plan


def test_it_runs_from_anywhere(tmp_path: Path, plans: dict[str, list[str]]) -> None:
    for folder, name in ((tmp_path, ROOT / "runs/tiny.sh"), (ROOT / "runs", Path("tiny.sh"))):
        place = os.path.relpath(ROOT / "runs/tiny.sh", folder) if name.is_absolute() else str(name)
        done = subprocess.run(
            ["sh", place],
            cwd=folder,
            env={**os.environ, "PLAN": "1"},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.splitlines() == plans["tiny"]


@pytest.mark.parametrize("version", ["someone/-my.model_", "someone/sd_.v2__"])
def test_the_shell_names_a_model_as_python_does(version: str) -> None:
    tag = resolve(version).tag
    assert f"statistics/pairwise_ssim_{tag}.pt" in "\n".join(planned(version))


def test_published_statistics_are_not_mixed_with_others(tmp_path: Path) -> None:
    environment = {**os.environ, "PLAN": "1", "STATISTICS_PROMPTS": "my own.csv"}
    done = [
        subprocess.run(
            ["sh", str(ROOT / "runs/paper.sh")],
            env={**environment, "VERSION": version},
            capture_output=True,
            text=True,
            check=False,
        )
        for version in ("v1-4", "v1-5")
    ]
    assert done[0].returncode == 2 and "STATISTICS_PROMPTS" in done[0].stderr
    assert done[1].stdout.count("'--prompts=my own.csv'") == 3


def test_the_output_of_a_command_is_its_own_scripts() -> None:
    """A download writes nothing that a table reads: it is not the command that locates neurons."""
    source = resolve("v1-4")
    plan = planned("v1-4")
    assert output_of("python prompts/download.py prompts statistics", source) is None
    assert "3_detect_memorized_neurons.py" in command_for(source.results, plan, source)
    assert "--detect_only" in command_for(source.scores, plan, source)


def test_an_error_stops_a_run(
    tiny: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    done = tiny({"2_compute": 2})
    assert done.returncode == 2
    assert len(asked(tmp_path)) == 2
    assert "stopped with code 2" in done.stderr and "log.txt" in done.stderr


SHARED = (
    *("2_", "3_", "4_"),
    *("metrics/compute_detector_scores", "metrics/attribute_tokens"),
    "metrics/compute_disentanglement",
)


def test_a_launcher_starts_the_scripts_that_share_work(tmp_path: Path) -> None:
    stand_in(tmp_path, {})
    done = subprocess.run(
        ["sh", str(ROOT / "runs/paper.sh")],
        env={**os.environ, "PLAN": "1", "LAUNCH": "accelerate launch --num_processes=8"},
        capture_output=True,
        text=True,
        check=True,
    )
    for command in done.stdout.splitlines():
        shared = any(f" {name}" in command for name in SHARED)
        assert command.startswith("accelerate launch --num_processes=8 ") == shared, command


LAUNCHER = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]


def test_two_processes_share_work_on_the_small_model(
    tmp_path: Path, plans: dict[str, list[str]]
) -> None:
    python = stand_in(tmp_path, {})
    environment = {**os.environ, "FOLDER": str(tmp_path / "paper")}
    subprocess.run(
        ["sh", str(ROOT / "runs/tiny.sh"), str(python)],
        env={name: value for name, value in environment.items() if name != "LAUNCH"},
        capture_output=True,
        check=True,
    )
    shared = [line[4:] for line in asked(tmp_path) if line[:4] == LAUNCHER]
    plan = [shlex.split(command)[1:] for command in plans["tiny"]]
    assert shared == [line for line in plan if line[0].startswith(SHARED)]


@pytest.mark.parametrize(
    ("codes", "ends_with", "output"),
    [
        # The launcher fails, one process completes.
        ({"nproc_per_node=2 3_detect": 1}, 0, "-o=results/neurons_tiny/tau_mean.csv"),
        # Both find a gap.
        ({"tiny_wanda --continue_run": 1}, 1, "-o=generated_images/tiny_wanda"),
    ],
)
def test_what_a_launcher_leaves_one_process_does(
    codes: dict[str, int],
    ends_with: int,
    output: str,
    tiny: Callable[..., subprocess.CompletedProcess[str]],
    tmp_path: Path,
) -> None:
    done = tiny(codes, LAUNCH=f"{tmp_path}/python {' '.join(LAUNCHER)}")
    assert done.returncode == ends_with, done.stderr
    shared, alone = (line for line in asked(tmp_path) if output in line)
    assert shared == [*LAUNCHER, *alone]
    assert asked(tmp_path)[-1][0] == "runs/collect.py", "the rest was run"


def test_an_error_behind_a_launcher_stops_a_run(
    tiny: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    codes = {"nproc_per_node=2 2_compute": 1, "2_compute": 2}
    done = tiny(codes, LAUNCH=f"{tmp_path}/python {' '.join(LAUNCHER)}")
    assert done.returncode == 2
    assert [line[0] for line in asked(tmp_path)[-2:]] == ["-m", "2_compute_pairwise_ssim.py"]


DEMO = ("a red barn", "an old map")  # captions; the first is memorized


@pytest.fixture
def demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Runs the demo's report in a folder as runs/demo.sh leaves it, with two prompts."""
    monkeypatch.chdir(tmp_path)
    source = resolve("tiny")
    nothing: list[list[int]] = [[], []]
    results = [
        Result(0, DEMO[0], "", [[1, 2], [3]], 0.3, [[1], []], 0.2),
        Result(1, DEMO[1], "", nothing, 0.0, nothing, 0.0),
    ]
    prompts = Path(source.defaults.memorized_prompts)
    write_table(prompts, ["Caption", "type"], [[caption, "VM"] for caption in DEMO])
    write_table(source.results, RESULT_COLUMNS, map(result_cells, results))
    scan = [[caption, "", "0.5", 2, row] for row, caption in enumerate(DEMO)]
    write_table(source.scores, SCAN_COLUMNS, scan)
    for row in range(len(DEMO)):
        training = Path("tiny_model/training_images") / f"{row:04d}_first_image.jpg"
        picture(training, seed=row, side=64)
        for run in ("unblocked", "blocked"):
            shown = Path("generated_images") / f"tiny_{run}" / image_name(row, 0)
            picture(shown, seed=row, side=64)

    def report(*options: str) -> int:
        monkeypatch.setattr(sys, "argv", ["demo_report.py", *options])
        module = script("runs/demo_report.py")
        code: int = module.main(module.parse_args())
        return code

    return report


def test_the_demos_sheet_is_a_png(
    demo: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert demo("-o=new/sheet.png") == 0
    assert [path.name for path in Path("new").iterdir()] == ["sheet.png"]
    with Image.open("new/sheet.png") as sheet:
        assert sheet.format == "PNG"
    assert "1 of 2 prompts are memorized" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        demo("-o=other/sheet")
    assert "'other/sheet' does not end in .png" in capsys.readouterr().err


@pytest.mark.parametrize("part", ["results", "scores"])
def test_the_demo_shows_no_numbers_of_other_prompts(demo: Callable[..., int], part: str) -> None:
    path: Path = getattr(resolve("tiny"), part)
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    path.write_text("".join(lines[:2]), encoding="utf-8")
    with pytest.raises(InputError, match=f"{path}: no row 1"):
        demo()
    assert demo("--rows=0") == 0
    path.write_text("".join(lines).replace(DEMO[1], "another"), encoding="utf-8")
    with pytest.raises(InputError, match=f"{path}: row 1 has another caption"):
        demo()


def test_make_runs_it() -> None:
    done = subprocess.run(
        ["make", "--dry-run", "paper-tiny"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "sh runs/tiny.sh .venv/bin/python" in done.stdout
