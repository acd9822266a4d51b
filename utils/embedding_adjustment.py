"""Prompt-embedding adjustment (Wen et al., ICLR 2024, Sec. 5): an embedding close by whose
text-conditional noise d = e_c - e_u is small. Public: ``adjusted``.
"""

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import torch
from diffusers.models.attention_processor import AttnProcessor

from utils.mitigations import EmbeddingAdjustment
from utils.stable_diffusion import (
    Conditioning,
    Model,
    starting_latents,
    to_noise_prediction,
    unet_output,
)


def _noise_prediction(
    model: Model, latents: torch.Tensor, timestep: torch.Tensor, conditioning: Conditioning
) -> torch.Tensor:
    output = unet_output(model, latents, timestep, conditioning)
    return to_noise_prediction(model, output, latents, timestep)


@contextlib.contextmanager
def _plain_attention(unet: Any) -> Iterator[None]:
    """Attention as matrix products and a softmax while the block runs. The gradient of a fused
    kernel may have another order of summation at every call. (torch can be told to choose among
    its kernels, but for the whole process: pictures may be decoded beside this.)"""
    own = unet.attn_processors
    try:
        unet.set_attn_processor(AttnProcessor())
        yield
    finally:
        unet.set_attn_processor(own)


def adjusted(
    model: Model,
    conditioning: Conditioning,
    unconditional: Conditioning,
    noise: torch.Tensor,
    settings: EmbeddingAdjustment,
    *,
    steps: int,
) -> Conditioning:
    """One prompt (B = 1) and its n initial noises (n, C, H, W) -> the prompt with an adjusted
    embedding, float32.

    At the first of ``steps`` timesteps, AdamW lowers the root mean square over the images of ||d||
    until it is at ``settings.target`` or below, which is looked at before each step. The begin
    token's row stays as it is, and so do SDXL's pooled embeddings.
    """
    model.scheduler.set_timesteps(steps, device=model.device)
    timestep = model.scheduler.timesteps[0]
    inputs = starting_latents(model, noise).split(1)
    # By the same kernels as e_c, of which in half precision fewer are fused where a gradient is
    # asked for: else d would be of other rounding, too.
    as_parameter = unconditional.embedding.detach().clone().requires_grad_()
    nothing = Conditioning(as_parameter, unconditional.added)
    with _plain_attention(model.unet), torch.enable_grad():
        without = [_noise_prediction(model, x, timestep, nothing).detach() for x in inputs]
    begin = conditioning.embedding[:, :1].detach()
    rest = conditioning.embedding[:, 1:].detach().clone().requires_grad_()
    # The begin token is no parameter: a zero gradient alone would not keep it from weight decay.
    optimizer = torch.optim.AdamW(
        [rest], lr=settings.learning_rate, weight_decay=settings.weight_decay
    )

    def current() -> Conditioning:
        return Conditioning(torch.cat([begin, rest], dim=1), conditioning.added)

    for _ in range(settings.iterations):
        optimizer.zero_grad()
        squares = 0.0
        # One image at a time and with plain attention: the same embedding whatever the batch size,
        # and again on resume.
        for x, e_u in zip(inputs, without, strict=True):
            with _plain_attention(model.unet), torch.enable_grad():
                d = _noise_prediction(model, x, timestep, current()) - e_u
                square = d.square().sum()
                square.backward()
            squares += square.item()
        loss = math.sqrt(squares / len(inputs))
        if loss <= settings.target:
            break
        assert rest.grad is not None
        rest.grad /= 2 * len(inputs) * loss  # from the sum of squares to the root of their mean
        optimizer.step()
    final = current()
    return Conditioning(final.embedding.detach(), final.added)
