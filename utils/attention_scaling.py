"""Attention scaling (Ren et al., ECCV 2024): cross-attention turned from what triggers memorization
(padding, and the end token) to the begin token. Public: ``attention_scaled``.
"""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from utils.attention_maps import cross_attentions
from utils.mitigations import AttentionScaling


@contextlib.contextmanager
def attention_scaled(
    unet: torch.nn.Module, lengths: Sequence[int], settings: AttentionScaling
) -> Iterator[None]:
    """While the block runs, in every cross-attention: no row attends to tokens behind its prompt
    (-inf before the softmax), and in conditional rows the begin token's logit is multiplied.

    ``lengths``: tokens of the prompt of each of B pictures, begin and end included. A batch has B
    conditional rows, or the B unconditional ones before them, which are cut off like their
    partners. Whatever attention processor is there keeps computing: a logit is linear in its key,
    so the begin token's key is multiplied instead, which comes to the same. No hook outlives the
    block. ValueError at the pass for a batch of another size.
    """
    hidden_from = [length - 1 if settings.drop_eos else length for length in lengths]
    pictures = len(lengths)

    def multiply_begin(module: object, inputs: object, key: torch.Tensor) -> torch.Tensor:
        scaled = key.clone()  # out of place: the layer's own output may be kept by others
        scaled[-pictures:, 0] *= settings.factor
        return scaled

    def hide(
        module: object, positional: tuple[Any, ...], named: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        text = named["encoder_hidden_states"]  # (rows, tokens, width)
        halves, left_over = divmod(len(text), pictures)
        if left_over or halves not in (1, 2):
            raise ValueError(f"{len(text)} batch rows for {pictures} prompts")
        mask = text.new_zeros(pictures, 1, text.shape[1])
        for row, position in enumerate(hidden_from):
            mask[row, :, position:] = -torch.inf
        return positional, {**named, "attention_mask": mask.repeat(halves, 1, 1)}

    handles = []
    try:
        for attention in cross_attentions(unet).values():
            handles.append(attention.to_k.register_forward_hook(multiply_begin))
            handles.append(attention.register_forward_pre_hook(hide, with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()
