"""Guided sampling in which ||d|| has a minimum: along random weights it has none.

Public: ``with_minima``.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from utils.stable_diffusion import Model, encode_prompt


@contextlib.contextmanager
def with_minima(model: Model, minima: dict[str, int]) -> Iterator[None]:
    """While the block runs, what a caption adds to a prediction is smallest at its timestep:
    d becomes (1 + |t - minimum| / 50) d, of each row by itself. Batches are [without; with]."""
    of_caption = [(encode_prompt(model, c).embedding[0], t) for c, t in minima.items()]

    def minimum(text: torch.Tensor) -> int:
        return next(t for embedding, t in of_caption if torch.allclose(embedding, text, atol=1e-4))

    def hook(module: object, args: Any, kwargs: Any, outputs: Any) -> Any:
        timestep, texts = float(args[1]), kwargs["encoder_hidden_states"]
        without, with_text = outputs[0].chunk(2)
        scales = [1 + abs(timestep - minimum(text)) / 50 for text in texts.chunk(2)[1]]
        added = torch.tensor(scales)[:, None, None, None] * (with_text - without)
        return (torch.cat([without, without + added]),)

    handle = model.unet.register_forward_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
