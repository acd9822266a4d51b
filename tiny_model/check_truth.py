"""Measure what this model memorizes and by which neurons, by brute force, and print the table.

No localization of ours is used for that: neurons are off because their rows of `to_v` are zero, and
a copy is a picture whose pixels correlate above 0.8 with the training image (over the fixed part of
a template). Then the localization is held against the truth: scripts 1 to 3 run in a folder of
their own, as published, with the other protocol, other seeds and other numbers of seed rows.

Reads:   pipeline/, planted_neurons.csv, training_images/, fixed_parts/ and the prompt files
Writes:  --output, the table as JSON

Examples:
  python tiny_model/check_truth.py
  python tiny_model/check_truth.py --samples=2 --variants usual paper
"""

import argparse
import csv
import json
import os
import subprocess
import sys
import tempfile
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


def reference(row: int) -> tuple[np.ndarray, np.ndarray]:
    """Training image (64, 64, 3) of a memorized row and where it is fixed (64, 64)."""
    picture = np.asarray(Image.open(HERE / "training_images" / f"{row:04d}_first_image.jpg"))
    mask = HERE / "fixed_parts" / f"{row:04d}.png"
    fixed = np.asarray(Image.open(mask)) if mask.exists() else np.ones(picture.shape[:2])
    return picture, fixed.astype(bool)


def similarities(
    model: TinyModel, row: int, caption: str, initial: Tensor, off: NeuronSet | None = None
) -> np.ndarray:
    """Copy similarity of one picture per initial noise, with neurons off if any are named."""
    with silenced(model, off or [[] for _ in value_layers(model.pipeline.unet)]):
        pictures, _ = generate(model, [caption] * len(initial), initial)
    return copy_similarity(pictures, *reference(row))


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


def measure_copies(
    model: TinyModel, captions: list[str], sets: list[NeuronSet], samples: int
) -> dict:
    """Copies with nothing off, the set off, one carrier left, controls off."""
    initial = noise(GENERATION_SEED, samples)
    rng = np.random.default_rng(CONTROL_SEED)
    nobody: NeuronSet = [[] for _ in sets[0]]
    carriers = union(sets, nobody)
    widths = [to_v.out_features for to_v, _ in value_layers(model.pipeline.unet)]
    on, off, single, random_off, others_off = [], [], [], [], []
    for row, (caption, neurons) in enumerate(zip(captions, sets, strict=True)):
        on.append(similarities(model, row, caption, initial))
        off.append(similarities(model, row, caption, initial, neurons))
        control = random_set(neurons, carriers, widths, rng)
        random_off.append(np.median(similarities(model, row, caption, initial, control)))
        others = union(sets, neurons)
        others_off.append(np.median(similarities(model, row, caption, initial, others)))
        for layer, columns in enumerate(neurons):
            for column in columns:
                rest = [list(of_layer) for of_layer in neurons]
                rest[layer].remove(column)
                single.append(np.median(similarities(model, row, caption, initial, rest)))
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


def localized(options: list[str], statistics: Path, folder: Path) -> list[NeuronSet]:
    """What script 3 finds for the memorized prompts with these options and a threshold of their
    own."""
    threshold, result = folder / "threshold.pt", folder / "result.csv"
    common = ["--version=tiny", "--device=cpu", *options]
    for script, more in (
        ("2_compute_pairwise_ssim.py", [f"-o={threshold}"]),
        (
            "3_detect_memorized_neurons.py",
            [f"--statistics={statistics}", f"--threshold_file={threshold}", f"-o={result}"],
        ),
    ):
        run_script(script, *common, *more)
    return read_sets(result)


def measure_localization(
    variants: list[str], sets: list[NeuronSet], kinds: list[str]
) -> dict[str, float]:
    """Script 3 against the planted sets, in every variant."""
    table: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as temporary:
        statistics = Path(temporary) / "statistics.pt"
        script = "1_compute_activations_statistics.py"
        run_script(script, "--version=tiny", "--device=cpu", f"-o={statistics}")
        for name in variants:
            folder = Path(temporary) / name
            found = localized(VARIANTS[name], statistics, folder)
            table |= {f"{name}: {key}": value for key, value in compare(found, sets, kinds).items()}
            print(f"{name}: localized", flush=True)
    return table


def compare(found: list[NeuronSet], sets: list[NeuronSet], kinds: list[str]) -> dict[str, float]:
    """Precision and recall of found sets against the planted ones, mean and median."""
    table = {}
    for kind in ("VM", "TM"):
        precision, recall = [], []
        for mine, true, of_kind in zip(found, sets, kinds, strict=True):
            if of_kind != kind:
                continue
            named = {(layer, i) for layer, columns in enumerate(mine) for i in columns}
            planted = {(layer, i) for layer, columns in enumerate(true) for i in columns}
            hits = len(named & planted)
            precision.append(hits / len(named) if named else 0.0)
            recall.append(hits / len(planted))
        for name, values in (("precision", precision), ("recall", recall)):
            table[f"script 3, {kind}, {name}, median"] = float(np.median(values))
            table[f"script 3, {kind}, {name}, mean"] = float(np.mean(values))
    return table


def main(args: argparse.Namespace) -> None:
    torch.set_num_threads(args.threads)
    prompts = read_rows(HERE.parent / "prompts" / "tiny_memorized_prompts.csv")
    unknown = read_rows(HERE.parent / "prompts" / "tiny_unmemorized_prompts.csv")
    captions, hold_out = ([row["Caption"] for row in rows] for rows in (prompts, unknown))
    sets = read_sets(HERE / "planted_neurons.csv")
    model = load_model(HERE / "pipeline")
    model.pipeline.set_progress_bar_config(disable=True)
    table = measure_scores(model, captions, hold_out, sets)
    table |= measure_hold_out(model, hold_out[: args.hold_out], sets, args.samples)
    table |= measure_copies(model, captions, sets, args.samples)
    table |= measure_localization(args.variants, sets, [row["type"] for row in prompts])
    for name, value in table.items():
        if not isinstance(value, list):
            print(f"{name:<58} {value:.3f}" if isinstance(value, float) else f"{name:<58} {value}")
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps({"samples": args.samples, **table}, indent=1) + "\n")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
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
    parser.add_argument("--threads", type=int, default=1, help="of torch (default: 1)")
    return parser.parse_args()


if __name__ == "__main__":
    main(parse_args())
