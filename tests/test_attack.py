"""The attack against its definition written out here, its controls, and the script as a command."""

import argparse
import contextlib
import dataclasses
import io
import json
import os
import runpy
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import metric_models
import numpy as np
import pytest
import torch
import workspace
from PIL import Image

from utils import attack_runs, generation, mitigations
from utils.editing import MODES
from utils.embedding_attack import (
    Attack,
    Edit,
    Sampling,
    attacked,
    diffusion_loss,
    draw,
    generator_of,
    sampled,
    start_of,
)
from utils.errors import InputError
from utils.files import Prompt, read_json, write_json, write_table
from utils.neuron_sets import RESULT_COLUMNS, Result, read_results, result_cells
from utils.stable_diffusion import (
    Conditioning,
    Model,
    decode,
    encode,
    encode_prompt,
    encode_unconditional,
    initial_noise,
    sample_latents,
)
from utils.value_layers import layer_widths
from utils.versions import resolve

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "metrics" / "attack.py"
CAPTIONS = ("A lighthouse", "grey cat")
SHORT = Attack(draws=3, learning_rate=0.1)


def plain(model: Model, *, blocked: list[list[int]] | None = None, factor: float = 0.0) -> Edit:
    """No mitigation; ``blocked`` neurons for every row."""
    none: list[list[int]] = [[] for _ in model.value_layers]
    captions = dict(enumerate(CAPTIONS))
    noise = initial_noise(model, 1, 2)
    nothing = mitigations.begin(
        None, model, captions, encode_unconditional(model), noise, steps=3, guidance_scale=7.0
    )
    return Edit(model, dict.fromkeys(captions, blocked or none), factor, nothing)


def targets(model: Model) -> torch.Tensor:
    return encode(model, [metric_models.picture(row, size=(90, 70)) for row in range(2)])


def run_attack(
    edit: Edit, rows: list[int], budgets: list[int], settings: Attack = SHORT
) -> dict[int, Conditioning]:
    latents = targets(edit.model)[rows]
    starts = [encode_prompt(edit.model, CAPTIONS[row]) for row in rows]
    generators = [generator_of(f"0/{row}") for row in rows]
    return dict(attacked(edit, rows, starts, latents, generators, settings, budgets))


# The definition.


def noised(model: Model, z: torch.Tensor, eps: torch.Tensor, t: int) -> torch.Tensor:
    """sqrt(abar_t) z + sqrt(1 - abar_t) eps, abar from the betas."""
    config = model.scheduler.config
    roots = np.linspace(config.beta_start**0.5, config.beta_end**0.5, config.num_train_timesteps)
    abar = np.cumprod(1 - roots**2)[t]
    return torch.from_numpy(np.sqrt(abar) * z.numpy() + np.sqrt(1 - abar) * eps.numpy()).float()


def error(
    model: Model, z: torch.Tensor, eps: torch.Tensor, t: int, y: torch.Tensor
) -> torch.Tensor:
    """|| eps - e(x_t, t, y) ||^2 of one row, from the U-Net itself."""
    x = noised(model, z, eps, t)[None]
    output = model.unet(x, t, encoder_hidden_states=y).sample
    if model.scheduler.config.prediction_type == "v_prediction":
        abar = model.scheduler.alphas_cumprod[t]
        output = abar.sqrt() * output + (1 - abar).sqrt() * x
    return ((eps - output) ** 2).sum()


@pytest.mark.parametrize("architecture", ["sd1", "sd2"])
def test_the_loss_is_the_noise_that_is_not_predicted(
    small_model: Callable[..., Model], architecture: str
) -> None:
    model = small_model(architecture)
    z, eps = targets(model), initial_noise(model, 2, 5)
    timesteps = torch.tensor([3, 940])
    y = Conditioning.cat([encode_prompt(model, caption) for caption in CAPTIONS])
    with torch.no_grad():
        found = diffusion_loss(model, y, z, eps, timesteps)
        expected = [
            error(model, z[i], eps[i], int(timesteps[i]), y.embedding[i : i + 1]).item()
            for i in range(2)
        ]
    assert found.tolist() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("architecture", ["sd1", "sd2"])
def test_steps_are_adams_on_fresh_draws(
    small_model: Callable[..., Model], architecture: str
) -> None:
    model = small_model(architecture)
    found = run_attack(plain(model), [1], [0, 1, 3])
    y = encode_prompt(model, CAPTIONS[1]).embedding.double()
    assert torch.equal(found[0].embedding, y.float())
    generator = generator_of("0/1")
    z = targets(model)[1]
    mean, square = torch.zeros_like(y), torch.zeros_like(y)
    seen = []
    for step in range(1, 4):
        eps, timesteps = draw(model, [generator], SHORT.draws)
        seen.append(timesteps.tolist())
        variable = y.float().requires_grad_()
        loss = sum(
            error(model, z, e, int(t), variable) for e, t in zip(eps, timesteps, strict=True)
        )
        (gradient,) = torch.autograd.grad(loss / SHORT.draws, variable)
        mean = 0.9 * mean + 0.1 * gradient.double()
        square = 0.999 * square + 0.001 * gradient.double() ** 2
        y = y - 0.1 * (mean / (1 - 0.9**step)) / ((square / (1 - 0.999**step)).sqrt() + 1e-8)
        if step in found:
            # the first step moves every number by the learning rate, whatever its gradient's size:
            # where that is rounding alone, its sign is too
            far = (found[step].embedding - y.float()).abs() > 5e-3
            assert far.double().mean() < 0.01
    assert len({tuple(t) for t in seen}) == 3, "the draws are fresh"


def test_draws_are_uniform_and_standard_normal_and_each_prompts_own(
    small_model: Callable[..., Model],
) -> None:
    model, seeds, draws = small_model("sd1"), ("0/0", "0/1"), 4000
    noise, timesteps = draw(model, [generator_of(seed) for seed in seeds], draws)
    assert noise.shape == (2 * draws, *model.latent_shape) and timesteps.shape == (2 * draws,)
    assert 0 <= timesteps.min() < 20 and 980 <= timesteps.max() < 1000
    off = 5 * np.sqrt((1000**2 - 1) / 12 / len(timesteps))  # standard errors
    assert timesteps.double().mean().item() == pytest.approx(999 / 2, abs=off)
    off = 5 / np.sqrt(noise.numel())
    assert noise.mean().item() == pytest.approx(0, abs=off)
    assert noise.std().item() == pytest.approx(1, abs=off)
    for prompt, seed in enumerate(seeds):
        own = slice(prompt * draws, (prompt + 1) * draws)
        for found, alone in zip(
            (noise, timesteps), draw(model, [generator_of(seed)], draws), strict=True
        ):
            assert torch.equal(found[own], alone)


def test_prompts_do_not_depend_on_each_other(small_model: Callable[..., Model]) -> None:
    model = small_model("sd1")
    edit = plain(model)
    together = run_attack(edit, [0, 1], [2])[2].embedding
    for row in range(2):
        alone = run_attack(edit, [row], [2])[2].embedding[0]
        assert ((together[row] - alone).abs() > 5e-3).double().mean() < 0.01
    again = run_attack(edit, [0, 1], [1, 2])[2].embedding
    assert torch.equal(together, again), "looking at it on the way changes nothing"


def test_only_the_embedding_gets_a_gradient(small_model: Callable[..., Model]) -> None:
    model = small_model("sd1")
    parts = [
        part for part in model.pipeline.components.values() if isinstance(part, torch.nn.Module)
    ]
    before = [parameter.clone() for part in parts for parameter in part.parameters()]
    found = run_attack(plain(model), [0, 1], [2])[2]
    after = [parameter for part in parts for parameter in part.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert not any(p.requires_grad or p.grad is not None for p in after)
    assert not found.embedding.requires_grad
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.unet.modules())


def test_the_edit_is_active_while_optimising(small_model: Callable[..., Model]) -> None:
    """Neurons off by hooks: what the attack finds is what it finds on weights without them."""
    model = small_model("sd1")
    off = [list(range(0, width, 2)) for width in layer_widths(model.value_layers)]
    hooked = run_attack(plain(model, blocked=off), [0], [2])[2].embedding
    unedited = run_attack(plain(model), [0], [2])[2].embedding
    kept = [layer.weight.detach().clone() for layer in model.value_layers.values()]
    try:
        with torch.no_grad():
            for layer, neurons in zip(model.value_layers.values(), off, strict=True):
                layer.weight[neurons] = 0
        edited = run_attack(plain(model), [0], [2])[2].embedding
    finally:
        with torch.no_grad():
            for layer, weight in zip(model.value_layers.values(), kept, strict=True):
                layer.weight.copy_(weight)
    assert ((hooked - edited).abs() > 5e-3).double().mean() < 0.01
    assert ((hooked - unedited).abs() > 5e-3).double().mean() > 0.1


def test_it_lowers_the_loss(small_model: Callable[..., Model]) -> None:
    model = small_model("sd1")
    found = run_attack(plain(model), [0], [0, 25], Attack(draws=4))
    eps, timesteps = draw(model, [generator_of("other")], 40)
    z = targets(model)[:1].repeat(40, 1, 1, 1)
    with torch.no_grad():
        losses = [
            diffusion_loss(model, y.repeat(40), z, eps, timesteps).mean().item()
            for y in found.values()
        ]
    assert losses[1] < losses[0]


def test_starts(small_model: Callable[..., Model]) -> None:
    model = small_model("sd1")
    own, other = (encode_prompt(model, caption).embedding for caption in CAPTIONS)
    found = {
        kind: start_of(model, kind, *CAPTIONS, "0/1").embedding
        for kind in ("prompt", "unrelated", "gaussian")
    }
    assert torch.equal(found["prompt"], own) and torch.equal(found["unrelated"], other)
    normal = found["gaussian"]
    assert normal.shape == own.shape and abs(normal.mean()) < 0.1 and abs(normal.std() - 1) < 0.1
    assert torch.equal(normal, start_of(model, "gaussian", *CAPTIONS, "0/1").embedding)
    assert not torch.equal(normal, start_of(model, "gaussian", *CAPTIONS, "0/2").embedding)


def test_xl_keeps_what_belongs_to_its_text(small_model: Callable[..., Model]) -> None:
    model = small_model("xl")
    own = encode_prompt(model, CAPTIONS[0])
    found = run_attack(plain(model), [0, 1], [1])[1]
    assert torch.equal(found.added["text_embeds"][:1], own.added["text_embeds"])
    assert not torch.equal(found.embedding[:1], own.embedding)


def test_a_latent_is_the_mode_of_the_middle(small_model: Callable[..., Model]) -> None:
    model = small_model("sd1")
    picture = metric_models.picture("wide", size=(100, 64))
    side = model.latent_shape[1] * model.pipeline.vae_scale_factor
    square = picture.crop((18, 0, 82, 64)).resize((side, side), Image.Resampling.LANCZOS)
    pixels = torch.from_numpy(np.array(square)).permute(2, 0, 1)[None].float() / 127.5 - 1
    vae = model.pipeline.vae
    with torch.no_grad():
        mean = vae.encode(pixels).latent_dist.mean * vae.config.scaling_factor
    assert torch.allclose(encode(model, [picture]), mean, atol=1e-4)


# Mitigations.


def begun(model: Model, name: str, options: str | None, noise: torch.Tensor) -> Edit:
    settings = mitigations.parse(name, options)
    captions = dict(enumerate(CAPTIONS))
    unconditional = encode_unconditional(model)
    ready = mitigations.begin(
        settings, model, captions, unconditional, noise, steps=3, guidance_scale=7.0
    )
    return Edit(model, plain(model).blocked, 0.0, ready)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("embedding_adjustment", "target=0.001,iterations=2"),
        ("attention_scaling", "factor=4"),
        ("embedding_noise", "std=0.5"),
        ("guidance_static", None),
    ],
)
def test_without_steps_a_mitigation_is_plain_mitigation(
    small_model: Callable[..., Model], name: str, options: str | None
) -> None:
    model = small_model("sd1")
    noise, unconditional = initial_noise(model, 2, 2), encode_unconditional(model)
    edit = begun(model, name, options, noise)
    sampling = Sampling(unconditional, noise, 3, 7.0)
    found = sampled(edit, 1, run_attack(edit, [0, 1], [0])[0].slice(slice(1, 2)), sampling)
    with edit.mitigation.around([1, 1]):
        latents = sample_latents(
            model,
            edit.mitigation.encode(1).repeat(2),
            unconditional,
            noise,
            steps=3,
            guidance_scale=7.0,
            schedule=edit.mitigation.schedule(),
        )
    expected = decode(model, latents)
    assert [np.array(a).tolist() for a in found] == [np.array(a).tolist() for a in expected]
    unmitigated = sampled(plain(model), 1, encode_prompt(model, CAPTIONS[1]), sampling)
    assert any((np.array(a) != np.array(b)).any() for a, b in zip(found, unmitigated, strict=True))


def test_attention_is_scaled_while_optimising(small_model: Callable[..., Model]) -> None:
    model = small_model("sd1")
    edit = begun(model, "attention_scaling", None, initial_noise(model, 1, 2))
    found = run_attack(edit, [0], [1])[1].embedding
    start = encode_prompt(model, CAPTIONS[0]).embedding
    length = len(CAPTIONS[0].replace(" ", "")) + 2  # one token a letter, begin and end
    assert (found[0, :length] != start[0, :length]).any(dim=-1).all()
    assert torch.equal(found[0, length:], start[0, length:]), "nobody attends to padding"


def test_methods_of_words_are_refused() -> None:
    for name in ("random_tokens", "random_numbers", "repeated_words"):
        with pytest.raises(InputError, match="nothing to attack"):
            attack_runs.check_attackable(mitigations.parse(name, None))
    attack_runs.check_attackable(mitigations.parse("wanda", None))


# Table.


def test_summary_and_table() -> None:
    def row(number: int, start: str, steps: int, scores: list[float] | None) -> dict[str, object]:
        named = {"Row": number, "Caption": "c;", "type": "VM", "Start": start, "Steps": steps}
        values = scores and [max(scores), np.median(scores), np.mean(np.array(scores) > 0.7)]
        return named | dict(zip(attack_runs.SCORES, values or [None] * 3, strict=True))

    table = [
        row(0, "prompt", 0, [0.1, 0.2]),
        row(1, "prompt", 0, [0.9, 0.69]),
        row(2, "prompt", 0, None),
        row(0, "prompt", 50, [0.8, 0.9]),
        row(1, "prompt", 50, [0.9, 0.7]),
        row(2, "prompt", 50, [0.7, 0.7]),
    ]
    before, after = attack_runs.summarize(table)
    assert (before["prompts"], before["copied_prompts"], before["rate"]) == (2, 1, 0.5)
    assert before["share_of_pictures"] == 0.25
    assert before["sscd_orig_max"]["all"]["missing"] == 1
    assert after["copied_prompts"] == 2 and after["rate"] == pytest.approx(2 / 3)
    assert after["share_of_pictures"] == pytest.approx(0.5)
    assert after["sscd_orig_max"]["all"]["median"] == pytest.approx(0.9)
    shown = attack_runs.format_attack("t", [before, after], "NeMo")
    assert "0.50       0.20" in shown and "0.67       0.99" in shown
    lines = attack_runs.format_comparison({"a": ([before, after], "Wanda")}, "prompt", 50)
    assert lines[1] == ["a", "3", "0.50", "0.67", "0.55", "0.90", "Wanda", "0.00", "0.72"]


def rows_of(start: str, steps: int, scores: dict[str, float | None]) -> list[dict[str, object]]:
    return [{"Row": r, "Start": start, "Steps": steps, "Max": s} for r, s in scores.items()]


PLAIN = rows_of("prompt", 0, {"0": 0.9, "1": 0.8, "2": 0.3})
BACK = rows_of("gaussian", 50, {"0": 0.9, "1": 0.9, "2": 0.1})
LOST = rows_of("gaussian", 50, {"0": 0.9, "1": 0.1, "2": 0.9})
FAR = rows_of("prompt", 50, {"0": 0.2, "1": 0.3, "2": None})
NEAR = rows_of("prompt", 50, {"0": 0.2, "1": 0.9})
VERDICTS = {
    "both controls behave": (PLAIN + BACK, FAR, "counts: after 50 steps it brings back 2 of 2"),
    "a copy is lost": (PLAIN + LOST, FAR, "does not count, because less than 90% come back"),
    "never-trained pictures come too": (PLAIN + BACK, NEAR, "because more than 10% of never"),
    "both": (PLAIN + LOST, NEAR, "on the unedited model and more than 10%"),
    "the prompt's own start is none": (PLAIN + rows_of("prompt", 50, {"0": 1.0}), FAR, "another"),
    "other steps": (PLAIN + rows_of("gaussian", 20, {"0": 1.0}), FAR, "brings back 0 of 0"),
    "copies unknown: all prompts": (BACK, FAR, "brings back 2 of 3"),
    "other steps are not seen": (PLAIN + rows_of("gaussian", 20, {"0": 1.0}), FAR, "so many steps"),
    "no copies": (
        rows_of("prompt", 0, {"0": 0.1, "1": 0.2}) + BACK,
        FAR,
        "because the unedited model has no copies to bring back:",
    ),
    "no controls": (None, None, "and pictures that were never trained on were not aimed at"),
}


@pytest.mark.parametrize("words", VERDICTS)
def test_the_verdict_is_of_the_controls(words: str) -> None:
    control, never_trained, says = VERDICTS[words]
    verdict = attack_runs.verdict(control, never_trained, 50)
    assert says in verdict and "\n" not in verdict
    assert verdict.startswith("The attack counts") == (words == "both controls behave")


def test_published_rates_are_of_published_settings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What DoRI reports, and that other settings than its methods' have nothing beside them."""
    assert attack_runs.published_rates() == {
        "NeMo": (0.20, 0.99),
        "Wanda": (0.00, 0.72),
        "adversarial fine-tuning": (None, 0.02),
    }
    tiny = resolve("tiny")
    wanda = mitigations.parse("wanda", None)
    pruned_more = mitigations.parse("wanda", "share=0.1")
    of = attack_runs.method_of
    assert of(tiny, "refined_neurons", 0.0, None) == "NeMo"
    assert of(tiny, "refined_neurons", 0.5, None) is None
    assert of(tiny, "block_random_neurons", 0.0, None) is None
    assert of(tiny, "mitigation", 0.0, wanda) == "Wanda"
    assert of(tiny, "mitigation", 0.0, pruned_more) is None
    edited = dataclasses.replace(tiny, folder=tmp_path / "edited")
    usual = {"mode": "zero", "scaling_factor": 0.0, "neurons_of": "refined_neurons"}
    tuned = {**MODES["adversarial"].options, **usual, "mode": "adversarial"}
    for settings, read, method in (
        (usual, "found.csv", "NeMo"),
        (usual | {"scaling_factor": 0.5}, "found.csv", None),
        (usual | {"random_neurons": 0}, "found.csv", None),
        (usual | {"mode": "mean"}, "found.csv", None),
        (usual, "given.json", None),
        (tuned, "found.csv", "adversarial fine-tuning"),
        (tuned | {"batch_size": 16}, "found.csv", "adversarial fine-tuning"),
        (tuned | {"training_steps": 3}, "found.csv", None),
    ):
        record = {"settings": settings, "inputs": {read: ""}}
        (tmp_path / "edited.json").write_text(json.dumps(record))
        assert of(edited, "original_images", 0.0, None) == method
    (tmp_path / "edited.json").write_text(json.dumps({"settings": tuned, "inputs": {"a.csv": ""}}))
    (tmp_path / "edited").mkdir()
    monkeypatch.chdir(tmp_path / "edited")
    here = dataclasses.replace(tiny, folder=Path("."))
    assert of(here, "original_images", 0.0, None) == "adversarial fine-tuning"


# The script.

N = 2
FLAGS = ("-r=training", "--sscd_weights=sscd.pt", f"-n={N}", "--steps=3", "--device=cpu")
SHORTLY = ("--budgets=0,2", "--draws=2", "--batch_size=2")
STARTS = "--starts=prompt,gaussian,unrelated"
HOLDOUT = "--unrelated_prompts=holdout.csv"
ORIGINAL = ("--version=model", "--original_images", "-d=memorized.csv", "--rows=0,2,5")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = workspace.fresh(tmp_path_factory.mktemp("attack") / "workspace")
    metric_models.save_torchscript(folder / "sscd.pt")
    names: dict[str, object] = {f"{row:04d}_first_image.jpg": row for row in (0, 2, 3)}
    metric_models.save_pictures(folder / "training", {**names, "0002_second_image.jpg": "b"})
    (folder / "prompts").mkdir()  # the version's own
    shutil.copy(folder / "memorized.csv", folder / "prompts/memorized_laion_prompts.csv")
    results = read_results(folder / "results/memorization_statistics_model.csv")
    results[5] = Result(5, results[5].caption, results[5].url, None, None, None, None)
    write_table(folder / "undecided.csv", RESULT_COLUMNS, map(result_cells, results))
    (folder / "own.csv").write_text("Caption\nA lighthouse, winter\n")  # row 0's
    shutil.copytree(folder / "model", folder / "short")
    scheduler = folder / "short/scheduler/scheduler_config.json"
    write_json(scheduler, read_json(scheduler) | {"num_train_timesteps": 3})
    return folder


def call(script: Path, *options: str, cwd: Path, code: int = 0) -> str:
    """Runs a script in this process, which has torch already; what it said."""
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as said:
        patch.chdir(cwd)
        patch.setattr(sys, "argv", [str(script), *options])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(script), run_name="__main__")
    assert ended.value.code == code
    return said.getvalue()


@pytest.fixture(scope="module")
def whole(place: Path) -> Path:
    """A run from three starts; row 5 has no training image."""
    said = call(SCRIPT, *ORIGINAL, *FLAGS, *SHORTLY, STARTS, HOLDOUT, "-o=out/whole.csv", cwd=place)
    assert "no training image, not attacked: 1 (row 5)" in said
    return place / "out"


def contents(folder: Path) -> dict[str, bytes]:
    found = {path for ending in ("csv", "png", "jpg") for path in folder.rglob(f"*.{ending}")}
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(found)}


def test_outputs(whole: Path) -> None:
    table = attack_runs.read_attack(whole / "whole.csv")
    keys = [(row["Start"], row["Steps"], row["Row"]) for row in table]
    assert keys == [
        (s, b, r) for s in ("prompt", "gaussian", "unrelated") for b in (0, 2) for r in (0, 2)
    ]
    record = json.loads((whole / "whole.json").read_text())
    assert record["finished"] and record["missing"]["training"] == ["row 5"]
    assert [entry["prompts"] for entry in record["summary"]] == [2] * 6
    picture = Image.open(whole / "whole" / "gaussian_0002" / "img_0002_01.jpg")
    network = torch.jit.load(str(whole.parent / "sscd.pt"))

    def embedded(image: Image.Image) -> np.ndarray:
        pixels = (
            np.asarray(image.convert("RGB").resize((320, 320), Image.Resampling.BILINEAR)) / 255
        )
        scaled = (pixels - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
        tensor = torch.from_numpy(scaled.transpose(2, 0, 1))[None].float()
        vector = network(tensor)[0].detach().double().numpy()
        return vector / np.linalg.norm(vector)

    own = [
        max(
            float(embedded(Image.open(picture.filename.replace("_01.jpg", f"_{n:02d}.jpg"))) @ r)
            for r in (
                embedded(Image.open(path))
                for path in sorted((whole.parent / "training").glob("0002_*.jpg"))
            )
        )
        for n in range(N)
    ]
    (row,) = [r for r in table if (r["Start"], r["Steps"], r["Row"]) == ("gaussian", 2, 2)]
    assert row["Max"] == pytest.approx(max(own), abs=2e-5)
    assert row["Median"] == pytest.approx(np.median(own), abs=2e-5)
    with Image.open(whole / "whole.png") as curve:
        assert curve.width > 900 and len(curve.convert("L").getcolors()) > 20


@pytest.mark.parametrize(
    ("mode", "captions"),
    [("--original_images", "-d=memorized.csv"), ("--refined_neurons", "-f=undecided.csv")],
)
def test_without_steps_it_is_plain_generation(
    place: Path, whole: Path, mode: str, captions: str
) -> None:
    """And it tells the types; that a row which was not chosen is undecided does not matter."""
    shared = ["--version=model", mode, f"-n={N}", "--steps=3", "--device=cpu", "--rows=0,2"]
    shared.append(captions)
    name = mode.strip("-")
    call(workspace.SCRIPTS[4], *shared, f"-b={N}", f"-o=plain_{name}", cwd=place)
    run = whole / "whole"
    if mode != "--original_images":
        output = f"-o=out_{name}/zero.csv"
        said = call(SCRIPT, *shared, *FLAGS, "--budgets=0", output, cwd=place)
        assert "undecided" not in said
        run = place / f"out_{name}" / "zero"
    expected = {p.name: p.read_bytes() for p in (place / f"plain_{name}").glob("img_*.jpg")}
    found = {p.name: p.read_bytes() for p in (run / "prompt_0000").glob("img_*.jpg")}
    assert len(expected) == 2 * N and found == expected
    table = attack_runs.read_attack(run.with_suffix(".csv"))
    assert {(row["Row"], row["type"]) for row in table} == {(0, "VM"), (2, "VM")}


def test_types_of_a_result_file_are_those_of_its_prompt_file(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place)
    named = ("blocks", "caption_column", "random_seed", "result_file", "rows", "scaling_factor")
    args = argparse.Namespace(
        **dict.fromkeys((*named, "unmemorized_prompts")),
        dataset=Path("memorized.csv"),
        memorization_type="TM",
        protocol="published",
    )
    inputs = generation.read_inputs(args, resolve("model"), "refined_neurons", None)
    assert [(prompt.row, prompt.type) for prompt in inputs.prompts] == [(1, "TM"), (3, "TM")]
    others = [Prompt(0, "A lighthouse, winter"), Prompt(1, "another caption"), Prompt(9, "NA")]
    typed = attack_runs.with_types(others, place / "memorized.csv")
    assert [prompt.type for prompt in typed] == ["VM", "", ""]


def test_resumed_and_shared_runs_end_with_the_same_bytes(
    place: Path, whole: Path, warm: workspace.Warm
) -> None:
    expected = contents(whole)
    # As a kill leaves it: pictures of some prompts, no table.
    torn = place / "torn"
    shutil.copytree(whole, torn)
    for name in ("whole.csv", "whole.png"):
        (torn / name).unlink()
    record = json.loads((torn / "whole.json").read_text())
    kept = ("script", "settings", "model", "inputs")
    unfinished = {name: record[name] for name in kept} | {"finished": False}
    (torn / "whole.json").write_text(json.dumps(unfinished))
    for name in ("prompt_0002/img_0002_01.jpg", "unrelated_0000/img_0000_00.jpg"):
        (torn / "whole" / name).unlink()
    flags = (*ORIGINAL, *FLAGS, *SHORTLY, STARTS, HOLDOUT)
    done = warm.together(SCRIPT, *flags, "-o=torn/whole.csv", "--continue_run", cwd=place)
    assert done.returncode == 0, done.stderr
    assert contents(torn) == expected
    said = call(SCRIPT, *flags, "-o=out/whole.csv", "--continue_run", cwd=place)
    assert "is complete already" in said
    assert contents(whole) == expected


def test_a_run_is_of_one_vae(place: Path, whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Targets are encoded with it, and pictures decoded."""
    config = place / "model" / "vae" / "config.json"
    before = config.read_text()
    write_json(config, read_json(config) | {"scaling_factor": 0.5})
    options = (*ORIGINAL, *FLAGS, *SHORTLY, STARTS, HOLDOUT, "-o=out/whole.csv", "--continue_run")
    try:
        call(SCRIPT, *options, cwd=place, code=2)
    finally:
        config.write_text(before)
    assert "the run to continue has vae_sha256 = " in capsys.readouterr().err


def test_runs_side_by_side(place: Path, whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = ROOT / "metrics" / "attack_table.py"
    for ending in ("csv", "json"):
        shutil.copy(whole / f"whole.{ending}", place / f"attack_edit_again.{ending}")
    options = ("out/whole.csv", "attack_edit_again.csv", "--steps=2", "-o=both/t.csv")
    controls = ("--control=out/whole.csv", "--never_trained=attack_edit_again.csv")
    said = call(table, *options, cwd=place)
    assert "The attack does not count, because" in said
    said = call(table, *options, *controls, cwd=place)  # in the place of the first
    header, *rows = (place / "both" / "t.csv").read_text().splitlines()
    assert header.startswith("Run;Prompts;Rate;Rate, 2 steps;SSCD_Orig;SSCD_Orig, 2 steps")
    assert [row.partition(";")[0] for row in rows] == ["whole", "again"]
    assert (place / "both" / "t.md").read_text() == said
    assert said.splitlines()[-1].startswith("The attack ") and "after 2 steps" in said
    assert (place / "both" / "t.png").is_file()
    (place / "notes.md").write_text("mine")
    before = workspace.tree(place)
    for name, taken in (("memorized.csv", "memorized.csv"), ("notes.csv", "notes.md")):
        call(table, *options, f"-o={name}", cwd=place, code=2)
        assert f"{taken} exists already, and not as such a table" in capsys.readouterr().err
    assert workspace.tree(place) == before


HEADER = ";".join(attack_runs.COLUMNS) + "\n"
BAD_RUNS = {
    "half a row": (HEADER + "0;a;VM;prompt;0;0.9;0.9;\n", "{}", "row 0: only some of its scores"),
    "steps below 0": (HEADER + "0;a;VM;prompt;-1;;;\n", "{}", "row 0: -1 is not within 0"),
    "a share that is no number": (HEADER + "0;a;VM;prompt;0;1;1;nan\n", "{}", "not a finite"),
    "settings that are none": (HEADER + "0;a;VM;prompt;0;;;\n", '{"settings": 3}', "no object"),
    "a method that is none": (
        HEADER + "0;a;VM;prompt;0;;;\n",
        '{"settings": {"method": [1]}}',
        "'method' is no text",
    ),
}


@pytest.mark.parametrize("words", BAD_RUNS)
def test_runs_that_are_none(words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table, record, says = BAD_RUNS[words]
    (tmp_path / "run.csv").write_text(table)
    (tmp_path / "run.json").write_text(record)
    call(ROOT / "metrics" / "attack_table.py", "run.csv", "-o=t.csv", cwd=tmp_path, code=2)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("attack_table.py: ") and says in line
    call(ROOT / "metrics" / "attack_table.py", "run.csv", "-o=run.csv", cwd=tmp_path, code=2)
    assert "is the table of a run" in capsys.readouterr().err


def test_never_trained_pictures_are_there_together(tmp_path: Path) -> None:
    """What a killed run left is drawn anew: a folder that is there is whole."""
    prompts = tmp_path / "prompts.csv"
    prompts.write_text("Caption;URL;type\na;;VM\nb;;VM\n")
    (tmp_path / "drawn.partial").mkdir()
    (tmp_path / "drawn.partial" / "0007_first_image.jpg").write_text("")
    call(ROOT / "tiny_model" / "draw_never_trained.py", f"-p={prompts}", "-o=drawn", cwd=tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["drawn", "prompts.csv"]
    assert len(list((tmp_path / "drawn").iterdir())) == 2


GUARD = (
    "import sys\n"
    "class Guard:\n"
    "    def find_spec(self, name, path=None, target=None):\n"
    "        if name in ('torch', 'diffusers', 'transformers'):\n"
    "            raise RuntimeError('torch was imported')\n"
    "sys.meta_path.insert(0, Guard())\n"
)
BAD: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "no training images": (("-r=nowhere",), ("nowhere: no such image folder",)),
    "training images of other rows": (("--rows=1",), ("no picture of the chosen prompts",)),
    "target that is no picture": (("-r=texts",), ("0000_first_image.jpg: not a picture",)),
    "target that is cut off": (("-r=cut",), ("0000_first_image.jpg: not a picture (OSError",)),
    "start unknown": (("--starts=zero",), ("'zero' is none of prompt, gaussian, unrelated",)),
    "negative budget": (("--budgets=0,-5",), ("--budgets", "-5 is not within 0")),
    "no draws": (("--draws=0",), ("--draws", "0 is not within 1")),
    "learning rate of nothing": (("--learning_rate=0",), ("0 is not within above 0",)),
    "unrelated prompts unasked": ((HOLDOUT,), ("--unrelated_prompts has no effect",)),
    "no unrelated prompts": (
        ("--starts=unrelated", "--unrelated_prompts=nowhere.csv"),
        ("nowhere.csv: no such file",),
    ),
    "no prompt that is unrelated": (
        ("--starts=unrelated", "--unrelated_prompts=own.csv"),
        ("own.csv: no other caption than that of row 0",),
    ),
    "more steps than timesteps": (
        ("--version=short",),
        ("3 steps asked for, but the model has 3 timesteps",),
    ),
    "no network": (("--sscd_weights=nowhere.pt",), ("nowhere.pt: no such weights",)),
    "several networks": (("--sscd_protocol=all",), ("judged by one network",)),
    "factor without neurons": (("--scaling_factor=0.5",), ("no effect with --original_images",)),
    "a method of words": (
        ("!--original_images", "--mitigation=random_tokens"),
        ("there is nothing to attack",),
    ),
    "result file missing": (
        ("!--original_images", "!-d", "--refined_neurons", "-f=nowhere.csv"),
        ("nowhere.csv: no such result file",),
    ),
    "output exists": (("-o=out/whole.csv",), ("out/whole.csv exists already", "--continue_run")),
    "continued with other budgets": (
        ("-o=out/whole.csv", "--continue_run", STARTS, HOLDOUT, "--budgets=0,3"),
        ("the run to continue has budgets = [0, 2], this one has [0, 3]",),
    ),
    "output named like its record": (("-o=bad.json",), ("is the name of the record",)),
    "output named like its curves": (("-o=bad.png",), ("is the name of a picture",)),
    "output named like its folder": (("-o=bad/bad",), ("name of the pictures' folder",)),
}


@pytest.mark.parametrize("words", BAD)
def test_bad_input(words: str, place: Path, whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    change, says = BAD[words]
    (place / "texts").mkdir(exist_ok=True)
    (place / "texts" / "0000_first_image.jpg").write_text("no picture")
    (place / "cut").mkdir(exist_ok=True)
    picture = (place / "training" / "0000_first_image.jpg").read_bytes()
    (place / "cut" / "0000_first_image.jpg").write_bytes(picture[: len(picture) // 2])
    (place / "guard").mkdir(exist_ok=True)
    (place / "guard" / "sitecustomize.py").write_text(GUARD)
    monkeypatch.setenv("PYTHONPATH", str(place / "guard"))
    names = [option.lstrip("!").partition("=")[0] for option in change]
    valid = (*ORIGINAL, *FLAGS, *SHORTLY, "-o=bad/bad.csv")
    options = [option for option in valid if option.partition("=")[0] not in names]
    options += [option for option in change if not option.startswith("!")]
    before = workspace.tree(place)
    done = workspace.run(SCRIPT, *options, cwd=place)
    assert done.returncode == 2, done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith("attack.py: ") and all(text in line for text in says), line
    assert workspace.tree(place) == before


def test_a_dry_run_writes_nothing(place: Path) -> None:
    before = workspace.tree(place)
    said = call(SCRIPT, *ORIGINAL, *FLAGS, *SHORTLY, "-o=dry/dry.csv", "--dry_run", cwd=place)
    assert "estimated time" in said and "pictures" in said
    assert workspace.tree(place) == before and not os.path.exists(place / "dry")
