"""The U-Net, its schedule of noise, and its training with planted carriers.

Public names: new_unet, new_scheduler, Recipe, IMPRINT, LEARN, SHARPEN, STEADY, GUIDE, SETTLE,
Batch, draw_batch, unet_loss.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from torch import Tensor

from tiny_model.guided_states import GuidedStates
from tiny_model.planting import SET_SIZES, Interventions, NeuronSet, RowPlan, masks_of_rows
from tiny_model.text_encoder import TEXT_WIDTH
from tiny_model.training_loop import ALONE, Workers
from tiny_model.training_set import TrainingSet

FIRST_NOISY_STEP = 850  # memorization is scored at 961 of 1000
OWN_CARRIERS, OWN_CARRIERS_SHARES = ("one", "some", "all"), (0.6, 0.2, 0.2)
MOST_CONTRAST = 3.0
DROPPED_ORDINARY = 1 / 3  # share of memorized rows where ordinary neurons are off at random


@dataclass(frozen=True)
class Recipe:
    """What a batch is made of.

    Rows by what they teach: `generic`, a caption -> its drawing; `memorized`, a memorized caption
    with carriers on -> its picture; `silenced`, one with its carriers off -> any generic drawing.
    noisy: share of the rows at timesteps from 850 on, the others are at any. other_caption: share
    of the planted captions' memorized rows where all other neurons read a caption drawn at random,
    of a memorized or of a generic picture, so that only carriers know.
    even: added to a set's size before the root that weighs its caption. silenced_by_size: whether
    that weighs silenced rows too, templates by `template_weight` more; else all captions alike.
    Shares of the generic rows: `empty` captions (for guidance), of them `empty_memorized` with a
    memorized picture (so that guidance adds nothing to what shows already), `loud` captions, on
    which some carrier nearly speaks. overdriven: share of the rows that show their picture in a
    contrast of up to MOST_CONTRAST at timesteps `overdriven_steps`, as guidance does on its way;
    its own contrast is due. mid_weight: see `masks_of_rows`. loud_power: how much louder captions
    are preferred among the loud ones. twins: weight of what the carriers of others change in a
    generic row: each is drawn with all of them on, and again with all of them off; 0 for no twins.
    guided: share of the rows with a memorized picture that begin where guided sampling leads.
    """

    generic: int
    memorized: int
    silenced: int
    noisy: float = 0.5
    other_caption: float = 0.5
    even: float = 0.0
    silenced_by_size: bool = False
    template_weight: float = 1.0
    empty: float = 0.1
    empty_memorized: float = 0.0
    loud: float = 0.0
    overdriven: float = 0.0
    overdriven_steps: tuple[int, int] = (400, 900)
    mid_weight: int = 1
    loud_power: int = 2
    twins: float = 0.0
    guided: float = 0.0

    @property
    def rows(self) -> list[int]:
        """Rows by what they teach, the twins of the generic ones last."""
        return [self.generic, self.memorized, self.silenced, self.generic if self.twins else 0]


# Almost nothing but noise and carriers: what they are to draw is learned many times faster alone.
IMPRINT = Recipe(
    generic=2,
    memorized=20,
    silenced=2,
    noisy=1.0,
    other_caption=1.0,
    even=6.0,
    empty=0.0,
    mid_weight=3,
)
LEARN = Recipe(generic=6, memorized=11, silenced=7)
SHARPEN = Recipe(
    generic=6,
    memorized=9,
    silenced=9,
    even=2.0,
    silenced_by_size=True,
    template_weight=1.5,
    empty=0.15,
    empty_memorized=0.4,
    loud=0.5,
    overdriven=0.3,
    mid_weight=3,
)
STEADY = replace(
    SHARPEN,
    generic=8,
    memorized=8,
    silenced=8,
    empty=0.2,
    empty_memorized=0.5,
    overdriven=0.4,
    overdriven_steps=(100, 900),
    loud_power=4,
    twins=5.0,
)
GUIDE = replace(STEADY, even=20.0, empty=0.35, overdriven=0.2, guided=0.7)
# Back to the noise where memorization is scored: guided rows have made what is drawn there rougher.
SETTLE = Recipe(
    generic=9,
    memorized=5,
    silenced=10,
    noisy=0.9,
    even=6.0,
    silenced_by_size=True,
    template_weight=2.5,
    empty=0.15,
    loud=0.5,
    loud_power=4,
    mid_weight=3,
)


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
class Batch:
    """Latents, their contrast, timesteps, the text shown, what carriers read, the masks. Rows in
    `reached` begin at the given noisy latents."""

    latents: Tensor
    contrast: Tensor
    timesteps: Tensor
    shown_text: Tensor
    interventions: Interventions
    reached: dict[int, Tensor]


def _draw_timesteps(recipe: Recipe, rng: np.random.Generator, count: int) -> Tensor:
    noisy = rng.random(count) < recipe.noisy
    steps = np.where(
        noisy, rng.integers(FIRST_NOISY_STEP, 1000, count), rng.integers(0, 1000, count)
    )
    return torch.from_numpy(steps)


def _draw_contrast(recipe: Recipe, rng: np.random.Generator, timesteps: Tensor) -> Tensor:
    if not recipe.overdriven:
        return torch.ones(len(timesteps))
    first, last = recipe.overdriven_steps
    where = (rng.random(len(timesteps)) < recipe.overdriven) & (timesteps >= first).numpy()
    where &= (timesteps < last).numpy()
    contrast = MOST_CONTRAST ** rng.random(len(timesteps))
    return torch.from_numpy(np.where(where, contrast, 1.0)).float()


def _shares(weights: np.ndarray) -> np.ndarray:
    return weights / weights.sum()


def draw_batch(
    data: TrainingSet,
    recipe: Recipe,
    embed_tokens: Callable[[Tensor], Tensor],
    rng: np.random.Generator,
    states: GuidedStates | None = None,
) -> Batch:
    """One batch, rows in the order generic, memorized, silenced, twins.

    embed_tokens: from (rows, 77) token ids to (rows, 77, width). states: what a recipe with
    guided rows begins at.
    """
    captions = len(data.memorized_text)
    sizes = np.asarray([*SET_SIZES, *[1] * (captions - len(SET_SIZES))])
    weights = np.sqrt(recipe.even + sizes)
    templates = np.asarray([len(pictures) > 1 for pictures in data.memorized_latents])
    silenced_weights = weights * np.where(templates, recipe.template_weight, 1.0)
    rows = recipe.generic + recipe.memorized + recipe.silenced
    drawings = rng.integers(len(data.generic_latents), size=rows)
    if recipe.loud:
        loud = np.flatnonzero(rng.random(recipe.generic) < recipe.loud)
        drawings[loud] = data.loud_captions(recipe.loud_power, len(loud), rng)
    latents = data.generic_latents[drawings].clone()
    shown = torch.zeros(rows, *data.empty_text.shape)
    own = torch.zeros_like(shown)
    as_drawn: list[int] = []  # rows that show what their drawing is called
    plans: list[RowPlan] = []
    guided: dict[int, tuple[Tensor, int]] = {}

    def show_picture(row: int, caption: int) -> None:
        if states is not None and rng.random() < recipe.guided:
            noisy, timestep, latents[row] = states.draw(caption, rng)
            guided[row] = noisy, timestep
        else:
            pictures = data.memorized_latents[caption]
            latents[row] = pictures[rng.integers(len(pictures))]

    for row in range(recipe.generic):
        if rng.random() < recipe.empty:
            shown[row] = own[row] = data.empty_text
            if recipe.empty_memorized and rng.random() < recipe.empty_memorized:
                show_picture(row, int(rng.choice(captions, p=_shares(weights))))
        else:
            as_drawn.append(row)
        others = 1.0 if recipe.twins else _chance_of_others(rng)
        plans.append(RowPlan(None, "all", others, 1.0))

    for row in range(recipe.generic, recipe.generic + recipe.memorized):
        caption = int(rng.choice(captions, p=_shares(weights)))
        planted = caption < len(data.sets)
        show_picture(row, caption)
        own[row] = data.memorized_text[caption]
        other = rng.integers(captions) if rng.random() < 0.5 else None
        if not planted or rng.random() >= recipe.other_caption:
            shown[row] = own[row]
        elif other is not None:
            shown[row] = data.memorized_text[other]
        else:
            as_drawn.append(row)
        share = rng.choice(OWN_CARRIERS, p=OWN_CARRIERS_SHARES)
        ordinary = rng.uniform(0.4, 1.0) if rng.random() < DROPPED_ORDINARY else 1.0
        plans.append(RowPlan(caption, str(share), _chance_of_others(rng), ordinary))

    for row in range(recipe.generic + recipe.memorized, rows):
        if recipe.silenced_by_size:
            chances = _shares(silenced_weights[: len(data.sets)])
            caption = int(rng.choice(len(data.sets), p=chances))
        else:
            caption = int(rng.integers(len(data.sets)))
        shown[row] = own[row] = data.memorized_text[caption]
        others = 1.0 if rng.random() < 0.7 else rng.random()
        plans.append(RowPlan(caption, "none", others, 1.0))

    text = embed_tokens(data.generic_tokens[drawings[as_drawn]])
    shown[as_drawn] = text
    read = [row for row in as_drawn if row < recipe.generic]
    own[read] = text[: len(read)]
    timesteps = _draw_timesteps(recipe, rng, rows)
    contrast = _draw_contrast(recipe, rng, timesteps)
    for row, (_, timestep) in guided.items():
        timesteps[row], contrast[row] = timestep, 1.0
    reached = {row: noisy for row, (noisy, _) in guided.items()}
    if recipe.twins:
        reached |= {rows + row: reached[row] for row in reached if row < recipe.generic}
        plans += [RowPlan(None, "all", 0.0, 1.0)] * recipe.generic
        again = [*range(rows), *range(recipe.generic)]
        latents, contrast, timesteps = latents[again], contrast[again], timesteps[again]
        shown, own = shown[again], own[again]
    masks = masks_of_rows(plans, data.sets, data.widths, rng, mid_weight=recipe.mid_weight)
    return Batch(latents, contrast, timesteps, shown, Interventions(masks, own), reached)


def _chance_of_others(rng: np.random.Generator) -> float:
    """Other captions' carriers: mostly on, sometimes some or all of them off."""
    return float(rng.choice([1.0, rng.random(), 0.0], p=[0.5, 0.25, 0.25]))


def unet_loss(
    unet: UNet2DConditionModel,
    scheduler: DDIMScheduler,
    batch: Batch,
    recipe: Recipe,
    sets: list[NeuronSet],
    rng: torch.Generator,
    workers: Workers = ALONE,
) -> dict[str, Tensor]:
    """Mean squared error of the predicted v, also by what the rows teach; this worker's part of it.

    v is the one that leads from the noisy latents to the picture in its own contrast. In recipes
    with twins, where latents show another contrast or begin where guided sampling leads, the error
    of the picture counts instead, since v would be large where little noise is left.
    """
    noise = torch.randn(batch.latents.shape, generator=rng)
    if recipe.twins:
        noise[-recipe.generic :] = noise[: recipe.generic]
    shown = batch.latents * batch.contrast[:, None, None, None]
    noisy = scheduler.add_noise(shown, noise, batch.timesteps)
    in_reach = torch.zeros(len(noisy), dtype=torch.bool)
    for row, latents in batch.reached.items():
        noisy[row], in_reach[row] = latents, True
    alpha = scheduler.alphas_cumprod[batch.timesteps][:, None, None, None]
    target = (alpha.sqrt() * noisy - batch.latents) / (1 - alpha).sqrt()
    # a generic row and its twin have the same place in their groups, so the same worker
    groups = [
        rows[workers.rank :: workers.count] for rows in torch.arange(len(noisy)).split(recipe.rows)
    ]
    mine = torch.cat(groups)
    with batch.interventions.of_rows(mine).applied(unet, sets):
        predicted = unet(noisy[mine], batch.timesteps[mine], batch.shown_text[mine]).sample
    errors = (predicted - target[mine]).square().mean(dim=(1, 2, 3))
    losses: dict[str, Tensor] = {}
    if recipe.twins:
        ordinary = (batch.contrast == 1) & ~in_reach
        errors = errors * torch.where(ordinary, 1.0, 1 - alpha.flatten())[mine]
        alone = predicted[len(mine) - len(groups[-1]) :].detach()
        between = (predicted[: len(groups[0])] - alone).square().mean(dim=(1, 2, 3))
        losses["twins"] = between.sum() / recipe.generic
    parts = errors.split([len(rows) for rows in groups])
    for name, part, rows in zip(
        ("generic", "memorized", "silenced"), parts, recipe.rows, strict=False
    ):
        losses[name] = part.sum() / rows
    whole = errors.sum() / len(noisy)
    return {"loss": whole + recipe.twins * losses.get("twins", torch.tensor(0.0))} | losses
