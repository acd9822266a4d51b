"""What a second process gains: script 3 as one process of one thread, as one of two threads, and as
two of one thread each.

Each way runs the script on two prompts and on all of them; the difference is what the other prompts
took, without the start. Two processes of one thread must write the same bytes as one. Another
number of threads rounds otherwise: same_sets is the share of prompts with the neurons of the first,
among the prompts that have any in either way (with_neurons says how many). What the machine itself
bears is measured besides: two runs of one process each, which know nothing of each other, at the
same time.

Reads:   the version's prompts, statistics and threshold
Writes:  processes.csv, its picture, RESULTS.md

Examples:
  python benchmarks/benchmark_processes.py
  python benchmarks/benchmark_processes.py --prompts=8 --repeats=1
"""

import argparse
import concurrent.futures
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

# `python benchmarks/benchmark_processes.py` puts benchmarks/ on the path, not the project.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import report
from utils import cli
from utils.errors import InputError
from utils.files import read_prompts, read_table, write_table
from utils.neuron_sets import NeuronSet, parse_neurons
from utils.versions import resolve

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SCRIPT = Path(__file__).resolve().parent.parent / "3_detect_memorized_neurons.py"
FEWEST = 2  # prompts of the runs that measure the start: one for each process
LAUNCH = ("-m", "torch.distributed.run", "--standalone")
COLUMNS = (
    "processes",
    "threads",
    "prompts",
    "seconds",
    "start_seconds",
    "ratio",
    "ratio_with_start",
    "same_bytes",
    "with_neurons",
    "same_sets",
)


@dataclass(frozen=True)
class Way:
    """So many processes of so many threads."""

    processes: int
    threads: int


WAYS = (Way(1, 1), Way(1, 2), Way(2, 1))


def main(args: argparse.Namespace) -> int:
    # Check.
    source = resolve(args.version)
    known = [Path(source.defaults.memorized_prompts), Path(source.defaults.unmemorized_prompts)]
    captions = [prompt.caption for path in known for prompt in read_prompts(path)]
    captions = list(dict.fromkeys(captions))[: args.prompts]
    if len(captions) <= FEWEST:
        raise InputError(f"--prompts {len(captions)}: more than {FEWEST}, or nothing is left")
    report.prepare(args)

    # Measure.
    counts = (FEWEST, len(captions))
    seconds: dict[tuple[Way, int], list[float]] = {(w, n): [] for w in WAYS for n in counts}
    apart: dict[int, list[float]] = {count: [] for count in counts}
    written: dict[Way, bytes] = {}
    sets: dict[Way, list[NeuronSet]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for repeat in range(args.repeats):
            for way in WAYS:
                for count in counts:
                    dataset = Path(folder) / f"{count}.csv"
                    write_table(dataset, ["Caption"], [[text] for text in captions[:count]])
                    output = Path(folder) / f"{repeat}_{way.processes}_{way.threads}_{count}.csv"
                    seconds[way, count].append(run(way, args, dataset, output))
                    print(f"{way} {count} prompts: {seconds[way, count][-1]:.1f} s")
                    if way == WAYS[0]:
                        apart[count].append(run_twice(way, args, dataset, output))
                        print(f"twice at a time: {apart[count][-1]:.1f} s")
                written[way] = output.read_bytes()
                sets[way] = refined_sets(output)
                if way.threads == WAYS[0].threads and written[way] != written[WAYS[0]]:
                    raise AssertionError(f"{way} wrote other bytes than {WAYS[0]}")

    # Write.
    whole = {way: median(seconds[way, counts[-1]]) for way in WAYS}
    start = {way: median(seconds[way, FEWEST]) for way in WAYS}
    first = WAYS[0]
    alone = whole[first] - start[first]
    borne = 2 * alone / (median(apart[counts[-1]]) - median(apart[FEWEST]))
    rows = [
        [
            str(way.processes),
            str(way.threads),
            str(len(captions)),
            f"{whole[way]:.1f}",
            f"{start[way]:.1f}",
            f"{alone / (whole[way] - start[way]):.2f}",
            f"{whole[first] / whole[way]:.2f}",
            "yes" if written[way] == written[first] else "no",
            *compared(sets[way], sets[first]),
        ]
        for way in WAYS
    ]
    remark = (
        f"Script 3 from the command to its end; start_seconds are those of a run over {FEWEST} "
        "prompts, ratio is without them. same_sets: with the neurons of the first line, among the "
        "prompts with neurons in either (with_neurons). With more threads a score's last digits "
        "may differ, and with them which neurons of a long list are kept that hardly matter."
    )
    beside = (
        "Two runs of one process of one thread at the same time, which share nothing but the "
        f"machine, do {borne:.2f} times the work of one in its time, for comparison."
    )
    table = report.Table("processes", "Two processes", COLUMNS, rows, [remark, beside])
    report.publish(args.output, args.device, table, lambda axes: draw(axes, rows))
    return 0


def refined_sets(output: Path) -> list[NeuronSet]:
    """The refined sets of a result file, prompt by prompt."""
    return [
        parse_neurons(cells["Refined Neurons"], where=f"{output}: row {row}")
        for row, cells in enumerate(read_table(output)[1])
    ]


def compared(sets: Sequence[NeuronSet], first: Sequence[NeuronSet]) -> list[str]:
    """Cells of with_neurons and same_sets: prompts with neurons in either way, and the share of
    them with the same ones (empty for none)."""
    either = [(a, b) for a, b in zip(sets, first, strict=True) if any(a) or any(b)]
    same = sum(a == b for a, b in either)
    return [str(len(either)), f"{same / len(either):.3f}" if either else ""]


def run(way: Way, args: argparse.Namespace, dataset: Path, output: Path) -> float:
    """Seconds of one run of script 3."""
    launch = (*LAUNCH, f"--nproc_per_node={way.processes}") if way.processes > 1 else ()
    options = (f"--version={args.version}", f"--dataset={dataset}", f"--output={output}")
    # MKL and torch each have a variable of their own.
    threads = {"OMP_NUM_THREADS": str(way.threads), "MKL_NUM_THREADS": str(way.threads)}
    started = time.perf_counter()
    done = subprocess.run(
        [sys.executable, *launch, str(SCRIPT), *options, f"--device={args.device}"],
        env={**os.environ, **threads},
        capture_output=True,
        text=True,
        check=False,
    )
    elapsed = time.perf_counter() - started
    if done.returncode != 0:
        raise InputError(f"script 3 ended with code {done.returncode}: {done.stderr[-500:]}")
    return elapsed


def run_twice(way: Way, args: argparse.Namespace, dataset: Path, output: Path) -> float:
    """Seconds until the later one of two runs at the same time has ended."""
    outputs = [output.with_suffix(f".{number}.csv") for number in range(2)]
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        return max(pool.map(lambda path: run(way, args, dataset, path), outputs))


def draw(axes: "Axes", rows: Sequence[Sequence[str]]) -> None:
    """Seconds with and without the start, a bar for each way."""
    names = [f"{row[0]} x {row[1]} thread" + "s" * (row[1] != "1") for row in rows]
    start = [float(row[4]) for row in rows]
    axes.bar(names, start, color="lightgrey", label="start, two prompts")
    others = [float(row[3]) - float(row[4]) for row in rows]
    axes.bar(names, others, bottom=start, color="C0", label="the other prompts")
    axes.set(ylabel="seconds")
    axes.legend()


def parse_args() -> argparse.Namespace:
    parser = cli.make_parser(__doc__)
    parser.add_argument(
        "-v", "--version", default="tiny", metavar="NAME|DIR", help="model, as in script 3"
    )
    parser.add_argument(
        "--prompts",
        type=cli.whole_number(3, 100_000),
        default=48,
        metavar="INT",
        help="the memorized ones first, then hold-out prompts",
    )
    report.add_options(parser, device="cpu")
    return parser.parse_args()


if __name__ == "__main__":
    cli.run(main, parse_args(), lower="--prompts")
