"""Noise differences (paper Alg. 1): what the U-Net predicts on the initial noise, minus that noise.

Public: ``PROTOCOL_STEP``, ``NoiseSettings``, ``scored_timestep``, ``noise_difference``,
``normalized``.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch

from utils.stable_diffusion import (
    Conditioning,
    Model,
    starting_latents,
    to_noise_prediction,
    unet_output,
)

# Index into the sampling timesteps. The published neurons were found at the second (961 for v1-4),
# Alg. 1 as written says the first; both look at the initial noise itself.
PROTOCOL_STEP = {"published": 1, "paper": 0}


@dataclass(frozen=True)
class NoiseSettings:
    """How a noise difference is made; a threshold belongs to one of these.

    ``guidance_scale`` 1 means no guidance (paper B.3). ``exchanged_guidance`` exchanges the
    two halves, as the published threshold's script did where guidance was on.
    """

    protocol: str = "published"
    num_inference_steps: int = 50
    guidance_scale: float = 1.0
    exchanged_guidance: bool = False

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> "NoiseSettings":
        """From resolved options, which may hold more than these."""
        return cls(**{field.name: options[field.name] for field in fields(cls)})


def scored_timestep(model: Model, steps: int, protocol: str) -> torch.Tensor:
    """The timestep, of a sampling in so many steps, at which noise differences are taken."""
    model.scheduler.set_timesteps(steps, device=model.device)
    return model.scheduler.timesteps[PROTOCOL_STEP[protocol]]


def normalized(difference: torch.Tensor) -> torch.Tensor:
    """Min-max scaling to [0, 1] per row and channel over H, W; a constant channel becomes 0."""
    low = difference.amin(dim=(-2, -1), keepdim=True)
    span = difference.amax(dim=(-2, -1), keepdim=True) - low
    return torch.where(span == 0, torch.zeros_like(difference), (difference - low) / span)


def noise_difference(
    model: Model,
    conditioning: Conditioning,
    unconditional: Conditioning | None,
    noise: torch.Tensor,
    settings: NoiseSettings,
    *,
    batch_size: int | None = None,
) -> torch.Tensor:
    """delta = eps_theta(x, t, y) - x, scaled: (n, C, H, W) noise and one prompt (B = 1) -> (n, C,
    H, W) in [0, 1], float32. One U-Net pass over all n rows, or over ``batch_size`` rows at a time.

    x is the initial noise in the U-Net's dtype; the difference is taken in float32. Neurons are
    switched off around the call (``value_layers.deactivated``). Values that are not finite stay so.
    """
    timestep = scored_timestep(model, settings.num_inference_steps, settings.protocol)
    inputs = starting_latents(model, noise)
    guided = settings.guidance_scale != 1.0
    parts = []
    for latents in inputs.split(batch_size or len(inputs)):
        rows = len(latents)
        if guided:
            assert unconditional is not None
            both = Conditioning.cat([unconditional.repeat(rows), conditioning.repeat(rows)])
            output = unet_output(model, torch.cat([latents, latents]), timestep, both)
            without, with_text = output.float().chunk(2)
            if settings.exchanged_guidance:
                without, with_text = with_text, without
            output = without + settings.guidance_scale * (with_text - without)
        else:
            output = unet_output(model, latents, timestep, conditioning.repeat(rows))
        noise_prediction = to_noise_prediction(model, output, latents, timestep)
        parts.append(noise_prediction - latents.float())
    return normalized(torch.cat(parts))
