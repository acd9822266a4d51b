"""Guidance held back against a sampling loop of diffusers' own scheduler, and dynamic transitions
against local minima looked for by hand."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler
from guidance_minima import with_minima

from utils.held_back_guidance import schedule
from utils.mitigations import METHODS, HeldBackGuidance
from utils.stable_diffusion import (
    Conditioning,
    Model,
    Schedule,
    Step,
    encode_prompt,
    encode_unconditional,
    initial_noise,
    sample_latents,
)

STATIC = METHODS["guidance_static"].settings
CAPTIONS = ("fox", "A small house by the sea")


def sampled(model: Model, settings: HeldBackGuidance | None, steps: int = 4) -> torch.Tensor:
    return sample_latents(
        model,
        Conditioning.cat([encode_prompt(model, caption) for caption in CAPTIONS]),
        encode_unconditional(model),
        initial_noise(model, 2, 2),
        steps=steps,
        guidance_scale=7.5,
        schedule=None if settings is None else schedule(model, settings, 7.5),
    )


@torch.no_grad()
def by_hand(model: Model, scale: Callable[[int], float], steps: int = 4) -> torch.Tensor:
    """Row by row: a DDIM loop whose guidance scale is a function of the timestep."""
    pipe = model.pipeline
    results = []
    for row, caption in enumerate(CAPTIONS):
        with_text, without = (
            e.embedding for e in (encode_prompt(model, caption), encode_unconditional(model))
        )
        scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
        scheduler.set_timesteps(steps)
        latents = initial_noise(model, 2, 2)[row : row + 1]
        for timestep in scheduler.timesteps:
            e_c, e_u = (
                pipe.unet(latents, timestep, encoder_hidden_states=text).sample
                for text in (with_text, without)
            )
            output = e_u + scale(int(timestep)) * (e_c - e_u)
            latents = scheduler.step(output, timestep, latents).prev_sample
        results.append(latents)
    return torch.cat(results)


@pytest.mark.parametrize("architecture", ["sd1", "sd2"])
@pytest.mark.parametrize("opposite", [False, True])
def test_static_is_none_or_its_opposite_until_the_timestep_and_plain_from_there(
    small_model: Callable[..., Model], architecture: str, opposite: bool
) -> None:
    model = small_model(architecture)
    assert HeldBackGuidance(until=500) == STATIC
    before = -7.5 if opposite else 0.0
    expected = by_hand(model, lambda t: 7.5 if t <= 500 else before)
    result = sampled(model, HeldBackGuidance(500, opposite))
    torch.testing.assert_close(result, expected, rtol=1e-3, atol=1e-3)
    assert (result - sampled(model, None)).abs().max() > 0.01


def test_the_timestep_named_is_guided(small_model: Callable[..., Model]) -> None:
    model = small_model("sd1")
    scales: list[float] = []
    model.scheduler.set_timesteps(10)
    held = schedule(model, HeldBackGuidance(until=501), 7.5)
    empty = torch.zeros(1, 4, 16, 16)
    for timestep in model.scheduler.timesteps:  # 901, 801, ... 1
        scales.append(float(held(Step(timestep, empty, empty, empty))))
    assert scales == [0.0] * 4 + [7.5] * 6


def test_from_the_first_step_on_it_is_plain_sampling(small_model: Callable[..., Model]) -> None:
    model = small_model("sd1")
    assert torch.equal(sampled(model, HeldBackGuidance(until=1000)), sampled(model, None))


def first_guided(norms: Sequence[float]) -> int:
    """The step after the first one that is lower than both its neighbours; none: past the end."""
    for step in range(1, len(norms) - 1):
        if norms[step - 1] > norms[step] < norms[step + 1]:
            return step + 1
    return len(norms)


NORMS = (
    (9.0, 7.0, 5.0, 6.0, 4.0, 8.0),  # minimum at step 2
    (9.0, 8.0, 7.0, 6.0, 5.0, 4.0),  # none
    (1.0, 2.0, 3.0, 2.5, 2.6, 2.7),  # rises first: the beginning is no minimum
    (3.0, 1.0, 2.0, 0.5, 9.0, 1.0),  # at step 1, and stays on after it
    (3.0, 1.0, 1.0, 2.0, 1.0, 2.0),  # a plateau is none, step 4 is
)


@pytest.mark.parametrize("architecture", ["sd1", "sd2"])
def test_dynamic_begins_after_each_images_first_local_minimum(
    small_model: Callable[..., Model], architecture: str
) -> None:
    """||d|| is of noises: at a step where velocities count more, they are smaller."""
    model = small_model(architecture)
    velocity = architecture == "sd2"
    model.scheduler.set_timesteps(6)
    guide = schedule(model, METHODS["guidance_opposite"].settings, 7.0)  # type: ignore[arg-type]
    direction = torch.randn((len(NORMS), 4, 16, 16), generator=torch.Generator().manual_seed(0))
    direction /= direction.flatten(1).norm(dim=1)[:, None, None, None]
    scales = []
    for step, timestep in enumerate(model.scheduler.timesteps):
        size = torch.tensor([row[step] for row in NORMS])[:, None, None, None]
        if velocity:
            size = size / model.scheduler.alphas_cumprod[timestep] ** 0.5
        without = torch.randn(direction.shape, generator=torch.Generator().manual_seed(step))
        latents = torch.zeros_like(without)
        scale = guide(Step(timestep, latents, torch.zeros_like(without), size * direction))
        assert isinstance(scale, torch.Tensor) and scale.shape == (len(NORMS), 1, 1, 1)
        scales.append(scale.flatten().tolist())
    for row, norms in enumerate(NORMS):
        begins = first_guided(norms)
        if velocity and row == 4:
            continue  # rounding makes no plateau of two quotients
        assert [scale[row] for scale in scales] == [-7.0] * begins + [7.0] * (6 - begins), row


def test_a_batch_of_prompts_has_a_transition_for_each(small_model: Callable[..., Model]) -> None:
    """Rows together equal rows alone, along real sampling, in which they begin at other steps."""
    model = small_model("sd1")
    settings = METHODS["guidance_dynamic"].settings
    assert isinstance(settings, HeldBackGuidance)
    noise = initial_noise(model, 2, 2)
    with with_minima(model, dict(zip(CAPTIONS, (626, 376), strict=True))):
        together = sampled(model, settings, steps=8)
        for row, caption in enumerate(CAPTIONS):
            scales: list[float] = []
            held = schedule(model, settings, 7.5)

            def followed(step: Step, held: Schedule = held, scales: list[float] = scales) -> Any:
                scale = held(step)
                scales.append(float(scale))
                return scale

            alone = sample_latents(
                model,
                encode_prompt(model, caption),
                encode_unconditional(model),
                noise[row : row + 1],
                steps=8,
                guidance_scale=7.5,
                schedule=followed,
            )
            torch.testing.assert_close(together[row : row + 1], alone, rtol=1e-3, atol=1e-3)
            # Timesteps 876, 751, 626, 501, 376, ...: after the smallest one.
            begins = (3, 5)[row]
            assert scales == [0.0] * begins + [7.5] * (8 - begins)
