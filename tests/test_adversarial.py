"""Fine-tuning against the attack: its losses by definition, what it trains, and that it can be
killed."""

import json
import runpy
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import metric_models
import pytest
import torch
import workspace
from safetensors.torch import load_file

from utils import adversarial
from utils.adversarial import (
    Memorized,
    Recipe,
    adversarial_errors,
    fine_tune,
    gather,
    utility_errors,
)
from utils.embedding_attack import draw, generator_of
from utils.errors import InputError
from utils.stable_diffusion import (
    Conditioning,
    Model,
    encode,
    encode_prompt,
    initial_noise,
    load_model,
)
from utils.versions import resolve

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "5_edit_model.py"
HOLD_OUT = ["one dog", "Two boats at sea", "a green hat 3"]
CAPTIONS = ["A lighthouse", "grey cat", "Tea"]
SHORT = Recipe(
    steps=4,
    prompts=2,
    inner_steps=2,
    attack_steps=4,
    draws=2,
    utility_rows=3,
    surrogates=2,
    batch_size=2,
)


@pytest.fixture(autouse=True)
def brief(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adversarial, "STEPS", 2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("adversarial") / "model"
    workspace.save_model(place)
    return place


@pytest.fixture
def pair(folder: Path) -> tuple[Model, Model]:
    """A model to train, and the teacher."""
    first, second = (load_model(resolve(str(folder)), device="cpu", dtype="float32") for _ in "12")
    return first, second


def memorized(model: Model) -> list[Memorized]:
    return [
        Memorized(row, caption, encode(model, [metric_models.picture((row, k)) for k in range(2)]))
        for row, caption in enumerate(CAPTIONS)
    ]


def state(model: Model) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.unet.state_dict().items()}


# In the middle the small model has one position, which attends to itself whatever these are.
WITHOUT_EFFECT = {
    f"mid_block.attentions.0.transformer_blocks.0.attn1.to_{part}.weight" for part in "qk"
}


def still_the_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> set[str]:
    return {name for name in a if torch.equal(a[name], b[name])}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("architecture", ["sd1", "sd2"])
def test_losses_by_definition(small_model: Callable[..., Model], architecture: str) -> None:
    model = small_model(architecture)
    found, taught = (encode_prompt(model, c).repeat(2) for c in CAPTIONS[:2])
    z, others = initial_noise(model, 2, 7), initial_noise(model, 2, 8)
    noise, more = initial_noise(model, 2, 9), initial_noise(model, 2, 10)
    t, u = torch.tensor([900, 20]), torch.tensor([500, 1])
    with torch.no_grad():
        first = adversarial_errors(model, found, z, noise, t)
        second = utility_errors(model, model, taught, others, more, u)
    assert second.eq(0).all(), "the model is its own teacher"
    errors = []
    for row in range(2):
        abar = float(model.scheduler.alphas_cumprod[t[row]])
        x = abar**0.5 * z[row] + (1 - abar) ** 0.5 * noise[row]
        with torch.no_grad():
            output = model.unet(
                x[None], t[row], encoder_hidden_states=found.embedding[row : row + 1]
            ).sample[0]
        wanted = noise[row]
        if architecture == "sd2":  # the velocity whose noise is eps
            wanted = (noise[row] - (1 - abar) ** 0.5 * x) / abar**0.5
        errors.append(((output - wanted) ** 2).mean().item())
    assert first.tolist() == pytest.approx(errors, rel=1e-3)


def test_the_teacher_pulls_back(pair: tuple[Model, Model]) -> None:
    model, teacher = pair
    with torch.no_grad():
        for layer in model.value_layers.values():
            layer.weight.mul_(0.5)
    rows = [encode_prompt(model, c) for c in HOLD_OUT[:2]]
    taught = Conditioning.cat(rows)
    z, noise = initial_noise(model, 2, 3), initial_noise(model, 2, 4)
    times = torch.tensor([400, 10])
    with torch.no_grad():
        found = utility_errors(model, teacher, taught, z, noise, times)
        x = model.scheduler.add_noise(z, noise, times)
        ours, theirs = (
            m.unet(x, times, encoder_hidden_states=taught.embedding).sample
            for m in (model, teacher)
        )
    wanted = ((ours - theirs) ** 2).mean(dim=(1, 2, 3))
    assert torch.allclose(found, wanted, rtol=1e-4) and found.gt(0).all()


def test_rows_go_by_in_parts(pair: tuple[Model, Model]) -> None:
    """The gradient is that of the mean over all rows, however few pass at a time."""
    model, _ = pair
    found = Conditioning.cat([encode_prompt(model, c) for c in CAPTIONS])
    z, noise, times = initial_noise(model, 3, 3), initial_noise(model, 3, 4), torch.arange(3) * 300
    weights = list(model.unet.parameters())

    def gradient(batch_size: int) -> torch.Tensor:
        model.unet.zero_grad()
        errors = partial(adversarial_errors, model)
        told.append(adversarial._backward(errors, found, (z, noise, times), batch_size, weight=0.5))
        return torch.cat([w.grad.flatten() for w in weights if w.grad is not None])

    told: list[float] = []
    model.unet.requires_grad_(True)
    whole = torch.autograd.grad(
        0.5 * adversarial_errors(model, found, z, noise, times).mean(), weights, allow_unused=True
    )
    expected = torch.cat([part.flatten() for part in whole if part is not None])
    for batch_size in (1, 2, 3, 8):
        assert torch.allclose(gradient(batch_size), expected, atol=1e-5 * expected.abs().max())
    assert told == pytest.approx([told[0]] * 4, rel=1e-5)


def test_what_is_sampled(pair: tuple[Model, Model]) -> None:
    """The surrogates are the edited model's pictures, the utility ones the teacher's."""
    model, teacher = pair
    with torch.no_grad():
        for name, weight in model.unet.named_parameters():
            if "attn2.to_v" in name:
                weight.zero_()
    material = gather(model, teacher, memorized(model), HOLD_OUT, SHORT)
    shape = model.latent_shape
    assert material.surrogates.shape == (3, 2, *shape) and material.utility.shape == (3, *shape)
    # deaf to text, the edited model makes the same pictures of every prompt
    assert torch.allclose(material.surrogates[0], material.surrogates[2], atol=1e-4)
    assert not torch.allclose(material.surrogates[0, 0], material.surrogates[0, 1], atol=1e-2)
    again = gather(teacher, teacher, memorized(model)[:1], HOLD_OUT, SHORT)
    assert torch.equal(again.utility, material.utility)
    assert not torch.allclose(again.surrogates[0], material.surrogates[0], atol=1e-2)


def test_a_killed_run_ends_with_the_same_weights(
    pair: tuple[Model, Model], folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, teacher = pair
    before, others = state(model), state(teacher)
    parts = [model.pipeline.vae, model.pipeline.text_encoder]
    beside = [p.clone() for part in parts for p in part.parameters()]
    told = fine_tune(
        model, teacher, memorized(model), HOLD_OUT, SHORT, checkpoint=tmp_path / "whole"
    )
    whole = state(model)
    assert len(told["adversarial"]) == len(told["utility"]) == SHORT.steps
    assert still_the_same(whole, before) <= WITHOUT_EFFECT, "the full U-Net is trained"
    assert same(state(teacher), others)
    still = [p for part in parts for p in part.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(beside, still, strict=True))
    assert not any(p.requires_grad for m in pair for p in m.unet.parameters())

    monkeypatch.setattr(adversarial, "SAVE_EVERY", 0.0)
    second = load_model(resolve(str(folder)), device="cpu", dtype="float32")

    def killed(steps: Any) -> Iterator[Any]:
        for step in steps:
            if step == 3:  # in the middle of attacks: they go on from where they were
                raise KeyboardInterrupt
            yield step

    args = (teacher, memorized(model), HOLD_OUT, SHORT)
    monkeypatch.setattr(adversarial, "gather", lambda *a, **k: gather(*a))
    with pytest.raises(KeyboardInterrupt):
        fine_tune(second, *args, checkpoint=tmp_path / "torn", progress=killed)
    third = load_model(resolve(str(folder)), device="cpu", dtype="float32")
    monkeypatch.setattr(adversarial, "gather", None)  # it goes on with what was sampled
    again = fine_tune(third, *args, checkpoint=tmp_path / "torn")
    assert again == told and same(state(third), whole)
    # the checkpoint belongs to these settings
    other = replace(SHORT, learning_rate=1e-3)
    with pytest.raises(InputError, match="other settings"):
        fine_tune(third, teacher, memorized(model), HOLD_OUT, other, checkpoint=tmp_path / "torn")


def test_attacks_go_on_and_begin_anew(pair: tuple[Model, Model]) -> None:
    model, _ = pair
    attacks = adversarial._Attacks(model, memorized(model), HOLD_OUT, SHORT)
    first = attacks.go_on([0, 1], 0)
    assert attacks.had == [2, 2, 4]
    saved = attacks.state()
    second = attacks.go_on([0], 1)
    assert attacks.had == [4, 2, 4]
    moved = (second.embedding[0] - first.embedding[0]).abs().max()
    assert 0 < moved < 0.25, "two steps of Adam at 0.1 from where it was"
    third = attacks.go_on([0], 2)
    assert attacks.had == [2, 2, 4] and (third.embedding - second.embedding).abs().max() > 0.3
    again = adversarial._Attacks(model, memorized(model), HOLD_OUT, SHORT)
    again.load(saved)
    assert torch.equal(again.go_on([1], 5).embedding, attacks.go_on([1], 5).embedding)


def test_everyone_has_a_turn() -> None:
    for count, size in ((5, 2), (24, 4), (3, 3)):
        turns = [adversarial._turn(count, size, step, 0) for step in range(count)]
        had = [number for turn in turns for number in turn]
        assert set(had) == set(range(count))
        assert max(map(had.count, range(count))) - min(map(had.count, range(count))) <= 1
    assert adversarial._turn(24, 4, 0, 0) != adversarial._turn(24, 4, 0, 1)


def test_it_learns(pair: tuple[Model, Model], tmp_path: Path) -> None:
    """Under an embedding found by a fixed attack, the surrogate is predicted better than before."""
    model, teacher = pair
    known = memorized(model)[:1]
    recipe = replace(SHORT, steps=25, prompts=1, learning_rate=1e-3, surrogates=1, utility=0.1)
    material = gather(model, teacher, known, HOLD_OUT, recipe)
    found = adversarial._Attacks(model, known, HOLD_OUT, recipe).go_on([0], 0).repeat(30)
    noise, times = draw(model, [generator_of("judge")], 30)
    z = material.surrogates[0].expand(30, -1, -1, -1)

    def loss(trained: Model) -> float:
        with torch.no_grad():
            return adversarial_errors(trained, found, z, noise, times).mean().item()

    before = loss(model)
    fine_tune(model, teacher, known, HOLD_OUT, recipe, checkpoint=tmp_path / "c")
    assert loss(model) < 0.9 * before


def test_the_cost_is_that_of_the_rows_that_pass(
    pair: tuple[Model, Model], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A row that a gradient is asked of counts three times."""
    cost = 0
    for model in pair:
        plain = model.unet.forward

        def counted(sample: torch.Tensor, *more: Any, _of: Any = plain, **named: Any) -> Any:
            nonlocal cost
            assert not torch.is_grad_enabled() or len(sample) <= SHORT.batch_size
            cost += len(sample) * (3 if torch.is_grad_enabled() else 1)
            return _of(sample, *more, **named)

        monkeypatch.setattr(model.unet, "forward", counted)
    fine_tune(*pair, memorized(pair[0]), HOLD_OUT, SHORT, checkpoint=tmp_path / "c")
    # at the most: where a round of the prompts ends, a step may have fewer
    assert 0.8 * SHORT.unet_rows(3, 3) < cost <= SHORT.unet_rows(3, 3)


# The script.

OPTIONS = (
    *("--version=model", "--mode=adversarial", "--hold_out=holdout.csv", "--reference=training"),
    *("--training_steps=2", "--inner_steps=1", "--rows=0-2", "--device=cpu"),
)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    copy = workspace.fresh(tmp_path_factory.mktemp("script") / "workspace")
    metric_models.save_pictures(copy / "training", {f"{r:04d}_first_image.jpg": r for r in (0, 2)})
    return copy


def test_the_script_writes_a_model_that_loads(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from diffusers import StableDiffusionPipeline

    monkeypatch.chdir(place)
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *OPTIONS, "-o=edited/hardened"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    assert ended.value.code == 0
    assert "no training image, not trained against: 1 (row 1)" in capsys.readouterr().out
    record = json.loads((place / "edited/hardened.json").read_text())
    assert record["finished"] and record["settings"]["training_steps"] == 2
    assert record["findings"]["attacked_prompts"] == 2
    # which encodes the training images
    assert record["model"]["vae_sha256"] == resolve(str(place / "model")).vae_sha256
    assert not list((place / "edited").glob("*.checkpoint"))
    new, old = (
        load_file(place / name / "unet/diffusion_pytorch_model.safetensors")
        for name in ("edited/hardened", "model")
    )
    assert new.keys() == old.keys() and still_the_same(new, old) <= WITHOUT_EFFECT
    pipeline = StableDiffusionPipeline.from_pretrained(place / "edited/hardened")
    assert torch.equal(pipeline.unet.state_dict()["conv_in.weight"], new["conv_in.weight"])
    card = " ".join((place / "edited/hardened/README.md").read_text().split())
    assert "fine-tuned" in card and "lighthouse" not in card
    assert "Everything else is as it was" not in card and "What is not the U-Net is as" in card


def test_a_dry_run_counts_the_training(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(place)
    options = [*OPTIONS, "--training_steps=1000000", "-o=edited/long", "--dry_run"]
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *options])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    assert ended.value.code == 0
    (said,) = (s for s in capsys.readouterr().out.splitlines() if "estimated time" in s)
    assert " h at " in said


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (("--reference=nowhere",), "nowhere: no such image folder"),
        (("!--reference",), "--mode adversarial needs the training images"),
        (("!--mode",), "has no effect with --mode zero"),
        (("--training_steps=0",), "0 is not within 1"),
        (("--learning_rate=nan",), "nan is not within above 0"),
        (("--neurons=set.json", "!--rows"), "must know which prompts a neuron serves"),
    ],
)
def test_bad_input(place: Path, change: tuple[str, ...], says: str) -> None:
    (place / "set.json").write_text("[[1], [], [], []]")
    names = [option.lstrip("!").partition("=")[0] for option in change]
    options = [o for o in OPTIONS if o.partition("=")[0] not in names]
    options += [o for o in change if not o.startswith("!")]
    before = workspace.tree(place)
    done = workspace.run(SCRIPT, *options, "-o=bad/model", cwd=place)
    assert done.returncode == 2, done.stderr
    assert len(done.stderr.splitlines()) == 1 and says in done.stderr
    assert workspace.tree(place) == before
