"""What script 4 gains from batches that reach over prompts: one image a prompt, own sets blocked.

Script 4's own sampling and writing, the one behind the other, once with the images of several
prompts in a batch and once with one prompt at a time, taking turns, after a run of each that does
not count. Which neurons are blocked costs nothing, so that each prompt gets some of its own at
random.

Reads:   a prompt file
Writes:  generation.csv, its picture, RESULTS.md; the images go to a folder that is deleted

Examples:
  python benchmarks/benchmark_generation.py
  python benchmarks/benchmark_generation.py --prompts=4 --steps=5 --repeats=1 --threads=1
"""

import argparse
import random
import sys
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

# `python benchmarks/benchmark_generation.py` puts benchmarks/ on the path, not the project.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import report
from utils import cli
from utils.files import Prompt, read_prompts
from utils.versions import resolve

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from utils.stable_diffusion import Model

SEED = 2
NEURONS = 2  # blocked in every layer


def main(args: argparse.Namespace) -> int:
    # Check.
    source = resolve(args.version)
    path = args.dataset or Path(source.defaults.memorized_prompts)
    prompts = read_prompts(path)[: args.prompts]
    report.prepare(args)

    # Measure.
    from utils.stable_diffusion import load_model

    print(f"{len(prompts)} prompts of {path}, one image each, {args.steps} steps")
    dtype = cli.default_dtype(args.device)
    model = load_model(source, device=args.device, dtype=dtype)
    batches = sorted({1, *args.batches})
    seconds: dict[int, list[float]] = {batch: [] for batch in batches}
    for _ in range(args.repeats + 1):
        for batch in batches:
            with tempfile.TemporaryDirectory() as folder:
                work = partial(generate, model, prompts, batch, args.steps, Path(folder))
                seconds[batch].append(report.seconds_of(work, args.device))

    # Write.
    medians = {batch: median(times[1:]) for batch, times in seconds.items()}
    rows = [
        [
            str(batch),
            str(len(prompts)),
            f"{medians[batch]:.3f}",
            f"{len(prompts) / medians[batch]:.2f}",
            f"{medians[1] / medians[batch]:.2f}",
        ]
        for batch in batches
    ]
    columns = ("batch", "images", "seconds", "images_per_second", "ratio_to_one_prompt")
    remark = (
        f"{args.steps} steps, guidance 7, one image a prompt, {dtype}; "
        "batch 1 is one prompt at a time."
    )
    table = report.Table("generation", "Generation", columns, rows, [remark])
    report.publish(args.output, args.device, table, lambda axes: draw(axes, rows))
    return 0


def generate(
    model: "Model", prompts: Sequence[Prompt], batch_size: int, steps: int, folder: Path
) -> None:
    """Script 4 with one sample a prompt, into a folder without pictures."""
    from utils import mitigations
    from utils.behind import Behind
    from utils.generation import Sampling, write_pictures
    from utils.images import all_batches
    from utils.stable_diffusion import encode_unconditional, initial_noise
    from utils.value_layers import layer_widths

    widths = layer_widths(model.value_layers)
    how: dict[str, Any] = {"steps": steps, "guidance_scale": 7.0}
    noise = initial_noise(model, 1, SEED)
    unconditional = encode_unconditional(model)
    captions = {prompt.row: prompt.caption for prompt in prompts}
    nothing = mitigations.begin(None, model, captions, unconditional, noise, **how)
    draws = {row: random.Random(row) for row in captions}
    off = {
        row: [sorted(draw.sample(range(width), NEURONS)) for width in widths]
        for row, draw in draws.items()
    }
    settings = {"batch_size": batch_size, "scaling_factor": 0.0, **how}
    sampling = Sampling(model, noise, unconditional, nothing, off, settings)
    with Behind(lambda written: None, at_once=model.device.type == "cpu") as behind:
        for batch in all_batches(list(captions), 1, batch_size):
            behind(partial(write_pictures, model, sampling.latents(batch), batch, folder))


def draw(axes: "Axes", rows: Sequence[Sequence[str]]) -> None:
    """Images a second against the batch."""
    axes.plot([int(row[0]) for row in rows], [float(row[3]) for row in rows], "o-")
    axes.set(xlabel="images in a batch", ylabel="images per second", ylim=(0, None))


def parse_args() -> argparse.Namespace:
    parser = cli.make_parser(__doc__)
    report.add_model_options(parser)
    parser.add_argument(
        "--prompts",
        type=cli.whole_number(1, 100_000),
        default=20,
        metavar="INT",
        help="only the first so many prompts",
    )
    parser.add_argument("--steps", type=cli.STEPS, default=50, metavar="INT", help="DDIM steps")
    parser.add_argument(
        "--batches",
        type=report.number_list,
        default="5,10",
        metavar="LIST",
        help="images per batch, beside 1",
    )
    report.add_options(parser)
    return parser.parse_args()


if __name__ == "__main__":
    cli.run(main, parse_args(), lower="--batches")
