"""How much memory localization and generation need, against the batch.

Each measurement is a process of its own that loads the model, does the work once and reports its
peak: the device's allocated memory on a GPU, the process's resident memory on a CPU. Localization
in batches below the number of seed rows is the plain search in parts, from that number on exact.

Reads:   the version's memorized prompts
Writes:  memory.csv, its picture, RESULTS.md

Examples:
  python benchmarks/benchmark_memory.py
  python benchmarks/benchmark_memory.py --batches=1,2 --samples=2 --steps=2 --threads=1
"""

import argparse
import multiprocessing
import resource
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

# `python benchmarks/benchmark_memory.py` puts benchmarks/ on the path, not the project.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import report
from utils import cli
from utils.files import Prompt, read_prompts
from utils.versions import resolve

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from utils.stable_diffusion import Model

WORK = ("loading", "localization", "generation")


def main(args: argparse.Namespace) -> int:
    # Check.
    source = resolve(args.version)
    path = args.dataset or Path(source.defaults.memorized_prompts)
    prompts = read_prompts(path)
    report.prepare(args)

    # Measure.
    jobs = [("loading", 0), *((work, batch) for work in WORK[1:] for batch in args.batches)]
    rows = []
    for work, batch in jobs:
        peaks = [in_a_process(args, prompts, work, batch) for _ in range(args.repeats)]
        rows.append([work, str(batch or ""), f"{median(peaks) / 1e6:.1f}"])
        print(f"{work} {batch or ''}: {median(peaks) / 1e6:.0f} MB")

    # Write.
    loaded = float(rows[0][2])
    rows = [[*row, f"{float(row[2]) - loaded:.1f}"] for row in rows]
    columns = ("work", "batch", "peak_mb", "beyond_loading_mb")
    kind = (
        "allocated on the device" if args.device.startswith("cuda") else "resident, torch included"
    )
    dtype = cli.default_dtype(args.device)
    remark = f"Peak memory of a process, {kind}; {args.samples} seed rows, {dtype}."
    table = report.Table("memory", "Memory", columns, rows, [remark])
    report.publish(args.output, args.device, table, lambda axes: draw(axes, rows))
    return 0


def in_a_process(
    args: argparse.Namespace, prompts: Sequence[Prompt], work: str, batch: int
) -> float:
    """Peak bytes of the work in a process that did nothing else."""
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        return pool.apply(measured, (args, prompts, work, batch))


def measured(args: argparse.Namespace, prompts: Sequence[Prompt], work: str, batch: int) -> float:
    """Does the work and tells this process's peak bytes."""
    import torch

    from benchmarks.benchmark_generation import generate
    from utils.stable_diffusion import load_model

    if args.threads:
        torch.set_num_threads(args.threads)
    dtype = cli.default_dtype(args.device)
    model = load_model(resolve(args.version), device=args.device, dtype=dtype)
    if work == "localization":
        localize_once(args, model, prompts[0].caption, batch)
    if work == "generation":
        copies = [Prompt(row, prompts[row % len(prompts)].caption) for row in range(batch)]
        with tempfile.TemporaryDirectory() as folder:
            generate(model, copies, batch, args.steps, Path(folder))
    if args.device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(args.device)
    return report.RSS_UNIT * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def localize_once(args: argparse.Namespace, model: "Model", caption: str, batch: int) -> None:
    """A search in which every seed row counts and every candidate is asked about."""
    import torch

    from utils.activation_statistics import Statistics
    from utils.localization import Search, Thresholds
    from utils.noise_difference import NoiseSettings
    from utils.scoring import Detector
    from utils.value_layers import layer_widths

    widths = layer_widths(model.value_layers)
    statistics = Statistics([torch.zeros(w) for w in widths], [torch.ones(w) for w in widths])
    detector = Detector(model, NoiseSettings(), rows=args.samples, seed=1, batch_size=batch)
    detector.find(
        caption,
        statistics,
        search=Search(use_theta=False, initial_k=2),
        thresholds=Thresholds(pairwise=-1.0, initial=2.0, refinement=0.0),
    )


def draw(axes: "Axes", rows: Sequence[Sequence[str]]) -> None:
    """Memory against the batch, a line for each kind of work."""
    for work in WORK[1:]:
        points = [(int(row[1]), float(row[2])) for row in rows if row[0] == work]
        axes.plot(*zip(*points, strict=True), "o-", label=work)
    axes.axhline(float(rows[0][2]), color="grey", linestyle=":", label=WORK[0])
    axes.set(xlabel="batch rows", ylabel="peak memory, MB", ylim=(0, None))
    axes.legend()


def parse_args() -> argparse.Namespace:
    parser = cli.make_parser(__doc__)
    report.add_model_options(parser)
    parser.add_argument(
        "--batches",
        type=report.number_list,
        default="1,2,5,10,20",
        metavar="LIST",
        help="batch rows: seed rows per pass, images per batch",
    )
    parser.add_argument("--samples", type=cli.SAMPLES, default=10, metavar="INT", help="seed rows")
    parser.add_argument("--steps", type=cli.STEPS, default=5, metavar="INT", help="DDIM steps")
    report.add_options(parser, repeats=1)
    return parser.parse_args()


if __name__ == "__main__":
    cli.run(main, parse_args(), lower="--batches")
