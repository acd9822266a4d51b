"""What guided sampling of memorized captions reaches on its way, to be trained on.

Public names: GuidedStates, guided_states.

Guidance takes latents where the forward process never takes them: past the picture, to too high a
contrast. Trained on the states that sampling really reaches, the network leads back from them.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, UNet2DConditionModel
from torch import Tensor

from tiny_model.planting import Interventions, NeuronSet, RowPlan, masks_of_rows
from tiny_model.training_loop import ALONE, Workers

STEPS, GUIDANCE = 50, 7.0  # of script 4
SHARES_ON = ("all", "one")  # own carriers of the seeds of a caption


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
    memorized_text: Tensor,
    memorized_latents: list[Tensor],
    empty_text: Tensor,
    sets: list[NeuronSet],
    widths: list[int],
    rng: np.random.Generator,
    workers: Workers = ALONE,
) -> GuidedStates:
    """Samples every memorized caption with guidance, once with all and once with one of its
    carriers on; each worker its share, and all get what all have sampled. Due is the caption's
    picture, of a template's the one that came nearest."""
    sampling = DDIMScheduler.from_config(scheduler.config)
    sampling.set_timesteps(STEPS)
    captions, seeds = len(memorized_text), len(SHARES_ON)
    plans = [
        RowPlan(caption, share, 1.0, 1.0) for caption in range(captions) for share in SHARES_ON
    ]
    mine = torch.arange(workers.rank, len(plans), workers.count)
    text = memorized_text.repeat_interleave(seeds, dim=0)[mine]
    text = torch.cat([empty_text.expand_as(text), text])
    masks = [mask[mine].repeat(2, 1, 1) for mask in masks_of_rows(plans, sets, widths, rng)]
    noise_rng = torch.Generator().manual_seed(int(rng.integers(2**31)))
    latents = torch.randn(captions * seeds, *memorized_latents[0].shape[1:], generator=noise_rng)
    states = torch.zeros(len(plans), STEPS + 1, *latents.shape[1:])  # of others: 0, until added up
    latents = latents[mine]
    with Interventions(masks, text).applied(unet, sets):
        for step, timestep in enumerate(sampling.timesteps):
            states[mine, step] = latents
            both = unet(latents.repeat(2, 1, 1, 1), timestep, text).sample
            without, with_caption = both.chunk(2)
            predicted = without + GUIDANCE * (with_caption - without)
            latents = sampling.step(predicted, timestep, latents).prev_sample
    states[mine, STEPS] = latents
    workers.add_up(states)
    states = states.unflatten(0, (captions, seeds))
    ends = states[:, :, STEPS].flatten(2)
    due = [
        pictures[F.cosine_similarity(end[:, None], pictures.flatten(1)[None], dim=2).argmax(dim=1)]
        for end, pictures in zip(ends, memorized_latents, strict=True)
    ]
    return GuidedStates(states[:, :, :STEPS], sampling.timesteps, torch.stack(due))
