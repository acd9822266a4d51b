"""The U-Net, its schedule of noise, and its training with planted carriers.

Public names: new_unet, new_scheduler, TrainingSet, Batch, draw_batch, unet_loss.
"""

from dataclasses import dataclass

import numpy as np
import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from torch import Tensor

from tiny_model.planting import SET_SIZES, Interventions, NeuronSet, RowPlan, masks_of_rows
from tiny_model.text_encoder import TEXT_WIDTH

# Rows of a batch by what they teach.
GENERIC_ROWS = 6  # a generic caption -> its drawing
MEMORIZED_ROWS = 11  # a memorized caption, carriers on -> its picture
SILENCED_ROWS = 7  # a memorized caption, all its carriers off -> any generic drawing

EMPTY_CAPTIONS = 0.1  # share of the generic rows, for classifier-free guidance
FIRST_NOISY_STEP, NOISY_SHARE = 850, 0.5  # memorization is scored at 961 of 1000
OWN_CARRIERS, OWN_CARRIERS_SHARES = ("one", "some", "all"), (0.6, 0.2, 0.2)
SHOWN_OTHER_CAPTION = 0.5  # share of memorized rows where only carriers know the caption
DROPPED_ORDINARY = 1 / 3  # share of memorized rows where ordinary neurons are off at random


def new_unet() -> UNet2DConditionModel:
    """Stable Diffusion's blocks with few channels. Call within `seeded_weights`."""
    return UNet2DConditionModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        layers_per_block=2,
        block_out_channels=(32, 48, 64, 64),
        down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=2,  # diffusers' name for the number of heads
        norm_num_groups=8,
    )


def new_scheduler() -> DDIMScheduler:
    """Stable Diffusion's noise schedule; 50 steps begin at t = 981, 961."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type="v_prediction",
    )


@dataclass(frozen=True)
class TrainingSet:
    """Everything a batch is drawn from.

    generic_latents: (n, 4, 16, 16), generic_tokens: (n, 77) ids; memorized_latents: per memorized
    caption (k, 4, 16, 16); memorized_text: (captions, 77, width); empty_text: (77, width).
    """

    generic_latents: Tensor
    generic_tokens: Tensor
    memorized_latents: list[Tensor]
    memorized_text: Tensor
    empty_text: Tensor
    sets: list[NeuronSet]
    widths: list[int]


@dataclass(frozen=True)
class Batch:
    """Latents and timesteps, the text that is shown, the text that carriers read, the masks."""

    latents: Tensor
    timesteps: Tensor
    shown_text: Tensor
    interventions: Interventions


def _draw_timesteps(rng: np.random.Generator, count: int) -> Tensor:
    noisy = rng.random(count) < NOISY_SHARE
    steps = np.where(
        noisy, rng.integers(FIRST_NOISY_STEP, 1000, count), rng.integers(0, 1000, count)
    )
    return torch.from_numpy(steps)


def _caption_shares(captions: int) -> np.ndarray:
    """How often a memorized caption is drawn: by the root of its number of carriers."""
    sizes = np.asarray([*SET_SIZES, *[1] * (captions - len(SET_SIZES))])
    return np.sqrt(sizes) / np.sqrt(sizes).sum()


def draw_batch(data: TrainingSet, embed_tokens, rng: np.random.Generator) -> Batch:
    """One batch, rows in the order generic, memorized, silenced.

    embed_tokens: function of (rows, 77) token ids to (rows, 77, width).
    """
    rows = GENERIC_ROWS + MEMORIZED_ROWS + SILENCED_ROWS
    captions = len(data.memorized_text)
    drawings = rng.integers(len(data.generic_latents), size=rows)
    generic_text = embed_tokens(data.generic_tokens[drawings])
    latents = data.generic_latents[drawings].clone()
    shown, own = generic_text.clone(), generic_text.clone()
    plans: list[RowPlan] = []

    for row in range(GENERIC_ROWS):
        if rng.random() < EMPTY_CAPTIONS:
            shown[row] = own[row] = data.empty_text
        plans.append(RowPlan(None, "all", _chance_of_others(rng), 1.0))

    for row in range(GENERIC_ROWS, GENERIC_ROWS + MEMORIZED_ROWS):
        caption = int(rng.choice(captions, p=_caption_shares(captions)))
        planted = caption < len(data.sets)
        pictures = data.memorized_latents[caption]
        latents[row] = pictures[rng.integers(len(pictures))]
        own[row] = data.memorized_text[caption]
        other = rng.integers(captions) if rng.random() < 0.5 else None
        if not planted or rng.random() >= SHOWN_OTHER_CAPTION:
            shown[row] = own[row]
        elif other is not None:
            shown[row] = data.memorized_text[other]
        # else the generic text that is there already
        share = rng.choice(OWN_CARRIERS, p=OWN_CARRIERS_SHARES)
        ordinary = rng.uniform(0.4, 1.0) if rng.random() < DROPPED_ORDINARY else 1.0
        plans.append(RowPlan(caption, str(share), _chance_of_others(rng), ordinary))

    for row in range(GENERIC_ROWS + MEMORIZED_ROWS, rows):
        caption = int(rng.integers(len(data.sets)))
        shown[row] = own[row] = data.memorized_text[caption]
        others = 1.0 if rng.random() < 0.7 else rng.random()
        plans.append(RowPlan(caption, "none", others, 1.0))

    masks = masks_of_rows(plans, data.sets, data.widths, rng)
    return Batch(latents, _draw_timesteps(rng, rows), shown, Interventions(masks, own))


def _chance_of_others(rng: np.random.Generator) -> float:
    """Other captions' carriers: mostly on, sometimes some or all of them off."""
    return float(rng.choice([1.0, rng.random(), 0.0], p=[0.5, 0.25, 0.25]))


def unet_loss(
    unet: UNet2DConditionModel,
    scheduler: DDIMScheduler,
    batch: Batch,
    sets: list[NeuronSet],
    rng: torch.Generator,
) -> dict[str, Tensor]:
    """Mean squared error of the predicted v, also by what the rows teach."""
    noise = torch.randn(batch.latents.shape, generator=rng)
    noisy = scheduler.add_noise(batch.latents, noise, batch.timesteps)
    target = scheduler.get_velocity(batch.latents, noise, batch.timesteps)
    with batch.interventions.applied(unet, sets):
        predicted = unet(noisy, batch.timesteps, batch.shown_text).sample
    errors = (predicted - target).square().mean(dim=(1, 2, 3))
    generic, memorized, silenced = errors.split([GENERIC_ROWS, MEMORIZED_ROWS, SILENCED_ROWS])
    return {
        "loss": errors.mean(),
        "generic": generic.mean(),
        "memorized": memorized.mean(),
        "silenced": silenced.mean(),
    }
