"""What the model memorizes and by which neurons, by brute force, without our localization.

Public names: COPY, HANDFUL, Figures, Memorized, widths_of, nobody, union, random_set, best_score,
measure_scores, measure_handful, measure_copies, measure_hold_out, measure_unplanted.

Neurons are off because their rows of `to_v` are zero, and a copy is a picture whose pixels
correlate above `COPY` with the training image (over the fixed part of a template). What is
measured comes back by name: numbers, or lists by row.
"""

from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
from torch import Tensor

from tiny_model.measure import (
    DETECTION_SEED,
    GENERATION_SEED,
    TinyModel,
    copy_similarity,
    generate,
    noise,
    noise_difference,
    pairwise_scores,
    silenced,
)
from tiny_model.planting import NeuronSet, value_layers

COPY = 0.8  # pixel correlation from which a picture counts as a copy
HANDFUL = 5  # neurons
CONTROL_SEED = 3

Figures = dict[str, float | list[float]]


@dataclass(frozen=True)
class Memorized:
    """A memorized caption: its kind (VM or TM), planted set (of no neurons where nothing is
    planted), training image (64, 64, 3) uint8, and where that is fixed (64, 64) bool."""

    caption: str
    kind: str
    neurons: NeuronSet
    picture: np.ndarray
    fixed: np.ndarray


def widths_of(model: TinyModel) -> list[int]:
    """Neurons of every value layer."""
    return [to_v.out_features for to_v, _ in value_layers(model.pipeline.unet)]


def nobody(model: TinyModel) -> NeuronSet:
    """No neuron of any layer."""
    return [[] for _ in widths_of(model)]


def union(sets: list[NeuronSet], without: NeuronSet) -> NeuronSet:
    """All neurons of several sets but those of one."""
    return [
        sorted({column for neurons in sets for column in neurons[layer]} - set(kept))
        for layer, kept in enumerate(without)
    ]


def random_set(
    like: NeuronSet, carriers: NeuronSet, widths: list[int], rng: np.random.Generator
) -> NeuronSet:
    """As many neurons of the same layers, none of them a carrier."""
    return [
        sorted(
            int(column)
            for column in rng.choice(
                sorted(set(range(width)) - set(taken)), len(columns), replace=False
            )
        )
        for columns, taken, width in zip(like, carriers, widths, strict=True)
    ]


def best_score(model: TinyModel, caption: str, off: NeuronSet) -> float:
    """Largest pairwise score of a caption with neurons off."""
    with silenced(model, off):
        differences = noise_difference(model, model.text([caption]), noise(DETECTION_SEED))
    return pairwise_scores(differences).max().item()


def similarities(model: TinyModel, known: Memorized, initial: Tensor, off: NeuronSet) -> np.ndarray:
    """Copy similarity of one picture per initial noise, with neurons off."""
    with silenced(model, off):
        pictures, _ = generate(model, [known.caption] * len(initial), initial)
    return copy_similarity(pictures, known.picture, known.fixed)


def share_of_copies(values: list) -> float:
    """Of similarities, how many are copies'."""
    return float((np.asarray(values) > COPY).mean())


def measure_scores(model: TinyModel, memorized: list[Memorized], hold_out: list[str]) -> Figures:
    """Largest pairwise scores: the threshold, who is above it, and the gap."""
    none = nobody(model)
    carriers = union([known.neurons for known in memorized], none)
    known = np.asarray([best_score(model, one.caption, none) for one in memorized])
    unknown = np.asarray([best_score(model, caption, none) for caption in hold_out])
    threshold = unknown.mean() + unknown.std(ddof=1)
    above = [caption for caption, score in zip(hold_out, unknown, strict=True) if score > threshold]
    silent = np.asarray([best_score(model, caption, carriers) for caption in above])
    return {
        "threshold": float(threshold),
        "memorized prompts above the threshold": float((known > threshold).mean()),
        "lowest score of a memorized prompt": float(known.min()),
        "highest score of a hold-out prompt": float(unknown.max()),
        "lowest memorized over highest hold-out": float(known.min() / unknown.max()),
        "hold-out prompts": len(hold_out),
        "hold-out prompts above the threshold": len(above),
        "the same with all carriers off": int((silent > threshold).sum()),
    }


def measure_handful(model: TinyModel, hold_out: list[str], threshold: float, most: int) -> Figures:
    """How many hold-out prompts above the threshold lose their score to a handful of neurons.

    Of the first `most` such prompts: every value neuron is off alone, and then the `HANDFUL` of
    them together after which the score was lowest; beside them as many random ones.
    """
    none = nobody(model)
    above = (caption for caption in hold_out if best_score(model, caption, none) > threshold)
    tried = list(islice(above, most))
    neurons = [
        (layer, column) for layer, width in enumerate(widths_of(model)) for column in range(width)
    ]
    rng = np.random.default_rng(CONTROL_SEED)
    lost = by_chance = 0
    for place, caption in enumerate(tried, 1):
        alone = {neuron: best_score(model, caption, _as_set([neuron], none)) for neuron in neurons}
        handful = sorted(neurons, key=lambda neuron: (alone[neuron], neuron))[:HANDFUL]
        lost += best_score(model, caption, _as_set(handful, none)) <= threshold
        control = [neurons[i] for i in rng.choice(len(neurons), HANDFUL, replace=False)]
        by_chance += best_score(model, caption, _as_set(control, none)) <= threshold
        print(f"hold-out prompt {place} of {len(tried)}: {lost} lost", flush=True)
    return {
        "hold-out prompts above the threshold, tried": len(tried),
        f"below it with {HANDFUL} neurons off": int(lost),
        f"below it with {HANDFUL} random neurons off": int(by_chance),
    }


def _as_set(neurons: list[tuple[int, int]], none: NeuronSet) -> NeuronSet:
    return [sorted(column for of, column in neurons if of == layer) for layer, _ in enumerate(none)]


def measure_copies(model: TinyModel, memorized: list[Memorized], samples: int) -> Figures:
    """Copies with nothing off, the set off, one carrier left (by row, layer and number), controls
    off; similarities are medians over the samples."""
    initial = noise(GENERATION_SEED, samples)
    rng = np.random.default_rng(CONTROL_SEED)
    sets = [known.neurons for known in memorized]
    none = nobody(model)
    carriers = union(sets, none)
    on, off, single, random_off, others_off = [], [], [], [], []
    for row, known in enumerate(memorized):
        on.append(similarities(model, known, initial, none))
        off.append(similarities(model, known, initial, known.neurons))
        control = random_set(known.neurons, carriers, widths_of(model), rng)
        random_off.append(np.median(similarities(model, known, initial, control)))
        others = union(sets, known.neurons)
        others_off.append(np.median(similarities(model, known, initial, others)))
        for layer, columns in enumerate(known.neurons):
            for column in columns:
                rest = [list(of_layer) for of_layer in known.neurons]
                rest[layer].remove(column)
                single.append(np.median(similarities(model, known, initial, rest)))
        print(f"row {row}: on {np.median(on[-1]):.2f}, off {np.median(off[-1]):.2f}", flush=True)
    return {
        "copies, nothing off": share_of_copies(on),
        "copies, set off": share_of_copies(off),
        "carriers that bring the picture back alone": share_of_copies(single),
        "prompts whose picture stays, random neurons off": share_of_copies(random_off),
        "prompts whose picture stays, others' carriers off": share_of_copies(others_off),
        "similarity by row, nothing off": [float(np.median(values)) for values in on],
        "similarity by row, set off": [float(np.median(values)) for values in off],
        "similarity by row, random neurons off": [float(value) for value in random_off],
        "similarity by row, others' carriers off": [float(value) for value in others_off],
        "similarity by carrier, alone on": [float(value) for value in single],
    }


def measure_hold_out(
    model: TinyModel, memorized: list[Memorized], hold_out: list[str], samples: int
) -> Figures:
    """Same-seed latents of hold-out prompts with and without all carriers: cosine."""
    initial = noise(GENERATION_SEED, samples)
    carriers = union([known.neurons for known in memorized], nobody(model))
    cosines = []
    for caption in hold_out:
        _, before = generate(model, [caption] * samples, initial)
        with silenced(model, carriers):
            _, after = generate(model, [caption] * samples, initial)
        cosines += torch.cosine_similarity(before.flatten(1), after.flatten(1)).tolist()
    return {"latents with all carriers off, median cosine": float(np.median(cosines))}


def measure_unplanted(
    model: TinyModel,
    unplanted: list[Memorized],
    found: list[NeuronSet],
    carriers: NeuronSet,
    samples: int,
) -> Figures:
    """What memorization by training alone looks like: scores, the neurons that script 3 `found`,
    and copies with nothing, with all `carriers` and with these neurons off."""
    initial = noise(GENERATION_SEED, samples)
    none = nobody(model)
    pairs = list(zip(unplanted, found, strict=True))
    return {
        "score by row": [best_score(model, known.caption, none) for known in unplanted],
        "neurons found by row": [sum(map(len, neurons)) for neurons in found],
        "score by row, these off": [best_score(model, known.caption, off) for known, off in pairs],
        "copies, nothing off": share_of_copies(
            [similarities(model, known, initial, none) for known in unplanted]
        ),
        "copies, all planted carriers off": share_of_copies(
            [similarities(model, known, initial, carriers) for known in unplanted]
        ),
        "copies, found neurons off": share_of_copies(
            [similarities(model, known, initial, off) for known, off in pairs]
        ),
    }
