"""What a noise difference costs at full size: Stable Diffusion 1.5's configuration, random weights.

Times whole passes and passes that restart in the mid block, made as the exact and the bisect search
make them (small ones on a GPU as CUDA graphs), against the rate that this device reaches on one
large matrix product, and says what 500 prompts would take at these rates (112 prompts of about 100
evaluations, 388 of about 700: the published mix). The replay table counts floating point operations
and needs no device: on the meta device nothing is computed.

Writes:  full_size.csv, replay.csv, their pictures, RESULTS.md

Examples:
  python benchmarks/benchmark_full_size.py
  python benchmarks/benchmark_full_size.py --batches=1 --repeats=1 --device=cpu
  python benchmarks/benchmark_full_size.py --flops_only
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

# `python benchmarks/benchmark_full_size.py` puts benchmarks/ on the path, not the project.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import report
from utils import cli

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from utils.passes import Changes

ROWS = 10  # seed rows of a prompt
BATCHES = {"cpu": [1, 2], "cuda": [10, 20, 40, 80]}


def main(args: argparse.Namespace) -> int:
    report.prepare(args)
    replay = replay_flops()
    report.publish(args.output, args.device, replay, lambda axes: draw_replay(axes, replay.rows))
    if args.flops_only:
        return 0
    table = timings(args, whole=float(replay.rows[0][1]) * 1e9)
    report.publish(args.output, args.device, table, lambda axes: draw_rate(axes, table.rows))
    return 0


def replay_flops() -> report.Table:
    """Operations of a pass over one row, whole and from each value layer on."""
    from benchmarks.full_size_model import pass_flops

    flops = pass_flops()
    rows = [["whole pass", f"{flops.whole / 1e9:.1f}", "1.00"]]
    rows += [
        [
            name.removesuffix(".transformer_blocks.0.attn2.to_v"),
            f"{n / 1e9:.1f}",
            f"{flops.whole / n:.2f}",
        ]
        for name, n in flops.from_layer.items()
    ]
    mean = fmean(flops.from_layer.values())
    rows.append(["spread evenly", f"{mean / 1e9:.1f}", f"{flops.whole / mean:.2f}"])
    columns = ("restart at the value layer of", "GFLOP per row", "fewer by")
    remarks = ["Counted by torch.utils.flop_counter, a multiplication and an addition being two."]
    return report.Table("replay", "Replay, Stable Diffusion 1.5", columns, rows, remarks)


def timings(args: argparse.Namespace, *, whole: float) -> report.Table:
    """Seconds of noise differences by batch size; ``whole``: operations of a row."""
    import torch

    from benchmarks.full_size_model import MATRIX, MIX, TEXT, full_size_model, matrix_rate
    from utils.noise_difference import NoiseSettings, noise_difference
    from utils.passes import MOST_ROWS, changes_of
    from utils.replay import Recording, Replay
    from utils.stable_diffusion import Conditioning, initial_noise

    kind = torch.device(args.device).type
    dtype = report.full_size_dtype(args)
    batches = args.batches or BATCHES[kind]
    rate = matrix_rate(args.device, dtype, MATRIX[kind], args.repeats)
    print(f"{dtype}, matrix products at {rate / 1e12:.3f} TFLOP/s; making the model")
    model = full_size_model(args.device, dtype)
    generator = torch.Generator().manual_seed(0)
    text = Conditioning(torch.randn(1, *TEXT, generator=generator).to(args.device), {})

    noise = initial_noise(model, max(batches), 1)

    def difference(rows: int) -> torch.Tensor:
        return noise_difference(model, text, None, noise[:rows], NoiseSettings())

    changes = changes_of(model.unet, model.value_layers, needed_rows=max(batches))
    replay = Replay(model.unet, model.value_layers, lambda: difference(1), changes)
    rows, per_row = [], {}
    for batch in batches:
        seconds = median_seconds(partial(difference, batch), changes, args)
        recorded = min(batch, ROWS)
        with replay.recording(rows=recorded, halves=1) as recording:
            difference(recorded)
        chosen = [row % recorded for row in range(batch)]

        def from_mid_block(
            recording: Recording = recording, chosen: list[int] = chosen
        ) -> torch.Tensor:
            """As a search does it, with what it has to copy for each pass."""
            with replay.replaying(recording, replay.layers - 1, chosen):
                return difference(len(chosen))

        mid = median_seconds(from_mid_block, changes, args)
        per_row[batch] = seconds / batch
        rows.append(
            [
                str(batch),
                f"{1000 * seconds / batch:.1f}",
                f"{1000 * mid / batch:.1f}",
                f"{whole * batch / seconds / rate:.1%}",
                f"{batch / seconds:.3g}",
            ]
        )
        print(f"batch {batch}: {seconds:.2f} s")
    best = min(per_row.values())
    seconds_of = [evaluations * ROWS * best for _, evaluations in MIX]
    hours = sum(n * seconds for (n, _), seconds in zip(MIX, seconds_of, strict=True)) / 3600
    columns = (
        "batch",
        "ms per row",
        "ms per row, mid block",
        "share of matrix rate",
        "differences per second",
    )
    graphs = f" Passes of up to {MOST_ROWS} rows are CUDA graphs." if kind == "cuda" else ""
    remarks = [
        f"{dtype}; {whole / 1e9:.0f} GFLOP a row. Matrix rate: {rate / 1e12:.3f} TFLOP/s on "
        f"{MATRIX[kind]} x {MATRIX[kind]}. A difference is of one seed row.{graphs}",
        f"Extrapolated, not run, as whole passes at the best of these rates: a prompt of 100 "
        f"evaluations of {ROWS} rows would take {seconds_of[0]:.3g} s, one of 700 "
        f"{seconds_of[1]:.3g} s, 500 prompts of the published mix {hours:.3g} h.",
    ]
    return report.Table("full_size", "Full size, random weights", columns, rows, remarks)


def median_seconds(
    work: Callable[[], object], changes: "Changes", args: argparse.Namespace
) -> float:
    """Median time of passes of one kind with ``changes`` in use, after those of them that do not
    count."""
    with changes.in_use():
        for _ in range(changes.slow - 1):  # ``report`` makes one more
            work()
        return report.median_seconds(work, args.repeats, args.device)


def draw_replay(axes: "Axes", rows: Sequence[Sequence[str]]) -> None:
    """What a pass costs from each layer on."""
    names, costs = [row[0] for row in rows][::-1], [float(row[1]) for row in rows][::-1]
    axes.barh(names, costs)
    axes.set(xlabel="GFLOP per row")


def draw_rate(axes: "Axes", rows: Sequence[Sequence[str]]) -> None:
    """Milliseconds a row against the batch."""
    batches = [int(row[0]) for row in rows]
    axes.plot(batches, [float(row[1]) for row in rows], "o-", label="whole pass")
    axes.plot(batches, [float(row[2]) for row in rows], "o-", label="from the mid block on")
    axes.set(xlabel="rows in a batch", ylabel="ms per row", ylim=(0, None))
    axes.legend()


def parse_args() -> argparse.Namespace:
    parser = cli.make_parser(__doc__)
    parser.add_argument(
        "--batches",
        type=report.number_list,
        metavar="LIST",
        help="batch sizes (default: 1,2; on CUDA 10,20,40,80)",
    )
    report.add_dtype_option(parser)
    parser.add_argument("--flops_only", action="store_true", help="count operations, time nothing")
    report.add_options(parser, repeats=1)
    return parser.parse_args()


if __name__ == "__main__":
    cli.run(main, parse_args(), lower="--batches")
