"""What half precision does to localization: decisions that flip, and how steady a score is.

The neuron sets are those that the plain search asks about in float32, on the small model (its own
prompts and threshold) and on Stable Diffusion 1's structure with narrower layers, 64-pixel latents
and random weights (threshold half-way to the largest candidate set's score). In each precision
every set's reference score is compared with float32's (does the decision flip?), and with the
scores that the fast search would have seen, whose passes all start at the first value layer with a
neuron off: several sets in one batch, one set, each seed row on its own. ``scoring.margin`` is to
be ten times the largest of those differences, at least.

Reads:   the small model, its prompts, statistics and threshold
Writes:  precision.csv, its picture, RESULTS.md

Examples:
  python benchmarks/benchmark_precision.py
  python benchmarks/benchmark_precision.py --prompts=1 --samples=2 --dtypes=bfloat16
"""

import argparse
import copy
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

# `python benchmarks/benchmark_precision.py` puts benchmarks/ on the path, not the project.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import report
from utils import cli, records
from utils.files import read_prompts
from utils.localization import Search, Thresholds, candidates, kept_rows, localize
from utils.neuron_sets import NeuronSet
from utils.thresholds import threshold_from_file
from utils.versions import VERSIONS, Source, resolve

if TYPE_CHECKING:
    import torch
    from matplotlib.axes import Axes

    from utils.activation_statistics import Statistics
    from utils.stable_diffusion import Model

TOGETHER = 4  # sets in one batch
ORDINARY = 12  # captions of the random model's statistics
EVERY_ROW = -1.0  # a threshold below all scores: that a seed row counts is no decision then
COLUMNS = (
    "model",
    "dtype",
    "prompts",
    "decisions",
    "flips",
    "same_answers",
    "to_float32",
    "batching",
    "replay",
    "single_rows",
    "near_threshold",
)


@dataclass(frozen=True)
class Asked:
    """What the plain search asks about a caption in float32: which seed rows count (above
    ``pairwise``), then on which side of ``threshold`` the score of each set lies."""

    caption: str
    pairwise: float
    rows: list[int]
    threshold: float
    sets: list[NeuronSet]
    scores: list[float]


@dataclass
class Found:
    """What one precision came to on a model's captions; differences are the largest."""

    prompts: int = 0
    decisions: int = 0
    flips: int = 0
    same_answers: int = 0
    near: int = 0
    to_float32: float = 0.0
    batching: float = 0.0
    replay: float = 0.0
    single_rows: float = 0.0

    def cells(self) -> list[str]:
        """Of the table, from ``prompts`` on."""
        differences = (self.to_float32, self.batching, self.replay, self.single_rows)
        return [
            *map(str, (self.prompts, self.decisions, self.flips, self.same_answers)),
            *(f"{difference:.1e}" for difference in differences),
            str(self.near),
        ]


class Evaluations:
    """One caption on one model: its scores in every way in which the searches make them."""

    def __init__(self, model: "Model", caption: str, samples: int) -> None:
        from utils.noise_difference import NoiseSettings
        from utils.replay import Replay
        from utils.stable_diffusion import encode_prompt, initial_noise

        self._model, self._settings = model, NoiseSettings()
        self.conditioning = encode_prompt(model, caption)
        self._noise = initial_noise(model, samples, 1)
        self._rows = list(range(samples))
        nothing: NeuronSet = [[] for _ in model.value_layers]
        self._replay = Replay(
            model.unet, model.value_layers, lambda: self.differences([nothing], [0])
        )
        with self._replay.recording(rows=samples, halves=1) as self._recording:
            self.unblocked = self.whole(nothing)

    def differences(self, sets: Sequence[NeuronSet], rows: Sequence[int]) -> "torch.Tensor":
        """Several sets, some seed rows, one pass: (sets, rows, C, H, W)."""
        from utils.noise_difference import noise_difference
        from utils.value_layers import deactivated

        of_rows = sets if len(sets) == 1 else [neurons for neurons in sets for _ in rows]
        noise = self._noise[list(rows)].repeat(len(sets), 1, 1, 1)
        with deactivated(self._model.value_layers, of_rows):
            found = noise_difference(self._model, self.conditioning, None, noise, self._settings)
        return found.unflatten(0, (len(sets), len(rows)))

    def whole(self, neurons: NeuronSet) -> "torch.Tensor":
        """The reference: one set, all seed rows."""
        return self.differences([neurons], self._rows)[0]

    def _replayed(self, sets: Sequence[NeuronSet], rows: Sequence[int]) -> "torch.Tensor":
        """A pass that starts at the first value layer in which a set has a neuron off."""
        layers = enumerate(zip(*sets, strict=True))
        begins = next((at for at, columns in layers if any(columns)), self._replay.layers - 1)
        with self._replay.replaying(self._recording, begins, list(rows) * len(sets)):
            return self.differences(sets, rows)

    def together(self, sets: Sequence[NeuronSet]) -> "torch.Tensor":
        """Several sets in one replayed batch."""
        return self._replayed(sets, self._rows)

    def alone(self, neurons: NeuronSet) -> "torch.Tensor":
        """One set, all seed rows, replayed."""
        return self._replayed([neurons], self._rows)[0]

    def row_by_row(self, neurons: NeuronSet) -> "torch.Tensor":
        """A replayed pass for each seed row."""
        import torch

        return torch.cat([self._replayed([neurons], [row])[0] for row in self._rows])

    def score(self, blocked: "torch.Tensor", rows: Sequence[int]) -> float:
        """The memorization score of one set's noise differences, over the kept rows."""
        from utils.ssim import ssim

        chosen = list(rows)
        return ssim(self.unblocked[chosen], blocked[chosen]).max().item()


def main(args: argparse.Namespace) -> int:
    # Check.
    source = resolve("tiny")
    prompts = read_prompts(Path(source.defaults.memorized_prompts))[: args.prompts]
    records.check_statistics_record(source.statistics, source)
    settings = {"protocol": "published", "num_inference_steps": 50, "guidance_scale": 1.0}
    settings |= {"exchanged_guidance": False, "dtype": "float32"}
    tau = threshold_from_file(source.threshold, source, settings)
    report.prepare(args)

    # Measure.
    from tqdm import tqdm

    from utils.activation_statistics import load_statistics
    from utils.scoring import margin
    from utils.stable_diffusion import DTYPES, load_model

    statistics = load_statistics(source.statistics, widths=source.widths)
    usual, narrow = load_model(source, device=args.device, dtype="float32"), random_model(args)
    captions = [prompt.caption for prompt in prompts]
    asked = {
        "tiny": [
            found for c in captions if (found := ask(usual, c, statistics, args.samples, tau))
        ],
        "random": [ask(narrow, "a caption", ordinary(narrow), args.samples, None)],
    }
    rows = []
    for dtype in args.dtypes:
        models = {
            "tiny": load_model(source, device=args.device, dtype=dtype),
            "random": in_precision(narrow, dtype),
        }
        for name, model in models.items():
            found = Found()
            for question in tqdm(asked[name], desc=f"{name} {dtype}", unit="prompt"):
                compare(model, question, args, margin(model.device, DTYPES[dtype]), found)
            rows.append([name, dtype, *found.cells()])

    # Write.
    device = usual.device
    margins = ", ".join(f"{name} {margin(device, DTYPES[name]):g}" for name in args.dtypes)
    remarks = [
        f"{args.samples} seed rows; the first {args.sets} sets of a prompt for the three ways. "
        "Differences are the largest of any score: to_float32 of reference scores, the others of "
        "fast scores, whose passes are all replayed, to reference scores in the same precision. "
        f"near_threshold: decisions within the margin ({margins}), which the reference takes.",
        "decisions: which seed rows count (on the random model all do, which decides nothing), and "
        "what is asked about each neuron set; same_answers: prompts without a flip, whose search "
        "ends with float32's neurons.",
    ]
    table = report.Table("precision", "Half precision", COLUMNS, rows, remarks)
    report.publish(args.output, args.device, table, lambda axes: draw(axes, rows))
    return 0


def ask(
    model: "Model", caption: str, statistics: "Statistics", samples: int, tau: float | None
) -> Any:
    """An ``Asked``; None for a caption that is not memorized. ``tau`` None: all seed rows count,
    and the threshold lies half-way between 1 and the score of the largest candidate set."""
    from utils.activation_statistics import z_scores
    from utils.scoring import MemorizationScore
    from utils.ssim import pairwise_ssim

    one = Evaluations(model, caption, samples)
    activations = model.value_reader.activations(one.conditioning.embedding[0])
    z = z_scores(activations, statistics)
    search = Search() if tau is not None else Search(initial_theta=4.0, min_theta=3.0)
    pairwise = EVERY_ROW if tau is None else tau
    rows = kept_rows(pairwise_ssim(one.unblocked).cpu(), samples, pairwise)
    if not rows:
        return None
    if tau is None:
        largest = candidates(activations, z, search.min_theta, 0)
        tau = (1 + one.score(one.whole(largest), rows)) / 2
    asked: dict[str, tuple[NeuronSet, float]] = {}
    reference = MemorizationScore(one.whole, one.unblocked, rows)

    def score(neurons: NeuronSet) -> float:
        found = reference(neurons)
        if any(neurons):
            asked.setdefault(str([sorted(layer) for layer in neurons]), (neurons, found))
        return found

    localize(activations, z, score, search=search, thresholds=Thresholds(tau, tau, tau))
    sets, scores = zip(*asked.values(), strict=True)
    return Asked(caption, pairwise, rows, tau, list(sets), list(scores))


def compare(
    model: "Model", asked: Asked, args: argparse.Namespace, margin: float, found: Found
) -> None:
    """Adds one caption in one precision to ``found``."""
    from utils.ssim import pairwise_ssim

    one = Evaluations(model, asked.caption, args.samples)
    kept = kept_rows(pairwise_ssim(one.unblocked).cpu(), args.samples, asked.pairwise)
    flips = len(set(kept) ^ set(asked.rows))
    scores = []
    for neurons, float32 in zip(asked.sets, asked.scores, strict=True):
        scores.append(one.score(one.whole(neurons), asked.rows))
        flips += (scores[-1] <= asked.threshold) != (float32 <= asked.threshold)
        found.near += abs(scores[-1] - asked.threshold) <= margin
        found.to_float32 = max(found.to_float32, abs(scores[-1] - float32))
    found.prompts += 1
    found.decisions += len(scores) + (args.samples if asked.pairwise != EVERY_ROW else 0)
    found.flips += flips
    found.same_answers += not flips
    looked_at = list(zip(asked.sets, scores, strict=True))[: args.sets]
    for start in range(0, len(looked_at), TOGETHER):
        batch = looked_at[start : start + TOGETHER]
        # A single set is no batch of several.
        together = one.together([neurons for neurons, _ in batch] * (2 if len(batch) == 1 else 1))
        for (neurons, score), blocked in zip(batch, together, strict=False):
            ways = {
                "batching": blocked,
                "replay": one.alone(neurons),
                "single_rows": one.row_by_row(neurons),
            }
            for name, differences in ways.items():
                noise = abs(one.score(differences, asked.rows) - score)
                setattr(found, name, max(getattr(found, name), noise))


def random_model(args: argparse.Namespace) -> "Model":
    """Stable Diffusion 1's U-Net with narrower layers and random weights, in float32. Its
    cross-attention is eight times as strong as it came, so that captions and neurons matter; a text
    embedding is random, the same for the same caption."""
    import torch
    from diffusers import DDIMScheduler, UNet2DConditionModel

    from benchmarks.full_size_model import NARROW, SCHEDULER, UNET, random_text
    from utils.stable_diffusion import Model
    from utils.value_layers import ValueReader, find_value_layers

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        unet: Any = UNet2DConditionModel(**{**UNET, **NARROW})
    unet.eval().requires_grad_(False)
    for name, parameter in unet.named_parameters():
        if "attn2.to_v" in name or "attn2.to_out" in name:
            parameter.mul_(8)
    unet.to(args.device)

    encode_prompt = random_text(NARROW["cross_attention_dim"], args.device)
    layers = find_value_layers(unet)
    return Model(
        pipeline=SimpleNamespace(unet=unet, encode_prompt=encode_prompt),
        source=Source("v1-5", "random weights", None, None, "random", VERSIONS["v1-5"]),
        device=torch.device(args.device),
        dtype=torch.float32,
        scheduler=DDIMScheduler(**SCHEDULER),
        value_layers=layers,
        value_reader=ValueReader(layers, copies=True),
    )


def in_precision(model: "Model", dtype: str) -> "Model":
    """The same model with its U-Net cast; activations stay those of float32."""
    from utils.stable_diffusion import DTYPES, settle_layout
    from utils.value_layers import find_value_layers

    unet = copy.deepcopy(model.unet).to(DTYPES[dtype])
    settle_layout(unet)
    pipeline = SimpleNamespace(unet=unet, encode_prompt=model.pipeline.encode_prompt)
    layers = find_value_layers(unet)
    return replace(model, pipeline=pipeline, dtype=DTYPES[dtype], value_layers=layers)


def ordinary(model: "Model") -> "Statistics":
    """Activation statistics of some captions."""
    from utils.activation_statistics import RunningStatistics
    from utils.stable_diffusion import encode_prompt
    from utils.value_layers import layer_widths

    running = RunningStatistics(layer_widths(model.value_layers))
    for number in range(ORDINARY):
        conditioning = encode_prompt(model, f"ordinary {number}")
        running.add(model.value_reader.activations(conditioning.embedding[0]))
    return running.result()


def draw(axes: "Axes", rows: Sequence[Sequence[str]]) -> None:
    """The largest differences, on a logarithmic scale."""
    names = COLUMNS[COLUMNS.index("to_float32") : COLUMNS.index("near_threshold")]
    for row in rows:
        heights = [float(row[COLUMNS.index(name)]) or None for name in names]
        axes.plot(names, heights, "o-", label=f"{row[0]}, {row[1]}")
    axes.set(yscale="log", ylabel="largest difference of a score")
    axes.legend()


def parse_args() -> argparse.Namespace:
    parser = cli.make_parser(__doc__)
    parser.add_argument(
        "--prompts",
        type=cli.whole_number(1, 1000),
        default=6,
        metavar="INT",
        help="only the first so many memorized prompts",
    )
    parser.add_argument("--samples", type=cli.SAMPLES, default=4, metavar="INT", help="seed rows n")
    parser.add_argument(
        "--sets",
        type=cli.whole_number(1, 1000),
        default=8,
        metavar="INT",
        help="neuron sets of a prompt that are also evaluated the fast ways",
    )
    parser.add_argument(
        "--dtypes",
        type=report.name_list(report.PRECISIONS),
        default=",".join(report.PRECISIONS),
        metavar="LIST",
        help="compared",
    )
    report.add_options(parser, repeats=None)
    return parser.parse_args()


if __name__ == "__main__":
    cli.run(main, parse_args(), lower="--samples")
