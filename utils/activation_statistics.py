"""Activation statistics of the hold-out prompts (script 1) and z-scores against them.

Public: ``Statistics``, ``RunningStatistics``, ``save_tensors``, ``load_statistics``,
``check_fit``, ``z_scores``.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from utils.errors import InputError
from utils.files import replacing


@dataclass(frozen=True)
class Statistics:
    """Mean and unbiased standard deviation of every neuron's activation: L float32 vectors each."""

    means: list[torch.Tensor]
    stds: list[torch.Tensor]

    @property
    def widths(self) -> list[int]:
        """Number of neurons of each layer."""
        return [len(mean) for mean in self.means]


class RunningStatistics:
    """Streams activations, one prompt at a time, into mean and standard deviation (Welford's
    update in float64): memory does not grow with the number of prompts, and the state can be saved
    and restored exactly."""

    def __init__(self, widths: Sequence[int]) -> None:
        self.widths = list(widths)
        self.count = 0
        self._mean = np.zeros(sum(widths))
        self._squares = np.zeros(sum(widths))  # sum of squared deviations from the mean

    def add(self, activations: Sequence[torch.Tensor]) -> None:
        """One prompt's L activation vectors."""
        values = torch.cat(list(activations)).numpy().astype(np.float64)
        self.count += 1
        deviation = values - self._mean
        self._mean += deviation / self.count
        self._squares += deviation * (values - self._mean)

    def save(self, path: Path) -> None:
        """Writes the state atomically: (3, total width) float64, count, mean, sum of squares."""
        state = np.stack([np.full_like(self._mean, self.count), self._mean, self._squares])
        with replacing(path) as temporary, temporary.open("wb") as file:
            np.save(file, state)

    def restore(self, path: Path) -> None:
        """Continues exactly from what ``save`` wrote. InputError for anything else."""
        try:
            state = np.load(path)
            if state.shape != (3, sum(self.widths)):
                raise ValueError(f"numbers of shape {state.shape}")
        except (OSError, ValueError, EOFError) as error:
            raise InputError(
                f"{path}: not the sums of this run ({error}); delete it, and script 1 begins anew"
            ) from None
        self.count = int(state[0, 0])
        self._mean, self._squares = state[1].copy(), state[2].copy()

    def result(self) -> Statistics:
        """InputError for fewer than two prompts: a standard deviation needs two."""
        if self.count < 2:
            raise InputError(f"{self.count} prompt given; statistics need at least two")
        borders = np.cumsum(self.widths)[:-1]
        stds = np.sqrt(self._squares / (self.count - 1))
        return Statistics(
            *(
                [torch.from_numpy(part.astype(np.float32)) for part in np.split(vector, borders)]
                for vector in (self._mean, stds)
            )
        )


def save_tensors(content: object, path: Path) -> None:
    """``torch.save``, atomically and without the file's name in its bytes. The published statistics
    are such a file with (means, stds)."""
    with replacing(path) as temporary, temporary.open("wb") as file:
        torch.save(content, file)


def check_fit(statistics: Statistics, widths: Sequence[int], path: Path) -> None:
    """InputError if the statistics of this file are not those of value layers of ``widths``."""
    if statistics.widths != list(widths):
        raise InputError(
            f"{path}: statistics of layers {statistics.widths}, but the model's value layers have "
            f"widths {list(widths)}; it belongs to another model, make its own with script 1"
        )


def load_statistics(path: Path, *, widths: Sequence[int] | None = None) -> Statistics:
    """Reads a statistics file, ours or the published one. InputError for anything that is not two
    lists of equally long finite float vectors, or that does not fit value layers of ``widths``."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; make it with script 1") from None
    except Exception as error:  # torch.load raises many kinds for a file that is not its own
        reason = " ".join(str(error).split())[:80]
        raise InputError(
            f"{path}: not a statistics file ({reason}); remake it with script 1"
        ) from None
    if not (isinstance(content, (tuple, list)) and len(content) == 2):
        raise InputError(
            f"{path}: not a pair (means, standard deviations); remake it with script 1"
        )
    if not all(isinstance(part, (tuple, list)) for part in content):
        raise InputError(f"{path}: means and deviations are not lists; remake it with script 1")
    means, stds = ([_as_vector(v, path) for v in part] for part in content)
    if [len(mean) for mean in means] != [len(std) for std in stds]:
        raise InputError(f"{path}: means and standard deviations differ in shape; remake it")
    statistics = Statistics(means, stds)
    if widths is not None:
        check_fit(statistics, widths, path)
    if any(bool((std < 0).any()) for std in stds):
        raise InputError(f"{path}: a negative standard deviation; remake it with script 1")
    return statistics


def _as_vector(value: object, path: Path) -> torch.Tensor:
    if not (isinstance(value, torch.Tensor) and value.ndim == 1 and value.is_floating_point()):
        raise InputError(
            f"{path}: holds something other than float vectors; remake it with script 1"
        )
    vector = value.float()  # float64 may hold what is infinite in float32
    if not bool(torch.isfinite(vector).all()):
        raise InputError(f"{path}: holds NaN or infinity; remake it with script 1")
    return vector


def z_scores(activations: Sequence[torch.Tensor], statistics: Statistics) -> list[torch.Tensor]:
    """|a - mean| / std of every neuron, L float32 vectors. Where std is 0: infinite if the
    activation differs from the mean, else 0."""
    scores = []
    for activation, mean, std in zip(activations, statistics.means, statistics.stds, strict=True):
        deviation = (activation - mean).abs()
        # 0/0 would be NaN, which never compares as above a threshold.
        scores.append(torch.where(deviation == 0, torch.zeros_like(std), deviation / std))
    return scores
