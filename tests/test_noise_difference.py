"""Noise differences (Alg. 1) against the diffusers U-Net called by hand."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler, PNDMScheduler

from utils.noise_difference import NoiseSettings, noise_difference, normalized
from utils.stable_diffusion import (
    Conditioning,
    Model,
    encode_prompt,
    encode_unconditional,
    initial_noise,
    load_model,
    to_noise_prediction,
)
from utils.versions import resolve

CAPTION = "The no limits business woman"
ROWS = 3


def by_hand(model: Model, caption: str, timestep: int, *, first: float = 0, second: float = 1):
    """first * prediction without text + second * prediction with it, minus x, before scaling.

    Row by row, from the pipeline's parts alone."""
    pipe = model.pipeline
    noise = torch.randn((ROWS, 4, 16, 16), generator=torch.Generator().manual_seed(1))
    encoded = pipe.encode_prompt(
        caption, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=True
    )
    with_text, without = encoded[:2]
    added = [{}, {}]
    if len(encoded) == 4:  # SDXL: original size, crop, target size
        side = 16.0 * pipe.vae_scale_factor
        ids = torch.tensor([[side, side, 0, 0, side, side]])
        added = [{"text_embeds": pooled, "time_ids": ids} for pooled in (encoded[3], encoded[2])]
    beta = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    alpha_bar = float(torch.cumprod(1 - beta, 0)[timestep])
    rows = []
    for x in noise[:, None]:
        outputs = [
            pipe.unet(
                x, timestep, encoder_hidden_states=text, added_cond_kwargs=extra or None
            ).sample
            for text, extra in zip((without, with_text), added, strict=True)
        ]
        prediction = first * outputs[0] + second * outputs[1]
        if pipe.scheduler.config.prediction_type == "v_prediction":
            prediction = alpha_bar**0.5 * prediction + (1 - alpha_bar) ** 0.5 * x
        rows.append((prediction - x)[0])
    return torch.stack(rows)


def scaled(difference: torch.Tensor) -> torch.Tensor:
    flat = difference.flatten(2)
    low, high = flat.min(dim=2, keepdim=True).values, flat.max(dim=2, keepdim=True).values
    return ((flat - low) / (high - low)).view_as(difference)


def ours(model: Model, settings: NoiseSettings, **options: int) -> torch.Tensor:
    guided = encode_unconditional(model) if settings.guidance_scale != 1 else None
    conditioning = encode_prompt(model, CAPTION)
    noise = initial_noise(model, ROWS, 1)
    return noise_difference(model, conditioning, guided, noise, settings, **options)


CASES = [
    # case in words, settings, timestep, weights of the predictions without and with text
    ("published: the second timestep", NoiseSettings(), 961, (0, 1)),
    ("paper: the first timestep", NoiseSettings(protocol="paper"), 981, (0, 1)),
    ("guidance 7", NoiseSettings(guidance_scale=7.0), 961, (-6, 7)),
    ("guidance 7, paper", NoiseSettings(protocol="paper", guidance_scale=7.0), 981, (-6, 7)),
    (
        "guidance 7 with the halves exchanged",
        NoiseSettings(guidance_scale=7.0, exchanged_guidance=True),
        961,
        (7, -6),
    ),
    ("guidance 0 is the prompt's absence", NoiseSettings(guidance_scale=0.0), 961, (1, 0)),
    ("20 steps", NoiseSettings(num_inference_steps=20), 901, (0, 1)),
]


@pytest.mark.parametrize("architecture", ["sd1", "sd2", "xl"])
@pytest.mark.parametrize(
    ("settings", "timestep", "weights"), [case[1:] for case in CASES], ids=[c[0] for c in CASES]
)
def test_equals_the_unet_called_by_hand(
    small_model: Callable[..., Model],
    architecture: str,
    settings: NoiseSettings,
    timestep: int,
    weights: tuple[float, float],
) -> None:
    model = small_model(architecture)
    with torch.no_grad():
        expected = scaled(by_hand(model, CAPTION, timestep, first=weights[0], second=weights[1]))
    found = ours(model, settings)
    assert found.dtype == torch.float32
    # Guidance 7 makes some seven times of the last digits, which differ between processors.
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    lows, highs = found.amin(dim=(2, 3)), found.amax(dim=(2, 3))
    assert torch.equal(lows, torch.zeros(ROWS, 4)) and torch.equal(highs, torch.ones(ROWS, 4))


def test_cases_differ_from_each_other(small_model: Callable[..., Model]) -> None:
    """Else the test above could not tell protocols and guidance apart."""
    model = small_model("sd1")
    found = [ours(model, case[1]) for case in CASES]
    for i, first in enumerate(found):
        for second in found[:i]:
            assert (first - second).abs().max() > 1e-4


def change_class(index: Path, name: str) -> None:
    content = json.loads(index.read_text())
    index.write_text(json.dumps({**content, "scheduler": ["diffusers", name]}))


@pytest.mark.parametrize(
    ("scheduler", "timesteps"),
    [
        # v1-4's own configuration file
        (
            PNDMScheduler(
                beta_start=0.00085,
                beta_end=0.012,
                beta_schedule="scaled_linear",
                set_alpha_to_one=False,
                skip_prk_steps=True,
                steps_offset=1,
            ),
            [981, 961],
        ),
        # SDXL's
        (
            EulerDiscreteScheduler(
                beta_start=0.00085,
                beta_end=0.012,
                beta_schedule="scaled_linear",
                steps_offset=1,
                timestep_spacing="leading",
            ),
            [981, 961],
        ),
        (DDIMScheduler(), [980, 960]),  # offset 0
        (DDIMScheduler(timestep_spacing="trailing"), [999, 979]),
    ],
    ids=["PNDM of v1-4", "Euler of SDXL", "default DDIM", "trailing"],
)
def test_timestep_is_the_models_own_schedulers(
    small_folder: Callable[[str], Path], tmp_path: Path, scheduler: Any, timesteps: list[int]
) -> None:
    """Tried under SDXL: diffusers' pipeline for v1 and v2 mends an offset of 0 when it loads."""
    folder = shutil.copytree(small_folder("xl"), tmp_path / "model")
    change_class(folder / "model_index.json", type(scheduler).__name__)
    scheduler.save_pretrained(folder / "scheduler")
    model = load_model(resolve(str(folder)), device="cpu", dtype="float32")
    seen: list[int] = []
    hook = model.unet.register_forward_pre_hook(lambda module, args: seen.append(int(args[1])))
    try:
        for protocol in ("paper", "published"):
            ours(model, NoiseSettings(protocol=protocol))
    finally:
        hook.remove()
    assert seen == timesteps
    # a scheduler that knows no clipping of samples must not get DDIM's
    for name in ("clip_sample", "set_alpha_to_one"):
        assert model.scheduler.config[name] == scheduler.config.get(name, False)


@pytest.mark.parametrize(
    ("settings", "batch_size", "batches"),
    [
        (NoiseSettings(), None, [3]),
        (NoiseSettings(guidance_scale=7.0), None, [6]),
        (NoiseSettings(), 2, [2, 1]),
        (NoiseSettings(guidance_scale=7.0), 1, [2, 2, 2]),
    ],
    ids=["all rows at once", "both halves of guidance at once", "two at a time", "one, guided"],
)
def test_one_unet_pass_for_each_batch(
    small_model: Callable[..., Model],
    settings: NoiseSettings,
    batch_size: int | None,
    batches: list[int],
) -> None:
    model = small_model("sd1")
    seen: list[int] = []
    hook = model.unet.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    try:
        ours(model, settings, **({"batch_size": batch_size} if batch_size else {}))
    finally:
        hook.remove()
    assert seen == batches


@pytest.mark.parametrize("architecture", ["sd1", "sd2", "xl"])
@pytest.mark.parametrize("guidance", [1.0, 7.0])
def test_rows_do_not_depend_on_the_batch(
    small_model: Callable[..., Model], architecture: str, guidance: float
) -> None:
    model = small_model(architecture)
    settings = NoiseSettings(guidance_scale=guidance)
    whole, single = ours(model, settings), ours(model, settings, batch_size=1)
    difference = (whole - single).abs().max().item()
    assert difference < 1e-5 * guidance, f"batching changes a value by {difference:.1e}"


def test_constant_channel_becomes_zero() -> None:
    difference = torch.randn(2, 3, 4, 4)
    difference[1, 2] = -7.5
    found = normalized(difference)
    assert torch.equal(found[1, 2], torch.zeros(4, 4))
    assert found[0].amax() == 1 and torch.isfinite(found).all()


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_stays_so(value: float) -> None:
    """It must not be taken for a constant channel, nor touch other rows and channels."""
    difference = torch.randn(2, 3, 4, 4)
    clean = normalized(difference)
    difference[1, 2, 0, 0] = value
    found = normalized(difference)
    assert not torch.isfinite(found[1, 2]).all()
    found[1, 2] = clean[1, 2]
    assert torch.equal(found, clean)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_rounds_x_and_subtracts_in_float32(
    small_model: Callable[..., Model], monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    """x is the float32 draw, rounded; prediction and x are subtracted in float32.

    The U-Net is replaced by one that returns a known prediction."""
    model = small_model("sd1", dtype)
    kind = getattr(torch, dtype)
    assert model.dtype == kind and model.unet.dtype == kind
    drawn = torch.randn((ROWS, 4, 16, 16), generator=torch.Generator().manual_seed(1))
    prediction = torch.randn((ROWS, 4, 16, 16), generator=torch.Generator().manual_seed(9)).to(kind)
    seen = []

    def forward(latents: torch.Tensor, *_: object, **__: object) -> tuple[torch.Tensor]:
        seen.append(latents)
        return (prediction,)

    monkeypatch.setattr(model.unet, "forward", forward)
    found = ours(model, NoiseSettings())
    assert torch.equal(seen[0], drawn.to(kind))
    expected = prediction.float() - drawn.to(kind).float()
    assert torch.equal(found, normalized(expected))
    in_half = normalized((prediction - drawn.to(kind)).float())
    assert not torch.equal(found, in_half)


def test_half_precision_guides_in_float32(
    small_model: Callable[..., Model], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = small_model("sd1", "bfloat16")
    halves = torch.randn((2 * ROWS, 4, 16, 16), generator=torch.Generator().manual_seed(9))
    halves = halves.bfloat16()
    monkeypatch.setattr(model.unet, "forward", lambda *_, **__: (halves,))
    found = ours(model, NoiseSettings(guidance_scale=7.0))
    drawn = torch.randn((ROWS, 4, 16, 16), generator=torch.Generator().manual_seed(1)).bfloat16()
    without, with_text = halves.float().chunk(2)
    expected = without + 7.0 * (with_text - without) - drawn.float()
    assert torch.equal(found, normalized(expected))


def test_half_precision_end_to_end(small_model: Callable[..., Model]) -> None:
    """bfloat16 gives about what float32 gives, and not the same: it really is used."""
    exact, rounded = (
        ours(small_model("sd1", dtype), NoiseSettings()) for dtype in ("float32", "bfloat16")
    )
    assert rounded.dtype == torch.float32
    error = (exact - rounded).abs().mean().item()
    assert 1e-6 < error < 0.02


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_velocity_becomes_noise(small_model: Callable[..., Model], dtype: torch.dtype) -> None:
    """x_t = sqrt(abar) x0 + sqrt(1 - abar) eps and v = sqrt(abar) eps - sqrt(1 - abar) x0."""
    model = small_model("sd2")
    timestep = torch.tensor(500)
    alpha_bar = model.scheduler.alphas_cumprod[500].double()
    clean, noise = torch.randn(2, 1, 4, 8, 8, dtype=torch.float64)
    latents = alpha_bar.sqrt() * clean + (1 - alpha_bar).sqrt() * noise
    velocity = alpha_bar.sqrt() * noise - (1 - alpha_bar).sqrt() * clean
    found = to_noise_prediction(model, velocity.to(dtype), latents.to(dtype), timestep)
    assert found.dtype == torch.float32
    tolerance = 1e-5 if dtype == torch.float32 else 5e-3
    torch.testing.assert_close(found, noise.float(), atol=tolerance, rtol=0)


def test_noise_is_one_draw_and_reseeded_every_time(small_model: Callable[..., Model]) -> None:
    model = small_model("sd1")
    expected = torch.randn((5, 4, 16, 16), generator=torch.Generator("cpu").manual_seed(3))
    torch.manual_seed(0)
    state = torch.get_rng_state()
    first, second = initial_noise(model, 5, 3), initial_noise(model, 5, 3)
    assert torch.equal(first, expected) and torch.equal(second, expected)
    assert first.dtype == torch.float32
    assert torch.equal(torch.get_rng_state(), state), "the global generator was touched"


def test_conditioning_rows_keep_their_order() -> None:
    first = Conditioning(torch.randn(1, 7, 3), {"text_embeds": torch.randn(1, 5)})
    second = Conditioning(torch.randn(1, 7, 3), {"text_embeds": torch.randn(1, 5)})
    both = Conditioning.cat([first.repeat(2), second.repeat(3)])
    assert both.embedding.shape == (5, 7, 3) and both.added["text_embeds"].shape == (5, 5)
    for row, part in enumerate([first, first, second, second, second]):
        assert torch.equal(both.embedding[row], part.embedding[0])
        assert torch.equal(both.added["text_embeds"][row], part.added["text_embeds"][0])
    assert torch.equal(both.slice(slice(2, 5)).embedding, second.repeat(3).embedding)
