"""Score functions made up for a purpose, asked like a prompt's scores.

Public: ``SyntheticScore``, ``needed_neurons``.
"""

from collections.abc import Callable, Iterable, Sequence

import torch

from utils.exact_search import Question
from utils.neuron_sets import NeuronSet, SetKey, set_key


class SyntheticScore:
    """Answers a search's questions from ``function`` (neuron set -> score) and counts the different
    sets that it had to evaluate for that."""

    def __init__(self, function: Callable[[NeuronSet], float]) -> None:
        self._function = function
        self._known: dict[SetKey, float] = {}

    @property
    def evaluations(self) -> int:
        """Different sets evaluated so far."""
        return len(self._known)

    def __call__(self, neurons: NeuronSet) -> float:
        """The score; ``reference`` is the same."""
        key = set_key(neurons)
        if key not in self._known:
            self._known[key] = self._function(neurons)
        return self._known[key]

    reference = __call__

    def expect(self, above: float) -> None:
        """Every score costs the same here."""

    def leading(
        self,
        sets: Sequence[NeuronSet],
        question: Question,
        refused: Callable[[int], Sequence[NeuronSet]] | None = None,
    ) -> int:
        """How many of the sets, from the first on, get a yes before the first no."""
        for position, neurons in enumerate(sets):
            if not question.holds(self(neurons)):
                return position
        return len(sets)

    def guess(
        self, neurons: NeuronSet, question: Question, ahead: Iterable[Sequence[NeuronSet]] = ()
    ) -> bool:
        """The answer."""
        return question.holds(self(neurons))


def needed_neurons(
    candidates: int, needed: int, layers: int, generator: torch.Generator
) -> tuple[list[torch.Tensor], list[torch.Tensor], Callable[[NeuronSet], float]]:
    """(activations, z-scores, score function) of a prompt with so many candidates in equal
    ``layers``: the score is 0.1 while all ``needed`` ones, drawn at random, are switched off, else
    0.5 and more, up to 1 with the share of them that is not. A threshold lies between."""
    widths = [candidates // layers + (layer < candidates % layers) for layer in range(layers)]
    columns = [(layer, i) for layer, width in enumerate(widths) for i in range(width)]
    order = torch.randperm(len(columns), generator=generator).tolist()
    chosen = {columns[position] for position in order[:needed]}

    def score(neurons: NeuronSet) -> float:
        off = sum((layer, i) in chosen for layer, row in enumerate(neurons) for i in row)
        return 0.1 if off == needed else 1.0 - 0.5 * off / needed

    activations = [torch.rand(width, generator=generator) for width in widths]
    z = [torch.full((width,), 9.0) for width in widths]
    return activations, z, score
