"""How long localization takes: release-like, lean plain, exact and bisect on the same prompts.

- release-like: two U-Net passes for every noise difference and one for the activations at every
  theta, one neuron set at a time;
- plain: one pass a difference, activations from the text (``--search plain``);
- exact, bisect: as in script 3.
All share masks, noise differences and SSIM, and take turns prompt by prompt; on a GPU exact and
bisect play small passes as CUDA graphs, as in script 3, the others do not. The release-like and
exact searches must find what plain finds, or the script fails; bisect is compared. Its own table
looks at the prompts with many candidates, and a third one counts evaluations on made-up scores.

Reads:   a prompt file, the statistics of script 1, the threshold of script 2
Writes:  localization.csv, localization_long.csv and localization_cost.csv with their pictures,
         localization_prompts.csv (every prompt), RESULTS.md

Examples:
  python benchmarks/benchmark_localization.py
  python benchmarks/benchmark_localization.py --prompts=4 --repeats=1 --threads=1 -o=/tmp/results
"""

import argparse
import math
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean, median
from typing import TYPE_CHECKING, Any

# `python benchmarks/benchmark_localization.py` puts benchmarks/ on the path, not the project.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import report
from utils import cli, records
from utils.errors import InputError
from utils.files import read_prompts, write_table
from utils.localization import Outcome, Search, Thresholds, kept_rows, localize
from utils.neuron_sets import NeuronSet, size
from utils.thresholds import threshold_from_file
from utils.versions import resolve

if TYPE_CHECKING:
    import torch
    from matplotlib.axes import Axes

    from utils.activation_statistics import Statistics
    from utils.noise_difference import NoiseSettings
    from utils.scoring import Finding
    from utils.stable_diffusion import Model

RELEASE = "release-like"
SEARCHES = (RELEASE, "plain", "exact", "bisect")
COLUMNS = (
    "search",
    "prompts",
    "evaluations",
    "unet_rows",
    "seconds",
    "ratio_to_release_like",
    "same_sets",
)
MANY = 100  # candidates from which a prompt's list is long
LONG_THETA, LONG_K = 1.25, 15  # where a selection that falls back ends
CANDIDATES = (10, 30, 100, 300, 1000)
NEEDED = (1, 2, 5, 10, 20, 50)


@dataclass(frozen=True)
class Run:
    """One search on one prompt. Counts are the same at every repeat, seconds their median."""

    evaluations: int  # neuron sets
    unet_rows: int  # batch rows of all U-Net passes, also of those that restart half-way
    seconds: float
    outcome: Outcome


def main(args: argparse.Namespace) -> int:
    # Check.
    source = resolve(args.version)
    path = args.dataset or Path(source.defaults.memorized_prompts)
    prompts = read_prompts(path)[: args.prompts]
    statistics_path = args.statistics or source.statistics
    records.check_statistics_record(statistics_path, source)
    from utils.noise_difference import NoiseSettings

    dtype = cli.default_dtype(cli.checked_device(args.device))
    settings = {**asdict(NoiseSettings()), "dtype": dtype}
    tau = args.threshold
    if tau is None:
        tau = threshold_from_file(source.threshold, source, settings)
    report.prepare(args)
    from utils.activation_statistics import load_statistics

    statistics = load_statistics(statistics_path, widths=source.widths)

    # Measure.
    from tqdm import tqdm

    from utils.stable_diffusion import load_model

    print(f"{len(prompts)} prompts of {path}, {args.samples} seed rows, threshold {tau:.4f}")
    model = load_model(source, device=args.device, dtype=dtype)
    contest = Contest(model, statistics, rows=args.samples, tau=tau, repeats=args.repeats)
    usual: dict[int, Mapping[str, Run]] = {}
    for prompt in tqdm(prompts, unit="prompt"):
        if runs := contest.runs(prompt.caption, Search()):
            usual[prompt.row] = runs
    if not usual:
        raise InputError(f"{path}: none of these prompts is memorized at {tau:.4f}; lower it")
    long = {row: runs for row, runs in usual.items() if is_long(runs)}
    search = Search(initial_theta=LONG_THETA, initial_k=LONG_K)
    short = [prompt for prompt in prompts if prompt.row in usual.keys() - long.keys()]
    lengthened = {
        prompt.row: contest.runs(prompt.caption, search)
        for prompt in tqdm(short[: args.long_prompts], unit="long list")
    }

    # Write.
    selections = {"usual": usual, "lengthened": lengthened}
    write_prompts(args.output / "localization_prompts.csv", selections)
    cost = cost_curve(args.repeats)
    report.publish(args.output, args.device, cost, lambda axes: draw_cost(axes, cost.rows))
    many = [*long.values(), *filter(is_long, lengthened.values())]
    if many:
        remark = (
            f"{len(long)} of them as script 3 searches; {len(many) - len(long)} with theta "
            f"{LONG_THETA:g} and the {LONG_K} largest activations a layer in their first try, "
            "which makes any list long."
        )
        table = summary("localization_long", f"Lists of {MANY} candidates and more", many, remark)
        report.publish(args.output, args.device, table, lambda axes: draw_seconds(axes, many))
    found = list(usual.values())
    table = summary("localization", "Localization", found, f"{args.samples} seed rows.")
    report.publish(args.output, args.device, table, lambda axes: draw_seconds(axes, found))
    return 0


class ReleaseLike:
    """The search as the authors' release spends its time, with this project's hooks and scores."""

    def __init__(self, model: "Model", settings: "NoiseSettings", *, rows: int, seed: int) -> None:
        from utils.stable_diffusion import initial_noise

        self._model = model
        self._settings = settings
        self._noise = initial_noise(model, rows, seed)

    def find(
        self, caption: str, statistics: "Statistics", *, search: Search, thresholds: Thresholds
    ) -> "Finding":
        """What ``Detector.find`` finds."""
        from utils.activation_statistics import z_scores
        from utils.noise_difference import noise_difference
        from utils.scoring import Finding, MemorizationScore
        from utils.ssim import pairwise_ssim
        from utils.stable_diffusion import encode_prompt
        from utils.value_layers import deactivated

        model, settings, evaluations = self._model, self._settings, 0
        conditioning = encode_prompt(model, caption)

        def difference(neurons: NeuronSet) -> "torch.Tensor":
            """The release's loop makes the first timestep's pass on its way to the second's."""
            nonlocal evaluations
            evaluations += 1
            with deactivated(model.value_layers, [neurons]):
                for protocol in ("paper", "published"):
                    step = replace(settings, protocol=protocol)
                    found = noise_difference(model, conditioning, None, self._noise, step)
            return found

        def report(stage: str, left: int) -> None:
            """Activations of every theta are read from a pass of their own, here of one row."""
            if stage == "selection":
                noise_difference(model, conditioning, None, self._noise[:1], settings)

        unblocked = difference([[] for _ in model.value_layers])
        pairwise = pairwise_ssim(unblocked).cpu()
        rows = kept_rows(pairwise, len(self._noise), thresholds.pairwise)
        if not rows:
            return Finding(pairwise, rows, None, evaluations)
        activations = model.value_reader.activations(conditioning.embedding[0])
        outcome = localize(
            activations,
            z_scores(activations, statistics),
            MemorizationScore(difference, unblocked, rows),
            search=search,
            thresholds=thresholds,
            report=report,
        )
        return Finding(pairwise, rows, outcome, evaluations)


class Contest:
    """All searches on one model with the same settings."""

    def __init__(
        self, model: "Model", statistics: "Statistics", *, rows: int, tau: float, repeats: int
    ) -> None:
        from utils.noise_difference import NoiseSettings
        from utils.scoring import Detector

        self._model = model
        self._statistics = statistics
        self._thresholds = Thresholds(tau, tau, tau)
        self._repeats = repeats
        self._release = ReleaseLike(model, NoiseSettings(), rows=rows, seed=1)
        self._detector = Detector(model, NoiseSettings(), rows=rows, seed=1)
        print(self._detector.pace())  # measured here, so that no search pays for it

    def runs(self, caption: str, search: Search) -> dict[str, Run]:
        """Every search's run, taking turns; nothing for a prompt that is not memorized. Fails if
        two that must agree do not."""
        seconds: dict[str, list[float]] = {name: [] for name in SEARCHES}
        runs: dict[str, Run] = {}
        for repeat in range(self._repeats):
            turn = repeat % len(SEARCHES)
            for name in SEARCHES[turn:] + SEARCHES[:turn]:
                finding, rows, elapsed = self._one(name, caption, search)
                if finding.outcome is None:
                    return {}
                seconds[name].append(elapsed)
                runs[name] = Run(finding.evaluations, rows, median(seconds[name]), finding.outcome)
        for name in (RELEASE, "exact"):
            if runs[name].outcome != runs["plain"].outcome:
                raise AssertionError(f"{name} and plain differ for '{caption}'")
        return runs

    def _one(self, name: str, caption: str, search: Search) -> tuple["Finding", int, float]:
        """(what was found, U-Net rows, seconds)."""
        rows: list[int] = []
        handle = self._model.unet.register_forward_pre_hook(
            lambda module, inputs: rows.append(len(inputs[0]))
        )
        options: dict[str, Any] = {"search": search, "thresholds": self._thresholds}
        started = time.perf_counter()
        try:
            if name == RELEASE:
                finding = self._release.find(caption, self._statistics, **options)
            else:
                finding = self._detector.find(caption, self._statistics, method=name, **options)
        finally:
            handle.remove()
        return finding, sum(rows), time.perf_counter() - started


def is_long(runs: Mapping[str, Run]) -> bool:
    """Whether the candidate list of a prompt is long."""
    return bool(runs) and size(runs["plain"].outcome.initial) >= MANY


def jaccard(first: NeuronSet, second: NeuronSet) -> float:
    """Neurons in both sets by neurons in either; 1 for two empty ones."""
    a, b = ({(l, i) for l, row in enumerate(s) for i in row} for s in (first, second))
    return len(a & b) / len(a | b) if a | b else 1.0


def summary(name: str, title: str, found: Sequence[Mapping[str, Run]], remark: str) -> report.Table:
    """A line for each search: means over the prompts, and the ratio of all their seconds."""
    total = {search: sum(runs[search].seconds for runs in found) for search in SEARCHES}
    rows = []
    for search in SEARCHES:
        same = [runs[search].outcome.refined == runs["plain"].outcome.refined for runs in found]
        rows.append(
            [
                search,
                str(len(found)),
                f"{fmean(runs[search].evaluations for runs in found):.1f}",
                f"{fmean(runs[search].unet_rows for runs in found):.1f}",
                f"{total[search] / len(found):.3f}",
                f"{total[RELEASE] / total[search]:.2f}",
                f"{fmean(same):.3f}",
            ]
        )
    ratios = [
        f"{search} {median(runs[other].seconds / runs[search].seconds for runs in found):.2f}x "
        f"against {other}"
        for search in ("exact", "bisect")
        for other in (RELEASE, "plain")
    ]
    sets = [[runs[search].outcome.refined for search in ("plain", "bisect")] for runs in found]
    failed = sum(runs["bisect"].outcome.check_failed for runs in found)
    remarks = [
        "Evaluations, U-Net rows and seconds are means per prompt, the ratio is that of all "
        f"seconds, same_sets the share of prompts with the plain search's neurons. {remark}",
        f"All seconds: exact {total['plain'] / total['exact']:.2f}x against plain. Median over "
        f"prompts: {', '.join(ratios)}.",
        f"bisect: mean Jaccard {fmean(jaccard(*pair) for pair in sets):.3f}, {failed} of "
        f"{len(found)} prompts fell back to exact.",
    ]
    return report.Table(name, title, COLUMNS, rows, remarks)


def write_prompts(path: Path, selections: Mapping[str, Mapping[int, Mapping[str, Run]]]) -> None:
    """Every run of every prompt, by how its candidates were selected."""
    columns = (
        "Row",
        "selection",
        "search",
        "candidates",
        "kept",
        "evaluations",
        "unet_rows",
        "seconds",
    )
    rows = [
        [
            row,
            selection,
            search,
            size(run.outcome.initial),
            size(run.outcome.refined),
            run.evaluations,
            run.unet_rows,
            f"{run.seconds:.4f}",
        ]
        for selection, prompts in selections.items()
        for row, runs in prompts.items()
        for search, run in runs.items()
    ]
    write_table(path, columns, rows)


def cost_curve(repeats: int) -> report.Table:
    """Evaluations of exact and bisect on made-up scores: n candidates, k of them needed."""
    import torch

    from benchmarks.synthetic import SyntheticScore, needed_neurons
    from utils.bisect_search import localize_by_bisection
    from utils.exact_search import localize_exactly

    rows = []
    for n in CANDIDATES:
        for k in (k for k in NEEDED if k <= n):
            counts: dict[str, list[int]] = {"exact": [], "bisect": []}
            for repeat in range(repeats):
                a, z, function = needed_neurons(n, k, 7, torch.Generator().manual_seed(repeat))
                for name, localized in (
                    ("exact", localize_exactly),
                    ("bisect", localize_by_bisection),
                ):
                    score = SyntheticScore(function)
                    tau = Thresholds(0.3, 0.3, 0.3)
                    localized(a, z, score, search=Search(), thresholds=tau)
                    counts[name].append(score.evaluations)
            cells = [f"{median(counts[name]):g}" for name in counts]
            rows.append([str(n), str(k), *cells, f"{k * math.log2(n / k):.1f}"])
    columns = ("candidates", "needed", "exact", "bisect", "k log2(n/k)")
    remark = (
        "Different sets evaluated where the score is low while k neurons, anywhere among n in "
        "seven layers, are all off; selection (one try) and bisect's check included."
    )
    return report.Table("localization_cost", "Evaluations", columns, rows, [remark])


def draw_seconds(axes: "Axes", found: Sequence[Mapping[str, Run]]) -> None:
    """Every prompt's seconds against its candidates, by search."""
    for search in SEARCHES:
        points = sorted((size(r[search].outcome.initial), r[search].seconds) for r in found)
        axes.plot(*zip(*points, strict=True), "o", markersize=4, label=search)
    axes.set(xscale="log", yscale="log", xlabel="candidates", ylabel="seconds")
    axes.legend()


def draw_cost(axes: "Axes", rows: Sequence[Sequence[str]]) -> None:
    """Evaluations against candidates, a line for each number of needed neurons."""
    for shade, k in enumerate(NEEDED):
        lines = [row for row in rows if row[1] == str(k)]
        n = [int(row[0]) for row in lines]
        color = f"C{shade}"
        axes.plot(n, [float(row[3]) for row in lines], "o-", color=color, label=f"{k} needed")
        axes.plot(n, [float(row[2]) for row in lines], ":", color=color)
    axes.set(xscale="log", yscale="log", xlabel="candidates", ylabel="evaluations")
    axes.legend(title="bisect (dotted: exact)")


def parse_args() -> argparse.Namespace:
    parser = cli.make_parser(__doc__)
    report.add_model_options(parser)
    parser.add_argument(
        "--statistics", type=Path, metavar="FILE", help="of script 1 (default: the version's)"
    )
    parser.add_argument(
        "--threshold",
        type=cli.number(0, 1),
        metavar="FLOAT",
        help="all three thresholds (default: what script 2 recorded)",
    )
    parser.add_argument(
        "--prompts",
        type=cli.whole_number(1, 100_000),
        metavar="INT",
        help="only the first so many prompts",
    )
    parser.add_argument(
        "--long_prompts",
        type=cli.whole_number(0, 100_000),
        default=4,
        metavar="INT",
        help="prompts that are searched again with a list made long",
    )
    parser.add_argument("--samples", type=cli.SAMPLES, default=10, metavar="INT", help="seed rows")
    report.add_options(parser)
    return parser.parse_args()


if __name__ == "__main__":
    cli.run(main, parse_args(), lower="--samples")
