"""Script 1's memory and time against the number of prompts: flat memory is the claim.

Runs script 1 as a user does, in processes of its own, on captions made up of the hold-out ones, and
reads each process's largest resident memory from the system.

Reads:   the version's hold-out prompts
Writes:  statistics.csv, its picture, RESULTS.md; everything else goes to a folder that is deleted

Examples:
  python benchmarks/benchmark_statistics.py
  python benchmarks/benchmark_statistics.py --counts=20,100 --repeats=1 --threads=1
"""

import argparse
import itertools
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

# `python benchmarks/benchmark_statistics.py` puts benchmarks/ on the path, not the project.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import report
from utils import cli
from utils.errors import InputError
from utils.files import read_prompts, write_table
from utils.versions import PROJECT_ROOT, resolve

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SCRIPT = PROJECT_ROOT / "1_compute_activations_statistics.py"


def main(args: argparse.Namespace) -> int:
    # Check.
    source = resolve(args.version)
    path = args.dataset or Path(source.defaults.statistics_prompts)
    captions = [prompt.caption for prompt in read_prompts(path)]
    report.prepare(args)

    # Measure.
    peaks: dict[int, list[float]] = {count: [] for count in args.counts}
    seconds: dict[int, list[float]] = {count: [] for count in args.counts}
    for _ in range(args.repeats):
        for count in args.counts:
            peak, elapsed = run(args, source.name, captions, count)
            peaks[count].append(peak)
            seconds[count].append(elapsed)
            print(f"{count} prompts: {peak / 1e6:.0f} MB, {elapsed:.0f} s")

    # Write.
    first = median(peaks[args.counts[0]])
    rows = [
        [
            str(count),
            f"{median(peaks[count]) / 1e6:.1f}",
            f"{median(peaks[count]) / first - 1:+.1%}",
            f"{median(seconds[count]):.1f}",
            f"{count / median(seconds[count]):.0f}",
        ]
        for count in args.counts
    ]
    columns = ("prompts", "peak_mb", "against_fewest", "seconds", "prompts_per_second")
    remark = "Largest resident memory and all seconds of script 1's process, loading included."
    table = report.Table("statistics", "Statistics", columns, rows, [remark])
    report.publish(args.output, args.device, table, lambda axes: draw(axes, rows))
    return 0


def run(
    args: argparse.Namespace, version: str, captions: Sequence[str], count: int
) -> tuple[float, float]:
    """(peak bytes, seconds) of script 1 on ``count`` different captions."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        numbered = enumerate(itertools.islice(itertools.cycle(captions), count))
        rows = [[caption if i < len(captions) else f"{caption} {i}"] for i, caption in numbered]
        write_table(folder / "prompts.csv", ("Caption",), rows)
        options = [f"--prompts={folder / 'prompts.csv'}", f"-o={folder / 'statistics.pt'}"]
        options += [f"--version={version}", f"--device={args.device}"]
        environment = dict(os.environ)
        if args.threads:
            environment["OMP_NUM_THREADS"] = str(args.threads)
        said = folder / "said"
        started = time.perf_counter()
        with said.open("wb") as file:
            process = subprocess.Popen(
                [sys.executable, str(SCRIPT), *options],
                stdout=file,
                stderr=subprocess.STDOUT,
                env=environment,
            )
            _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            raise InputError(f"{SCRIPT.name}: {said.read_text().strip().splitlines()[-1]}")
        return report.RSS_UNIT * usage.ru_maxrss, time.perf_counter() - started


def draw(axes: "Axes", rows: Sequence[Sequence[str]]) -> None:
    """Memory against prompts."""
    axes.plot([int(row[0]) for row in rows], [float(row[1]) for row in rows], "o-")
    axes.set(xscale="log", xlabel="prompts", ylabel="peak memory, MB", ylim=(0, None))


def parse_args() -> argparse.Namespace:
    parser = cli.make_parser(__doc__)
    report.add_model_options(parser)
    parser.add_argument(
        "--counts",
        type=report.number_list,
        default="1000,50000",
        metavar="LIST",
        help="numbers of prompts; the first is compared with",
    )
    report.add_options(parser, repeats=1)
    return parser.parse_args()


if __name__ == "__main__":
    cli.run(main, parse_args(), lower="--counts")
