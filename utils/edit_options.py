"""Which neurons are meant: the options that the edit and its detector share, and what they name.

Public: ``Chosen``, ``add_neuron_options``, ``read_chosen``.
"""

import argparse
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from utils import cli
from utils.editing import EditedPrompt
from utils.errors import InputError
from utils.files import read_json, read_prompts
from utils.neuron_sets import (
    NeuronSet,
    check_neurons,
    parse_neurons,
    random_neurons,
    read_results,
    rows_of_type,
    size,
)
from utils.records import check_result_record
from utils.versions import Source


@dataclass(frozen=True)
class Chosen:
    """``neurons``: the union; ``prompts``: whose sets it is made of, none for a bare set;
    ``undecided``: rows that script 3 left so; ``files``: what was read."""

    neurons: NeuronSet
    prompts: list[EditedPrompt]
    undecided: list[int]
    files: list[Path]


def add_neuron_options(parser: argparse.ArgumentParser) -> None:
    """``-f --initial_neurons --refined_neurons --random_neurons --neurons -d --memorization_type
    --rows``."""
    group = parser.add_argument_group("neurons")
    group.add_argument(
        "-f",
        "--result_file",
        type=Path,
        metavar="CSV",
        help="result file of script 3 (default: results/memorization_statistics_<version>.csv)",
    )
    sets = group.add_mutually_exclusive_group()
    sets.add_argument(
        "--refined_neurons",
        action="store_true",
        help="the union of the prompts' refined sets (the default)",
    )
    sets.add_argument(
        "--initial_neurons", action="store_true", help="the union of their initial sets"
    )
    sets.add_argument(
        "--random_neurons",
        type=cli.SEED,
        metavar="SEED",
        help="control: in the place of each neuron of the refined sets another one of its layer, "
        "drawn with this seed among those that were located for no prompt",
    )
    sets.add_argument(
        "--neurons",
        type=Path,
        metavar="JSON",
        help="these instead: a list of lists of columns, one for each value layer, or the record "
        "of an edit",
    )
    group.add_argument(
        "--rows", type=cli.row_list, metavar="LIST", help="only these prompts, e.g. 0-99,205"
    )
    group.add_argument(
        "--memorization_type", choices=("VM", "TM"), help="only verbatim or only template prompts"
    )
    group.add_argument(
        "-d",
        "--dataset",
        type=Path,
        metavar="CSV",
        help="prompt file whose column 'type' --memorization_type asks (default: the version's)",
    )


def read_chosen(args: argparse.Namespace, source: Source) -> Chosen:
    """What the options name. InputError for a set that is empty or does not fit the model, for a
    result file of another model or of an unfinished run, and for rows that it does not have."""
    if args.neurons is not None:
        for name in ("result_file", "rows", "memorization_type", "dataset"):
            if getattr(args, name) is not None:
                raise InputError(f"--{name} has no effect with --neurons; leave it out")
        neurons = _read_set(args.neurons)
        if source.widths is not None:
            check_neurons(neurons, source.widths, where=str(args.neurons))
        chosen = Chosen(neurons, [], [], [args.neurons])
    else:
        chosen = _read_result_file(args, source)
    if not size(chosen.neurons):
        raise InputError(
            f"{chosen.files[0]}: no neuron was located for these prompts; choose others"
        )
    return chosen


def _read_set(path: Path) -> NeuronSet:
    try:
        text = path.read_text(encoding="utf-8")
    except (FileNotFoundError, IsADirectoryError):
        raise InputError(f"{path}: no such file; it holds a list of lists of neurons") from None
    except UnicodeDecodeError:
        raise InputError(f"{path}: not UTF-8 text; write [[1, 2], [], ...]") from None
    if text.lstrip().startswith("{"):
        text = json.dumps(read_json(path).get("neurons"))
    return parse_neurons(text, where=str(path))


def _read_result_file(args: argparse.Namespace, source: Source) -> Chosen:
    path = args.result_file or source.results
    if args.dataset is not None and args.memorization_type is None:
        raise InputError(f"--dataset {args.dataset} has no effect without --memorization_type")
    if not path.is_file():
        raise InputError(f"{path}: no such result file; make it with script 3 or name one with -f")
    check_result_record(path, source, protocol=None)
    results = read_results(path, widths=source.widths)
    files = [path]
    known = {result.row for result in results}
    unknown = [row for row in args.rows or [] if row not in known]
    if unknown:
        raise InputError(
            f"{path}: no row {unknown[0]}, the last one is {max(known, default=-1)}; mend --rows"
        )
    chosen = [result for result in results if args.rows is None or result.row in args.rows]
    if args.memorization_type is not None:
        dataset = args.dataset or Path(source.defaults.memorized_prompts)
        typed = rows_of_type(
            args.memorization_type, read_prompts(dataset), chosen, dataset=dataset, path=path
        )
        chosen = [result for result in chosen if result.row in typed]
        files.append(dataset)
    prompts, undecided = [], []
    for result in chosen:
        neurons = result.initial if args.initial_neurons else result.refined
        if neurons is None:
            undecided.append(result.row)
        elif size(neurons):
            prompts.append(EditedPrompt(result.row, result.caption, neurons))
    if args.random_neurons is not None and prompts:
        located = [result.refined for result in results if result.refined is not None]
        prompts = _ordinary(prompts, located, source, args.random_neurons)
    return Chosen(_union(prompts), prompts, undecided, files)


def _union(prompts: Sequence[EditedPrompt]) -> NeuronSet:
    layers = len(prompts[0].neurons) if prompts else 0
    return [sorted({i for p in prompts for i in p.neurons[layer]}) for layer in range(layers)]


def _ordinary(
    prompts: Sequence[EditedPrompt], located: Sequence[NeuronSet], source: Source, seed: int
) -> list[EditedPrompt]:
    """The prompts with an ordinary neuron in the place of each of theirs, the same one wherever it
    is shared. InputError where a layer has too few, or the model must be loaded to tell."""
    if source.widths is None:
        raise InputError(
            f"--random_neurons: how many neurons {source.id} has is known once it is here; name "
            "its folder with --version"
        )
    union = _union(prompts)
    drawn = random_neurons(union, located, source.widths, random.Random(seed))
    other = [dict(zip(own, new, strict=True)) for own, new in zip(union, drawn, strict=True)]
    return [
        replace(p, neurons=[sorted(other[n][i] for i in own) for n, own in enumerate(p.neurons)])
        for p in prompts
    ]
