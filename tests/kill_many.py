"""Kills the scripts with SIGKILL, many times, and compares what a continued run ends with.

Each script runs in a chain: killed at a random moment, started again with --continue_run, killed
again, ..., and at last left to finish. Its data files must then be those of an undisturbed run,
byte for byte, its record finished, and nothing else left in the folder.

Example:
  python tests/kill_many.py --kills=100
"""

import argparse
import json
import os
import random
import re
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
for place in (ROOT, ROOT / "tests"):
    if str(place) not in sys.path:
        sys.path.insert(0, str(place))

import workspace  # noqa: E402
from workspace import LOCATED, NOISE, WIDTHS, Warm  # noqa: E402

from utils.errors import InputError  # noqa: E402
from utils.files import read_table  # noqa: E402

PAIRS = 6  # of four seed rows


@dataclass(frozen=True)
class Run:
    """A command that writes below ``out``, and how many of its units are on the disk."""

    name: str
    script: int
    options: tuple[str, ...]
    units: Callable[[Path], int]  # of the folder ``out``
    total: int


def _saved_sums(out: Path) -> int:
    import numpy as np

    path = out / ".statistics.pt.sums"
    return int(np.load(path)[0, 0]) if path.exists() else 0


def _float_rows(name: str, width: int) -> Callable[[Path], int]:
    def count(out: Path) -> int:
        path = out / name
        return path.stat().st_size // (4 * width) if path.exists() else 0

    return count


def _table_rows(name: str) -> Callable[[Path], int]:
    def count(out: Path) -> int:
        try:
            return len(read_table(out / name, whole_rows=True)[1])
        except InputError:
            return 0

    return count


def _pictures(out: Path) -> int:
    return len(list((out / "images").glob("img_*.jpg")))


MODEL = "--version=model"
# Half a second a prompt: enough for a kill, and no more.
SEARCH = (MODEL, "--dataset=some.csv", *NOISE, *LOCATED, "--initial_theta=12")
RUNS = (
    Run("1", 1, (MODEL, "--prompts=many.csv", "-o=out/statistics.pt"), _saved_sums, 800),
    Run(
        "1 --no_statistics",
        1,
        (MODEL, "--prompts=many.csv", "-o=out/raw.pt", "--no_statistics"),
        _float_rows(".raw.pt.sums", sum(WIDTHS)),
        800,
    ),
    Run(
        "2",
        2,
        (MODEL, "--prompts=some.csv", "-o=out/threshold.pt", *NOISE),
        _table_rows(".threshold.pt.scores"),
        30,
    ),
    Run(
        "3",
        3,
        (*SEARCH, "-o=out/result.csv", "--rows=0-15"),
        _table_rows("result.csv"),
        16,
    ),
    Run(
        "3 --detect_only",
        3,
        (MODEL, "--dataset=some.csv", "-o=out/result.csv", *NOISE, "--detect_only"),
        _table_rows("result.csv"),
        30,
    ),
    Run(
        "4",
        4,
        (MODEL, "-o=out/images", "-n=3", "--steps=5", "-b=2", "--refined_neurons"),
        _pictures,
        18,
    ),
)


def prepared(folder: Path) -> Path:
    """A workspace with prompt files that keep every script busy for some seconds. Their captions
    hold quotes, line ends and carriage returns; some are equal."""
    workspace.fresh(folder)
    captions = [f"number {row} of many" for row in range(800)]
    (folder / "many.csv").write_text("Caption\n" + "".join(f"{text}\n" for text in captions))
    texts = ["A lighthouse, winter", "NA", "grey cat", 'two\r\nlines; ""quoted""', "a\rb", "cup"]
    rows = [f'"{texts[row % 6]}{row // 9 or ""}"\n' for row in range(30)]
    (folder / "some.csv").write_bytes(("Caption\n" + "".join(rows)).encode())
    return folder


def kill(
    warm: Warm, run: Run, folder: Path, *, first: bool, at: int | None, delay: float
) -> int | None:
    """Starts a run (``first``: anew), waits until ``at`` units are on the disk (None: not at all),
    then ``delay`` seconds, and kills it. Units on the disk then; None if it had ended before."""
    options = run.options if first else (*run.options, "--continue_run")
    pid = warm.start(run.script, *options, cwd=folder)
    while at is not None and run.units(folder / "out") < at:
        ended = warm.ended(pid, wait=False)
        if ended:
            assert ended.returncode == 0, ended.stderr
            return None
        time.sleep(0.001)
    time.sleep(delay)
    os.kill(pid, signal.SIGKILL)
    done = warm.ended(pid, wait=True)
    assert done is not None
    if done.returncode != -signal.SIGKILL:
        assert done.returncode == 0, done.stderr
        return None
    return run.units(folder / "out")


def finish(warm: Warm, run: Run, folder: Path) -> int:
    """Continues a run to its end. With how many units its progress bar began; all of a run that had
    ended already."""
    done = warm.run(run.script, *run.options, "--continue_run", cwd=folder)
    assert done.returncode == 0, done.stderr
    if "complete already" in done.stdout:
        return run.total
    shown = re.search(r"(\d+)/(\d+) \[", done.stderr)
    assert shown
    return int(shown[1])


def data_files(folder: Path) -> dict[str, str]:
    """What a run wrote: path -> sha256, records left out."""
    found = workspace.tree(folder / "out")
    return {path: digest for path, (_, _, digest) in found.items() if not path.endswith(".json")}


def records(folder: Path) -> dict[str, dict[str, object]]:
    """The run's records without what holds times, the command and the commit."""
    found = {}
    for path in sorted((folder / "out").rglob("*.json")):
        content = json.loads(path.read_text(encoding="utf-8"))
        assert content["finished"] is True
        found[path.name] = {
            field: value
            for field, value in content.items()
            if field not in ("seconds", "cost", "command", "git_commit")
        }
    return found


def assert_same(folder: Path, undisturbed: Path) -> None:
    """The same files with the same bytes, nothing besides, and the same records."""
    assert data_files(folder) == data_files(undisturbed)
    assert not [path for path in data_files(folder) if Path(path).name.startswith(".")]
    assert records(folder) == records(undisturbed)
    assert len(records(folder)) == 1


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=100, help="in all")
    parser.add_argument("--chain", type=int, default=5, help="kills before a run may finish")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    args = parser.parse_args()
    chosen = random.Random(args.seed)
    counts = {run.name: {"kills": 0, "between": 0, "too late": 0, "chains": 0} for run in RUNS}
    with Warm() as warm, tempfile.TemporaryDirectory() as temporary:
        seconds, undisturbed = {}, {}
        for run in RUNS:
            folder = undisturbed[run.name] = prepared(Path(temporary) / f"whole{len(seconds)}")
            begun = time.monotonic()
            done = warm.run(run.script, *run.options, cwd=folder)
            assert done.returncode == 0, done.stderr
            seconds[run.name] = time.monotonic() - begun
        chain = 0
        while sum(count["kills"] for count in counts.values()) < args.kills:
            run = RUNS[chain % len(RUNS)]
            count = counts[run.name]
            folder = prepared(Path(temporary) / f"chain{chain}")
            chain += 1
            units = 0
            for link in range(args.chain):
                if sum(count["kills"] for count in counts.values()) == args.kills:
                    break
                # Anywhere in what is left of the run, start-up included.
                delay = chosen.uniform(0, seconds[run.name] * (1 - units / run.total))
                died = kill(warm, run, folder, first=link == 0, at=None, delay=delay)
                if died is None:
                    count["too late"] += 1
                    break
                units = died
                count["kills"] += 1
                count["between"] += 0 < units < run.total
            finish(warm, run, folder)
            assert_same(folder, undisturbed[run.name])
            count["chains"] += 1
    columns = ("kills", "between", "too late", "chains")
    print(f"{'script':<20} {'kills':>6} {'between units':>14} {'too late':>9} {'same bytes':>11}")
    for name, count in counts.items():
        print("{:<20} {:>6} {:>14} {:>9} {:>11}".format(name, *(count[c] for c in columns)))
    print(
        "{:<20} {:>6} {:>14}".format(
            "all", *(sum(c[n] for c in counts.values()) for n in columns[:2])
        )
    )


if __name__ == "__main__":
    main()
