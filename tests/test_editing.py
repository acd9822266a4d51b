"""Permanent edits: what an edited model does, what is in its folder, and what its weights show.

Every edit is compared with a plain computation of its definition, or with hooks on the unedited
model."""

import dataclasses
import importlib.util
import json
import re
import runpy
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import torch
import workspace
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file, save_file
from small_models import save_small_model

from utils import edited_weights, editing
from utils.detection_metrics import auroc, roc
from utils.edit_detector import (
    CEILING,
    DETECTORS,
    conspicuousness,
    row_statistics,
    score_rows,
)
from utils.edited_weights import (
    StoredWeights,
    check_diff,
    read_diff,
    save_weights,
    unet_files,
    unet_folder,
    write_diff,
    write_pipeline,
)
from utils.editing import MODES, EditedPrompt, Job
from utils.errors import InputError
from utils.files import Prompt, read_prompts, write_json, write_table
from utils.model_card import with_measurements
from utils.neuron_sets import RESULT_COLUMNS, Result, result_cells
from utils.single_file import check_single_file, write_single_file
from utils.stable_diffusion import (
    Model,
    encode_prompt,
    encode_unconditional,
    initial_noise,
    load_model,
    sample_latents,
)
from utils.value_layers import deactivated
from utils.versions import resolve

EDIT = workspace.ROOT / "5_edit_model.py"
DETECT = workspace.ROOT / "metrics" / "detect_edited_rows.py"
TABLE = workspace.ROOT / "metrics" / "make_edit_table.py"
UNET = "unet/diffusion_pytorch_model.safetensors"
OURS = ("zero", "mean", "camouflage")  # adversarial: test_adversarial.py
HOLD_OUT = [Prompt(i, text) for i, text in enumerate(["one dog", "Two boats", "a hat 3", "RAIN"])]
# Neuron 5 of layer 0 serves both prompts, and so does 63 of layer 3.
NEURONS = [[2, 5], [], [0, 7, 40], [63]]
PROMPTS = [
    EditedPrompt(0, "A lighthouse, winter", [[2, 5], [], [0], [63]]),
    EditedPrompt(3, "grey cat on a red chair", [[5], [], [7, 40], [63]]),
]

# Refined sets of the six prompts of the workspace's file; the second was not memorized.
LOCATED = [
    [[2, 5], [], [0], [63]],
    [[], [], [], []],
    [[5], [], [7, 40], [63]],
    [[], [1], [], []],
    [[31], [], [], [8, 9]],
    [[], [], [7], []],
]
UNION = [[2, 5, 31], [1], [0, 7, 40], [8, 9, 63]]


def initial_of(refined: list[list[int]]) -> list[list[int]]:
    """Refinement has dropped neuron 20 of every layer that it left a neuron of."""
    return [[*layer, 20] if layer else [] for layer in refined]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the script reads: two models, prompt files, a result file with its record. To be read,
    never written."""
    place = tmp_path_factory.mktemp("place")
    workspace.save_model(place / "model")
    workspace.save_model(place / "other", seed=1)
    (place / "memorized.csv").write_text(workspace.MEMORIZED, encoding="utf-8")
    (place / "holdout.csv").write_text(workspace.HOLDOUT, encoding="utf-8")
    captions = [prompt.caption for prompt in read_prompts(place / "memorized.csv")]
    results = [
        Result(row, caption, "", initial_of(neurons), 0.9, neurons, 0.1)
        for row, (caption, neurons) in enumerate(zip(captions, LOCATED, strict=True))
    ]
    table = place / "results/memorization_statistics_model.csv"
    write_table(table, RESULT_COLUMNS, map(result_cells, results))
    record = {
        "model": resolve(str(place / "model")).identity,
        "settings": {"protocol": "paper"},
        "finished": True,
    }
    write_json(table.with_suffix(".json"), record)
    return place


@pytest.fixture(scope="module")
def folder(place: Path) -> Path:
    """A random model whose neurons matter. To be read, never written."""
    return place / "model"


@pytest.fixture(scope="module")
def model(folder: Path) -> Model:
    return load_model(resolve(str(folder)), device="cpu", dtype="float32")


def job_of(folder: Path, **options: Any) -> Job:
    return Job(resolve(str(folder)), NEURONS, PROMPTS, HOLD_OUT, options, "cpu")


def stored(folder: Path) -> StoredWeights:
    return StoredWeights(unet_files(folder))


def edited(folder: Path, output: Path, mode: str, **options: Any) -> Model:
    """The model, edited, written and loaded as a user's is."""
    given = {name: options.get(name, default) for name, default in MODES[mode].options.items()}
    changes, _ = MODES[mode].edit(job_of(folder, **given), stored(folder))
    write_pipeline(folder, output, changes, dtype=None, card="")
    return load_model(resolve(str(output)), device="cpu", dtype="float32")


def latents_of(model: Model) -> torch.Tensor:
    """Guided sampling: conditional and unconditional rows both count."""
    return sample_latents(
        model,
        encode_prompt(model, PROMPTS[0].caption).repeat(2),
        encode_unconditional(model),
        initial_noise(model, 2, seed=2),
        steps=3,
        guidance_scale=7.0,
    )


def embeddings(model: Model, captions: list[str]) -> np.ndarray:
    """(prompts, tokens, D) in float64."""
    found = [encode_prompt(model, caption).embedding[0].numpy() for caption in captions]
    return np.stack(found).astype(np.float64)


def layer_weights(folder: Path) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """(to_v weight, to_out weight, to_out bias) of each value layer, forward order written out."""
    tensors = load_file(folder / UNET)
    names = [
        *(f"down_blocks.{block}.attentions.0.transformer_blocks.0.attn2" for block in range(3)),
        "mid_block.attentions.0.transformer_blocks.0.attn2",
    ]
    parts = ("to_v.weight", "to_out.0.weight", "to_out.0.bias")
    return [tuple(tensors[f"{n}.{p}"].double().numpy() for p in parts) for n in names]  # type: ignore[misc]


# zero


@pytest.mark.parametrize("factor", [0.0, -0.5])
def test_zero_gives_the_latents_of_the_hooks_bit_for_bit(
    folder: Path, model: Model, tmp_path: Path, factor: float
) -> None:
    ours = latents_of(edited(folder, tmp_path / "edited", "zero", scaling_factor=factor))
    with deactivated(model.value_layers, [NEURONS], factor=factor):
        assert torch.equal(ours, latents_of(model))
    assert not torch.allclose(ours, latents_of(model), atol=1e-3), "the neurons do not matter"


def test_a_factor_that_needs_rounding_is_equal_up_to_it(
    folder: Path, model: Model, tmp_path: Path
) -> None:
    ours = latents_of(edited(folder, tmp_path / "edited", "zero", scaling_factor=0.3))
    with deactivated(model.value_layers, [NEURONS], factor=0.3):
        torch.testing.assert_close(ours, latents_of(model), rtol=0, atol=1e-4)


# mean


def test_mean_is_a_constant_value_column_for_all_rows(
    folder: Path, model: Model, tmp_path: Path
) -> None:
    """The constants are computed here from the definition, and set by a hook."""
    tokens = embeddings(model, [prompt.caption for prompt in HOLD_OUT])
    handles = []
    for layer, neurons, (weight, _, _) in zip(
        model.value_layers.values(), NEURONS, layer_weights(folder), strict=True
    ):
        means = np.einsum("ptd,nd->n", tokens, weight[neurons]) / (
            tokens.shape[0] * tokens.shape[1]
        )

        def constant(
            module: object,
            inputs: object,
            output: torch.Tensor,
            neurons: list[int] = neurons,
            means: np.ndarray = means,
        ) -> torch.Tensor:
            output = output.clone()
            output[..., neurons] = torch.tensor(means, dtype=output.dtype)
            return output

        handles.append(layer.register_forward_hook(constant))
    try:
        wanted = latents_of(model)
    finally:
        for handle in handles:
            handle.remove()
    ours = latents_of(edited(folder, tmp_path / "mean", "mean"))
    torch.testing.assert_close(ours, wanted, rtol=0, atol=1e-4)
    zero = latents_of(edited(folder, tmp_path / "zero", "zero"))
    assert not torch.allclose(ours, zero, atol=1e-3), "the constants do not matter"


def test_mean_needs_a_bias(folder: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "model"))
    tensors = load_file(copy / UNET)
    name = next(n for n in tensors if n.startswith("down_blocks.0") and "attn2.to_out.0.bias" in n)
    save_file({n: t for n, t in tensors.items() if n != name}, copy / UNET)
    with pytest.raises(InputError, match="no bias"):
        MODES["mean"].edit(job_of(folder), stored(copy))


# camouflage


def kkt(
    covariance: np.ndarray, before: np.ndarray, decoy: np.ndarray, ridge: float, away: np.ndarray
) -> np.ndarray:
    """argmin (w - before) C (w - before) + r |w - decoy|^2 with away w = 0, by its stationarity
    conditions as one linear system (``away`` of full rank)."""
    width, held = len(before), len(away)
    system = np.block(
        [[covariance + ridge * np.eye(width), away.T], [away, np.zeros((held, held))]]
    )
    right = np.concatenate([covariance @ before + ridge * decoy, np.zeros(held)])
    return np.linalg.solve(system, right)[:width]


@pytest.mark.parametrize("repeated", [False, True], ids=["two prompts", "one of them twice"])
def test_camouflage_is_the_constrained_fit(
    folder: Path, model: Model, monkeypatch: pytest.MonkeyPatch, repeated: bool
) -> None:
    decoy = np.linspace(-1, 1, 32)
    monkeypatch.setattr(editing._UsualRow, "draw", lambda *_: torch.tensor(decoy))
    job = job_of(folder, ridge=0.05, decoy_seed=0)
    if repeated:
        twin = dataclasses.replace(PROMPTS[1], row=9)
        job = dataclasses.replace(job, prompts=[*PROMPTS, twin])
    changes, _ = MODES["camouflage"].edit(job, stored(folder))

    tokens = embeddings(model, [prompt.caption for prompt in HOLD_OUT]).reshape(-1, 32)
    mean = tokens.mean(axis=0)
    covariance = np.cov(tokens.T, bias=True)
    ridge = 0.05 * np.linalg.eigvalsh(covariance).mean()
    memorized = embeddings(model, [p.caption for p in PROMPTS]).mean(axis=1)
    for layer, (weight, output, bias) in enumerate(layer_weights(folder)):
        name = list(model.value_layers)[layer]
        if not NEURONS[layer]:
            assert f"{name}.weight" not in changes
            continue
        wanted, constant = weight.copy(), bias.copy()
        for neuron in NEURONS[layer]:
            own = [i for i, prompt in enumerate(PROMPTS) if neuron in prompt.neurons[layer]]
            wanted[neuron] = kkt(covariance, weight[neuron], decoy, ridge, memorized[own] - mean)
            constant += output[:, neuron] * ((weight - wanted)[neuron] @ mean)
            # What it says to the prompts, with the constant, is what it said on average.
            said = memorized[own] @ wanted[neuron] + (weight - wanted)[neuron] @ mean
            np.testing.assert_allclose(said, weight[neuron] @ mean, atol=1e-9)
        np.testing.assert_allclose(changes[f"{name}.weight"].numpy(), wanted, atol=1e-7)
        place = name.replace("to_v", "to_out.0.bias")
        np.testing.assert_allclose(changes[place].numpy(), constant, atol=1e-7)


@pytest.mark.parametrize("length", [1.0, 100.0], ids=["a short decoy", "a long one"])
def test_camouflage_takes_the_smallest_ridge_whose_row_is_short_enough(
    folder: Path, model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, length: float
) -> None:
    """Each layer's first neuron is far too long, the others are next to nothing: with a short decoy
    any ridge will do for those, and with a long one none for the former."""
    decoy = np.linspace(-1, 1, 32)
    decoy *= length / np.linalg.norm(decoy)
    monkeypatch.setattr(editing._UsualRow, "draw", lambda *_: torch.tensor(decoy))
    copy = Path(shutil.copytree(folder, tmp_path / "model"))
    tensors = load_file(copy / UNET)
    for name, neurons in zip(model.value_layers, NEURONS, strict=True):
        tensors[f"{name}.weight"][neurons[:1]] *= 20
        tensors[f"{name}.weight"][neurons[1:]] *= 1e-3
    save_file(tensors, copy / UNET, metadata={"format": "pt"})
    job = job_of(copy, ridge=None, decoy_seed=0)
    changes, found = MODES["camouflage"].edit(job, stored(copy))

    tokens = embeddings(model, [prompt.caption for prompt in HOLD_OUT]).reshape(-1, 32)
    mean = tokens.mean(axis=0)
    covariance = np.cov(tokens.T, bias=True)
    unit = np.linalg.eigvalsh(covariance).mean()
    memorized = embeddings(model, [p.caption for p in PROMPTS]).mean(axis=1)
    ridges, kept = [], []
    for layer, (weight, _, _) in enumerate(layer_weights(copy)):
        name = list(model.value_layers)[layer]
        lengths = sorted(np.linalg.norm(np.delete(weight, NEURONS[layer], axis=0), axis=1))
        usual = lengths[(len(lengths) - 1) // 2]  # the lower of two middle ones
        for neuron in NEURONS[layer]:
            before = weight[neuron]
            own = [i for i, prompt in enumerate(PROMPTS) if neuron in prompt.neurons[layer]]
            rows = {
                ridge: kkt(covariance, before, decoy, ridge * unit, memorized[own] - mean)
                for ridge in editing.RIDGES
            }
            short = [ridge for ridge, row in rows.items() if np.linalg.norm(row) <= usual]
            ridge = min(short, default=editing.RIDGES[-1])
            after = changes[f"{name}.weight"][neuron].numpy()
            np.testing.assert_allclose(after, rows[ridge], atol=1e-7)
            ridges.append(ridge)
            lost = np.var(tokens @ (rows[ridge] - before))
            kept.append(1 - lost / np.var(tokens @ before))
    assert (found["median_ridge"], found["largest_ridge"]) == (median(ridges), max(ridges))
    share = found["median_share_of_hold_out_output_kept"]
    assert share == pytest.approx(median(kept), rel=1e-5, abs=1e-6)
    if length == 1:
        assert editing.RIDGES[0] == min(ridges) < max(ridges) < editing.RIDGES[-1]
    else:
        assert max(ridges) == editing.RIDGES[-1]


def test_camouflaged_rows_are_no_longer_than_usual_and_other_rows_stay(folder: Path) -> None:
    """The neurons' rows are made twenty times too long first, as a planted carrier's may be."""
    weights = dict(stored(folder))
    names = editing.value_layer_names(stored(folder), ("down", "mid"))
    for name, neurons in zip(names, NEURONS, strict=True):
        weights[f"{name}.weight"][neurons] *= 20

    class Loud(StoredWeights):
        def __getitem__(self, name: str) -> torch.Tensor:
            return weights[name]

    loud = Loud(unet_files(folder))
    changes, found = MODES["camouflage"].edit(job_of(folder, ridge=None, decoy_seed=0), loud)
    for name, neurons in zip(names, NEURONS, strict=True):
        if not neurons:
            continue
        before, after = weights[f"{name}.weight"].double(), changes[f"{name}.weight"]
        others = [i for i in range(len(before)) if i not in neurons]
        assert torch.equal(before[others], after[others])
        usual = before[others].norm(dim=1).median()
        assert (before[neurons].norm(dim=1) > 2 * usual).all()
        assert (after[neurons].norm(dim=1) <= 1.001 * usual).all()
    assert found["hold_out_tokens"] == 4 * 77 and found["largest_ridge"] in editing.RIDGES
    again, _ = MODES["camouflage"].edit(job_of(folder, ridge=None, decoy_seed=0), loud)
    other, _ = MODES["camouflage"].edit(job_of(folder, ridge=None, decoy_seed=1), loud)
    changed = f"{names[0]}.weight"
    assert torch.equal(changes[changed], again[changed])
    assert not torch.equal(changes[changed], other[changed])


@pytest.mark.parametrize("rows", [6, 40], ids=["fewer rows than inputs", "more"])
def test_a_drawn_row_has_the_usual_length_and_share_within_the_others(rows: int) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(rows, 12, generator=generator, dtype=torch.float64)
    weight[: rows // 2] += 2  # so that rows have something in common
    usual = editing._UsualRow.of(weight)
    within = []
    for i in range(rows):
        others = np.delete(weight.numpy(), i, axis=0).T
        fit = others @ np.linalg.lstsq(others, weight[i].numpy(), rcond=None)[0]
        within.append((fit**2).sum() / float((weight[i] ** 2).sum()))
    # torch's median is the lower of the two middle ones, of what lies beyond
    assert abs(usual.shared - sorted(within)[rows // 2]) < 1e-6
    drawn = usual.draw(generator)
    assert float(drawn.norm()) == pytest.approx(float(weight.norm(dim=1).median()), rel=1e-6)
    span = weight.numpy().T
    fit = span @ np.linalg.lstsq(span, drawn.numpy(), rcond=None)[0]
    assert (fit**2).sum() / float((drawn**2).sum()) == pytest.approx(usual.shared, abs=1e-6)


# The folder


def test_the_folder_loads_without_us_and_all_else_keeps_its_bytes(
    folder: Path, tmp_path: Path
) -> None:
    source = Path(shutil.copytree(folder, tmp_path / "model"))
    # Other copies of the weights, which would bring the images along.
    shutil.copy(source / UNET, source / "unet/diffusion_pytorch_model.fp16.safetensors")
    (source / "unet/diffusion_pytorch_model.bin").write_bytes(b"pickle")
    (source / "whole.safetensors").write_bytes(b"checkpoint")
    (source / "LICENSE.md").write_text("terms")
    output = tmp_path / "deep" / "edited.v2"
    changes, _ = MODES["zero"].edit(job_of(source, scaling_factor=0.0), stored(source))
    write_pipeline(source, output, changes, dtype=None, card="card")
    assert [path.name for path in output.parent.iterdir()] == ["edited.v2"], "temporary left"
    assert sorted(p.name for p in (output / "unet").iterdir()) == [
        "config.json",
        "diffusion_pytorch_model.safetensors",
    ]
    assert not (output / "whole.safetensors").exists() and (output / "LICENSE.md").exists()
    for path in sorted(output.rglob("*")):
        name = path.relative_to(output)
        if path.is_file() and str(name) not in (UNET, "README.md"):
            assert path.read_bytes() == (source / name).read_bytes(), name
    ours, theirs = load_file(output / UNET), load_file(source / UNET)
    assert ours.keys() == theirs.keys()
    touched = {name for name in ours if not torch.equal(ours[name], theirs[name])}
    assert len(touched) == 3 and all(name.endswith("attn2.to_v.weight") for name in touched)
    assert all(ours[name].dtype == theirs[name].dtype for name in ours)
    pipeline = StableDiffusionPipeline.from_pretrained(output)
    assert isinstance(pipeline, StableDiffusionPipeline)


def test_weights_keep_their_precision_or_get_the_one_asked_for(
    folder: Path, tmp_path: Path
) -> None:
    source = Path(shutil.copytree(folder, tmp_path / "model"))
    half = {name: tensor.half() for name, tensor in load_file(source / UNET).items()}
    save_file(half, source / UNET, metadata={"format": "pt"})
    changes, _ = MODES["zero"].edit(job_of(source, scaling_factor=0.3), stored(source))
    write_pipeline(source, tmp_path / "half", changes, dtype=None, card="")
    write_pipeline(source, tmp_path / "full", changes, dtype="float32", card="")
    name = next(iter(changes))
    kept, full = (load_file(tmp_path / place / UNET)[name] for place in ("half", "full"))
    row = NEURONS[0][0]
    assert kept.dtype == torch.float16 and full.dtype == torch.float32
    assert torch.equal(kept[row], (0.3 * half[name][row].double()).half())
    assert torch.equal(full[row], (0.3 * half[name][row].double()).float())


def test_sharded_weights_are_one_model(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = Path(shutil.copytree(folder, tmp_path / "model"))
    whole = stored(folder).digest()
    with monkeypatch.context() as smaller:  # real tensors are larger than what is read at once
        smaller.setattr(edited_weights, "CHUNK", 64)
        assert stored(folder).digest() == whole
    pipeline = StableDiffusionPipeline.from_pretrained(folder)
    shutil.rmtree(source / "unet")
    pipeline.unet.save_pretrained(source / "unet", max_shard_size="300KB")
    assert len(unet_files(source)) > 1 and stored(source).digest() == whole
    ours, theirs = (
        edited(place, tmp_path / name, "zero").unet.state_dict()
        for name, place in (("edited", source), ("whole", folder))
    )
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_failed_write_leaves_nothing(folder: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(folder, tmp_path / "model"))
    (source / "vae/diffusion_pytorch_model.safetensors").rename(source / "vae/weights.bin")
    with pytest.raises(InputError, match="pickle"):
        write_pipeline(source, tmp_path / "edited", {}, dtype=None, card="")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("name", ["..", ".", "../other", "/tmp"])
def test_an_index_does_not_say_what_is_copied_from_elsewhere(
    place: Path,
    name: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    copy = Path(shutil.copytree(place, tmp_path / "place"))
    index = json.loads((copy / "model/model_index.json").read_text())
    (copy / "model/model_index.json").write_text(json.dumps({**index, name: ["a", "B"]}))
    before = workspace.tree(tmp_path)
    options = ["--version=model", "-o=edited/x"]
    assert call(EDIT, *options, cwd=copy, monkeypatch=monkeypatch) == 2
    assert f"'{name}' is no name of a part" in capsys.readouterr().err
    assert workspace.tree(tmp_path) == before
    with pytest.raises(InputError, match="no name of a part"):
        write_pipeline(copy / "model", copy / "y", {}, dtype=None, card="")
    assert workspace.tree(tmp_path) == before


def test_the_unet_of_a_hub_model_is_enough_to_look_at_it(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From a cache that scripts 1 to 4 have filled: no safety checker, no network."""
    commit = "0123456789" * 4
    repository = tmp_path / "models--someone--a-model"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    kept = repository / "snapshots" / commit
    shutil.copytree(folder / "unet", kept / "unet")
    shutil.copy(folder / "model_index.json", kept)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert unet_folder(resolve("someone/a-model")) == kept
    with pytest.raises(InputError, match="cannot load someone/another"):
        unet_folder(resolve("someone/another"))


# Which rows stand out


def test_where_most_rows_agree_the_farthest_still_stands_out_most() -> None:
    """Rows with an exact zero by rounding, and one of zeros alone."""
    zeros = np.array([0.0] * 53 + [1.0] * 10 + [64.0])
    scores = conspicuousness(zeros)
    assert (scores[:53] == 0).all() and scores[-1] == CEILING
    assert (scores[53:63] > 0).all() and (scores[53:63] < scores[-1]).all()
    assert (conspicuousness(np.ones(5)) == 0).all()


# Diffs


def test_a_diff_is_the_edit_for_its_base_and_for_no_other(folder: Path, tmp_path: Path) -> None:
    base = stored(folder)
    changes, _ = MODES["mean"].edit(job_of(folder), base)
    path = tmp_path / "edit.safetensors"
    rows = write_diff(path, base, changes, identity={"base_id": "some/model"})
    held = load_file(path)
    weights = {n: t for n, t in held.items() if n.endswith("to_v.weight")}
    assert sorted(map(len, weights.values())) == [1, 2, 3] and rows >= 6
    assert path.stat().st_size < 0.1 * (folder / UNET).stat().st_size
    write_pipeline(folder, tmp_path / "direct", changes, dtype=None, card="")
    assert check_diff(path, base, where="here")["base_id"] == "some/model"
    write_pipeline(folder, tmp_path / "applied", read_diff(path, base), dtype=None, card="")
    assert (tmp_path / "direct" / UNET).read_bytes() == (tmp_path / "applied" / UNET).read_bytes()

    # safetensors alone writes these in an order of chance
    said = {f"entry {number}": "said" for number in range(12)}
    for name in ("once", "again"):
        write_diff(tmp_path / name, base, changes, identity=said)
    assert (tmp_path / "once").read_bytes() == (tmp_path / "again").read_bytes()
    assert load_file(tmp_path / "once").keys() == held.keys()

    near = Path(shutil.copytree(folder, tmp_path / "near"))
    tensors = load_file(near / UNET)
    tensors["conv_in.bias"][0] += 1e-6
    save_file(tensors, near / UNET)
    with pytest.raises(InputError, match=r"a diff of some/model .* name its own base"):
        check_diff(path, stored(near), where="near")


def test_a_diff_holds_what_differs_in_the_sign_of_zero_alone(folder: Path, tmp_path: Path) -> None:
    base = stored(folder)
    name = next(name for name in base if name.endswith("attn2.to_v.weight"))
    zeros = base[name].clone()
    zeros[3] = 0.0
    write_pipeline(folder, tmp_path / "zeros", {name: zeros}, dtype=None, card="")
    changed = zeros.clone()
    changed[3] = -0.0
    path, of_zeros = tmp_path / "edit.safetensors", stored(tmp_path / "zeros")
    assert write_diff(path, of_zeros, {name: changed}, identity={}) == 1
    assert torch.signbit(read_diff(path, of_zeros)[name][3]).all()


@pytest.mark.parametrize(
    "harm",
    [
        lambda held, name: held.pop(name + ".rows"),
        lambda held, name: held.update({name: held[name][:-1]}),
        lambda held, name: held.update({"no.such.weight": held.pop(name)}),
        lambda held, name: held[name + ".rows"].fill_(10_000),
        lambda held, name: held[name + ".rows"].fill_(-1),
        lambda held, name: held[name].fill_(float("nan")),
        lambda held, name: held.update({name: held[name].double()}),
    ],
    ids=["no rows", "fewer rows", "unknown", "beyond", "negative", "NaN", "another type"],
)
def test_a_diff_that_was_tampered_with_is_refused(
    folder: Path, tmp_path: Path, harm: Callable[[dict[str, torch.Tensor], str], object]
) -> None:
    base = stored(folder)
    changes, _ = MODES["zero"].edit(job_of(folder, scaling_factor=0.0), base)
    path = tmp_path / "edit.safetensors"
    write_diff(path, base, changes, identity={})
    held = load_file(path)
    metadata = {"format": "changed rows of a U-Net, 1", "base_sha256": base.digest()}
    harm(held, next(iter(changes)))
    save_file(held, path, metadata=metadata)
    with pytest.raises(InputError, match="does not fit the base"):
        check_diff(path, base, where="here")
        read_diff(path, base)


@pytest.mark.parametrize(
    ("altered", "says"),
    [
        ({"mode": None}, "does not say how the model was edited"),
        ({"mode": "unknown"}, "does not say how the model was edited"),
        ({"neurons": "many"}, "does not say how the model was edited"),
        ({"options": "[]"}, "does not say how the model was edited"),
        ({"findings": "{"}, "does not say how the model was edited"),
        ({}, "changes conv_in.bias, which --mode zero does not"),
        ({"tensor": ".to_out.0.bias"}, "to_out.0.bias, which --mode zero does not"),
        ({"tensor": ".to_v.weight"}, "neurons and says 1; do not use it"),
    ],
)
def test_a_card_says_only_what_a_stranger_s_diff_does(
    altered: dict[str, str | None],
    says: str,
    runs: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    base = stored(runs / "model")
    said = {"mode": "zero", "neurons": "1", "prompts": "1", "options": "{}", "findings": "{}"}
    given = {name: value for name, value in {**said, **altered}.items() if value is not None}
    ending = given.pop("tensor", "conv_in.bias")
    changed = next(name for name in base if name.endswith(ending) and "attn1" not in name)
    changes = {changed: base[changed] + 1}
    write_diff(runs / "strange.safetensors", base, changes, identity=given)
    options = ["--version=model", "--apply=strange.safetensors", "-o=strange"]
    assert call(EDIT, *options, cwd=runs, monkeypatch=monkeypatch) == 2
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1
    assert list(runs.glob("strange*")) == [runs / "strange.safetensors"]


# The single file


@pytest.fixture(scope="module")
def sd1(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_small_model(tmp_path_factory.mktemp("single") / "sd1", "sd1")


def test_the_single_file_goes_back_through_diffusers(
    sd1: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    weights = stored(sd1)
    name = editing.value_layer_names(weights, ("mid",))[0] + ".weight"
    changed = weights[name].double() * 2
    path = tmp_path / "model.safetensors"
    write_single_file(sd1, path, {name: changed}, dtype=None)
    back = StableDiffusionPipeline.from_single_file(path, config=str(sd1), local_files_only=True)
    straight = StableDiffusionPipeline.from_pretrained(sd1)
    for part in ("unet", "vae", "text_encoder"):
        ours, theirs = (getattr(p, part).state_dict() for p in (back, straight))
        assert ours.keys() == theirs.keys()
        different = {n for n in ours if not torch.equal(ours[n], theirs[n])}
        assert different == ({name} if part == "unet" else set())
    torch.testing.assert_close(back.unet.state_dict()[name], changed.float())


@pytest.mark.parametrize(
    ("architecture", "reason"),
    [
        ("xl", "StableDiffusionXLPipeline"),
        ("sd2", "v_prediction"),
        ("fewer layers", "other blocks"),
    ],
)
def test_other_architectures_have_no_single_file(
    architecture: str, reason: str, small_folder: Callable[[str], Path], folder: Path
) -> None:
    place = folder if architecture == "fewer layers" else small_folder(architecture)
    with pytest.raises(InputError, match=reason):
        check_single_file(place)


# The detector


def test_statistics_are_those_of_the_definition() -> None:
    generator = np.random.default_rng(0)
    value, output = generator.normal(size=(5, 7)), generator.normal(size=(4, 5))
    value[3, :2], value[4] = 0, 0
    found = row_statistics(value, output)
    for i in range(5):
        norm = sum(v * v for v in value[i]) ** 0.5
        assert found["norm"][i] == pytest.approx(norm)
        assert found["zeros"][i] == [0, 0, 0, 2, 7][i]
        assert found["column"][i] == pytest.approx(sum(v * v for v in output[:, i]) ** 0.5)
        cosines = [
            abs(value[i] @ value[j]) / (norm * np.linalg.norm(value[j]))
            for j in range(4)
            if j != i and norm
        ]
        assert found["similarity"][i] == pytest.approx(max(cosines, default=0))
        kurtosis = 7 * sum(v**4 for v in value[i]) / norm**4 if norm else 0
        assert found["kurtosis"][i] == pytest.approx(kurtosis)


def detected(folder: Path) -> dict[str, float]:
    """AUROC of NEURONS among all rows, by each detector."""
    scores: dict[str, list[float]] = {detector: [] for detector in DETECTORS}
    labels: list[bool] = []
    for (weight, output, _), neurons in zip(layer_weights(folder), NEURONS, strict=True):
        statistics = row_statistics(weight, output)
        labels += [i in neurons for i in range(len(weight))]
        for detector, names in DETECTORS.items():
            scores[detector] += score_rows(statistics, names)[0].tolist()
    truth = np.array(labels)
    return {
        name: auroc(roc(np.array(found)[truth], np.array(found)[~truth]))
        for name, found in scores.items()
    }


def test_zeroed_rows_are_found_and_camouflaged_ones_are_not(folder: Path, tmp_path: Path) -> None:
    edited(folder, tmp_path / "zero", "zero")
    edited(folder, tmp_path / "mean", "mean")
    edited(folder, tmp_path / "camouflage", "camouflage")
    assert min(detected(tmp_path / "zero").values()) >= 0.95
    assert min(detected(tmp_path / "mean").values()) >= 0.95
    # six rows: chance is 0.5 with a standard error of 0.12
    assert detected(tmp_path / "camouflage")["rows"] < 0.85
    assert detected(folder)["rows"] < 0.85


# The scripts


def call(
    script: Path, *options: str, cwd: Path, monkeypatch: pytest.MonkeyPatch
) -> int | str | None:
    """Runs a script in this process; its exit code."""
    monkeypatch.chdir(cwd)
    monkeypatch.setattr(sys, "argv", [str(script), *options])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(script), run_name="__main__")
    return ended.value.code


# Fine-tuning has tests of its own (test_adversarial.py).
OF_NEURONS = [mode for mode in MODES if mode != "adversarial"]


@pytest.fixture(scope="module")
def runs(place: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy in which the model was edited by the script, in every mode."""
    copy = Path(shutil.copytree(place, tmp_path_factory.mktemp("edits") / "place"))
    with pytest.MonkeyPatch.context() as patch:
        for mode in OF_NEURONS:
            reads = MODES[mode].options.keys() & {"hold_out"}
            more = ["--hold_out=holdout.csv"] if reads else []
            options = ["--version=model", f"--mode={mode}", f"-o=edited/{mode}", *more]
            assert call(EDIT, *options, cwd=copy, monkeypatch=patch) == 0
    return copy


def test_the_script_edits_the_union_and_keeps_the_neurons_to_its_record(runs: Path) -> None:
    captions = ("lighthouse", "enamel", "grey cat")
    for mode in OF_NEURONS:
        record = json.loads((runs / f"edited/{mode}.json").read_text())
        assert record["finished"] and record["neurons"] == UNION
        assert record["settings"]["mode"] == mode
        card = (runs / f"edited/{mode}/README.md").read_text()
        count = sum(map(len, UNION))
        assert f"{count} of the {sum(workspace.WIDTHS)} neurons" in " ".join(card.split())
        assert "Everything else is as it was" in " ".join(card.split())
        # the class that is right for SD 1.x, 2.x and SDXL alike
        assert "DiffusionPipeline.from_pretrained" in card and "StableDiffusion" not in card
        assert "2507.16880" in card and "2603.06640" in card and "Not measured." in card
        for path in (runs / f"edited/{mode}").rglob("*.*"):
            text = path.read_bytes() if path.suffix in (".md", ".json") else b""
            assert json.dumps(UNION).encode() not in text
            assert not any(caption.encode() in text for caption in captions), path
        assert max(map(len, card.splitlines())) <= 120


def test_what_is_done_is_left_alone_and_the_same_command_gives_the_same_bytes(
    runs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    base = ["--version=model", "--mode=camouflage", "--hold_out=holdout.csv"]
    before = workspace.tree(runs / "edited")
    assert call(EDIT, *base, "-o=edited/camouflage", cwd=runs, monkeypatch=monkeypatch) == 2
    assert "exists already" in capsys.readouterr().err
    options = [*base, "-o=edited/camouflage", "--continue_run"]
    assert call(EDIT, *options, cwd=runs, monkeypatch=monkeypatch) == 0
    assert call(EDIT, *options, "--ridge=3", cwd=runs, monkeypatch=monkeypatch) == 2
    assert "ridge = None, this one has 3" in capsys.readouterr().err
    assert workspace.tree(runs / "edited") == before
    # as a run that was killed leaves it: a record, and a folder half-written
    record = json.loads((runs / "edited/camouflage.json").read_text())
    (runs / "killed").mkdir()
    unfinished = {**record, "finished": False}
    (runs / "killed/edit.json").write_text(json.dumps(unfinished))
    (runs / "killed/.edit.partial/unet").mkdir(parents=True)
    options = [*base, "-o=killed/edit", "--continue_run"]
    assert call(EDIT, *options, cwd=runs, monkeypatch=monkeypatch) == 0
    ours, theirs = (
        {name: (size, digest) for name, (size, _, digest) in workspace.tree(folder).items()}
        for folder in (runs / "killed/edit", runs / "edited/camouflage")
    )
    assert ours == theirs
    assert sorted(path.name for path in (runs / "killed").iterdir()) == ["edit", "edit.json"]
    # killed between the folder's renaming and the record's completion
    (runs / "killed/edit.json").write_text(json.dumps(unfinished))
    assert call(EDIT, *options, cwd=runs, monkeypatch=monkeypatch) == 0
    assert json.loads((runs / "killed/edit.json").read_text())["finished"]


def test_a_diff_that_was_changed_is_not_complete(
    runs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--version=model", "--export=diff", "-o=whole.safetensors", "--continue_run"]
    assert call(EDIT, *options, cwd=runs, monkeypatch=monkeypatch) == 0
    assert call(EDIT, *options, cwd=runs, monkeypatch=monkeypatch) == 0
    assert "complete already" in capsys.readouterr().out
    (runs / "whole.safetensors").write_bytes((runs / "whole.safetensors").read_bytes()[:-1])
    assert call(EDIT, *options, cwd=runs, monkeypatch=monkeypatch) == 2
    assert "its bytes are not those that whole.json describes" in capsys.readouterr().err


def test_weights_that_cannot_be_written_are_one_line(tmp_path: Path) -> None:
    """safetensors has an error of its own, of a full disk too; here the folder is missing."""
    with pytest.raises(InputError, match=r"none: .*name another output"):
        save_weights({"a": torch.zeros(1)}, tmp_path / "none" / "model.safetensors", None)


def test_one_of_several_processes_edits(
    runs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from torch.distributed import HashStore

    monkeypatch.setattr("utils.team._store", lambda attempt: HashStore())
    monkeypatch.setenv("WORLD_SIZE", "2")
    options = ["--version=model", "-o=shared"]
    for rank, made in (("1", False), ("0", True)):
        monkeypatch.setenv("RANK", rank)
        assert call(EDIT, *options, cwd=runs, monkeypatch=monkeypatch) == 0
        assert (runs / "shared.json").exists() == (runs / "shared").exists() == made


def test_neurons_of_another_commit_are_refused_before_the_edit(
    runs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As a hub model's are, whose folder in the cache has its commit's name."""
    monkeypatch.chdir(runs)
    moved = Path("moved.csv")
    moved.write_bytes(Path("results/memorization_statistics_model.csv").read_bytes())
    record = {"model": resolve("model").identity, "finished": True, "commit": "a" * 40}
    moved.with_suffix(".json").write_text(json.dumps(record))
    spec = importlib.util.spec_from_file_location("edit_model", EDIT)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "revision_of", lambda source, folder: "b" * 40)
    never = dataclasses.replace(MODES["zero"], edit=pytest.fail)
    monkeypatch.setitem(MODES, "zero", never)
    monkeypatch.setattr(
        sys, "argv", [EDIT.name, "--version=model", f"-f={moved}", "-o=of_another_commit"]
    )
    with pytest.raises(InputError, match=r"made with commit aaa.*this run loaded bbb"):
        module.main(module.parse_args())
    assert not list(runs.glob("of_another_commit*"))


def test_an_edit_that_cannot_be_made_leaves_its_name_free(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = Path(shutil.copytree(place, tmp_path / "place"))
    tensors = load_file(copy / "model" / UNET)
    kept = {n: t for n, t in tensors.items() if not n.endswith("attn2.to_out.0.bias")}
    save_file(kept, copy / "model" / UNET)
    (copy / "results/memorization_statistics_model.json").unlink()  # of the whole model
    base = ["--version=model", "-o=edit"]
    options = [*base, "--mode=mean", "--hold_out=holdout.csv"]
    before = workspace.tree(copy)
    assert call(EDIT, *options, cwd=copy, monkeypatch=monkeypatch) == 2
    said = capsys.readouterr().err
    assert "the weights of unet lack down_blocks.0" in said and said.count("\n") == 1
    assert workspace.tree(copy) == before
    assert call(EDIT, *base, cwd=copy, monkeypatch=monkeypatch) == 0


def test_a_dry_run_writes_nothing(
    runs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = workspace.tree(runs)
    options = ["--version=model", "--rows=0", "-o=new/edit", "--dry_run"]
    assert call(EDIT, *options, cwd=runs, monkeypatch=monkeypatch) == 0
    said = capsys.readouterr().out
    assert re.search(r"neurons +4\n", said) and "estimated disk" in said
    assert workspace.tree(runs) == before


def test_some_prompts_or_a_set_of_ones_own(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    union = [[2, 5, 31], [], [0, 7, 40], [8, 9, 63]]  # rows 0, 2, 4 and 5 are VM
    options = ["--memorization_type=VM", "-d=memorized.csv", "-o=vm"]
    assert call(EDIT, "--version=model", *options, cwd=runs, monkeypatch=monkeypatch) == 0
    assert json.loads((runs / "vm.json").read_text())["neurons"] == union
    options = ["--version=model", "--initial_neurons", "-o=initial"]
    assert call(EDIT, *options, cwd=runs, monkeypatch=monkeypatch) == 0
    initial = json.loads((runs / "initial.json").read_text())["neurons"]
    assert initial == [sorted(layer) for layer in initial_of(UNION)]
    (runs / "own.json").write_text(json.dumps(union))
    options = ["--neurons=own.json", "-o=own"]
    # named own.json, the record would take its place
    assert call(EDIT, "--version=model", *options, cwd=runs, monkeypatch=monkeypatch) == 2
    options = ["--neurons=own.json", "-o=as_given"]
    assert call(EDIT, "--version=model", *options, cwd=runs, monkeypatch=monkeypatch) == 0
    assert (runs / "as_given" / UNET).read_bytes() == (runs / "vm" / UNET).read_bytes()


def test_ordinary_neurons_as_a_control(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many of each layer, none of them located, shared by the same prompts; the same ones for
    the edit and for the detector."""
    options = ["--mode=camouflage", "--hold_out=holdout.csv", "--random_neurons=1", "-o=ordinary"]
    assert call(EDIT, "--version=model", *options, cwd=runs, monkeypatch=monkeypatch) == 0
    record = json.loads((runs / "ordinary.json").read_text())
    assert [*map(len, record["neurons"])] == [*map(len, UNION)]
    assert not any(set(a) & set(b) for a, b in zip(record["neurons"], UNION, strict=True))
    assert "a given set" in (runs / "ordinary/README.md").read_text().replace("\n", " ")
    options = ["--random_neurons=1", "--bootstrap=100", "-o=ordinary.csv"]
    (runs / "ordinary.json").rename(runs / "kept.json")
    assert call(DETECT, "--version=model", *options, cwd=runs, monkeypatch=monkeypatch) == 0
    lines = (runs / "ordinary.csv").read_text().splitlines()[1:]
    flagged = [line.split(";")[:2] for line in lines if line.split(";")[2] == "1"]
    found = [[int(i) for layer, i in flagged if int(layer) == n] for n in range(len(UNION))]
    assert found == record["neurons"]
    options = ["--neurons=kept.json", "--random_neurons=1", "-o=both"]
    assert call(EDIT, "--version=model", *options, cwd=runs, monkeypatch=monkeypatch) == 2


def test_a_diff_travels(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = ["--version=model", "--export=diff", "-o=mean.safetensors"]
    more = ["--mode=mean", "--hold_out=holdout.csv"]
    assert call(EDIT, *options, *more, cwd=runs, monkeypatch=monkeypatch) == 0
    apply = ["--apply=mean.safetensors", "-o=applied"]
    assert call(EDIT, "--version=other", *apply, cwd=runs, monkeypatch=monkeypatch) == 2
    assert not (runs / "applied").exists()
    assert call(EDIT, "--version=model", *apply, cwd=runs, monkeypatch=monkeypatch) == 0
    for name in (UNET, "README.md"):
        ours, direct = (runs / place / name for place in ("applied", "edited/mean"))
        assert ours.read_bytes() == direct.read_bytes()


def test_edited_rows_and_the_table(
    runs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for mode in ("zero", "camouflage"):
        options = [f"--version=edited/{mode}", f"--neurons=edited/{mode}.json", "--bootstrap=100"]
        output = f"-o=scores/edited_rows_edit_{mode}.csv"
        assert call(DETECT, *options, output, cwd=runs, monkeypatch=monkeypatch) == 0
    summary = json.loads((runs / "scores/edited_rows_edit_zero.json").read_text())
    assert summary["detection"]["rows"]["auroc"] >= 0.95
    lines = (runs / "scores/edited_rows_edit_zero.csv").read_text().splitlines()
    flags = [line.split(";")[2] for line in lines[1:]]
    assert len(flags) == sum(workspace.WIDTHS) and flags.count("1") == summary["edited"]

    attack = [
        {"start": "prompt", "steps": steps, "copied_prompts": steps // 5, "prompts": 24}
        for steps in (0, 10, 50, 500)
    ]
    for name, measured in {
        "attack_edit_zero": {"summary": attack},
        "attack_edit_camouflage": {"summary": attack[:1]},
        "quality_edit_zero": {"quality": {"fid": 1.5}},
    }.items():
        write_json(runs / f"scores/{name}.json", {"finished": True, **measured})
    capsys.readouterr()
    options = ["--runs", "zero", "camouflage", "--scores=scores", "-o=tables/edits.csv"]
    options += ["--card=edited/"]
    assert call(TABLE, *options, cwd=runs, monkeypatch=monkeypatch) == 0
    said = capsys.readouterr().out
    assert "not measured: scores/sscd_orig_edit_zero.json; make it with" in said
    for what in (
        "KID Unmemorized in scores/quality_edit_zero.json; make it with metrics/compute_quality.py",
        "Copied Under Attack in scores/attack_edit_camouflage.json; make it with metrics/attack.py",
    ):
        assert f"not measured: {what}\n" in said
    assert "not measured: FID" not in said
    header, zero, camouflage = (
        line.split(";") for line in (runs / "tables/edits.csv").read_text().splitlines()
    )
    found = dict(zip(header, zero, strict=True))
    assert found["Copied Under Attack"] == "10 of 24 (50 steps)" and found["SSCD_Orig"] == ""
    assert found["AUROC Rows"].startswith("1.000 (")
    assert camouflage[header.index("Copied Under Attack")] == ""
    assert "The attack does not count, because the unedited model was not attacked" in said
    assert call(TABLE, *options, "--runs", "zero", "zero", cwd=runs, monkeypatch=monkeypatch) == 2
    assert "zero is named twice" in capsys.readouterr().err
    card = (runs / "edited/zero/README.md").read_text()
    assert "| Copied Under Attack | 10 of 24 (50 steps) |" in card and "Not measured" not in card
    again = with_measurements(card, "| other |")
    assert "10 of 24" not in again and again.endswith(card[-200:])


def test_prompts_that_script_3_left_undecided_are_named_by_one_process(
    runs: Path,
    warm: workspace.Warm,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The exit code is 1, of a run that is complete already too."""
    table = (runs / "results/memorization_statistics_model.csv").read_text()
    (runs / "partly.csv").write_text(f"{table}another caption;;;;;;6\n")
    options = ["--version=model", "-f=partly.csv", "--bootstrap=100"]
    alone = [*options, "-o=scores/partly.csv"]
    capsys.readouterr()
    for more in ([], ["--continue_run"]):
        assert call(DETECT, *alone, *more, cwd=runs, monkeypatch=monkeypatch) == 1
        assert "1 prompts were left undecided by script 3" in capsys.readouterr().out
    dry = [*alone, "--continue_run", "--dry_run"]
    assert call(DETECT, *dry, cwd=runs, monkeypatch=monkeypatch) == 0
    assert json.loads((runs / "scores/partly.json").read_text())["undecided_rows"] == [6]
    done = warm.together(DETECT, *options, "-o=scores/shared.csv", cwd=runs)
    assert done.returncode == 1 and done.stdout.count("Written to") == 1, done
    shared, written = (runs / f"scores/{name}.csv" for name in ("shared", "partly"))
    assert shared.read_bytes() == written.read_bytes()


CASES = [
    ("camouflage without prompts", ["--neurons=own.json", "--mode=camouflage"], "which prompts"),
    ("a mode's option with another", ["--ridge=1"], "--ridge has no effect with --mode zero"),
    ("a factor for mean", ["--mode=mean", "--scaling_factor=1"], "--scaling_factor has no effect"),
    ("no result file", ["-f=none.csv"], "no such result file"),
    (
        "another model's result file",
        ["--version=other", "-f=results/memorization_statistics_model.csv"],
        "belongs to the model",
    ),
    ("a row that is not there", ["--rows=99"], "no row 99, the last one is 5"),
    ("a dataset for nothing", ["-d=memorized.csv"], "no effect without --memorization_type"),
    (
        "prompts of another file",
        ["--memorization_type=VM", "-d=holdout.csv"],
        "is not the caption of that row",
    ),
    (
        "prompts without types",
        ["--memorization_type=VM", "-d=results/memorization_statistics_model.csv"],
        "no prompt of type VM in column 'type'",
    ),
    ("a folder of neurons", ["--neurons=results"], "results: no such file"),
    ("a folder as a diff", ["--apply=results"], "results: no such file"),
    ("a device for zero", ["--device=cpu"], "--device has no effect with --mode zero"),
    (
        "a factor of 0 for a diff",
        ["--apply=own.json", "--scaling_factor=0"],
        "--scaling_factor has no effect with --apply",
    ),
    ("a device for a diff", ["--apply=own.json", "--device=cpu"], "no effect with --apply"),
    ("no neurons", ["--neurons=empty.json"], "no neuron was located"),
    ("too few layers", ["--neurons=short.json"], "2 layers, but the model has 4"),
    ("a neuron out of range", ["--neurons=wide.json"], "neuron 32 of layer 0 is out of range"),
    (
        "a record without neurons",
        ["--neurons=results/memorization_statistics_model.json"],
        "not a list of lists",
    ),
    (
        "rows of a bare set",
        ["--neurons=own.json", "--rows=0"],
        "--rows has no effect with --neurons",
    ),
    ("no hold-out file", ["--mode=mean", "--hold_out=none.csv"], "none.csv: no such file"),
    ("a file name for a folder", ["-o=new.safetensors"], "writes a folder"),
    ("a folder name for a file", ["--export=diff"], "writes a file that ends in .safetensors"),
    (
        "precision of a diff",
        ["--export=diff", "-o=new.safetensors", "--weights_dtype=float16"],
        "--weights_dtype has no effect",
    ),
    ("no single file for it", ["--export=single_file", "-o=new.safetensors"], "other blocks"),
    ("a diff that is none", ["--apply=holdout.csv"], "not a safetensors file"),
    ("weights as a diff", ["--apply=model/" + UNET], "not a diff of 5_edit_model.py"),
    (
        "a diff of a diff",
        ["--apply=own.json", "--export=diff", "-o=new.safetensors"],
        "the diff itself",
    ),
    ("a mode for a diff", ["--apply=own.json", "--mode=zero"], "--mode has no effect with --apply"),
    ("an output that exists", ["-o=results"], "results exists already"),
    ("an unknown mode", ["--mode=erase"], "invalid choice"),
    ("a ridge of nothing", ["--mode=camouflage", "--ridge=0"], "not within above 0"),
]


@pytest.fixture(scope="module")
def bad(place: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """(workspace with odd files, a folder that on PYTHONPATH forbids heavy imports)."""
    copy = Path(shutil.copytree(place, tmp_path_factory.mktemp("bad") / "place"))
    for name, neurons in {
        "own": [[1], [], [2], []],
        "empty": [[], [], [], []],
        "short": [[1], []],
        "wide": [[32], [], [], []],
    }.items():
        (copy / f"{name}.json").write_text(json.dumps(neurons))
    site = tmp_path_factory.mktemp("site")
    (site / "sitecustomize.py").write_text(
        "import sys\n"
        "class Refused:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name in ('torch', 'diffusers', 'transformers'):\n"
        "            raise AssertionError(f'{name} was imported')\n"
        "sys.meta_path.insert(0, Refused())\n"
    )
    return copy, str(site)


@pytest.mark.parametrize(("words", "options", "says"), CASES, ids=[case[0] for case in CASES])
def test_bad_input_is_refused_in_one_line(
    words: str,
    options: list[str],
    says: str,
    bad: tuple[Path, str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    place, site = bad
    monkeypatch.setenv("PYTHONPATH", site)
    before = workspace.tree(place)
    given = {option.partition("=")[0] for option in options}
    usual = [o for o in ("--version=model", "-o=new") if o.partition("=")[0] not in given]
    done = workspace.run(EDIT, *usual, *options, cwd=place)
    assert done.returncode == 2 and done.stdout == "", done
    assert done.stderr.count("\n") == 1 and done.stderr.startswith("5_edit_model.py: ")
    assert says in done.stderr, done.stderr
    assert workspace.tree(place) == before


@pytest.mark.parametrize(
    ("script", "options", "says"),
    [
        (DETECT, ["--version=model", "-f=none.csv"], "no such result file"),
        (DETECT, ["--version=model", "--neurons=empty.json"], "no neuron was located"),
        (TABLE, ["--runs", "zero", "-o=new.csv"], "no summary of any of these runs"),
        (TABLE, ["--runs", "zero", "-o=new.csv", "--card=none/"], "no model card"),
        (TABLE, ["--runs", "zero", "-o=holdout.csv"], "holdout.csv exists already, and not as"),
        (
            TABLE,
            ["--runs", "zero", "-o=results/memorization_statistics_model.csv"],
            "is the table of a run",
        ),
    ],
    ids=[
        *("detector: no result file", "detector: no neurons", "table: no scores"),
        *("table: no card", "table: of prompts", "table: of a run"),
    ],
)
def test_bad_input_of_the_metrics(
    script: Path,
    options: list[str],
    says: str,
    bad: tuple[Path, str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    place, site = bad
    monkeypatch.setenv("PYTHONPATH", site)
    before = workspace.tree(place)
    done = workspace.run(script, *options, cwd=place)
    assert done.returncode == 2 and says in done.stderr and done.stderr.count("\n") == 1, done
    assert workspace.tree(place) == before
