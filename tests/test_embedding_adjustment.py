"""Prompt-embedding adjustment against AdamW written out, on U-Net calls made by hand."""

import math
from collections.abc import Callable

import pytest
import torch
from diffusers import DDIMScheduler

from utils.embedding_adjustment import adjusted
from utils.mitigations import EmbeddingAdjustment
from utils.stable_diffusion import (
    Conditioning,
    Model,
    encode_prompt,
    encode_unconditional,
    initial_noise,
)

CAPTION = "Sleepy fox beneath a maple"
STEPS = 50


def losses_and_embeddings(
    model: Model, noise: torch.Tensor, iterations: int
) -> tuple[list[float], list[torch.Tensor]]:
    """The root mean square of ||d|| before each step, and the embedding there; one batch of all
    images, AdamW (Loshchilov and Hutter) in float64, begin token left alone."""
    pipe = model.pipeline
    scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    scheduler.set_timesteps(STEPS)
    timestep = scheduler.timesteps[0]
    alpha_bar = float(scheduler.alphas_cumprod[timestep])
    velocity = scheduler.config.prediction_type == "v_prediction"
    factor = math.sqrt(alpha_bar) if velocity else 1.0  # d of noises from d of velocities
    n = len(noise)
    embedding, without = (encode(model) for encode in (with_text, encode_unconditional))
    current = embedding.embedding.clone()

    def unet(text: torch.Tensor, added: dict[str, torch.Tensor]) -> torch.Tensor:
        extra = {name: value.expand(n, -1) for name, value in added.items()}
        return pipe.unet(
            noise,
            timestep,
            encoder_hidden_states=text.expand(n, -1, -1),
            added_cond_kwargs=extra or None,
        ).sample

    with torch.no_grad():
        e_u = unet(without.embedding, without.added)
    first = second = torch.zeros_like(current, dtype=torch.float64)
    losses, embeddings = [], []
    for step in range(1, iterations + 1):
        leaf = current.clone().requires_grad_()
        d = factor * (unet(leaf, embedding.added) - e_u)
        loss = d.flatten(1).norm(dim=1).square().mean().sqrt()
        (gradient,) = torch.autograd.grad(loss, leaf)
        losses.append(loss.item())
        embeddings.append(current)
        gradient = gradient.double()
        first = 0.9 * first + 0.1 * gradient
        second = 0.999 * second + 0.001 * gradient**2
        update = (first / (1 - 0.9**step)) / ((second / (1 - 0.999**step)).sqrt() + 1e-8)
        changed = current.double() * (1 - 0.05 * 0.01) - 0.05 * update
        changed[:, 0] = current[:, 0].double()
        current = changed.float()
    return losses, embeddings


def with_text(model: Model) -> Conditioning:
    return encode_prompt(model, CAPTION)


def adjust(model: Model, noise: torch.Tensor, **settings: float) -> Conditioning:
    return adjusted(
        model,
        with_text(model),
        encode_unconditional(model),
        noise,
        EmbeddingAdjustment(**settings),  # type: ignore[arg-type]
        steps=STEPS,
    )


@pytest.mark.parametrize("architecture", ["sd1", "sd2", "xl"])
def test_it_is_adamw_on_the_mean_square_and_stops_at_the_target(
    small_model: Callable[..., Model], architecture: str
) -> None:
    model = small_model(architecture)
    noise = initial_noise(model, 2, 2)
    losses, embeddings = losses_and_embeddings(model, noise, 4)
    assert losses[0] > losses[1] > losses[2] > losses[3], losses
    target = (losses[2] + losses[1]) / 2  # reached after two steps
    result = adjust(model, noise, target=target)
    torch.testing.assert_close(result.embedding, embeddings[2], rtol=0, atol=2e-3)
    assert (result.embedding - embeddings[2]).abs().mean() < 1e-5
    before = with_text(model)
    assert torch.equal(result.embedding[:, 0], before.embedding[:, 0]), "the begin token"
    assert (result.embedding[:, 1:] != before.embedding[:, 1:]).all()
    assert all(torch.equal(result.added[name], before.added[name]) for name in before.added)
    assert not result.embedding.requires_grad
    assert all(p.grad is None for p in model.unet.parameters())


def test_at_the_target_nothing_is_changed_and_iterations_are_at_most(
    small_model: Callable[..., Model],
) -> None:
    model = small_model("sd1")
    noise = initial_noise(model, 1, 2)
    losses, embeddings = losses_and_embeddings(model, noise, 2)
    unchanged = adjust(model, noise, target=losses[0] * 1.001)
    assert torch.equal(unchanged.embedding, with_text(model).embedding)
    once = adjust(model, noise, target=0.0, iterations=1)
    torch.testing.assert_close(once.embedding, embeddings[1], rtol=0, atol=1e-4)


def test_the_number_of_images_does_not_matter(small_model: Callable[..., Model]) -> None:
    """The same image n times: the same steps, the same end."""
    model = small_model("sd1")
    noise = initial_noise(model, 1, 2)
    losses, _ = losses_and_embeddings(model, noise, 2)
    target = (losses[0] + losses[1]) / 2
    one, four, ten = (
        adjust(model, noise.repeat(n, 1, 1, 1), target=target).embedding for n in (1, 4, 10)
    )
    for other in (four, ten):
        torch.testing.assert_close(other, one, rtol=0, atol=2e-3)
        assert (other - one).abs().mean() < 1e-5


def test_it_is_the_same_to_the_bit_when_done_again(small_model: Callable[..., Model]) -> None:
    model = small_model("sd1")
    noise = initial_noise(model, 2, 2)
    before = dict(model.unet.attn_processors)
    first, second = (adjust(model, noise, iterations=2, target=0.0).embedding for _ in range(2))
    assert torch.equal(first, second)
    assert dict(model.unet.attn_processors) == before


def test_half_precision_lowers_the_loss_too(small_model: Callable[..., Model]) -> None:
    model = small_model("sd1", "bfloat16")
    noise = initial_noise(model, 1, 2)
    result = adjust(model, noise, iterations=3, target=0.0)
    assert result.embedding.dtype == torch.float32 and torch.isfinite(result.embedding).all()
    full = small_model("sd1")
    timestep = torch.tensor(981)

    def norm(embedding: torch.Tensor) -> float:
        with torch.no_grad():
            outputs = [
                full.unet(noise, timestep, encoder_hidden_states=text).sample
                for text in (embedding, encode_unconditional(full).embedding)
            ]
        return float((outputs[0] - outputs[1]).norm())

    assert norm(result.embedding) < norm(with_text(full).embedding)
