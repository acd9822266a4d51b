"""Several processes share a run: the same bytes as one, also where one of them dies."""

import argparse
import os
import re
import signal
import subprocess
import time
from datetime import timedelta
from pathlib import Path

import kill_many
import pytest
import workspace
from kill_many import RUNS, Run
from workspace import SCRIPTS, Warm

from utils import cli
from utils.cost_log import CostLog
from utils.decided_rows import DecidedRows
from utils.errors import InputError
from utils.files import Prompt, append_row, read_whole_rows
from utils.neuron_sets import RESULT_COLUMNS
from utils.team import Team, join

BY_NAME = {run.name: run for run in RUNS}
COLUMNS = ("Caption", "URL", "Score", "Row")
PROMPTS = [Prompt(row, f"caption {row}", f"u{row}") for row in (2, 3, 5, 8, 13)]


def launched(run: Run, folder: Path, *options: str, restarts: int = 0) -> subprocess.Popen[str]:
    """Two processes of a run."""
    script = SCRIPTS[run.script]
    return workspace.launched(script, *run.options, *options, cwd=folder, restarts=restarts)


def workers(process: subprocess.Popen[str]) -> list[int]:
    """Process ids of the launcher's two children that run the script, once both are there."""
    listing = ["ps", "-ww", "-o", "pid=,args=", "--ppid", str(process.pid)]
    found: list[int] = []
    while len(found) < 2:
        assert process.poll() is None, process.communicate()
        lines = subprocess.run(listing, capture_output=True, text=True).stdout.splitlines()
        found = [int(line.split()[0]) for line in lines if re.search(r"\d_\w+\.py", line)]
    return found


def decided(folder: Path) -> int:
    """Rows on the disk of a run of script 3 by several processes."""
    parts = sorted((folder / "out").glob(".result.csv.part-*"))
    return sum(len(read_whole_rows(path, RESULT_COLUMNS)) for path in parts)


def wait_for(rows: int, process: subprocess.Popen[str], folder: Path) -> None:
    while decided(folder) < rows:
        assert process.poll() is None, process.communicate()
        time.sleep(0.002)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, warm: Warm) -> dict[str, Path]:
    """Run -> a folder where one process ran through."""
    folders = {}
    for name in ("2", "3", "4"):
        folder = kill_many.prepared(tmp_path_factory.mktemp("alone") / "workspace")
        done = warm.run(BY_NAME[name].script, *BY_NAME[name].options, cwd=folder)
        assert done.returncode == 0, done.stderr
        folders[name] = folder
    return folders


@pytest.mark.parametrize("name", ["2", "4"])
def test_two_processes_write_what_one_writes(
    name: str, alone: dict[str, Path], warm: Warm, tmp_path: Path
) -> None:
    """For script 3 the next test shows it, where one of them dies besides."""
    folder = kill_many.prepared(tmp_path / "workspace")
    done = warm.together(BY_NAME[name].script, *BY_NAME[name].options, cwd=folder)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Loading model") == 1, "one of them speaks"
    kill_many.assert_same(folder, alone[name])


def test_the_launcher_restarts_what_died_and_decided_rows_are_kept(
    alone: dict[str, Path], tmp_path: Path
) -> None:
    folder = kill_many.prepared(tmp_path / "workspace")
    process = launched(BY_NAME["3"], folder, restarts=1)
    victim = workers(process)[1]
    wait_for(4, process, folder)
    os.kill(victim, signal.SIGKILL)
    before = decided(folder)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    begun = [int(found) for found in re.findall(r"(\d+)/16 \[", errors)]
    assert before >= 4 and begun == sorted(begun), "the second attempt goes on from the first"
    kill_many.assert_same(folder, alone["3"])


def test_one_process_goes_on_with_what_two_have_left(
    alone: dict[str, Path], warm: Warm, tmp_path: Path
) -> None:
    folder = kill_many.prepared(tmp_path / "workspace")
    process = launched(BY_NAME["3"], folder)
    both = workers(process)
    wait_for(4, process, folder)
    for victim in (process.pid, *both):
        os.kill(victim, signal.SIGKILL)
    process.communicate()
    before = decided(folder)
    done = warm.run(3, *BY_NAME["3"].options, "--continue_run", cwd=folder)
    assert done.returncode == 0, done.stderr
    shown = re.search(r"(\d+)/16 \[", done.stderr)
    assert shown and int(shown[1]) == before >= 4, "no row is computed twice"
    kill_many.assert_same(folder, alone["3"])


def test_bad_input_is_said_once(tmp_path: Path) -> None:
    folder = workspace.fresh(tmp_path / "workspace")
    run = Run("bad", 3, ("--version=model", "--dataset=none.csv"), lambda out: 0, 0)
    process = launched(run, folder)
    _, errors = process.communicate(timeout=300)
    assert process.returncode != 0
    assert errors.count("none.csv: no such file; check the path") == 1


# The rows of a table.


def table(folder: Path, name: str = "table.csv") -> DecidedRows:
    return DecidedRows(folder / name, COLUMNS, PROMPTS)


@pytest.mark.parametrize("order", [(0, 1, 2, 3, 4), (4, 2, 0, 3, 1)])
def test_rows_decided_in_any_order_are_written_in_the_prompts_order(
    order: tuple[int, ...], tmp_path: Path
) -> None:
    teams = [Team(rank=rank, size=2, store=Agreed()) for rank in range(2)]
    rows = [table(tmp_path) for _ in teams]
    for mine, team in zip(rows, teams, strict=True):
        mine.open(team)
    for place, number in enumerate(order):
        rows[place % 2].add(PROMPTS[number], [number / 4])
    rows[0].close()
    expected = "".join(f"caption {p.row};u{p.row};{n / 4};{p.row}\n" for n, p in enumerate(PROMPTS))
    assert (tmp_path / "table.csv").read_text() == ";".join(COLUMNS) + "\n" + expected
    assert [path.name for path in tmp_path.iterdir()] == ["table.csv"], "no part is left"


def test_a_name_with_the_signs_of_a_pattern_loses_no_rows(tmp_path: Path) -> None:
    rows = table(tmp_path, "a[b]*?.csv")
    rows.open(Team(size=2, store=Agreed()))
    for prompt in PROMPTS:
        rows.add(prompt, [1])
    rows.close()
    assert len(read_whole_rows(tmp_path / "a[b]*?.csv", COLUMNS)) == len(PROMPTS)


def test_rows_that_another_process_wrote_elsewhere_are_missed(tmp_path: Path) -> None:
    rows = table(tmp_path)
    rows.open(Team(size=2, store=Agreed()))
    rows.add(PROMPTS[0], [1])
    with pytest.raises(InputError, match=r"4 of 5 rows are missing, the first is 3; .* one folder"):
        rows.close()
    assert rows.parts(), "what was decided is kept"


class Agreed:
    """A store in which everything was agreed already: that an empty table has no rows."""

    def set(self, key: str, value: str) -> None: ...

    def wait(self, keys: list[str], patience: object) -> None: ...

    def get(self, key: str) -> bytes:
        return b"0"


def test_parts_of_a_dead_team_are_rows_that_one_process_need_not_decide(tmp_path: Path) -> None:
    for name, numbers in (("done", (3,)), ("0", (0,)), ("1", (1,))):
        part = tmp_path / f".table.csv.part-{name}"
        append_row(part, COLUMNS)
        for number in numbers:
            prompt = PROMPTS[number]
            append_row(part, [prompt.caption, prompt.url, number, prompt.row])
    with (tmp_path / ".table.csv.part-1").open("ab") as file:
        file.write(b"caption 5;u5;0.")  # half a row, as a killed process leaves it
    for _ in range(2):  # the first one is killed, too
        rows = table(tmp_path)
        rows.check()
        rows.open(Team())
        assert [rows.known(prompt.row) for prompt in PROMPTS] == [True, True, False, True, False]
    for number in (2, 4):
        rows.add(PROMPTS[number], [number])
    rows.close()
    lines = (tmp_path / "table.csv").read_text().splitlines()[1:]
    assert lines == [f"caption {p.row};u{p.row};{n};{p.row}" for n, p in enumerate(PROMPTS)]
    assert [path.name for path in tmp_path.iterdir()] == ["table.csv"]


def test_a_part_of_another_run_is_refused(tmp_path: Path) -> None:
    part = tmp_path / ".table.csv.part-1"
    append_row(part, COLUMNS)
    append_row(part, ["x", "", 1, 4])
    with pytest.raises(InputError, match=r"part-1: row 4 is not of this run"):
        table(tmp_path).check()


def test_what_prompts_cost_is_summed_over_processes_and_killed_runs(tmp_path: Path) -> None:
    output = tmp_path / "a[b].csv"
    first, second = (CostLog(output, rank) for rank in (0, 1))
    for log in (first, second):
        log.open()
    first.add(Prompt(0, "a", type="VM"), 1.5, searched_again=False)
    second.add(Prompt(4, "b", type="TM"), 2, searched_again=True)
    second.add(Prompt(2, "c"), 0.25, searched_again=False)
    with first.files()[1].open("ab") as file:
        file.write(b"7;VM;9")  # half a row: killed
    again = CostLog(output, 1)
    again.open()
    again.add(Prompt(0, "a", type="VM"), 1.25, searched_again=False)  # its row had been lost
    cost, searched_again = again.totals()
    assert searched_again == [4] and cost == {
        "TM": {"prompts": 1, "seconds": 2.0},
        "VM": {"prompts": 1, "seconds": 1.25},
        "all": {"prompts": 1, "seconds": 0.25},
    }
    first.remove()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("first", "said"),
    [
        ("a.csv: no such file", ""),
        ("another reason", "[process 1] a.csv: no such file"),
        (None, "[process 1] a.csv: no such file"),
    ],
)
def test_bad_input_of_one_process_alone_is_said(
    first: str | None,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from torch.distributed import HashStore

    store = HashStore()
    monkeypatch.setattr("utils.team._store", lambda attempt, **options: store)
    monkeypatch.setattr("utils.team.HEARING", timedelta(seconds=0.2))
    monkeypatch.setenv("WORLD_SIZE", "2")

    def end(rank: str, message: str) -> str:
        monkeypatch.setenv("RANK", rank)

        def main(args: argparse.Namespace) -> int:
            raise InputError(message)

        with pytest.raises(SystemExit):
            cli.run(main, argparse.Namespace(), lower=None)
        return capsys.readouterr().err

    if first is not None:
        assert first in end("0", first)
    found = end("1", "a.csv: no such file")
    assert said in found and bool(said) == bool(found)


@pytest.mark.parametrize("name", ["RANK", "MASTER_ADDR", "MASTER_PORT"])
def test_what_the_launcher_should_have_said_is_named(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    said = {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29999"}
    for variable, value in said.items():
        monkeypatch.setenv(variable, value)
    monkeypatch.delenv(name)
    with pytest.raises(InputError, match=rf"{name}.* unset WORLD_SIZE"):
        join()


def test_what_the_launcher_should_not_say_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "two")
    with pytest.raises(InputError, match="WORLD_SIZE=two: not a whole number"):
        join()
    monkeypatch.setattr(cli, "_gpu_count", lambda: 2)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    with pytest.raises(InputError, match="3 processes on this machine have 2 GPUs"):
        cli.checked_device(None)
    assert cli.checked_device("cuda:1") == "cuda:1" and cli.checked_device("cpu") == "cpu"


def test_a_gpu_that_torch_cannot_use_is_spoken_of(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(cli, "_gpu_count", lambda: 0)
    monkeypatch.setattr(cli, "GPU_DEVICES", (tmp_path,))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert cli.checked_device(None) == "cpu"
    assert caplog.messages == ["there is an NVIDIA GPU that torch cannot use: the CPU computes"]
    assert cli.checked_device("cpu") == "cpu"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # it was hidden on purpose
    assert cli.checked_device(None) == "cpu" and len(caplog.messages) == 1


def test_a_process_alone_does_every_unit_on_the_device_it_was_given() -> None:
    team = Team()
    assert list(team.deal(3)) == [0, 1, 2]
    assert (team.first, team.device("cuda"), team.agree("x", lambda: "y")) == (True, "cuda", "y")


def test_each_process_of_a_machine_has_its_own_gpu() -> None:
    team = Team(rank=9, size=16, local_rank=1)
    assert (team.device("cuda"), team.device("cpu"), team.device("cuda:3")) == (
        "cuda:1",
        "cpu",
        "cuda:3",
    )


def test_one_process_knows_that_it_was_restarted(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.distributed import HashStore

    monkeypatch.setattr("utils.team._store", lambda attempt, **options: HashStore())
    assert not join().restarted
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert join().restarted and join().size == 1


@pytest.mark.parametrize("size", ["1", "2"])
def test_what_was_refused_is_refused_after_a_restart(
    size: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """An output that exists must not be taken for one that this run had begun."""
    from torch.distributed import HashStore, PrefixStore

    stores = HashStore()
    monkeypatch.setattr(
        "utils.team._store",
        lambda attempt, **options: PrefixStore(f"attempt {attempt}", stores),
    )
    monkeypatch.setenv("WORLD_SIZE", size)
    monkeypatch.setenv("RANK", "0")
    for attempt, message in (("0", "a.csv: exists already"), ("1", "unheard"), ("2", "unheard")):
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", attempt)

        def main(args: argparse.Namespace, message: str = message) -> int:
            join()
            raise InputError(message)

        with pytest.raises(SystemExit):
            cli.run(main, argparse.Namespace(), lower=None)
        assert "a.csv: exists already" in capsys.readouterr().err


def test_restarts_on_several_machines_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("GROUP_WORLD_SIZE", "2")
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "1")
    with pytest.raises(InputError, match="--max_restarts works on one machine"):
        join()
