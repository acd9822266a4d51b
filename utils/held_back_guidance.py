"""Guidance held back (Jain et al., CVPR 2025): none, or away from the prompt, while it would lead
into a training image's attraction basin. Public: ``schedule``.
"""

import torch

from utils.mitigations import HeldBackGuidance
from utils.stable_diffusion import Model, Schedule, Step
from utils.text_conditional_noise import noise_norms


def schedule(model: Model, settings: HeldBackGuidance, guidance_scale: float) -> Schedule:
    """The guidance scale of each step of one batch: ``guidance_scale`` from the transition on, 0
    (or its negative) before.

    Static: the first timestep that is ``settings.until`` or less has guidance. Dynamic, for each
    image by itself: the first step at which ||d|| is larger than at the step before, where it was
    smaller than before that; an image without one is never guided.
    """
    before = -guidance_scale if settings.opposite else 0.0
    if settings.until is not None:
        until = settings.until
        return lambda step: guidance_scale if step.timestep <= until else before

    norms: list[torch.Tensor] = []  # of the last two steps
    begun: torch.Tensor | None = None  # (B,) bool

    def dynamic(step: Step) -> torch.Tensor:
        nonlocal begun
        norm = noise_norms(model, step.with_text, step.without, step.latents, step.timestep)
        if begun is None:
            begun = torch.zeros_like(norm, dtype=torch.bool)
        if len(norms) == 2:
            begun = begun | ((norms[1] < norms[0]) & (norm > norms[1]))
        norms[:] = [*norms[-1:], norm]
        scales = torch.where(begun, guidance_scale, before)
        return scales[:, None, None, None].to(step.without.dtype)

    return dynamic
