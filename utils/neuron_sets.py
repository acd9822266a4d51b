"""Neuron sets: the result CSV's cells, and which sets a generation run blocks.

A neuron set is a list of L sorted lists of column indices, one for each value layer in forward
order.
Public: ``NeuronSet``, ``SetKey``, ``RESULT_COLUMNS``, ``Result``, ``parse_neurons``,
``format_neurons``, ``size``, ``set_key``, ``counted``, ``by_frequency``, ``check_neurons``,
``read_results``, ``rows_of_type``, ``result_cells``, ``most_frequent_neurons``,
``most_frequent_neurons_per_layer``, ``most_frequent_sets``, ``random_neurons``.
"""

import json
import math
import random
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from utils.errors import InputError
from utils.files import Prompt, is_whole_number, read_table

NeuronSet = list[list[int]]
SetKey = tuple[tuple[int, ...], ...]

RESULT_COLUMNS = (
    "Caption",
    "URL",
    "Initial Neurons",
    "Initial SSIM",
    "Refined Neurons",
    "Refined SSIM",
    "Row",
)


@dataclass(frozen=True)
class Result:
    """One row of a result CSV. Sets and scores are None where the prompt was left undecided."""

    row: int
    caption: str
    url: str
    initial: NeuronSet | None
    initial_score: float | None
    refined: NeuronSet | None
    refined_score: float | None

    @property
    def memorized(self) -> bool:
        """A prompt that is not memorized has empty sets and scores of 0; where no neuron stands
        out, a memorized one may have empty sets, too."""
        return self.initial is not None and (size(self.initial) > 0 or bool(self.initial_score))


def size(neurons: NeuronSet) -> int:
    """Number of neurons in a set."""
    return sum(len(layer) for layer in neurons)


def set_key(neurons: NeuronSet) -> SetKey:
    """The same for equal sets, in whatever order their neurons stand."""
    return tuple(tuple(sorted(layer)) for layer in neurons)


def parse_neurons(text: str, *, where: str) -> NeuronSet:
    """Reads a set from its cell, a JSON list of lists (which a Python list of lists of integers is
    too, so files of the authors' release are read alike). InputError names ``where``."""
    try:
        neurons = json.loads(text)
    except (ValueError, RecursionError):  # not JSON; too many digits; nested too deeply
        raise InputError(
            f"{where}: '{text[:40]}' is not a list of lists of neurons; write [[1, 2], [], ...]"
        ) from None
    if not isinstance(neurons, list) or not all(isinstance(layer, list) for layer in neurons):
        raise InputError(f"{where}: '{text[:40]}' is not a list of lists; write [[1, 2], [], ...]")
    for layer, columns in enumerate(neurons):
        if not all(type(column) is int and column >= 0 for column in columns):
            raise InputError(
                f"{where}: layer {layer} holds something other than whole numbers from 0; "
                "neurons are column indices"
            )
        if len(set(columns)) != len(columns):
            twice = next(column for column, n in Counter(columns).items() if n > 1)
            raise InputError(f"{where}: layer {layer} names neuron {twice} twice; keep it once")
    return [sorted(columns) for columns in neurons]


def format_neurons(neurons: NeuronSet) -> str:
    """The cell's text; ``parse_neurons`` is its inverse."""
    return json.dumps([sorted(columns) for columns in neurons])


def check_neurons(neurons: NeuronSet, widths: Sequence[int], *, where: str) -> None:
    """InputError if a set does not fit value layers of these widths."""
    if len(neurons) != len(widths):
        raise InputError(
            f"{where}: {len(neurons)} layers, but the model has {len(widths)} value layers; "
            "is it another model's result file?"
        )
    for layer, (columns, width) in enumerate(zip(neurons, widths, strict=True)):
        if columns and max(columns) >= width:
            raise InputError(
                f"{where}: neuron {max(columns)} of layer {layer} is out of range, "
                f"its columns are 0 to {width - 1}; is it another model's result file?"
            )


def _parse_score(text: str, *, where: str) -> float:
    try:
        score = float(text)
    except ValueError:
        raise InputError(f"{where}: '{text[:40]}' is not a number; restore the file") from None
    if not math.isfinite(score):
        raise InputError(f"{where}: the score is {text}; a score is a finite number")
    return score


def read_results(path: Path, *, widths: Sequence[int] | None = None) -> list[Result]:
    """Reads a result CSV, ours or the authors' (no ``Row`` column: a row's position counts).

    Checks layer counts and ranges against ``widths`` where given, else only that all rows have as
    many layers. InputError for a missing column, a file cut off, a row number that appears twice,
    and every malformed cell.
    """
    header, table = read_table(path)
    for column in RESULT_COLUMNS[:-1]:
        if column not in header:
            raise InputError(f"{path}: no column '{column}'; is it a result file of script 3?")
    if not path.read_bytes().endswith(b"\n"):
        raise InputError(
            f"{path}: the last row is cut off; complete it with script 3 and --continue_run"
        )
    results: list[Result] = []
    seen: set[int] = set()
    for position, cells in enumerate(table):
        where = f"{path}: row {position}"
        text = cells.get("Row", str(position))
        if not is_whole_number(text):
            raise InputError(
                f"{where}: '{text[:40]}' in column 'Row' is not a whole number; restore it"
            )
        row = int(text)
        if row in seen:
            raise InputError(f"{where}: 'Row' {row} appears twice; keep one of them")
        seen.add(row)
        named = RESULT_COLUMNS[2:6]
        values = [cells[column] for column in named]
        if not any(values):
            results.append(Result(row, cells["Caption"], cells["URL"], None, None, None, None))
            continue
        sets, scores = [], []
        for column, value in zip(named[0::2], values[0::2], strict=True):
            neurons = parse_neurons(value, where=f"{where}, '{column}'")
            if widths is not None:
                check_neurons(neurons, widths, where=f"{where}, '{column}'")
            sets.append(neurons)
        for column, value in zip(named[1::2], values[1::2], strict=True):
            scores.append(_parse_score(value, where=f"{where}, '{column}'"))
        results.append(
            Result(row, cells["Caption"], cells["URL"], sets[0], scores[0], sets[1], scores[1])
        )
    layer_counts = {len(s) for r in results for s in (r.initial, r.refined) if s is not None}
    if len(layer_counts) > 1:
        raise InputError(
            f"{path}: rows with {' and '.join(map(str, sorted(layer_counts)))} layers; "
            "one file belongs to one model"
        )
    return results


def rows_of_type(
    kind: str, prompts: Sequence[Prompt], results: Sequence[Result], *, dataset: Path, path: Path
) -> set[int]:
    """Rows of this type, as the prompt file ``dataset`` tells. InputError where it has none, or
    where the results, of the file ``path``, are not of this prompt file."""
    captions = {prompt.row: prompt.caption for prompt in prompts}
    for result in results:
        if captions.get(result.row) != result.caption:
            raise InputError(
                f"{path}: row {result.row} is not the caption of that row in {dataset}; name the "
                "prompt file of these results with -d"
            )
    rows = {prompt.row for prompt in prompts if prompt.type == kind}
    if not rows:
        raise InputError(
            f"{dataset}: no prompt of type {kind} in column 'type'; leave out --memorization_type "
            "or name another file with -d"
        )
    return rows


def result_cells(result: Result) -> list[object]:
    """The cells of one row of the result CSV, in the order of ``RESULT_COLUMNS``."""

    def cells(neurons: NeuronSet | None, score: float | None) -> list[object]:
        if neurons is None or score is None:
            return ["", ""]
        return [format_neurons(neurons), f"{score:.6f}"]

    return [
        result.caption,
        result.url,
        *cells(result.initial, result.initial_score),
        *cells(result.refined, result.refined_score),
        result.row,
    ]


def counted(sets: Iterable[NeuronSet]) -> Counter[tuple[int, int]]:
    """(layer, neuron) -> in how many sets it is."""
    return Counter((l, i) for neurons in sets for l, layer in enumerate(neurons) for i in layer)


def by_frequency(counts: Counter[tuple[int, int]]) -> list[tuple[int, int]]:
    """Most frequent first; ties by layer, then index, so that the order never depends on the
    file's."""
    return sorted(counts, key=lambda neuron: (-counts[neuron], neuron))


def _as_set(neurons: Iterable[tuple[int, int]], layers: int) -> NeuronSet:
    columns: list[set[int]] = [set() for _ in range(layers)]
    for layer, index in neurons:
        columns[layer].add(index)
    return [sorted(layer) for layer in columns]


def most_frequent_neurons(sets: Sequence[NeuronSet], k: int) -> NeuronSet:
    """The k neurons that occur in most sets. InputError if fewer than k occur at all."""
    ranked = by_frequency(counted(sets))
    if len(ranked) < k:
        raise InputError(f"only {len(ranked)} different neurons were located, {k} asked for")
    return _as_set(ranked[:k], len(sets[0]))


def most_frequent_neurons_per_layer(sets: Sequence[NeuronSet], k: int) -> NeuronSet:
    """In each layer the k neurons that occur in most sets (all of them where fewer than k occur).
    InputError if no layer has k."""
    layers = len(sets[0]) if sets else 0
    counts = counted(sets)
    ranked = [[n for n in by_frequency(counts) if n[0] == layer] for layer in range(layers)]
    most = max(map(len, ranked), default=0)
    if most < k:
        raise InputError(f"no layer has more than {most} located neurons, {k} asked for")
    return _as_set((n for layer in ranked for n in layer[:k]), layers)


def most_frequent_sets(sets: Sequence[NeuronSet], k: int) -> NeuronSet:
    """The union of the k whole sets that occur for most prompts. InputError if fewer differ."""
    counts = Counter(tuple(tuple(layer) for layer in neurons) for neurons in sets if size(neurons))
    ranked = sorted(counts, key=lambda whole: (-counts[whole], whole))
    if len(ranked) < k:
        raise InputError(f"only {len(ranked)} different neuron sets were located, {k} asked for")
    chosen = ((l, i) for whole in ranked[:k] for l, layer in enumerate(whole) for i in layer)
    return _as_set(chosen, len(sets[0]))


def random_neurons(
    like: NeuronSet, located: Sequence[NeuronSet], widths: Sequence[int], generator: random.Random
) -> NeuronSet:
    """As many neurons as ``like`` has, from the same layers, none of them in any ``located`` set.

    The control of paper table 1. InputError if a layer has too few others left.
    """
    drawn: NeuronSet = []
    for layer, columns in enumerate(like):
        taken = {index for neurons in located for index in neurons[layer]}
        others = [index for index in range(widths[layer]) if index not in taken]
        if len(others) < len(columns):
            raise InputError(
                f"layer {layer}: {len(columns)} random neurons asked for, but only {len(others)} "
                "of its neurons were located for no prompt; block fewer"
            )
        drawn.append(sorted(generator.sample(others, len(columns))))
    return drawn
