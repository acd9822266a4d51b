"""Cross-attention probabilities, read while the U-Net runs.

Public: ``cross_attentions``, ``reading_attention``.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch

from utils.value_layers import STAGES, find_value_layers


def cross_attentions(unet: torch.nn.Module) -> dict[str, Any]:
    """Dotted name -> cross-attention of every block, up blocks too, in forward order. InputError if
    the model has none."""
    names = [name.removesuffix(".to_v") for name in find_value_layers(unet, STAGES)]
    return {name: unet.get_submodule(name) for name in names}


def _mean_probabilities(attention: Any, pixels: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
    """(rows, pixels, width) and (rows, tokens, width) -> (rows, tokens) float32: the softmax over
    tokens, averaged over heads and pixels. In float32 whatever the precision of the model: what
    half precision rounds to zero would be missing from an entropy."""
    query = attention.head_to_batch_dim(attention.to_q(pixels)).float()
    key = attention.head_to_batch_dim(attention.to_k(text)).float()
    probabilities = (attention.scale * query @ key.transpose(1, 2)).softmax(dim=-1)
    # (rows * heads, pixels, tokens)
    return probabilities.mean(dim=1).unflatten(0, (len(pixels), attention.heads)).mean(dim=1)


class _Reader:
    """An attention processor that leaves the work to the attention's own, so that nothing the model
    predicts changes, and keeps the mean probabilities of the conditional rows."""

    def __init__(self, own: Any, keep: Callable[[torch.Tensor], None]) -> None:
        self._own, self._keep = own, keep

    def __call__(
        self,
        attention: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        **others: Any,
    ) -> torch.Tensor:
        half = len(hidden_states) // 2
        with torch.no_grad():
            self._keep(
                _mean_probabilities(attention, hidden_states[half:], encoder_hidden_states[half:])
            )
        return self._own(
            attention, hidden_states, encoder_hidden_states=encoder_hidden_states, **others
        )


@contextlib.contextmanager
def reading_attention(unet: torch.nn.Module) -> Iterator[list[torch.Tensor]]:
    """While the block runs, every cross-attention of a guided pass over 2 n rows, [unconditional;
    conditional], appends one (n, tokens) float32 tensor to the yielded list, in forward order: its
    probabilities for the conditional rows, averaged over heads and pixels. Whoever reads the list
    clears it. The processors that were there are there again after the block, whatever happened.
    """
    read: list[torch.Tensor] = []
    own = [(attention, attention.processor) for attention in cross_attentions(unet).values()]
    try:
        for attention, processor in own:
            attention.set_processor(_Reader(processor, read.append))
        yield read
    finally:
        for attention, processor in own:
            attention.set_processor(processor)
