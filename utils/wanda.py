"""Wanda pruning (Chavhan et al., 2024): the feed-forward weights that memorized prompts use and
others do not, located by weight times activation norm and set to 0.

A feed-forward's second linear has a weight W (d, f) and sees z (tokens, f). With every token's z of
length 1, A[j] is the root of the sum over tokens and prompts of z_j^2, at one denoising step; a
weight's score is |W[i, j]| A[j].
Public: ``feed_forwards``, ``activation_norms``, ``weights_to_mask``, ``locate``, ``pruned``.
"""

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch

from utils.errors import InputError
from utils.files import Prompt
from utils.mitigations import Wanda
from utils.stable_diffusion import (
    Conditioning,
    Model,
    encode_prompt,
    sample_latents,
)

Progress = Callable[[Iterable[Prompt]], Iterable[Prompt]]


def feed_forwards(unet: torch.nn.Module) -> dict[str, torch.nn.Linear]:
    """Dotted name -> second linear of every transformer feed-forward of the U-Net. InputError if it
    has none."""
    found = {
        name: module
        for name, module in unet.named_modules()
        if name.endswith(".ff.net.2") and isinstance(module, torch.nn.Linear)
    }
    if not found:
        raise InputError(f"{type(unet).__name__} has no transformer feed-forward to prune")
    return found


@contextlib.contextmanager
def _listening(layers: Mapping[str, torch.nn.Module]) -> Iterator[dict[str, list[torch.Tensor]]]:
    """While the block runs, every pass appends to the yielded lists: of the batch's last row, which
    is the conditional one, the sum over tokens of z_j^2, (f,) float64."""
    heard: dict[str, list[torch.Tensor]] = {name: [] for name in layers}

    def listen(name: str) -> Any:
        def hook(module: object, inputs: tuple[torch.Tensor, ...]) -> None:
            z = torch.nn.functional.normalize(inputs[0][-1].double(), dim=-1)  # (tokens, f)
            heard[name].append(z.square().sum(dim=0))

        return hook

    handles = []
    try:
        for name, layer in layers.items():
            handles.append(layer.register_forward_pre_hook(listen(name)))
        yield heard
    finally:
        for handle in handles:
            handle.remove()


def _squares(
    model: Model,
    conditioning: Conditioning,
    unconditional: Conditioning,
    noise: torch.Tensor,
    settings: Wanda,
    *,
    steps: int,
    guidance_scale: float,
) -> list[torch.Tensor]:
    """A^2 of one prompt: of each layer (settings.steps, f)."""
    with _listening(feed_forwards(model.unet)) as heard:
        sample_latents(
            model,
            conditioning,
            unconditional,
            noise,
            steps=steps,
            guidance_scale=guidance_scale,
            only=settings.steps,
        )
    return [torch.stack(squares) for squares in heard.values()]


def activation_norms(
    model: Model,
    conditionings: Iterable[Conditioning],
    unconditional: Conditioning,
    noise: torch.Tensor,
    settings: Wanda,
    *,
    steps: int,
    guidance_scale: float,
) -> tuple[list[torch.Tensor], list[int]]:
    """A of each layer at the first ``settings.steps`` denoising steps, (settings.steps, f) float64,
    over prompts (B = 1 each) that are sampled from one noise (1, C, H, W), one at a time.

    The sum over prompts is divided by their number, so that sets of different sizes can be
    compared; for equal sizes that changes no comparison. Also returned: the positions of the
    prompts left out because an activation is not finite. InputError if that leaves none.
    """
    totals: list[torch.Tensor] = []
    left_out, counted = [], 0
    for position, conditioning in enumerate(conditionings):
        squares = _squares(
            model,
            conditioning,
            unconditional,
            noise,
            settings,
            steps=steps,
            guidance_scale=guidance_scale,
        )
        if not all(bool(torch.isfinite(layer).all()) for layer in squares):
            left_out.append(position)
            continue
        counted += 1
        totals = [a + b for a, b in zip(totals, squares, strict=True)] if totals else squares
    if not counted:
        raise InputError("wanda: no prompt has finite activations; name others, or use float32")
    return [(total / counted).sqrt() for total in totals], left_out


def weights_to_mask(
    weight: torch.Tensor, memorized: torch.Tensor, base: torch.Tensor, share: float
) -> torch.Tensor:
    """(d, f) weight and both sets' norms (steps, f) -> (d, f) bool: weights that, at any step, are
    among the top ``share`` of their row for the memorized set (all that equal the last of them
    count) and score higher than for the base set."""
    size = weight.double().abs()
    count = math.floor(share * weight.shape[1] + 1e-9)  # 0.29 * 100 is a little less than 29
    masked = torch.zeros_like(weight, dtype=torch.bool)
    for own, other in zip(memorized, base, strict=True):
        scores = size * own
        if count:
            last = scores.topk(count, dim=1).values[:, -1:]
            masked |= (scores >= last) & (scores > size * other)
    return masked


def locate(
    model: Model,
    settings: Wanda,
    memorized: Sequence[Prompt],
    base: Sequence[Prompt],
    unconditional: Conditioning,
    noise: torch.Tensor,
    *,
    steps: int,
    guidance_scale: float,
    progress: Progress = iter,
) -> tuple[list[tuple[torch.nn.Linear, torch.Tensor]], dict[str, Any]]:
    """(linear, its mask) of every feed-forward, and for the record how many weights that is and
    which prompt rows were left out. Without ``base`` prompts the empty prompt is the base. Noise:
    one, (1, C, H, W). InputError if nothing is found."""

    def norms(prompts: Sequence[Prompt]) -> tuple[list[torch.Tensor], list[int]]:
        return activation_norms(
            model,
            (encode_prompt(model, prompt.caption) for prompt in progress(prompts)),
            unconditional,
            noise,
            settings,
            steps=steps,
            guidance_scale=guidance_scale,
        )

    own, left_out = norms(memorized)
    # The empty prompt as often as there are others: the mean is that of one.
    other, base_left_out = norms(base or [Prompt(-1, "")])
    layers = feed_forwards(model.unet).values()
    masks = [
        (layer, weights_to_mask(layer.weight, a, b, settings.share))
        for layer, a, b in zip(layers, own, other, strict=True)
    ]
    masked = sum(int(mask.sum()) for _, mask in masks)
    if not masked:
        raise InputError(
            f"wanda: share {settings.share:g} of a row leaves no weight to mask; use a larger one"
        )
    found = {
        "masked_weights": masked,
        "of_weights": sum(mask.numel() for _, mask in masks),
        "memorized_prompts": len(memorized) - len(left_out),
        "left_out_rows": [memorized[position].row for position in left_out],
        "left_out_base_rows": [base[position].row for position in base_left_out],
    }
    return masks, found


@contextlib.contextmanager
def pruned(masks: Sequence[tuple[torch.nn.Linear, torch.Tensor]]) -> Iterator[None]:
    """Masked weights are 0 while the block runs, and exactly what they were after it."""
    kept = [layer.weight[mask].clone() for layer, mask in masks]
    try:
        with torch.no_grad():
            for layer, mask in masks:
                layer.weight[mask] = 0
        yield
    finally:
        with torch.no_grad():
            for (layer, mask), values in zip(masks, kept, strict=True):
                layer.weight[mask] = values
