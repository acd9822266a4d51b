"""The detectors and the token attribution against plain loops written from their definitions.

``reference`` samples with diffusers' own scheduler and calls the U-Net directly; what it meets at
each step (noise predictions, attention probabilities written out in numpy) is what the definitions
need, and nothing of the project computes it.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from small_models import ARCHITECTURES, save_small_model

from utils.attention_entropy import attention_entropy, entropy
from utils.attention_maps import reading_attention
from utils.detectors import checked_options, make_detector
from utils.errors import InputError
from utils.localization import UndecidedError
from utils.prompt_tokens import joined_words, prompt_ids, token_scores
from utils.stable_diffusion import (
    Model,
    encode_prompt,
    encode_unconditional,
    initial_noise,
    load_model,
)
from utils.text_conditional_noise import conditional_noise_norms, token_gradients
from utils.versions import resolve

CAPTION = "two boats at sea"
GUIDANCE = 7.5
STEPS = 10  # their last fifth are two
IMAGES = 2


@dataclass(frozen=True)
class Met:
    """What one step of sampling meets: x_t and e_u, e_c (n, C, H, W), as noise, and the attention
    of each layer, (L, n, tokens), of the conditional rows."""

    timestep: torch.Tensor
    latents: torch.Tensor
    without: torch.Tensor
    with_text: torch.Tensor
    attention: np.ndarray


def plain_inputs(model: Model, caption: str) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
    """Embeddings of the prompt and of the empty prompt, (1, tokens, width), and for SDXL what else
    the U-Net is told, [unconditional; conditional]."""
    encoded = model.pipeline.encode_prompt(
        caption, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=True
    )
    if len(encoded) == 2:
        return encoded[0], encoded[1], {}
    side = model.latent_shape[1] * model.pipeline.vae_scale_factor
    ids = torch.tensor([[side, side, 0, 0, side, side]], dtype=torch.float32)
    added = {"text_embeds": torch.cat([encoded[3], encoded[2]]), "time_ids": ids.repeat(2, 1)}
    return encoded[0], encoded[1], added


def noise_of(model: Model, output: torch.Tensor, latents: torch.Tensor, t: Any) -> torch.Tensor:
    if model.scheduler.config.prediction_type == "epsilon":
        return output
    alpha = model.scheduler.alphas_cumprod[t]
    return alpha.sqrt() * output + (1 - alpha).sqrt() * latents


def softmax_over_tokens(module: Any, pixels: np.ndarray, text: np.ndarray) -> np.ndarray:
    """One row's (pixels, width) and (tokens, width) -> (heads, pixels, tokens), float64."""

    def linear(layer: Any, values: np.ndarray) -> np.ndarray:
        bias = 0 if layer.bias is None else layer.bias.detach().double().numpy()
        return values @ layer.weight.detach().double().numpy().T + bias

    query, key = linear(module.to_q, pixels), linear(module.to_k, text)
    heads = []
    for part in np.split(np.arange(query.shape[1]), module.heads):
        logits = query[:, part] @ key[:, part].T / math.sqrt(len(part))
        weights = np.exp(logits - logits.max(axis=1, keepdims=True))
        heads.append(weights / weights.sum(axis=1, keepdims=True))
    return np.stack(heads)


@torch.no_grad()
def reference(model: Model, caption: str, noise: torch.Tensor, steps: int) -> list[Met]:
    """Guided sampling by the book, each step with what it meets. One image at a time."""
    prompt, empty, added = plain_inputs(model, caption)
    per_image: list[list[Met]] = []
    for one in noise.split(1):
        scheduler = DDIMScheduler.from_config(model.pipeline.scheduler.config)
        scheduler.set_timesteps(steps)
        latents = one.clone()
        met = []
        for t in scheduler.timesteps:
            maps: list[np.ndarray] = []

            def look(module: Any, args: Any, more: Any, maps: list[np.ndarray] = maps) -> None:
                pixels, text = args[0][1], more["encoder_hidden_states"][1]
                found = softmax_over_tokens(module, pixels.double().numpy(), text.double().numpy())
                assert found.sum(axis=-1) == pytest.approx(1, abs=1e-12)
                maps.append(found.mean(axis=(0, 1)))

            hooks = [
                module.register_forward_pre_hook(look, with_kwargs=True)
                for name, module in model.unet.named_modules()
                if name.endswith("attn2")
            ]
            try:
                output = model.unet(
                    torch.cat([latents, latents]),
                    t,
                    encoder_hidden_states=torch.cat([empty, prompt]),
                    added_cond_kwargs=added or None,
                ).sample
            finally:
                for hook in hooks:
                    hook.remove()
            without, with_text = output.chunk(2)
            both = [noise_of(model, raw, latents, t) for raw in (without, with_text)]
            met.append(Met(t, latents, both[0], both[1], np.stack(maps)[:, None]))
            guided = without + GUIDANCE * (with_text - without)
            latents = scheduler.step(guided, t, latents).prev_sample
        per_image.append(met)
    return [
        Met(
            images[0].timestep,
            torch.cat([one.latents for one in images]),
            torch.cat([one.without for one in images]),
            torch.cat([one.with_text for one in images]),
            np.concatenate([one.attention for one in images], axis=1),
        )
        for images in zip(*per_image, strict=True)
    ]


@pytest.fixture(scope="module")
def met(small_model: Callable[..., Model]) -> Callable[..., list[Met]]:
    """Architecture -> what sampling of CAPTION meets, made once."""

    @functools.cache
    def made(architecture: str, steps: int = STEPS) -> list[Met]:
        model = small_model(architecture)
        return reference(model, CAPTION, initial_noise(model, IMAGES, seed=1), steps)

    return made


@pytest.fixture
def sampled(small_model: Callable[..., Model]) -> Callable[..., Any]:
    """(function, architecture) -> its value for CAPTION and the same noises, by the project."""

    def value(
        function: Callable[..., Any], architecture: str, *more: object, steps: int = STEPS
    ) -> Any:
        model = small_model(architecture)
        return function(
            model,
            *more,
            encode_prompt(model, CAPTION),
            encode_unconditional(model),
            initial_noise(model, IMAGES, seed=1),
            steps=steps,
            guidance_scale=GUIDANCE,
        )

    return value


# Text-conditional noise.


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_noise_norms_along_plain_sampling(
    architecture: str, met: Callable[..., list[Met]], sampled: Callable[..., Any]
) -> None:
    found = sampled(conditional_noise_norms, architecture).numpy()
    expected = np.array(
        [
            [
                math.sqrt(((step.with_text[i] - step.without[i]).double().numpy() ** 2).sum())
                for i in range(IMAGES)
            ]
            for step in met(architecture)
        ]
    )
    assert found.shape == (STEPS, IMAGES) and expected.min() > 0.01
    assert found == pytest.approx(expected, rel=1e-3)


# Cross-attention entropy.


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_what_is_read_is_the_softmax_of_the_conditional_rows(
    architecture: str, met: Callable[..., list[Met]], small_model: Callable[..., Model]
) -> None:
    model = small_model(architecture)
    prompt, empty, added = plain_inputs(model, CAPTION)
    first = met(architecture)[0]
    both = {name: value.repeat_interleave(IMAGES, dim=0) for name, value in added.items()}

    def forward() -> torch.Tensor:
        with torch.no_grad():
            return model.unet(
                torch.cat([first.latents, first.latents]),
                first.timestep,
                encoder_hidden_states=torch.cat([empty, prompt]).repeat_interleave(IMAGES, dim=0),
                added_cond_kwargs=both or None,
            ).sample

    before = forward()
    with reading_attention(model.unet) as read:
        inside = forward()
    assert torch.equal(inside, before), "reading changes nothing that the model predicts"
    layers = sum(name.endswith("attn2") for name, _ in model.unet.named_modules())
    assert len(read) == layers > len(model.value_layers), "up blocks count too"
    found = torch.stack(read).double().numpy()
    assert found.shape == (layers, IMAGES, 77)
    assert found.sum(axis=-1) == pytest.approx(1, abs=1e-5)
    assert found == pytest.approx(first.attention, abs=1e-6)


@pytest.mark.parametrize("failure", [None, RuntimeError("the pass failed")])
def test_processors_come_back(failure: Exception | None, small_model: Callable[..., Model]) -> None:
    unet = small_model("sd1").unet
    before = dict(unet.attn_processors)
    try:
        with reading_attention(unet):
            changed = {
                name
                for name, processor in unet.attn_processors.items()
                if processor is not before[name]
            }
            assert changed == {name for name in before if ".attn2." in name}
            if failure is not None:
                raise failure
    except RuntimeError as raised:
        assert raised is failure
    assert all(unet.attn_processors[name] is before[name] for name in before)


def plain_entropy(shares: np.ndarray) -> float:
    return -sum(a * math.log(a) for a in shares.tolist() if a > 0)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_scores_d_and_e_by_their_definition(
    architecture: str, met: Callable[..., list[Met]], sampled: Callable[..., Any]
) -> None:
    found = sampled(attention_entropy, architecture, CAPTION).numpy()
    # begin, one token a letter (the small tokenizer knows no longer ones), end
    length = 2 + len(CAPTION.replace(" ", ""))
    steps = met(architecture)
    for image in range(IMAGES):
        mean = [step.attention[:, image].mean(axis=0) for step in steps]
        late = [plain_entropy(a) for a in mean[-2:]]
        at_end = [plain_entropy(a[length - 1 :]) for a in mean]
        d = np.mean(late) + np.mean(at_end[-2:]) - at_end[0]
        e = plain_entropy(steps[0].attention[3, image])
        assert found[:, image] == pytest.approx([d, e], abs=2e-5)
        assert abs(np.mean(at_end[-2:]) - at_end[0]) > 1e-4, "the second part of D matters here"


def test_an_entropy_knows_zeros() -> None:
    certain = torch.tensor([[0.0, 1.0, 0.0, 0.0], [0.25, 0.25, 0.25, 0.25]], dtype=torch.float16)
    assert entropy(certain).tolist() == pytest.approx([0.0, math.log(4)], abs=1e-9)


def test_a_cut_off_caption_ends_with_its_last_position(small_model: Callable[..., Model]) -> None:
    model = small_model("sd1")
    assert len(prompt_ids(model, "a" * 200)) == 77
    assert len(prompt_ids(model, "a" * 75)) == 77 and len(prompt_ids(model, "a" * 7)) == 9


def test_a_model_with_too_few_cross_attentions_is_refused(tmp_path: Any) -> None:
    folder = save_small_model(
        tmp_path / "flat",
        "sd1",
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        block_out_channels=(32, 64),
        layers_per_block=1,
        sample_size=8,
    )
    model = load_model(resolve(str(folder)), device="cpu", dtype="float32")
    settings = {**options("attention_entropy"), "num_inference_steps": 2, "seed": 1}
    with pytest.raises(InputError, match="2 cross-attention layers"):
        make_detector("attention_entropy", model, {**settings, "batch_size": None})


# The number of images.


def options(name: str, samples: int | None = None, **given: object) -> dict[str, Any]:
    usual = {"samples_per_prompt": samples, "guidance_scale": None, "protocol": None}
    return checked_options(name, {**usual, **given})


@pytest.mark.parametrize("name", ["text_conditional_noise", "attention_entropy"])
def test_scores_are_means_over_images_however_many(
    name: str, small_model: Callable[..., Model]
) -> None:
    model = small_model("sd1")
    shared = {"num_inference_steps": 2, "seed": 5}
    noise = initial_noise(model, 10, seed=5)
    alone = []
    for one in noise.split(1):
        sampling = {"steps": 2, "guidance_scale": GUIDANCE}
        both = encode_prompt(model, CAPTION), encode_unconditional(model), one
        if name == "text_conditional_noise":
            norms = conditional_noise_norms(model, *both, **sampling)
            alone.append([norms.mean().item(), norms[0].item()])
        else:
            found = attention_entropy(model, CAPTION, *both, **sampling)
            alone.append(found[:, 0].tolist())
    for samples, batch_size in ((1, None), (4, None), (10, 3)):
        settings = {**options(name, samples), **shared, "batch_size": batch_size}
        scores = make_detector(name, model, settings)(CAPTION)
        assert scores == pytest.approx(np.mean(alone[:samples], axis=0), rel=1e-4)
    assert np.ptp(alone, axis=0).min() > 1e-5, "images differ"


@pytest.mark.parametrize(
    ("given", "steps", "seed"),
    [({}, 50, 1), ({"protocol": "paper", "guidance_scale": 3.0}, 20, 5)],
    ids=["defaults", "other settings"],
)
def test_pairwise_ssim_is_what_script_3_scores(
    given: dict[str, Any], steps: int, seed: int, small_model: Callable[..., Model]
) -> None:
    from utils.noise_difference import NoiseSettings
    from utils.scoring import Detector

    model = small_model("sd1")
    rows = 6  # of fifteen pairs some score above 0
    sampling = {"num_inference_steps": steps, "seed": seed, "batch_size": None}
    settings = {**options("pairwise_ssim", rows, **given), **sampling}
    detector = make_detector("pairwise_ssim", model, settings)
    asked = NoiseSettings(num_inference_steps=steps, **given)
    expected, usual = (
        Detector(model, how, rows=rows, seed=drawn).pairwise(CAPTION).max().item()
        for how, drawn in ((asked, seed), (NoiseSettings(), 1))
    )
    assert detector(CAPTION) == [expected]
    assert (expected != usual) == bool(given)


@pytest.mark.parametrize("name", ["text_conditional_noise", "attention_entropy", "pairwise_ssim"])
def test_what_is_not_finite_is_undecided(
    name: str, small_model: Callable[..., Model], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = small_model("sd1")
    settings = {**options(name, 2), "num_inference_steps": 2, "seed": 1, "batch_size": None}
    detector = make_detector(name, model, settings)
    with torch.no_grad():
        weight = model.unet.mid_block.attentions[0].transformer_blocks[0].attn2.to_k.weight
        kept = weight.clone()
        try:
            weight.fill_(math.nan)
            with pytest.raises(UndecidedError):
                detector(CAPTION)
        finally:
            weight.copy_(kept)


# Token attribution.


def plain_gradients(model: Model, met: list[Met]) -> np.ndarray:
    """g_t by autograd through one image at a time, and the mean of its norms over the steps."""
    prompt, _, added = plain_inputs(model, CAPTION)
    conditional = {name: value[1:] for name, value in added.items()}
    norms = []
    for step in met:
        embedding = prompt.clone().requires_grad_()
        parts = []
        for i in range(len(step.latents)):
            latents = step.latents[i : i + 1]
            output = model.unet(
                latents,
                step.timestep,
                encoder_hidden_states=embedding,
                added_cond_kwargs=conditional or None,
            ).sample
            difference = noise_of(model, output, latents, step.timestep) - step.without[i : i + 1]
            parts.append(difference.square().sum().sqrt())
        torch.stack(parts).mean().backward()
        norms.append(embedding.grad[0].double().norm(dim=1).numpy())
    return np.mean(norms, axis=0)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_token_scores_are_the_gradients_of_a_plain_loop(
    architecture: str,
    met: Callable[..., list[Met]],
    sampled: Callable[..., Any],
    small_model: Callable[..., Model],
) -> None:
    expected = plain_gradients(small_model(architecture), met(architecture, 3))
    for batch_size in (None, 1):
        function = functools.partial(token_gradients, batch_size=batch_size)
        found = sampled(function, architecture, steps=3).numpy()
        assert found.shape == (77,)
        assert found == pytest.approx(expected, rel=1e-3, abs=1e-4 * expected.max())


def test_a_token_score_is_a_slope(small_model: Callable[..., Model]) -> None:
    """Of the first step alone: what a small step along a token's gradient changes."""
    model = small_model("sd1")
    noise = initial_noise(model, 1, seed=1)
    encoded, empty = encode_prompt(model, CAPTION), encode_unconditional(model)
    sampling = {"steps": 1, "guidance_scale": GUIDANCE}
    scores = token_gradients(model, encoded, empty, noise, **sampling)
    token, h = int(scores.argmax()), 1e-2

    def mean_norm(moved: torch.Tensor) -> float:
        other = type(encoded)(moved, encoded.added)
        return conditional_noise_norms(model, other, empty, noise, **sampling).mean().item()

    slopes = []
    for column in range(encoded.embedding.shape[-1]):
        step = torch.zeros_like(encoded.embedding)
        step[0, token, column] = h
        up, down = (mean_norm(encoded.embedding + sign * step) for sign in (1, -1))
        slopes.append((up - down) / (2 * h))
    assert np.linalg.norm(slopes) == pytest.approx(scores[token].item(), rel=0.05)


def test_attribution_does_not_grow_with_the_number_of_images(
    small_model: Callable[..., Model],
) -> None:
    model = small_model("sd1")
    noise = initial_noise(model, 1, seed=1)
    sampling = {"steps": 1, "guidance_scale": GUIDANCE}
    encoded = encode_prompt(model, CAPTION), encode_unconditional(model)
    one = token_gradients(model, *encoded, noise, **sampling).numpy()
    for images in (4, 10):
        same = token_gradients(model, *encoded, noise.repeat(images, 1, 1, 1), **sampling).numpy()
        assert same == pytest.approx(one, rel=1e-3, abs=1e-5 * one.max())


def test_only_the_caption_s_own_tokens_are_shown(small_model: Callable[..., Model]) -> None:
    model = small_model("sd1")
    noise, empty = initial_noise(model, 1, seed=1), encode_unconditional(model)
    sampling = {"steps": 2, "guidance_scale": GUIDANCE}
    found = token_scores(model, "a cat", empty, noise, **sampling)
    every = token_gradients(model, encode_prompt(model, "a cat"), empty, noise, **sampling)
    assert [token for token, _ in found] == ["a</w>", "c", "a", "t</w>"]
    assert [score for _, score in found] == every[1:5].tolist()


def test_tokens_are_joined_to_words(small_model: Callable[..., Model]) -> None:
    tokenizer = small_model("sd1").pipeline.tokenizer
    model: Any = SimpleNamespace(pipeline=SimpleNamespace(tokenizer=tokenizer))
    tokens = ["a</w>", "c", "a", "t</w>", ",</w>", "c", "u"]
    scores = [1.0, 2.0, 5.0, 3.0, 0.5, 7.0, 4.0]
    assert joined_words(model, tokens, scores) == [
        ("a", 1.0),
        ("cat", 5.0),
        (",", 0.5),
        ("cu", 7.0),
    ]
    assert joined_words(model, [], []) == []
