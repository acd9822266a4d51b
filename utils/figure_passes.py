"""The figures' own U-Net passes: noise differences, and scores with more and more neurons blocked.

Public: ``Passes``.
"""

from typing import Any

import numpy as np
import torch

from utils.localization import UndecidedError, kept_rows
from utils.neuron_sets import NeuronSet
from utils.noise_difference import NoiseSettings, noise_difference
from utils.ssim import pairwise_ssim, ssim
from utils.stable_diffusion import (
    encode_prompt,
    encode_unconditional,
    initial_noise,
    load_model,
)
from utils.value_layers import deactivated
from utils.versions import Source


class Passes:
    """A model with the noises and settings that a run of script 3 recorded."""

    def __init__(self, source: Source, settings: dict[str, Any], *, device: str) -> None:
        """``settings``: of the record of script 3."""
        self._model = load_model(source, device=device, dtype=settings["dtype"])
        self._settings = NoiseSettings.from_options(settings)
        self._noise = initial_noise(self._model, settings["samples_per_prompt"], settings["seed"])
        self._threshold = settings["pairwise_ssim_threshold"]
        self._factor = settings["scaling_factor"]
        guided = self._settings.guidance_scale != 1
        self._unconditional = encode_unconditional(self._model) if guided else None

    def _difference(self, caption: str, neurons: NeuronSet | None) -> torch.Tensor:
        off = neurons or [[] for _ in self._model.value_layers]
        with deactivated(self._model.value_layers, [off], factor=self._factor):
            return noise_difference(
                self._model,
                encode_prompt(self._model, caption),
                self._unconditional,
                self._noise,
                self._settings,
            )

    def pictures(self, caption: str, neurons: NeuronSet | None = None) -> np.ndarray:
        """Noise differences, mean over channels: (n, H, W) float32 in [0, 1]."""
        return self._difference(caption, neurons).mean(dim=1).cpu().numpy()

    def scores(self, caption: str, neurons: NeuronSet) -> list[float]:
        """The memorization score with the first 0, 1, 2 ... of the set's neurons blocked, in the
        order of layers and columns. (neurons + 1,) UndecidedError where that cannot be said: for a
        score that is not finite, or if no pair of rows is above the threshold on this device."""
        unblocked = self._difference(caption, None)
        rows = kept_rows(pairwise_ssim(unblocked).cpu(), len(unblocked), self._threshold)
        if not rows:
            raise UndecidedError("not memorized on this device, as it was on script 3's")
        blocked: NeuronSet = [[] for _ in neurons]
        found = [1.0]  # of a difference and itself
        for layer, columns in enumerate(neurons):
            for column in columns:
                blocked[layer].append(column)
                difference = self._difference(caption, blocked)
                found.append(ssim(unblocked[rows], difference[rows]).max().item())
        if not np.isfinite(found).all():
            raise UndecidedError("a memorization score is not finite")
        return found
