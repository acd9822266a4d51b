r"""Measure what this model memorizes and by which neurons, by brute force, and print the table.

No localization of ours is used for that (see brute_force.py). Then the localization is held against
the truth: scripts 1 to 3 run in a folder of their own, as published, with the other protocol, other
seeds and other numbers of seed rows.

Reads:   --model: pipeline/, planted_neurons.csv, training_images/, unplanted_images/, fixed_parts/;
         --prompts: the three prompt files that train.py wrote with it
Writes:  --output, the table as JSON, part by part; a killed run goes on from its last part

The exit code is 1 where a figure misses what is to be reached.

Examples:
  python tiny_model/check_truth.py
  python tiny_model/check_truth.py --samples=2 --variants usual paper --output=/tmp/short.json
  python tiny_model/check_truth.py --model=/tmp/tiny/tiny_model --output=/tmp/tiny/truth.json
"""

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a script: find tiny_model

from tiny_model.brute_force import (
    Figures,
    Memorized,
    measure_copies,
    measure_handful,
    measure_hold_out,
    measure_scores,
    measure_unplanted,
    nobody,
    union,
    widths_of,
)
from tiny_model.measure import load_model
from tiny_model.planting import NeuronSet
from tiny_model.truth_files import (
    HOLD_OUT_PROMPTS,
    MEMORIZED_PROMPTS,
    PLANTED_NEURONS,
    UNPLANTED_PROMPTS,
)
from utils import cli
from utils.errors import InputError
from utils.files import read_json, read_prompts, sha256_of_file, write_json
from utils.neuron_sets import Result, read_results

HERE = Path(__file__).resolve().parent
USUAL = "usual"
VARIANTS: dict[str, list[str]] = {  # options of scripts 2 and 3
    USUAL: [],
    "paper": ["--protocol=paper"],
    "seed 11": ["--seed=11"],
    "seed 12": ["--seed=12"],
    "5 rows": ["--samples_per_prompt=5"],
    "20 rows": ["--samples_per_prompt=20"],
}
KINDS = ("VM", "TM")
# What is to be reached, by part and figure.
AT_LEAST = {
    ("scores", "memorized prompts above the threshold"): 1.0,
    ("scores", "lowest memorized over highest hold-out"): 2.0,
    ("hold-out", "latents with all carriers off, median cosine"): 0.95,
    ("copies", "copies, nothing off"): 0.95,
    ("copies", "carriers that bring the picture back alone"): 0.95,
    ("copies", "prompts whose picture stays, random neurons off"): 0.95,
    ("copies", "prompts whose picture stays, others' carriers off"): 0.95,
}
for _figure in (f"{kind}, {name}" for kind in KINDS for name in ("precision", "recall")):
    AT_LEAST |= {(variant, f"{_figure}, mean"): 0.85 for variant in VARIANTS}
    AT_LEAST |= {(USUAL, f"{_figure}, mean"): 0.9, (USUAL, f"{_figure}, median"): 1.0}
AT_MOST = {("copies", "copies, set off"): 0.05}


def read_planted(model: Path, prompts: Path, widths: list[int]) -> list[NeuronSet]:
    """The planted sets of a prompt file's captions. InputError if they are other captions'."""
    results = read_results(model / PLANTED_NEURONS, widths=widths)
    known = [(result.row, result.caption) for result in results]
    if known != [(prompt.row, prompt.caption) for prompt in read_prompts(prompts)]:
        raise InputError(
            f"{prompts}: not the rows and captions of {model / PLANTED_NEURONS}; name the folders "
            "that one run of train.py has written"
        )
    return [result.refined or [[] for _ in widths] for result in results]


def read_memorized(
    model: Path, prompts: Path, pictures: str, sets: list[NeuronSet]
) -> list[Memorized]:
    """The memorized captions of a prompt file, in row order, with their planted `sets`, and what
    the folders of the `model` hold of them."""
    found = []
    for prompt, neurons in zip(read_prompts(prompts), sets, strict=True):
        name = f"{prompt.row:04d}"
        picture = np.asarray(Image.open(model / pictures / f"{name}_first_image.jpg"))
        if prompt.type == "TM":
            fixed = np.asarray(Image.open(model / "fixed_parts" / f"{name}.png")).astype(bool)
        else:
            fixed = np.ones(picture.shape[:2], dtype=bool)
        found.append(Memorized(prompt.caption, prompt.type, neurons, picture, fixed))
    return found


class Scripts:
    """Scripts 1 to 3 on the model in `model`, with the hold-out prompts of `prompts`; what they
    write lies in `folder`, and is written once."""

    def __init__(self, model: Path, prompts: Path, folder: Path) -> None:
        self._model = [f"--version={model.resolve() / 'pipeline'}", "--device=cpu"]
        self._prompts, self._folder = prompts.resolve(), folder

    def find(self, variant: str, name: str) -> list[Result]:
        """What script 3 finds for the prompts of the file called `name`. InputError if it, or a
        script before it, fails or leaves a prompt undecided."""
        options = [*self._model, *VARIANTS[variant]]
        hold_out = f"--prompts={self._prompts / HOLD_OUT_PROMPTS}"
        statistics = self._folder / "statistics.pt"
        if not statistics.exists():
            self._run(
                "1_compute_activations_statistics.py", *self._model, hold_out, f"-o={statistics}"
            )
        threshold = self._folder / variant / "ssim.pt"
        if not threshold.exists():
            self._run("2_compute_pairwise_ssim.py", *options, hold_out, f"-o={threshold}")
        files = [f"--statistics={statistics}", f"--threshold_file={threshold}"]
        found = self._folder / variant / name
        dataset = f"--dataset={self._prompts / name}"
        self._run("3_detect_memorized_neurons.py", *options, dataset, *files, f"-o={found}")
        return read_results(found)

    def _run(self, *words: str) -> None:
        """With as many threads as this process has."""
        threads = str(torch.get_num_threads())
        ended = subprocess.run(
            [sys.executable, *words],
            cwd=HERE.parent,
            env={**os.environ, "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads},
            check=False,
            stdout=subprocess.PIPE,
            text=True,
        )
        if ended.returncode:
            print(ended.stdout)
            raise InputError(
                f"{words[0]} ended with code {ended.returncode}; what it said stands above"
            )


def compare(found: list[NeuronSet], memorized: list[Memorized]) -> Figures:
    """Precision and recall of found sets against the planted ones, median and mean."""
    figures: Figures = {}
    for kind in KINDS:
        precision, recall = [], []
        for mine, known in zip(found, memorized, strict=True):
            if known.kind != kind:
                continue
            named = {(layer, i) for layer, columns in enumerate(mine) for i in columns}
            planted = {(layer, i) for layer, columns in enumerate(known.neurons) for i in columns}
            hits = len(named & planted)
            precision.append(hits / len(named) if named else 0.0)
            recall.append(hits / len(planted))
        for name, values in (("precision", precision), ("recall", recall)):
            figures[f"{kind}, {name}, median"] = float(np.median(values))
            figures[f"{kind}, {name}, mean"] = float(np.mean(values))
    return figures


def to_reach(part: str, name: str) -> str:
    """What is to be reached, in words; nothing for what is only reported."""
    if (part, name) in AT_LEAST:
        return f"{AT_LEAST[part, name]:g} or more"
    if (part, name) in AT_MOST:
        return f"{AT_MOST[part, name]:g} or less"
    return ""


def missed(part: str, name: str, value: float) -> bool:
    """Whether a figure is not as it should be."""
    least, most = AT_LEAST.get((part, name), -np.inf), AT_MOST.get((part, name), np.inf)
    return not least <= value <= most


def print_table(table: dict[str, Figures]) -> int:
    """Prints what was measured beside what is to be reached; returns how many figures miss it."""
    misses = 0
    for part, figures in table.items():
        for name, value in figures.items():
            if isinstance(value, list):
                continue
            shown = f"{value:.3f}" if isinstance(value, float) else str(value)
            verdict = "  missed" if missed(part, name, value) else ""
            misses += bool(verdict)
            print(f"{f'{part}: {name}':<62} {shown:>7}  {to_reach(part, name)}{verdict}".rstrip())
    return misses


def begin(output: Path, settings: dict[str, int | str]) -> dict[str, Figures]:
    """What was measured before with these settings, which are written down in any case.
    InputError if the file holds what was measured with others."""
    if not output.exists():
        write_json(output, {"settings": settings})
        return {}
    before = read_json(output)
    if before.pop("settings", None) != settings:
        raise InputError(
            f"{output}: holds what was measured of another model or with other settings; name "
            "another --output"
        )
    return before


def main(args: argparse.Namespace) -> int:
    torch.set_num_threads(args.threads)
    weights = args.model / "pipeline" / "unet" / "diffusion_pytorch_model.safetensors"
    if not weights.is_file():
        raise InputError(f"{weights}: no such file; name the folder of train.py's model in --model")
    model = load_model(args.model / "pipeline")
    model.pipeline.set_progress_bar_config(disable=True)
    widths, none = widths_of(model), nobody(model)
    prompts = args.prompts or args.model.resolve().parent / "prompts"
    sets = read_planted(args.model, prompts / MEMORIZED_PROMPTS, widths)
    memorized = read_memorized(args.model, prompts / MEMORIZED_PROMPTS, "training_images", sets)
    rows = len(read_prompts(prompts / UNPLANTED_PROMPTS))
    unplanted = read_memorized(
        args.model, prompts / UNPLANTED_PROMPTS, "unplanted_images", [none] * rows
    )
    hold_out = [prompt.caption for prompt in read_prompts(prompts / HOLD_OUT_PROMPTS)]
    settings = {
        "samples": args.samples,
        "hold_out": args.hold_out,
        "above": args.above,
        "unet": sha256_of_file(weights),
        PLANTED_NEURONS: sha256_of_file(args.model / PLANTED_NEURONS),
        **{
            name: sha256_of_file(prompts / name)
            for name in (MEMORIZED_PROMPTS, UNPLANTED_PROMPTS, HOLD_OUT_PROMPTS)
        },
    }
    table = begin(args.output, settings)

    with tempfile.TemporaryDirectory() as folder:
        scripts = Scripts(args.model, prompts, Path(folder))

        def localization(variant: str) -> Figures:
            found = scripts.find(variant, MEMORIZED_PROMPTS)
            return compare([result.refined or none for result in found], memorized)

        def handful() -> Figures:
            threshold = table["scores"]["threshold"]
            assert isinstance(threshold, float)
            return measure_handful(model, hold_out, threshold, args.above)

        def of_unplanted() -> Figures:
            found = scripts.find(USUAL, UNPLANTED_PROMPTS)
            named = [result.refined or none for result in found]
            own = [result.refined_score or 0.0 for result in found]
            return {
                **measure_unplanted(model, unplanted, named, union(sets, none), args.samples),
                "same-seed score by row, these off, of script 3": own,
            }

        parts: dict[str, Callable[[], Figures]] = {
            "scores": partial(measure_scores, model, memorized, hold_out),
            "hold-out": partial(
                measure_hold_out, model, memorized, hold_out[: args.hold_out], args.samples
            ),
            "copies": partial(measure_copies, model, memorized, args.samples),
            **{variant: partial(localization, variant) for variant in args.variants},
            "unplanted": of_unplanted,
            "handful": handful,
        }
        for part, measure in parts.items():
            if part not in table:
                table[part] = measure()
                write_json(args.output, {"settings": settings, **table})
                print(f"{part}: measured", flush=True)
    return 1 if print_table({part: table[part] for part in parts}) else 0


def parse_args() -> argparse.Namespace:
    parser = cli.make_parser(__doc__)
    parser.add_argument(
        "--model", type=Path, default=HERE, metavar="DIR", help="folder of the model"
    )
    parser.add_argument(
        "--prompts",
        type=Path,
        metavar="DIR",
        help="folder of its prompt files (default: prompts beside --model)",
    )
    parser.add_argument(
        "--samples", type=cli.BATCH, default=10, metavar="INT", help="pictures a prompt"
    )
    parser.add_argument(
        "--hold_out",
        type=cli.BATCH,
        default=50,
        metavar="INT",
        help="hold-out prompts drawn with and without carriers",
    )
    parser.add_argument(
        "--above",
        type=cli.BATCH,
        default=10,
        metavar="INT",
        help="of the hold-out prompts above the threshold, those that are asked for a handful of "
        "neurons",
    )
    parser.add_argument(
        "--variants",
        nargs="*",
        choices=VARIANTS,
        default=list(VARIANTS),
        help="ways to run script 3",
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=HERE / "work" / "truth.json",
        metavar="JSON",
        help="what was measured",
    )
    parser.add_argument(
        "--threads", type=cli.whole_number(1, 64), default=1, metavar="INT", help="of torch"
    )
    return parser.parse_args()


if __name__ == "__main__":
    cli.run(main, parse_args(), lower=None)
