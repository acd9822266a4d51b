"""What guided sampling of memorized captions reaches on its way, to be trained on.

Public names: sampled, GuidedStates, guided_states.

Guidance takes latents where the forward process never takes them: past the picture, to too high a
contrast. Trained on the states that sampling really reaches, the network leads back from them.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, UNet2DConditionModel
from torch import Tensor

from tiny_model.planting import Interventions, RowPlan, masks_of_rows
from tiny_model.training_loop import ALONE, Workers
from tiny_model.training_set import TrainingSet

STEPS, GUIDANCE = 50, 7.0  # of script 4
SHARES_ON = ("all", "one")  # own carriers of the seeds of a caption


def sampled(
    unet: UNet2DConditionModel,
    sampling: DDIMScheduler,
    latents: Tensor,
    text: Tensor,
    empty_text: Tensor,
    guidance: float,
) -> Iterator[Tensor]:
    """Latents (n, 4, 16, 16) as they come in, then after each step of `sampling`, which has its
    timesteps set. text: (n, 77, width); empty_text: (77, width)."""
    both_texts = torch.cat([empty_text.expand_as(text), text])
    yield latents
    for timestep in sampling.timesteps:
        both = unet(latents.repeat(2, 1, 1, 1), timestep, both_texts).sample
        without, with_caption = both.chunk(2)
        predicted = without + guidance * (with_caption - without)
        latents = sampling.step(predicted, timestep, latents).prev_sample
        yield latents


@dataclass(frozen=True)
class GuidedStates:
    """latents (captions, seeds, steps, 4, 16, 16) at `timesteps` (steps,), and the memorized
    latents (captions, seeds, 4, 16, 16) that are due."""

    latents: Tensor
    timesteps: Tensor
    due: Tensor

    def draw(self, caption: int, rng: np.random.Generator) -> tuple[Tensor, int, Tensor]:
        """One state of a caption: noisy latents, timestep, the latents that are due."""
        seed = int(rng.integers(self.latents.shape[1]))
        step = int(rng.integers(self.latents.shape[2]))
        return self.latents[caption, seed, step], int(self.timesteps[step]), self.due[caption, seed]


@torch.no_grad()
def guided_states(
    unet: UNet2DConditionModel,
    scheduler: DDIMScheduler,
    data: TrainingSet,
    rng: np.random.Generator,
    workers: Workers = ALONE,
) -> GuidedStates:
    """Samples every memorized caption with guidance, once with all and once with one of its
    carriers on; each worker its share, and all get what all have sampled. Due is the caption's
    picture, of a template's the one that came nearest."""
    sampling = DDIMScheduler.from_config(scheduler.config)
    sampling.set_timesteps(STEPS)
    captions, seeds = len(data.memorized_text), len(SHARES_ON)
    plans = [
        RowPlan(caption, share, 1.0, 1.0) for caption in range(captions) for share in SHARES_ON
    ]
    mine = torch.arange(workers.rank, len(plans), workers.count)
    text = data.memorized_text.repeat_interleave(seeds, dim=0)[mine]
    own_text = torch.cat([data.empty_text.expand_as(text), text])
    masks = masks_of_rows(plans, data.sets, data.widths, rng)
    interventions = Interventions([mask[mine].repeat(2, 1, 1) for mask in masks], own_text)
    noise_rng = torch.Generator().manual_seed(int(rng.integers(2**31)))
    shape = data.memorized_latents[0].shape[1:]
    noise = torch.randn(len(plans), *shape, generator=noise_rng)
    states = torch.zeros(len(plans), STEPS + 1, *shape)  # of others: 0, until added up
    with interventions.applied(unet, data.sets):
        passed = sampled(unet, sampling, noise[mine], text, data.empty_text, GUIDANCE)
        for step, latents in enumerate(passed):
            states[mine, step] = latents
    workers.add_up(states)
    states = states.unflatten(0, (captions, seeds))
    ends = states[:, :, STEPS].flatten(2)
    due = [
        pictures[F.cosine_similarity(end[:, None], pictures.flatten(1)[None], dim=2).argmax(dim=1)]
        for end, pictures in zip(ends, data.memorized_latents, strict=True)
    ]
    return GuidedStates(states[:, :, :STEPS], sampling.timesteps, torch.stack(due))
