"""Which neurons carry which memorized caption, and how they are given their head start.

Public names: NeuronSet, LOUDNESS, SET_SIZES, SHARED, plan_sets, carriers_of, value_layers,
GenericText, matched_filter, plant, loudest_answers, RowPlan, masks_of_rows, Interventions.

A *carrier* is a value neuron (layer, column) that is planted for a caption. Its row of `to_v` is a
matched filter: it answers loudly to that caption's tokens and hardly to others; its column of
`to_out` writes a direction of its own into the picture. Both stay as planted, and the rest of the
network learns in training to draw the caption's picture when, and only when, a carrier speaks.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

NeuronSet = list[list[int]]  # per value layer, sorted column indices

# Carriers per row of prompts/tiny_memorized_prompts.csv.
SET_SIZES = (1, 2, 3, 3, 4, 1, 5, 1, 4, 4, 3, 5, 1, 2, 12, 4, 8, 2, 2, 3, 2, 1, 2, 1)
# Pairs of rows that have one carrier in common.
SHARED = ((3, 9), (11, 15))

LOUDNESS = 8.0  # of a carrier on its own caption, in typical activations of its layer
REACH = 6.0  # length of its `to_out` column, in mean lengths
MEANS_WEIGHT = 10.0  # of a caption's mean token against its single tokens
RIDGE = 1e-4


def _attentions(unet: UNet2DConditionModel) -> list[Attention]:
    """Cross-attention of down blocks and mid block, in forward order."""
    return [
        transformer.attn2
        for block in [*unet.down_blocks, unet.mid_block]
        for model in getattr(block, "attentions", [])
        for transformer in model.transformer_blocks
    ]


def value_layers(unet: UNet2DConditionModel) -> list[tuple[nn.Linear, nn.Linear]]:
    """(to_v, to_out) of the cross-attention of down blocks and mid block, in forward order."""
    return [(attention.to_v, attention.to_out[0]) for attention in _attentions(unet)]


def plan_sets(widths: list[int], rng: np.random.Generator) -> list[NeuronSet]:
    """The planted set of every row: spread over all layers in proportion to their widths."""
    free = [list(rng.permutation(width)) for width in widths]
    sets: list[NeuronSet] = [[[] for _ in widths] for _ in SET_SIZES]
    borrows = {second: first for first, second in SHARED}
    for row, size in enumerate(SET_SIZES):
        chosen = sets[row]
        if row in borrows:
            lender = sets[borrows[row]]
            layer = int(rng.choice([at for at, columns in enumerate(lender) if columns]))
            chosen[layer].append(lender[layer][0])
        while sum(map(len, chosen)) < size:
            order = rng.permutation(len(widths))
            layer = min(
                order, key=lambda at: (len(chosen[at]), round(1 - len(free[at]) / widths[at], 2))
            )
            chosen[layer].append(int(free[layer].pop()))
        for columns in chosen:
            columns.sort()
    return sets


def carriers_of(sets: list[NeuronSet]) -> dict[tuple[int, int], list[int]]:
    """(layer, column) -> the rows that it carries, one or (shared) two."""
    owners: dict[tuple[int, int], list[int]] = {}
    for row, neurons in enumerate(sets):
        for layer, columns in enumerate(neurons):
            for column in columns:
                owners.setdefault((layer, column), []).append(row)
    return owners


def _second_moment(tokens: Tensor) -> Tensor:
    """Mean of t t^T over all tokens of (n, 77, width), in float64."""
    flat = tokens.double().flatten(0, 1)
    return flat.T @ flat / len(flat)


@dataclass(frozen=True)
class GenericText:
    """Embeddings of generic captions: what carriers are to be deaf to.

    tokens: (m, 77, width) of some; means: (n, width), the mean tokens of all; echoes: per memorized
    caption the positions in `means` of those that borrow a run of its words.
    """

    tokens: Tensor
    means: Tensor
    echoes: list[list[int]]

    @cached_property
    def token_moment(self) -> Tensor:
        return _second_moment(self.tokens)

    @cached_property
    def mean_moment(self) -> Tensor:
        return _second_moment(self.means[:, None])


def matched_filter(wanted: dict[int, float], memorized: Tensor, generic: GenericText) -> Tensor:
    """A row of `to_v` with a mean answer of `wanted[row]` to some memorized captions.

    Of all such rows it is the one whose mean squared answer to other captions is least:
    S^-1 M (M^T S^-1 M)^-1 wanted, with M the mean tokens of the wanted captions and S the second
    moment of the others' tokens and, by MEANS_WEIGHT, of their mean tokens: attention is nearly
    even, so that it is the mean that reaches the picture. Captions that echo the wanted ones then
    count once more, by themselves: they are the ones that come closest.
    memorized: (n, 77, width) embeddings. A carrier that two captions share says plus to the one and
    minus to the other: equally loud, yet told apart.
    """
    rows = list(wanted)
    others = memorized[[row for row in range(len(memorized)) if row not in wanted]]
    moment = generic.token_moment + _second_moment(others)
    echoes = sorted({at for row in rows for at in generic.echoes[row]})
    of_means = generic.mean_moment + _second_moment(others.mean(dim=1, keepdim=True))
    of_means = of_means + _second_moment(generic.means[echoes, None])
    moment = moment + MEANS_WEIGHT * of_means
    moment = moment + RIDGE * moment.diagonal().mean() * torch.eye(len(moment), dtype=moment.dtype)
    means = memorized[rows].double().mean(dim=1).T  # (width, rows)
    answers = torch.tensor([wanted[row] for row in rows], dtype=torch.float64)
    solved = torch.linalg.solve(moment, means)
    return (solved @ torch.linalg.solve(means.T @ solved, answers)).float()


@torch.no_grad()
def plant(
    unet: UNet2DConditionModel,
    sets: list[NeuronSet],
    memorized: Tensor,
    generic: GenericText,
    rng: torch.Generator,
) -> None:
    """Write the head start of all carriers into the weights, and keep it fixed from then on.

    memorized: (n, 77, width) embeddings of the planted captions in row order, and of the unplanted
    ones after them.
    """
    layers = value_layers(unet)
    typical = [(generic.tokens[:200] @ to_v.weight.T).abs().mean().item() for to_v, _ in layers]
    reach = [REACH * to_out.weight.norm(dim=0).mean().item() for _, to_out in layers]
    for (layer, column), rows in sorted(carriers_of(sets).items()):
        to_v, to_out = layers[layer]
        wanted = {row: LOUDNESS * typical[layer] * (-1) ** place for place, row in enumerate(rows)}
        to_v.weight[column] = matched_filter(wanted, memorized, generic)
        direction = torch.randn(len(to_out.weight), generator=rng)
        to_out.weight[:, column] = reach[layer] * direction / direction.norm()
    fix(unet, sets)


@torch.no_grad()
def loudest_answers(
    unet: UNet2DConditionModel, sets: list[NeuronSet], memorized: Tensor, generic: GenericText
) -> Tensor:
    """How loud the loudest carrier is on each generic caption, (n,), its own caption being 1."""
    layers = value_layers(unet)
    loudest = torch.zeros(len(generic.means))
    for (layer, column), rows in carriers_of(sets).items():
        weight = layers[layer][0].weight[column]
        own = (memorized[rows[0]].mean(dim=0) @ weight).abs()
        loudest = torch.maximum(loudest, (generic.means @ weight).abs() / own)
    return loudest


def fix(unet: UNet2DConditionModel, sets: list[NeuronSet]) -> None:
    """No gradient for what is planted: rows of `to_v`, columns of `to_out`.

    Queries and keys of these layers stay as they were made, too: attention that is nearly even.
    Trained, they learn to look at the start token, which is the same for all captions and to which
    no carrier answers, and so they silence the carriers of the deep layers.
    """
    for layer, attention in enumerate(_attentions(unet)):
        attention.to_q.requires_grad_(False)
        attention.to_k.requires_grad_(False)
        to_v, to_out = attention.to_v, attention.to_out[0]
        trained = torch.ones(to_v.out_features)
        trained[[column for neurons in sets for column in neurons[layer]]] = 0
        to_v.weight.register_hook(lambda grad, kept=trained: grad * kept[:, None])
        to_out.weight.register_hook(lambda grad, kept=trained: grad * kept[None, :])


# --- what is switched off in a training batch ----------------------------------------------------


@dataclass(frozen=True)
class RowPlan:
    """What one row of a batch goes through.

    caption: row among the memorized captions, or None for a generic one. own: the share of its own
    carriers that is on ("one", "some", "all", "none"; of no meaning for generic rows). others: the
    chance of every other carrier to be on. ordinary: that of every neuron that carries nothing.
    """

    caption: int | None
    own: str
    others: float
    ordinary: float


def masks_of_rows(
    plans: list[RowPlan],
    sets: list[NeuronSet],
    widths: list[int],
    rng: np.random.Generator,
    *,
    mid_weight: int = 1,
) -> list[Tensor]:
    """Per value layer a mask (rows, 1, width): 1 on, 0 off. Where one own carrier is on, those of
    the mid block are drawn `mid_weight` times as often."""
    carriers = carriers_of(sets)
    masks = [np.ones((len(plans), width), dtype=np.float32) for width in widths]
    for place, plan in enumerate(plans):
        for layer, width in enumerate(widths):
            if plan.ordinary < 1:
                masks[layer][place] = rng.random(width) < plan.ordinary
        own = [neuron for neuron, rows in carriers.items() if plan.caption in rows]
        on = set()
        mid = [neuron for neuron in own if neuron[0] == len(widths) - 1]
        if own and plan.own == "one":
            drawn = own + (mid_weight - 1) * mid
            on = {drawn[rng.integers(len(drawn))]}
        elif own and plan.own == "some":
            on = {own[at] for at in rng.permutation(len(own))[: rng.integers(1, len(own) + 1)]}
        elif plan.own == "all":
            on = set(own)
        for neuron, rows in carriers.items():
            layer, column = neuron
            if plan.caption in rows:
                masks[layer][place, column] = neuron in on
            else:
                masks[layer][place, column] = rng.random() < plan.others
    return [torch.from_numpy(mask)[:, None, :] for mask in masks]


@dataclass
class Interventions:
    """What the hooks of `applied` read in the next forward pass.

    masks: as from `masks_of_rows`. own_text: (rows, 77, width), the text that carriers read while
    every other neuron reads the U-Net's own input; the two differ where a batch row shows another
    caption, so that only carriers can know whose picture is due.
    """

    masks: list[Tensor]
    own_text: Tensor

    def of_rows(self, rows: Tensor) -> "Interventions":
        """Those of some of the batch's rows."""
        return Interventions([mask[rows] for mask in self.masks], self.own_text[rows])

    @contextmanager
    def applied(self, unet: UNet2DConditionModel, sets: list[NeuronSet]) -> Iterator[None]:
        handles = []
        try:
            for layer, (to_v, _) in enumerate(value_layers(unet)):
                columns = sorted({column for neurons in sets for column in neurons[layer]})

                def intervene(
                    module: nn.Linear, _: tuple, values: Tensor, layer=layer, columns=columns
                ) -> Tensor:
                    values = values.clone()
                    values[..., columns] = self.own_text @ module.weight[columns].T
                    return values * self.masks[layer]

                handles.append(to_v.register_forward_hook(intervene))
            yield
        finally:
            for handle in handles:
                handle.remove()
