r"""Can the edited rows of a checkpoint be told from its weights alone? AUROC over rows.

A row's score is by how much it stands out in its layer: length, exact zeros, likeness to another
row, kurtosis ("rows"); and the length of the column of `to_out` that it is written with ("rows and
columns"). The neurons of -f or --neurons are what is to be found, all others of the same layers are
the rest. 0.5 is chance where both would look alike unedited; below that baseline an edit shows as
well, to whoever looks for rows that are too usual. On a model before its edit the same figure says
how far its memorizing neurons stand out by themselves; where they do, an edit of ordinary rows
(--random_neurons of script 5 and here, with the same seed) says what the edit itself shows.

Reads:   the weights of --version; which neurons were edited: a result file, or the record of the
         edit
Writes:  --output, a row a neuron, and its summary (.json) beside it

Examples:
  python metrics/detect_edited_rows.py --version=edited_models/tiny_zero \
      --neurons=edited_models/tiny_zero.json
  python metrics/detect_edited_rows.py --version=tiny -f=tiny_model/planted_neurons.csv
"""

import argparse
import sys
from pathlib import Path

# `python metrics/detect_edited_rows.py` puts metrics/ on the path, not the project.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from utils import cli, metric_runs, records
from utils.edit_options import add_neuron_options, read_chosen
from utils.edited_weights import StoredWeights, revision_of, unet_files, unet_folder
from utils.editing import value_layer_names
from utils.errors import InputError
from utils.neuron_sets import check_neurons, size
from utils.value_layers import SEARCHED_STAGES
from utils.versions import resolve

SHOWN = ("auroc", "accuracy", "tpr_at_1_fpr_below")


def main(args: argparse.Namespace) -> int:
    # Check.
    source = resolve(args.version, args.revision, args.blocks or SEARCHED_STAGES)
    chosen = read_chosen(args, source)
    run = metric_runs.MetricRun(
        "Edited rows",
        args.output or Path(f"results/scores/edited_rows_{source.tag}.csv"),
        args,
        settings={
            "neurons_of": "initial_neurons" if args.initial_neurons else "refined_neurons",
            "random_neurons": args.random_neurons,
            "rows": args.rows,
            "memorization_type": args.memorization_type,
            "bootstrap": args.bootstrap,
        },
        source=source,
        files=chosen.files,
    )
    if run.over() or not run.team.first:  # there is nothing to share
        return run.exit_code()

    # Score.
    import numpy as np

    from utils.detection_metrics import bootstrap, evaluate
    from utils.edit_detector import DETECTORS, row_statistics, score_rows

    folder = unet_folder(source)
    commit = revision_of(source, folder)
    records.check_commits(run.record.content["inputs"], source.identity, commit)
    weights = StoredWeights(unet_files(folder))
    names = value_layer_names(weights, source.stages)
    widths = [weights.shape(f"{name}.weight")[0] for name in names]
    check_neurons(chosen.neurons, widths, where=str(chosen.files[0]))
    table: list[list[object]] = []
    scores: dict[str, list[float]] = {detector: [] for detector in DETECTORS}
    for number, name in enumerate(names):
        output = f"{name.removesuffix('to_v')}to_out.0.weight"
        value, written = (weights[n].float().numpy() for n in (f"{name}.weight", output))
        if not (np.isfinite(value).all() and np.isfinite(written).all()):
            raise InputError(f"{name}: weights that are not finite; restore the model")
        statistics = row_statistics(value, written)
        found = {detector: score_rows(statistics, DETECTORS[detector]) for detector in DETECTORS}
        for detector in DETECTORS:
            scores[detector] += found[detector][0].tolist()
        for i in range(len(value)):
            cells = [c for s, by in found.values() for c in (f"{s[i]:.6f}", by[i])]
            table.append([number, i, int(i in chosen.neurons[number]), *cells])
    edited = np.array([row[2] for row in table], dtype=bool)
    if edited.all():
        raise InputError(f"{chosen.files[0]}: names every neuron; there are no others to compare")

    results = {}
    for detector in DETECTORS:
        both = np.array(scores[detector])
        groups = both[edited], both[~edited]
        results[detector] = {
            **evaluate(*groups),
            "intervals": bootstrap(*groups, resamples=args.bootstrap),
        }

    # Write.
    columns = [c for detector in DETECTORS for c in (f"Score by {detector}", f"{detector} by")]
    run.write_rows(("Layer", "Neuron", "Edited", *columns), table)
    lines = [f"{'Edited rows':<18}" + "".join(f"{name:<26}" for name in SHOWN)]
    for detector, values in results.items():
        cells = [
            f"{values[name]:.4f} ({low:.4f}-{high:.4f})"
            for name in SHOWN
            for low, high in [values["intervals"][name]]
        ]
        lines.append(f"{detector:<18}" + "".join(f"{cell:<26}" for cell in cells))
    lines.append(f"{size(chosen.neurons)} edited rows among {len(table)}")
    if chosen.undecided:
        lines.append(
            f"{len(chosen.undecided)} prompts were left undecided by script 3, their neurons are "
            f"not among the edited: {chosen.undecided}"
        )
    run.finish(
        "\n".join(lines),
        detection=results,
        edited=size(chosen.neurons),
        rows=len(table),
        undecided_rows=chosen.undecided,
    )
    return 1 if chosen.undecided else 0


def parse_args() -> argparse.Namespace:
    parser = cli.make_parser(__doc__)
    group = parser.add_argument_group("model")
    group.add_argument(
        "-v",
        "--version",
        default="v1-4",
        metavar="NAME|HUB_ID|DIR",
        help="short name, hub id or local diffusers folder",
    )
    group.add_argument(
        "--revision", metavar="REV", help="branch, tag or commit of a hub repository"
    )
    cli.add_block_option(parser)
    add_neuron_options(parser)
    parser.add_argument(
        "--bootstrap",
        type=cli.whole_number(100, 1_000_000),
        default=2000,
        metavar="INT",
        help="resamples behind an interval",
    )
    metric_runs.add_output_options(parser)
    return parser.parse_args()


if __name__ == "__main__":
    cli.run(main, parse_args(), lower=None)
