"""Measure what this model memorizes and by which neurons, by brute force, and print the table.

No localization of ours is used for that: neurons are off because their rows of `to_v` are zero, and
a copy is a picture whose pixels correlate above 0.8 with the training image (over the fixed part of
a template). Then the localization is held against the truth: scripts 1 to 3 run in a folder of
their own, as published, with the other protocol, other seeds and other numbers of seed rows.

Reads:   --model: pipeline/, planted_neurons.csv, training_images/, fixed_parts/; --prompts
Writes:  --output, the table as JSON

Examples:
  python tiny_model/check_truth.py
  python tiny_model/check_truth.py --samples=2 --variants usual paper
  python tiny_model/check_truth.py --model=/tmp/tiny/tiny_model --prompts=/tmp/tiny/prompts
"""

import argparse
import csv
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a script: find tiny_model

from tiny_model.measure import (
    DETECTION_SEED,
    GENERATION_SEED,
    TinyModel,
    copy_similarity,
    generate,
    load_model,
    noise,
    noise_difference,
    pairwise_scores,
    silenced,
)
from tiny_model.planting import NeuronSet, value_layers
from tiny_model.truth_files import HOLD_OUT_PROMPTS, MEMORIZED_PROMPTS
from utils import cli

HERE = Path(__file__).resolve().parent
COPY = 0.8  # pixel correlation from which a picture counts as a copy
CONTROL_SEED = 3
VARIANTS: dict[str, list[str]] = {  # options of scripts 2 and 3
    "usual": [],
    "paper": ["--protocol=paper"],
    "seed 11": ["--seed=11"],
    "seed 12": ["--seed=12"],
    "5 rows": ["--samples_per_prompt=5"],
    "20 rows": ["--samples_per_prompt=20"],
}


def read_rows(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file, delimiter=";"))


def read_sets(path: Path) -> list[NeuronSet]:
    return [json.loads(row["Refined Neurons"]) for row in read_rows(path)]


@dataclass(frozen=True)
class Memorized:
    """A memorized caption: its kind (VM or TM), planted set, training image (64, 64, 3), and where
    that is fixed (64, 64)."""

    caption: str
    kind: str
    neurons: NeuronSet
    picture: np.ndarray
    fixed: np.ndarray


def read_memorized(folder: Path, prompts: Path) -> list[Memorized]:
    """The memorized captions of the model in `folder`, in row order."""
    rows = read_rows(prompts / MEMORIZED_PROMPTS)
    found = []
    for row, neurons in zip(rows, read_sets(folder / "planted_neurons.csv"), strict=True):
        name = f"{int(row['Index']):04d}"
        picture = np.asarray(Image.open(folder / "training_images" / f"{name}_first_image.jpg"))
        mask = folder / "fixed_parts" / f"{name}.png"
        fixed = np.asarray(Image.open(mask)) if mask.exists() else np.ones(picture.shape[:2])
        found.append(Memorized(row["Caption"], row["type"], neurons, picture, fixed.astype(bool)))
    return found


def similarities(model: TinyModel, known: Memorized, initial: Tensor, off: NeuronSet) -> np.ndarray:
    """Copy similarity of one picture per initial noise, with neurons off."""
    with silenced(model, off):
        pictures, _ = generate(model, [known.caption] * len(initial), initial)
    return copy_similarity(pictures, known.picture, known.fixed)


def union(sets: list[NeuronSet], without: NeuronSet) -> NeuronSet:
    """All neurons of several sets but those of one."""
    return [
        sorted({column for neurons in sets for column in neurons[layer]} - set(kept))
        for layer, kept in enumerate(without)
    ]


def random_set(like: NeuronSet, carriers: NeuronSet, widths: list[int], rng) -> NeuronSet:
    """As many neurons of the same layers, none of them a carrier."""
    return [
        sorted(rng.choice(sorted(set(range(width)) - set(taken)), len(columns), replace=False))
        for columns, taken, width in zip(like, carriers, widths, strict=True)
    ]


def measure_scores(
    model: TinyModel, memorized: list[str], hold_out: list[str], sets: list[NeuronSet]
) -> dict:
    """Largest pairwise scores: the threshold, who is above it, and the gap."""
    initial = noise(DETECTION_SEED)

    def best(caption: str) -> float:
        differences = noise_difference(model, model.text([caption]), initial)
        return pairwise_scores(differences).max().item()

    known, unknown = (
        np.asarray([best(c) for c in memorized]),
        np.asarray([best(c) for c in hold_out]),
    )
    threshold = unknown.mean() + unknown.std(ddof=1)
    nobody: NeuronSet = [[] for _ in sets[0]]
    with silenced(model, union(sets, nobody)):
        silent = np.asarray(
            [best(c) for c, b in zip(hold_out, unknown, strict=True) if b > threshold]
        )
    return {
        "threshold": threshold,
        "memorized above threshold": int((known > threshold).sum()),
        "memorized": len(known),
        "lowest memorized score": known.min(),
        "highest hold-out score": unknown.max(),
        "hold-out above threshold": int((unknown > threshold).sum()),
        "hold-out above threshold, all carriers off": int((silent > threshold).sum()),
        "hold-out": len(unknown),
    }


def measure_copies(model: TinyModel, memorized: list[Memorized], samples: int) -> dict:
    """Copies with nothing off, the set off, one carrier left, controls off."""
    initial = noise(GENERATION_SEED, samples)
    rng = np.random.default_rng(CONTROL_SEED)
    sets = [known.neurons for known in memorized]
    nobody: NeuronSet = [[] for _ in sets[0]]
    carriers = union(sets, nobody)
    widths = [to_v.out_features for to_v, _ in value_layers(model.pipeline.unet)]
    on, off, single, random_off, others_off = [], [], [], [], []
    for row, known in enumerate(memorized):
        on.append(similarities(model, known, initial, nobody))
        off.append(similarities(model, known, initial, known.neurons))
        control = random_set(known.neurons, carriers, widths, rng)
        random_off.append(np.median(similarities(model, known, initial, control)))
        others = union(sets, known.neurons)
        others_off.append(np.median(similarities(model, known, initial, others)))
        for layer, columns in enumerate(known.neurons):
            for column in columns:
                rest = [list(of_layer) for of_layer in known.neurons]
                rest[layer].remove(column)
                single.append(np.median(similarities(model, known, initial, rest)))
        print(f"row {row}: on {np.median(on[-1]):.2f}, off {np.median(off[-1]):.2f}", flush=True)

    def share(values: list) -> float:
        return float((np.asarray(values) > COPY).mean())

    return {
        "copies, nothing off": share(on),
        "copies, set off": share(off),
        "carriers that bring the picture back alone": share(single),
        "prompts whose picture stays, random neurons off": share(random_off),
        "prompts whose picture stays, others' carriers off": share(others_off),
        "similarity by row, nothing off": [float(np.median(values)) for values in on],
        "similarity by row, set off": [float(np.median(values)) for values in off],
    }


def measure_hold_out(
    model: TinyModel, hold_out: list[str], sets: list[NeuronSet], samples: int
) -> dict:
    """Same-seed latents of hold-out prompts with and without all carriers: cosine."""
    initial = noise(GENERATION_SEED, samples)
    nobody: NeuronSet = [[] for _ in sets[0]]
    cosines = []
    for caption in hold_out:
        _, before = generate(model, [caption] * samples, initial)
        with silenced(model, union(sets, nobody)):
            _, after = generate(model, [caption] * samples, initial)
        cosines += torch.cosine_similarity(before.flatten(1), after.flatten(1)).tolist()
    return {"hold-out latents, all carriers off: median cosine": float(np.median(cosines))}


def run_script(*words: str) -> None:
    """One of the project's scripts, with as many threads as this one has."""
    threads = str(torch.get_num_threads())
    subprocess.run(
        [sys.executable, *words],
        cwd=HERE.parent,
        env={**os.environ, "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads},
        check=True,
        stdout=subprocess.DEVNULL,
    )


def measure_localization(
    folder: Path, prompts: Path, variants: list[str], memorized: list[Memorized]
) -> dict[str, float]:
    """Script 3 against the planted sets, in every variant with a threshold of its own."""
    table: dict[str, float] = {}
    model = [f"--version={folder.resolve() / 'pipeline'}", "--device=cpu"]
    hold_out = f"--prompts={prompts.resolve() / HOLD_OUT_PROMPTS}"
    dataset = f"--dataset={prompts.resolve() / MEMORIZED_PROMPTS}"
    with tempfile.TemporaryDirectory() as temporary:
        statistics = Path(temporary) / "statistics.pt"
        run_script("1_compute_activations_statistics.py", *model, hold_out, f"-o={statistics}")
        for name in variants:
            threshold, result = (Path(temporary) / name / file for file in ("ssim.pt", "found.csv"))
            options = [*model, *VARIANTS[name]]
            run_script("2_compute_pairwise_ssim.py", *options, hold_out, f"-o={threshold}")
            files = [f"--statistics={statistics}", f"--threshold_file={threshold}", f"-o={result}"]
            run_script("3_detect_memorized_neurons.py", *options, dataset, *files)
            for key, value in compare(read_sets(result), memorized).items():
                table[f"{name}: {key}"] = value
            print(f"{name}: localized", flush=True)
    return table


def compare(found: list[NeuronSet], memorized: list[Memorized]) -> dict[str, float]:
    """Precision and recall of found sets against the planted ones, mean and median."""
    table = {}
    for kind in ("VM", "TM"):
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
            table[f"script 3, {kind}, {name}, median"] = float(np.median(values))
            table[f"script 3, {kind}, {name}, mean"] = float(np.mean(values))
    return table


def main(args: argparse.Namespace) -> int:
    torch.set_num_threads(args.threads)
    memorized = read_memorized(args.model, args.prompts)
    hold_out = [row["Caption"] for row in read_rows(args.prompts / HOLD_OUT_PROMPTS)]
    sets = [known.neurons for known in memorized]
    model = load_model(args.model / "pipeline")
    model.pipeline.set_progress_bar_config(disable=True)
    table = measure_scores(model, [known.caption for known in memorized], hold_out, sets)
    table |= measure_hold_out(model, hold_out[: args.hold_out], sets, args.samples)
    table |= measure_copies(model, memorized, args.samples)
    table |= measure_localization(args.model, args.prompts, args.variants, memorized)
    for name, value in table.items():
        if not isinstance(value, list):
            print(f"{name:<58} {value:.3f}" if isinstance(value, float) else f"{name:<58} {value}")
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps({"samples": args.samples, **table}, indent=1) + "\n")
    return 0


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model", type=Path, default=HERE, help="folder of the model (default: tiny_model)"
    )
    parser.add_argument(
        "--prompts",
        type=Path,
        default=HERE.parent / "prompts",
        help="folder of its prompt files (default: prompts)",
    )
    parser.add_argument("--samples", type=int, default=10, help="pictures a prompt (default: 10)")
    parser.add_argument("--hold_out", type=int, default=50, help="hold-out prompts drawn (50)")
    parser.add_argument(
        "--variants",
        nargs="*",
        choices=VARIANTS,
        default=list(VARIANTS),
        help="ways to run script 3 (default: all)",
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=HERE / "work" / "truth.json",
        help="(default: work/truth.json)",
    )
    parser.add_argument(
        "--threads", type=cli.whole_number(1, 64), default=1, help="of torch (default: 1)"
    )
    return parser.parse_args()


if __name__ == "__main__":
    cli.run(main, parse_args(), lower=None)
