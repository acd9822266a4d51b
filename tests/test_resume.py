"""Killed and continued: every script ends with the bytes of an undisturbed run."""

import csv
import io
import json
import random
from pathlib import Path

import kill_many
import pytest
import workspace
from kill_many import RUNS, Run
from workspace import Warm

# Units on the disk at which a run is killed, after some random milliseconds; None: as it starts.
# 20 kills in all, 17 of them between the first and the last unit.
PLAN: dict[str, tuple[int | None, ...]] = {
    "1": (None, 100, 300),
    "1 --no_statistics": (50, 300, 301),
    "2": (2, 6, 12),
    "3": (None, 1, 3, 7, 10),
    "3 --detect_only": (1, 6, 12),
    "4": (None, 2, 6),
}
killed: dict[str, list[int | None]] = {}  # run -> units on the disk at each kill


@pytest.fixture(scope="module")
def undisturbed(warm: Warm, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Run -> a folder where it ran through."""
    folders = {}
    for run in RUNS:
        folder = kill_many.prepared(tmp_path_factory.mktemp("undisturbed") / "workspace")
        done = warm.run(run.script, *run.options, cwd=folder)
        assert done.returncode == 0, done.stderr
        folders[run.name] = folder
    return folders


@pytest.mark.parametrize("run", RUNS, ids=lambda run: run.name)
def test_a_killed_run_ends_with_the_same_bytes(
    run: Run, warm: Warm, undisturbed: dict[str, Path], tmp_path: Path
) -> None:
    folder = kill_many.prepared(tmp_path / "workspace")
    moments = random.Random(run.name)
    kills = killed[run.name] = []
    for number, at in enumerate(PLAN[run.name]):
        delay = moments.uniform(0, 0.4 if at is None else 0.03)
        units = kill_many.kill(warm, run, folder, first=number == 0, at=at, delay=delay)
        assert units is not None, f"ended before it could be killed at {at} units"
        assert units >= max([0, *kills]), "what was done is kept"
        kills.append(units)
    pictures = [*folder.glob("out/images/img_*.jpg")]
    times = [path.stat().st_mtime_ns for path in pictures]
    begun = kill_many.finish(warm, run, folder)
    assert times == [path.stat().st_mtime_ns for path in pictures], "no picture is made twice"
    assert run.script == 4 or begun == units, "no row is computed twice"
    kill_many.assert_same(folder, undisturbed[run.name])
    if run.name == "3":  # what killed runs took counts; equal captions are computed once
        record = json.loads((folder / "out/result.json").read_text(encoding="utf-8"))
        assert record["cost"]["all"]["prompts"] == 12


def test_most_kills_hit_between_the_first_and_the_last_unit() -> None:
    if killed.keys() != PLAN.keys():
        pytest.skip("counts the kills of the whole file, which has not run")
    totals = {run.name: run.total for run in RUNS}
    assert sum(map(len, killed.values())) == 20
    between = sum(0 < units < totals[name] for name, at in killed.items() for units in at)
    assert between >= 15, killed


@pytest.mark.parametrize("run", RUNS, ids=lambda run: run.name)
def test_a_finished_run_is_left_alone(run: Run, warm: Warm, undisturbed: dict[str, Path]) -> None:
    folder = undisturbed[run.name]
    before = workspace.tree(folder)
    done = warm.run(run.script, *run.options, "--continue_run", cwd=folder)
    assert (done.returncode, done.stderr) == (0, "")
    assert "complete already" in done.stdout
    assert workspace.tree(folder) == before


# (The running sums of script 1 are replaced as a whole; there is no half of them.)
@pytest.mark.parametrize("name", ["1 --no_statistics", "2"])
def test_half_a_row_of_numbers_is_redone(
    name: str, warm: Warm, undisturbed: dict[str, Path], tmp_path: Path
) -> None:
    run = next(run for run in RUNS if run.name == name)
    folder = kill_many.prepared(tmp_path / "workspace")
    assert kill_many.kill(warm, run, folder, first=True, at=3, delay=0) is not None
    (partial,) = (path for path in (folder / "out").glob(".*") if path.suffix != ".partial")
    with partial.open("ab") as file:
        file.write(b"\x01\x02\x03\x04\x05")
    kill_many.finish(warm, run, folder)
    kill_many.assert_same(folder, undisturbed[run.name])


# Tables. No prompt is memorized at a threshold of 1, so rows take milliseconds.

UNMEMORIZED = Run(
    "3 without a search",
    3,
    (
        *("--version=model", "--dataset=few.csv", "-o=out/result.csv", *workspace.NOISE),
        "--pairwise_ssim_threshold=1",
    ),
    lambda out: 0,
    5,
)
FEW = 'Caption;URL\nNA;u0\n"two\nlines; ""a"" b";u1\nNA;u2\n"c\rd";u3\n x ;u4\n'


@pytest.fixture(scope="module")
def interrupted(warm: Warm, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes]:
    """(folder, table) of a finished run whose record says that it is not."""
    folder = workspace.fresh(tmp_path_factory.mktemp("table") / "workspace")
    (folder / "few.csv").write_bytes(FEW.encode())
    done = warm.run(UNMEMORIZED.script, *UNMEMORIZED.options, cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder, (folder / "out" / "result.csv").read_bytes()


def leave(folder: Path, data: bytes | None) -> None:
    """Puts a table as a killed run leaves it."""
    record = folder / "out" / "result.json"
    content = {**json.loads(record.read_text()), "finished": False}
    record.write_text(json.dumps(content))
    if data is None:
        (folder / "out" / "result.csv").unlink()
    else:
        (folder / "out" / "result.csv").write_bytes(data)


CUTS = {
    "no table yet": lambda data: None,
    "an empty table": lambda data: b"",
    "inside the header": lambda data: data[:11],
    "the header alone, without its line end": lambda data: data.split(b"\n")[0],
    "inside a quoted cell": lambda data: data[: data.index(b"two") + 2],
    "behind a line end inside quotes": lambda data: data[: data.index(b"\nlines") + 1],
    "between two quotes that stand for one": lambda data: data[: data.index(b'""a') + 1],
    "behind a carriage return inside quotes": lambda data: data[: data.index(b"\rd") + 1],
    "inside the last row": lambda data: data[:-3],
    "all but the last line end": lambda data: data[:-1],
    "rubbish behind the last whole row": lambda data: data[: data.index(b" x ")] + b'"ru\n;bb',
}


@pytest.mark.parametrize("name", CUTS)
def test_half_a_row_of_a_table_is_redone(
    name: str, interrupted: tuple[Path, bytes], warm: Warm
) -> None:
    folder, data = interrupted
    leave(folder, CUTS[name](data))
    kill_many.finish(warm, UNMEMORIZED, folder)
    assert (folder / "out" / "result.csv").read_bytes() == data
    assert len(kill_many.records(folder)) == 1


def test_equal_captions_are_computed_once_over_a_resume(
    interrupted: tuple[Path, bytes], warm: Warm
) -> None:
    folder, data = interrupted
    lines = data.decode().splitlines(keepends=True)
    marked = lines[1].replace("0.000000", "0.123456")  # what no computation gives
    leave(folder, (lines[0] + marked).encode())
    kill_many.finish(warm, UNMEMORIZED, folder)
    text = (folder / "out" / "result.csv").read_bytes().decode()
    rows = list(csv.DictReader(io.StringIO(text, newline=""), delimiter=";"))
    assert [row["Caption"] for row in rows] == ["NA", 'two\nlines; "a" b', "NA", "c\rd", " x "]
    marks = [row["Initial SSIM"] for row in rows]
    assert marks == ["0.123456", "0.000000", "0.123456", "0.000000", "0.000000"]
    assert [row["URL"] for row in rows] == ["u0", "u1", "u2", "u3", "u4"]


@pytest.mark.parametrize(
    ("words", "damage", "says"),
    [
        ("a row is missing", lambda lines: [lines[0], lines[-1]], "its 1 rows are not those"),
        ("a row is twice there", lambda lines: [*lines[:2], lines[1]], "its 2 rows are not those"),
        ("a cell too many", lambda lines: [lines[0], lines[1].replace("u0", "u0;")], "has 8 cells"),
        ("another header", lambda lines: ["Text" + lines[0][7:], *lines[1:]], "its columns are"),
    ],
)
def test_a_damaged_table_is_refused_before_anything_is_written(
    words: str, damage: object, says: str, interrupted: tuple[Path, bytes], warm: Warm
) -> None:
    folder, data = interrupted
    leave(folder, "".join(damage(data.decode().splitlines(keepends=True))).encode())
    before = workspace.tree(folder)
    done = warm.run(3, *UNMEMORIZED.options, "--continue_run", cwd=folder)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "out/result.csv" in done.stderr and says in done.stderr
    assert workspace.tree(folder) == before


def test_pictures_that_are_missing_are_made_again(
    warm: Warm, undisturbed: dict[str, Path], tmp_path: Path
) -> None:
    run = RUNS[-1]
    folder = kill_many.prepared(tmp_path / "workspace")
    done = warm.run(run.script, *run.options, cwd=folder)
    assert done.returncode == 0
    (folder / "out/images/img_0002_01.jpg").unlink()
    (folder / "out/images/.img_0002_01.jpg.partial").write_bytes(b"half a picture")
    kill_many.finish(warm, run, folder)
    kill_many.assert_same(folder, undisturbed[run.name])
