"""Which neuron set a generation run blocks for which prompt: the modes of script 4.

Public: ``NOTHING_BLOCKED``, ``OWN_SETS``, ``MODES``, ``sets_to_block``.
"""

import random
from collections.abc import Mapping, Sequence

from utils.errors import InputError
from utils.neuron_sets import (
    NeuronSet,
    Result,
    most_frequent_neurons,
    most_frequent_neurons_per_layer,
    most_frequent_sets,
    random_neurons,
)

# One set for all prompts, made from the refined sets of the whole result file.
_SHARED = {
    "block_top_k_neurons": most_frequent_neurons,
    "block_top_k_neurons_per_layer": most_frequent_neurons_per_layer,
    "block_top_k_neuron_subgroups": most_frequent_sets,
}
# Random neurons as many as another mode blocks, from the same layers.
_CONTROL_OF = {
    "block_random_neurons": "block_top_k_neurons",
    "block_random_neuron_subgroups": "block_top_k_neuron_subgroups",
}
NOTHING_BLOCKED = ("original_images", "mitigation")
OWN_SETS = ("initial_neurons", "refined_neurons", "block_random_neurons")
MODES = (*NOTHING_BLOCKED, "initial_neurons", "refined_neurons", *_SHARED, *_CONTROL_OF)


def sets_to_block(
    mode: str,
    k: int | None,
    results: Sequence[Result],
    rows: Sequence[int],
    widths: Sequence[int],
    *,
    seed: int,
    located: Sequence[Result] | None = None,
) -> Mapping[int, NeuronSet | None]:
    """Row -> neuron set for every one of ``rows``; None where script 3 left the prompt undecided.

    ``results`` are the located prompts that count (a VM/TM filter is the caller's), ``located`` all
    there are (default: the same): frequencies look at the former, random neurons avoid the refined
    sets of the latter. Neither depends on which ``rows`` are generated, and every row's random set
    has a generator of its own: a row never depends on which others are asked for.
    Without ``k``, ``block_random_neurons`` is each prompt's own control. InputError where a layer
    has too few neurons left, or fewer than k were located.
    """
    if mode in NOTHING_BLOCKED:
        return {row: [[] for _ in widths] for row in rows}
    refined = [result.refined for result in results if result.refined is not None]
    if not any(any(neurons) for neurons in refined):
        raise InputError("the result file has no located neurons to block for these prompts")
    taken = [r.refined for r in (located or results) if r.refined is not None]
    by_row = {result.row: result for result in results}
    if mode == "initial_neurons":
        return {row: by_row[row].initial for row in rows}
    if mode == "refined_neurons":
        return {row: by_row[row].refined for row in rows}
    if mode == "block_random_neurons" and k is None:
        controls: dict[int, NeuronSet | None] = {}
        for row in rows:
            own = by_row[row].refined
            generator = random.Random(f"{seed}/{row}")
            controls[row] = own and random_neurons(own, taken, widths, generator)
        return controls
    assert k is not None
    shared = _SHARED[_CONTROL_OF.get(mode, mode)](refined, k)
    if mode in _CONTROL_OF:
        shared = random_neurons(shared, taken, widths, random.Random(f"{seed}/all"))
    return dict.fromkeys(rows, shared)
