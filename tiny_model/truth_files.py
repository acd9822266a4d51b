"""The files around the model: prompts, reference pictures and the planted neurons.

Public names: write_truth_files, MEMORIZED_PROMPTS, HOLD_OUT_PROMPTS, UNPLANTED_PROMPTS,
PLANTED_NEURONS.

Run after the model is written: the similarities and scores in the tables are measured on it.
"""

import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from tiny_model.captions import PLANTED, UNPLANTED, MemorizedCaption, generic_captions
from tiny_model.drawings import fixed_part
from tiny_model.measure import (
    DETECTION_SEED,
    GENERATION_SEED,
    copy_similarity,
    generate,
    load_model,
    noise,
    noise_difference,
    pairwise_scores,
    same_seed_score,
    silenced,
)
from tiny_model.planting import NeuronSet
from tiny_model.training_loop import ALONE, Workers, numpy_rng
from tiny_model.world import memorized_pictures
from utils.files import write_table

MEMORIZED_PROMPTS = "tiny_memorized_prompts.csv"
HOLD_OUT_PROMPTS = "tiny_unmemorized_prompts.csv"
UNPLANTED_PROMPTS = "tiny_unplanted_prompts.csv"
PLANTED_NEURONS = "planted_neurons.csv"
HOLD_OUT_CAPTIONS = 500
ORDINALS = ("first", "second", "third", "fourth")
REFERENCES = {"VM": 1, "TM": len(ORDINALS)}


def reference_pictures(caption: MemorizedCaption, seed: int) -> np.ndarray:
    """(1 or 4, 64, 64, 3): the picture of a scene, four examples of a template."""
    rng = numpy_rng(seed, f"references of {caption.picture}")
    return memorized_pictures(caption, rng, REFERENCES[caption.kind])


def write_references(folder: Path, captions: tuple[MemorizedCaption, ...], seed: int) -> None:
    """`0003_first_image.jpg` is row 3's; for templates also the mask of what is fixed."""
    folder.mkdir(parents=True, exist_ok=True)
    for row, caption in enumerate(captions):
        for ordinal, picture in zip(ORDINALS, reference_pictures(caption, seed), strict=False):
            file = folder / f"{row:04d}_{ordinal}_image.jpg"
            Image.fromarray(picture).save(file, quality=98, subsampling=0)


def write_fixed_parts(folder: Path) -> None:
    """`0002.png`: white where row 2's template is fixed."""
    folder.mkdir(parents=True, exist_ok=True)
    for row, caption in enumerate(PLANTED):
        if caption.kind == "TM":
            Image.fromarray(fixed_part(caption.picture)).convert("1").save(
                folder / f"{row:04d}.png"
            )


def write_truth_files(
    model_folder: Path,
    prompts: Path,
    sets: list[NeuronSet],
    trained: set[str],
    seed: int,
    workers: Workers = ALONE,
) -> None:
    """Everything around `model_folder`/pipeline. trained: captions that no hold-out may repeat.
    Each worker measures its share of the captions, and the first one writes. The pictures' URLs
    are those of the folder that is shipped, wherever this one lies."""
    taken = trained | {caption.text for caption in PLANTED + UNPLANTED}
    hold_out = generic_captions(numpy_rng(seed, "hold-out"), HOLD_OUT_CAPTIONS, taken)
    model = load_model(model_folder / "pipeline")
    model.pipeline.set_progress_bar_config(disable=True)

    initial = noise(GENERATION_SEED)
    alike = torch.zeros(len(PLANTED + UNPLANTED), len(initial), dtype=torch.float64)
    for row in range(workers.rank, len(alike), workers.count):
        caption = (PLANTED + UNPLANTED)[row]
        pictures, _ = generate(model, [caption.text] * len(initial), initial)
        reference = reference_pictures(caption, seed)[0]
        likeness = copy_similarity(pictures, reference, fixed_part(caption.picture))
        alike[row] = torch.from_numpy(likeness)
    workers.add_up(alike)

    initial = noise(DETECTION_SEED)
    best = torch.zeros(len(hold_out), dtype=torch.float64)
    for row in range(workers.rank, len(hold_out), workers.count):
        differences = noise_difference(model, model.text([hold_out[row]]), initial)
        best[row] = pairwise_scores(differences).max()
    workers.add_up(best)
    threshold = (best.mean() + best.std()).item()
    if workers.rank:
        return

    write_references(model_folder / "training_images", PLANTED, seed)
    write_references(model_folder / "unplanted_images", UNPLANTED, seed)
    write_fixed_parts(model_folder / "fixed_parts")
    rows: list[list[object]] = [[row, caption, "", row] for row, caption in enumerate(hold_out)]
    write_table(prompts / HOLD_OUT_PROMPTS, ["", "Caption", "URL", "Index"], rows)
    for name, folder, captions, measured in (
        (MEMORIZED_PROMPTS, "training_images", PLANTED, alike[: len(PLANTED)]),
        (UNPLANTED_PROMPTS, "unplanted_images", UNPLANTED, alike[len(PLANTED) :]),
    ):
        rows = []
        for row, (caption, likeness) in enumerate(zip(captions, measured, strict=True)):
            address = f"tiny_model/{folder}/{row:04d}_first_image.jpg"
            mean_and_best = [f"{likeness.mean():.6f}", f"{likeness.max():.6f}"]
            rows.append([row, caption.text, address, caption.kind, *mean_and_best, row])
        header = ["", "Caption", "URL", "type", "mean_sscd", "max_sscd", "Index"]
        write_table(prompts / name, header, rows)

    rows = []
    for row, (caption, neurons) in enumerate(zip(PLANTED, sets, strict=True)):
        text = model.text([caption.text])
        differences = noise_difference(model, text, initial)
        with silenced(model, neurons):
            blocked = noise_difference(model, text, initial)
        score = f"{same_seed_score(differences, blocked, threshold):.6f}"
        planted = json.dumps(neurons)
        address = f"tiny_model/training_images/{row:04d}_first_image.jpg"
        rows.append([caption.text, address, planted, score, planted, score, row])
    header = ["Caption", "URL", "Initial Neurons", "Initial SSIM"]
    header += ["Refined Neurons", "Refined SSIM", "Row"]
    write_table(model_folder / PLANTED_NEURONS, header, rows)
