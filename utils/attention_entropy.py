"""Detection by the entropy of cross-attention (Ren et al., ECCV 2024).

A prompt that brings back a training image keeps its attention spread over many tokens, the padding
above all, where an ordinary prompt gathers it on a few.
Public: ``entropy``, ``check_layers``, ``attention_entropy``.
"""

import torch

from utils.attention_maps import cross_attentions, reading_attention
from utils.errors import InputError
from utils.prompt_tokens import prompt_ids
from utils.stable_diffusion import Conditioning, Model, Step, sample_latents

SMALLEST = 1e-12  # inside the logarithm: a probability of zero adds nothing, instead of NaN
SCORED_LAYER = 3  # score E: the fourth cross-attention in forward order
LAST_SHARE = 5  # score D: the last 10 of 50 steps, and as large a part of any other number


def entropy(shares: torch.Tensor) -> torch.Tensor:
    """- sum of a log a over the last dimension, float64, in nats."""
    shares = shares.double()
    return -(shares * (shares + SMALLEST).log()).sum(dim=-1)


def check_layers(model: Model) -> None:
    """InputError for a model with fewer than four cross-attentions."""
    layers = len(cross_attentions(model.unet))
    if layers <= SCORED_LAYER:
        raise InputError(
            f"{model.source.id}: {layers} cross-attention layers, and score E looks at the fourth; "
            "choose another --detector"
        )


def attention_entropy(
    model: Model,
    caption: str,
    conditioning: Conditioning,
    unconditional: Conditioning,
    noise: torch.Tensor,
    *,
    steps: int,
    guidance_scale: float,
) -> torch.Tensor:
    """Scores D and E of one prompt for n initial noises (n, C, H, W): (2, n) float64, higher is
    memorized.

    a(t) over tokens is the attention of the conditional rows at step t, averaged over pixels, heads
    and layers; E(t) its entropy, E_S(t) the part of positions from the end-of-text token on. D is
    the mean of E over the last fifth of the steps, plus the mean of E_S over them, minus E_S of the
    first step. E is the entropy of the fourth layer alone at the first step. Images do not mix:
    each noise has its own scores. The model must pass ``check_layers``.
    """
    end_of_text = len(prompt_ids(model, caption)) - 1
    everywhere: list[torch.Tensor] = []  # E(t), (n,) each
    at_end: list[torch.Tensor] = []  # E_S(t)
    fourth: list[torch.Tensor] = []
    with reading_attention(model.unet) as read:

        def observe(step: Step) -> None:
            if not fourth:
                fourth.append(entropy(read[SCORED_LAYER]))
            mean = torch.stack(read).double().mean(dim=0)  # (n, tokens)
            read.clear()
            everywhere.append(entropy(mean))
            at_end.append(entropy(mean[:, end_of_text:]))

        sample_latents(
            model,
            conditioning.repeat(len(noise)),
            unconditional,
            noise,
            steps=steps,
            guidance_scale=guidance_scale,
            observe=observe,
        )
    last = max(1, steps // LAST_SHARE)
    late, late_at_end = (torch.stack(values[-last:]).mean(dim=0) for values in (everywhere, at_end))
    return torch.stack([late + late_at_end - at_end[0], fourth[0]]).cpu()
