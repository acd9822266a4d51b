"""What localizing a prompt costs at full size: Stable Diffusion 1.5's U-Net with random weights.

With random weights nothing is memorized, so the answers are planted: every search runs as in script
3, with every U-Net pass, mask, recording, replay and SSIM, but what it scores are noise differences
made up for each neuron set (``full_size_model.PlantedDetector``). Two prompts, as the paper's
median verbatim and template ones: the plain search makes 100 and 700 evaluations, and 4 and 21
neurons are carriers, which every search must find, or the script fails. Operations are counted by
where each pass began, and compared with the rate that this device reaches on one large matrix
product.

Writes:  full_size_search.csv (with --close: full_size_search_close.csv), its picture, RESULTS.md

Examples:
  python benchmarks/benchmark_full_size_search.py
  python benchmarks/benchmark_full_size_search.py --close --searches=exact
  python benchmarks/benchmark_full_size_search.py --narrow --device=cpu --searches=exact,plain
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

# `python benchmarks/benchmark_full_size_search.py` puts benchmarks/ on the path, not the project.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import report
from utils import cli
from utils.localization import Search, Thresholds, localize
from utils.neuron_sets import NeuronSet

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from benchmarks.full_size_model import PassFlops, Plant, PlantedDetector
    from utils.scoring import Finding
    from utils.stable_diffusion import Model

SEARCHES = ("exact", "bisect", "plain")
# Name, candidates, carriers: 4 and 21 are the paper's median numbers of neurons, and so many
# candidates take the plain search 100 and 700 evaluations.
PROMPTS = {
    "full": (("VM-like", 117, 4), ("TM-like", 691, 21)),
    "narrow": (("VM-like", 8, 2), ("TM-like", 20, 3)),
}
SMALL = 16  # side of the narrow U-Net's latents
NARROW_MATRIX = 512  # side of its matrix product
TAU = 0.4
# Scores while a carrier is on, and while none is: clear answers, and such that lie within half
# precision's margin, where the reference decides.
CLEAR, CLOSE = (0.9, 0.0), (0.45, 0.33)
# Seconds of the two prompts, and minutes of 500 (issue 6, one H100 or H200).
TARGETS = {"exact": ((2, 13), 90), "bisect": ((2, 3), 20)}
TARGET_SHARE = 0.55
COLUMNS = (
    "prompt",
    "candidates",
    "carriers",
    "search",
    "found",
    "evaluations",
    "unet_rows",
    "seconds",
    "TFLOP",
    "share of matrix rate",
)


@dataclass(frozen=True)
class Run:
    """One search on one prompt. Counts are those of its last repeat, seconds the median."""

    search: str
    evaluations: int  # neuron sets
    unet_rows: int  # batch rows of all U-Net passes, also of those that restart half-way
    flops: int
    seconds: float


def main(args: argparse.Namespace) -> int:
    # Check.
    report.prepare(args)

    # Measure.
    import torch

    from benchmarks.full_size_model import (
        MATRIX,
        NARROW,
        PlantedDetector,
        full_size_model,
        matrix_rate,
        pass_flops,
        plant,
    )
    from utils.scoring import margin

    kind = torch.device(args.device).type
    dtype = report.full_size_dtype(args)
    changes = {**NARROW, "sample_size": SMALL} if args.narrow else None
    side = NARROW_MATRIX if args.narrow else MATRIX[kind]
    rate = matrix_rate(args.device, dtype, side, args.repeats)
    print(f"{dtype}, matrix products at {rate / 1e12:.3f} TFLOP/s; making the model")
    flops = pass_flops(changes)
    model = full_size_model(args.device, dtype, changes)
    detector = PlantedDetector(
        model,
        rows=args.samples,
        batch_size=args.batch_size,
        scores=CLOSE if args.close else CLEAR,
    )
    pace = detector.pace()  # measured here, so that no search pays for it
    print(pace)
    prompts = PROMPTS["narrow" if args.narrow else "full"]
    plants = [
        plant(model, name, candidates=candidates, carriers=carriers, seed=seed)
        for seed, (name, candidates, carriers) in enumerate(prompts)
    ]
    plain = [plain_evaluations(model, planted) for planted in plants]
    for search in args.searches:  # a device prepares itself for a shape when it first sees it
        measured(detector, plants[0], search, flops, 1, args.device)
    runs: list[list[Run]] = []
    for planted, expected in zip(plants, plain, strict=True):
        runs.append([])
        for search in args.searches:
            run = measured(detector, planted, search, flops, args.repeats, args.device)
            print(f"{planted.caption}, {search}: {run.seconds:.2f} s")
            if search == "plain" and run.evaluations != expected:
                raise AssertionError(f"{run.evaluations} evaluations instead of {expected}")
            runs[-1].append(run)

    # Write.
    rows = [
        [
            name,
            str(candidates),
            str(carriers),
            run.search,
            "all",
            str(run.evaluations),
            str(run.unet_rows),
            f"{run.seconds:.3f}",
            f"{run.flops / 1e12:.4g}",
            f"{run.flops / run.seconds / rate:.1%}",
        ]
        for (name, candidates, carriers), of_prompt in zip(prompts, runs, strict=True)
        for run in of_prompt
    ]
    counted = " and ".join(map(str, plain))
    on, off = CLOSE if args.close else CLEAR
    remarks = [
        f"{dtype}, {args.samples} seed rows, threshold {TAU:g}. {pace}. Matrix rate: "
        f"{rate / 1e12:.3f} TFLOP/s on {side} x {side}. The share is of all seconds: selection, "
        "scores and Python included.",
        f"Planted: scores of about {on:g} while a carrier is on and {off:g} while none is (within "
        f"{margin(model.device, model.dtype):g} of the threshold the reference decides); all "
        "candidates are in selection's first try. Found: all carriers and nothing else. The plain "
        f"search makes {counted} evaluations (counted without the U-Net), each a whole pass over "
        f"{args.samples} rows of {flops.whole / 1e9:.3g} GFLOP.",
        mix_remark(runs, args.searches, targets=not args.narrow),
    ]
    name = "full_size_search" + "_close" * args.close
    title = "A prompt at full size" if not args.narrow else "A prompt, narrow U-Net"
    title += ", random weights, planted neurons" + ", scores near the threshold" * args.close
    table = report.Table(name, title, COLUMNS, rows, remarks)
    report.publish(args.output, args.device, table, lambda axes: draw(axes, rows))
    return 0


def measured(
    detector: "PlantedDetector",
    planted: "Plant",
    search: str,
    flops: "PassFlops",
    repeats: int,
    device: str,
) -> Run:
    """Runs a search on a prompt so many times. Fails if it does not find what is planted."""
    findings: list[Finding] = []

    def find() -> None:
        findings.append(
            detector.find(
                planted.caption,
                planted.statistics,
                search=Search(),
                thresholds=Thresholds(TAU, TAU, TAU),
                method=search,
            )
        )

    seconds = []
    for _ in range(repeats):
        detector.expect(planted.carriers)
        seconds.append(report.seconds_of(find, device))
        outcome = findings[-1].outcome
        if outcome is None or outcome.refined != planted.carriers or outcome.check_failed:
            raise AssertionError(f"{search} does not find what is planted for {planted.caption}")
    from_layer = list(flops.from_layer.values())
    done = sum(
        rows * (flops.whole if layer is None else from_layer[layer])
        for layer, rows in detector.rows_from.items()
    )
    return Run(
        search,
        findings[-1].evaluations,
        sum(detector.rows_from.values()),
        done,
        median(seconds),
    )


def plain_evaluations(model: "Model", planted: "Plant") -> int:
    """How many neuron sets the plain search evaluates, the unblocked one among them; found from the
    planted scores alone, without the U-Net."""
    from benchmarks.synthetic import SyntheticScore
    from utils.activation_statistics import z_scores
    from utils.stable_diffusion import encode_prompt

    def score(neurons: NeuronSet) -> float:
        both = zip(planted.carriers, neurons, strict=True)
        return CLEAR[0] if any(set(carriers) - set(off) for carriers, off in both) else CLEAR[1]

    activations = model.value_reader.activations(encode_prompt(model, planted.caption).embedding[0])
    z = z_scores(activations, planted.statistics)
    asked = SyntheticScore(score)
    tau = Thresholds(TAU, TAU, TAU)
    outcome = localize(activations, z, asked, search=Search(), thresholds=tau)
    assert outcome.refined == planted.carriers
    return 1 + asked.evaluations


def mix_remark(runs: Sequence[Sequence[Run]], searches: Sequence[str], *, targets: bool) -> str:
    """What the published mix would take at the seconds of its two kinds of prompt."""
    from benchmarks.full_size_model import MIX

    parts = []
    for position, search in enumerate(searches):
        seconds = [of_prompt[position].seconds for of_prompt in runs]
        minutes = sum(n * s for (n, _), s in zip(MIX, seconds, strict=True)) / 60
        aims = ""
        if targets and search in TARGETS:
            (verbatim, template), target = TARGETS[search]
            aims = f" (targets: {verbatim} s, {template} s, {target} min)"
        parts.append(f"{search} {minutes:.3g} min{aims}")
    share = f" Target of the share: {TARGET_SHARE:.0%}." if targets else ""
    verbatim, template = (n for n, _ in MIX)
    return (
        f"Extrapolated from these two prompts, not run: {verbatim + template} prompts of the "
        f"published mix ({verbatim} VM, {template} TM) would take {', '.join(parts)}.{share}"
    )


def draw(axes: "Axes", rows: Sequence[Sequence[str]]) -> None:
    """Seconds of each prompt and search."""
    names = [f"{row[0]}, {row[COLUMNS.index('search')]}" for row in rows][::-1]
    axes.barh(names, [float(row[COLUMNS.index("seconds")]) for row in rows][::-1])
    axes.set(xlabel="seconds")


def parse_args() -> argparse.Namespace:
    parser = cli.make_parser(__doc__)
    parser.add_argument(
        "--searches",
        type=report.name_list(SEARCHES),
        default="exact,bisect",
        metavar="LIST",
        help="of exact, bisect, plain",
    )
    report.add_dtype_option(parser)
    parser.add_argument(
        "--batch_size",
        type=cli.whole_number(1, 10_000),
        metavar="INT",
        help="rows of a pass at the most (default: measured on this device)",
    )
    parser.add_argument("--samples", type=cli.SAMPLES, default=10, metavar="INT", help="seed rows")
    parser.add_argument(
        "--close",
        action="store_true",
        help=f"plant scores near the threshold {TAU:g}: {CLOSE[0]:g} and {CLOSE[1]:g} instead of "
        f"{CLEAR[0]:g} and {CLEAR[1]:g}",
    )
    parser.add_argument(
        "--narrow",
        action="store_true",
        help="a narrow U-Net, small latents and fewer candidates, for a CPU",
    )
    report.add_options(parser, repeats=1)
    return parser.parse_args()


if __name__ == "__main__":
    cli.run(main, parse_args(), lower="--batch_size")
