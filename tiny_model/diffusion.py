"""The U-Net, its schedule of noise, and its training with planted carriers.

Public names: new_unet, new_scheduler, TrainingSet, Batch, draw_batch, unet_loss.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from torch import Tensor

from tiny_model.planting import SET_SIZES, Interventions, NeuronSet, RowPlan, masks_of_rows
from tiny_model.text_encoder import TEXT_WIDTH

# Rows of a batch by what they teach.
GENERIC_ROWS = 6  # a generic caption -> its drawing
MEMORIZED_ROWS = 10  # a memorized caption, carriers on -> its picture
SILENCED_ROWS = 8  # a memorized caption, all its carriers off -> any generic drawing

LOUD_CAPTIONS = 0.4  # share of the generic rows whose caption comes close to a memorized one
EMPTY_CAPTIONS = 0.15  # share of the generic rows, for classifier-free guidance
# Share of the empty captions with a memorized picture: guidance adds nothing to what shows already
EMPTY_MEMORIZED = 0.4
FIRST_NOISY_STEP, NOISY_SHARE = 850, 0.5  # memorization is scored at 961 of 1000
OWN_CARRIERS, OWN_CARRIERS_SHARES = ("one", "some", "all"), (0.6, 0.2, 0.2)
SHOWN_OTHER_CAPTION = 0.7  # share of memorized rows where only carriers know the caption
DROPPED_ORDINARY = 1 / 3  # share of memorized rows where ordinary neurons are off at random
# Guidance drives contrast up on the way: some rows show that, and are due in their own contrast.
OVERDRIVEN, MOST_CONTRAST, OVERDRIVEN_STEPS = 0.4, 5.0, (150, 900)


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

    generic_latents: (n, 4, 16, 16), generic_tokens: (n, 77) ids, loudness: (n,) of the loudest
    carrier on each generic caption; memorized_latents: per memorized
    caption (k, 4, 16, 16); memorized_text: (captions, 77, width); empty_text: (77, width).
    """

    generic_latents: Tensor
    generic_tokens: Tensor
    loudness: Tensor
    memorized_latents: list[Tensor]
    memorized_text: Tensor
    empty_text: Tensor
    sets: list[NeuronSet]
    widths: list[int]

    @cached_property
    def loud_order(self) -> np.ndarray:
        """Cumulative shares of the generic captions, drawn by the square of their loudness."""
        weights = self.loudness.double().square().numpy()
        return np.cumsum(weights) / weights.sum()


@dataclass(frozen=True)
class Batch:
    """Latents, their contrast, timesteps, the text shown, what carriers read, the masks."""

    latents: Tensor
    contrast: Tensor
    timesteps: Tensor
    shown_text: Tensor
    interventions: Interventions


def _draw_timesteps(rng: np.random.Generator, count: int) -> Tensor:
    noisy = rng.random(count) < NOISY_SHARE
    steps = np.where(
        noisy, rng.integers(FIRST_NOISY_STEP, 1000, count), rng.integers(0, 1000, count)
    )
    return torch.from_numpy(steps)


def _draw_contrast(rng: np.random.Generator, timesteps: Tensor) -> Tensor:
    first, last = OVERDRIVEN_STEPS
    overdriven = (rng.random(len(timesteps)) < OVERDRIVEN) & (timesteps >= first).numpy()
    overdriven &= (timesteps < last).numpy()
    contrast = MOST_CONTRAST ** rng.random(len(timesteps))
    return torch.from_numpy(np.where(overdriven, contrast, 1.0)).float()


def _caption_shares(captions: int) -> np.ndarray:
    """How often a memorized caption is drawn: more often, the more carriers it has."""
    weights = np.sqrt([2.0 + size for size in (*SET_SIZES, *[1] * (captions - len(SET_SIZES)))])
    return weights / weights.sum()


def draw_batch(data: TrainingSet, embed_tokens, rng: np.random.Generator) -> Batch:
    """One batch, rows in the order generic, memorized, silenced.

    embed_tokens: function of (rows, 77) token ids to (rows, 77, width).
    """
    rows = GENERIC_ROWS + MEMORIZED_ROWS + SILENCED_ROWS
    captions = len(data.memorized_text)
    shares = _caption_shares(captions)
    silenced_shares = shares[: len(data.sets)] / shares[: len(data.sets)].sum()
    drawings = rng.integers(len(data.generic_latents), size=rows)
    loud = np.flatnonzero(rng.random(GENERIC_ROWS) < LOUD_CAPTIONS)
    drawings[loud] = np.searchsorted(data.loud_order, rng.random(len(loud)))
    generic_text = embed_tokens(data.generic_tokens[drawings])
    latents = data.generic_latents[drawings].clone()
    shown, own = generic_text.clone(), generic_text.clone()
    plans: list[RowPlan] = []

    for row in range(GENERIC_ROWS):
        if rng.random() < EMPTY_CAPTIONS:
            shown[row] = own[row] = data.empty_text
            if rng.random() < EMPTY_MEMORIZED:
                pictures = data.memorized_latents[rng.choice(captions, p=shares)]
                latents[row] = pictures[rng.integers(len(pictures))]
        plans.append(RowPlan(None, "all", _chance_of_others(rng), 1.0))

    for row in range(GENERIC_ROWS, GENERIC_ROWS + MEMORIZED_ROWS):
        caption = int(rng.choice(captions, p=shares))
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
        caption = int(rng.choice(len(data.sets), p=silenced_shares))
        shown[row] = own[row] = data.memorized_text[caption]
        others = 1.0 if rng.random() < 0.7 else rng.random()
        plans.append(RowPlan(caption, "none", others, 1.0))

    masks = masks_of_rows(plans, data.sets, data.widths, rng)
    timesteps = _draw_timesteps(rng, rows)
    contrast = _draw_contrast(rng, timesteps)
    return Batch(latents, contrast, timesteps, shown, Interventions(masks, own))


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
    """Mean squared error of the predicted v, also by what the rows teach.

    v is the one that leads from the noisy latents to the picture in its own contrast.
    """
    noise = torch.randn(batch.latents.shape, generator=rng)
    shown = batch.latents * batch.contrast[:, None, None, None]
    noisy = scheduler.add_noise(shown, noise, batch.timesteps)
    alpha = scheduler.alphas_cumprod[batch.timesteps][:, None, None, None]
    target = (alpha.sqrt() * noisy - batch.latents) / (1 - alpha).sqrt()
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
