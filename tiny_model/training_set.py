"""What all batches of the U-Net's training are drawn from.

Public names: TrainingSet.
"""

from dataclasses import dataclass

import numpy as np
from torch import Tensor

from tiny_model.planting import NeuronSet


@dataclass(frozen=True)
class TrainingSet:
    """Everything a batch is drawn from.

    generic_latents: (n, 4, 16, 16); generic_tokens: (n, 77) ids; loudness: (n,) of the loudest
    carrier on each generic caption; memorized_latents: per memorized caption (k, 4, 16, 16);
    memorized_text: (captions, 77, width); empty_text: (77, width); widths: of the value layers.
    """

    generic_latents: Tensor
    generic_tokens: Tensor
    loudness: Tensor
    memorized_latents: list[Tensor]
    memorized_text: Tensor
    empty_text: Tensor
    sets: list[NeuronSet]
    widths: list[int]

    def loud_captions(self, power: int, count: int, rng: np.random.Generator) -> np.ndarray:
        """Positions of generic captions, drawn by a power of their loudness."""
        weights = np.cumsum(self.loudness.double().numpy() ** power)
        return np.searchsorted(weights / weights[-1], rng.random(count))
