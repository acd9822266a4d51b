r"""What kind of memorization a prompt shows: verbatim (VM), template (TM), or none.

VM if the largest SSCD similarity of the prompt's generated pictures with its training image is
above 0.7, TM otherwise (paper C.1). With --scores, "none" where script 3 found no seed row above
the pairwise threshold. Empty where neither can be told: no training image, no picture, or a prompt
that script 3 left undecided.

With --calibrated also a p-value a prompt, by rank among pictures that were never trained on
(--null), and which prompts are memorized at a false discovery rate of --fdr (docs/calibration.md).

Reads:   a prompt file, pictures generated with all neurons on, training images, and for "none" a
         scan or a result file of script 3; with --calibrated the null: generated pictures of other
         prompts and never-trained pictures to compare them with, or a table of their scores
Writes:  --output, a row a prompt with its new type (a prompt file again, if all rows were chosen),
         and its summary (.json) beside it, which counts the types against those of the prompt file

Examples:
  python metrics/classify_memorization.py -p=prompts/memorized_laion_prompts.csv \
      -f=generated_images_unblocked -r=original_images
  python metrics/classify_memorization.py -p=prompts/tiny_memorized_prompts.csv \
      -f=generated_images/tiny_unblocked -r=tiny_model/training_images \
      --scores=results/memorization_scores_tiny.csv
  python metrics/classify_memorization.py -p=prompts/memorized_laion_prompts.csv \
      -f=generated_images_unblocked -r=original_images --calibrated \
      --null=generated_images_unmemorized --null_reference=never_trained_images
"""

import argparse
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

# `python metrics/classify_memorization.py` puts metrics/ on the path, not the project.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from utils import cli, metric_runs, never_trained
from utils.errors import InputError
from utils.files import Prompt, is_whole_number, read_table
from utils.neuron_sets import read_results

COLUMNS = ("Caption", "URL", "type", "Max SSCD", "Samples", "Row")
UNKNOWN = ""


def main(args: argparse.Namespace) -> int:
    # Check.
    metric_runs.check_device(args)
    prompts = metric_runs.read_targets(args)
    spaces = metric_runs.chosen_spaces(args)
    if len(spaces) > 1:
        raise InputError("--sscd_protocol=all: a prompt has one type; choose one protocol")
    seen = {} if args.scores is None else read_seen(args.scores, prompts)
    rows = [prompt.row for prompt in prompts]
    generated = metric_runs.generated(args.folder, rows, args.num_samples)
    originals = metric_runs.references(args.reference, rows, args.num_ref_samples)
    ((_, space),) = spaces.items()
    never = never_trained.read(args, generated, originals, space)
    run = metric_runs.MetricRun(
        "Classification",
        metric_runs.output_path(args, "classification", args.folder),
        args,
        settings=metric_runs.settings(
            args,
            num_samples=args.num_samples or generated.samples,
            copy_threshold=args.copy_threshold,
            **({"fdr": never.fdr} if never else {}),
        ),
        spaces=spaces.values(),
        files=[
            args.prompts,
            *([args.scores] if args.scores else []),
            *(never.files if never else []),
        ],
        folders=[generated, originals, *(never.folders if never else [])],
    )
    if run.over():
        return 0

    # Embed and classify.
    from utils.calibration import CALIBRATED, Compared, calibrate, said
    from utils.prompt_scores import score, to_all, to_nearest

    embedder = metric_runs.embedder(space, args, run.team)
    corrupt: dict[str, str] = {}
    first, second = (pictures.embed(embedder, corrupt) for pictures in (generated, originals))
    kinds: list[str] = []
    table: list[list[object]] = []
    compared: list[Compared] = []  # of each prompt
    for prompt in prompts:
        references = list(second.get(prompt.row, {}).values())
        nearest = to_nearest(first.get(prompt.row, {}), references)
        largest = score(nearest, "Max")
        kinds.append(kind_of(largest, seen.get(prompt.row, True), args.copy_threshold))
        shown = "" if largest is None else f"{largest:.6f}"
        table.append([prompt.caption, prompt.url, kinds[-1], shown, len(nearest), prompt.row])
        shown_samples = first.get(prompt.row, {})
        compared.append(Compared(sorted(shown_samples), to_all(shown_samples, references)))
    columns, notes, found = COLUMNS, [], {}
    if never:
        calibrated, found = calibrate(compared, never.null(embedder, corrupt), never.fdr)
        columns += CALIBRATED
        table = [[*cells, *more] for cells, more in zip(table, calibrated, strict=True)]
        notes = said(found)

    # Write.
    if not run.team.first:
        return 0
    counts = crossed([prompt.type for prompt in prompts], kinds)
    undecided = [row for row in rows if seen.get(row, True) is None]
    run.write_rows(columns, table)
    run.finish(
        "\n".join([format_counts(counts, args.prompts.name), *notes]),
        **({"calibration": found} if never else {}),
        types=dict(Counter(kind or "unknown" for kind in kinds)),
        against_prompt_file=counts,
        corrupt=corrupt,
        undecided_rows=undecided,
    )
    return 0


def kind_of(largest: float | None, seen: bool | None, threshold: float) -> str:
    """Type from the largest similarity (None: unknown) and from whether script 3 saw memorization
    (None: undecided)."""
    if seen is None:
        return UNKNOWN
    if not seen:
        return "none"
    if largest is None:
        return UNKNOWN
    return "VM" if largest > threshold else "TM"


def read_seen(path: Path, prompts: Sequence[Prompt]) -> dict[int, bool | None]:
    """Row -> whether any seed row was above the pairwise threshold, None where undecided, from a
    scan (``Seed Rows``) or a result file of script 3. InputError if it belongs to other prompts."""
    header, table = read_table(path)
    captions: dict[int, str] = {}
    seen: dict[int, bool | None] = {}
    if "Seed Rows" in header and "Row" in header:
        for cells in table:
            numbers = cells["Row"], cells["Seed Rows"] or "0"
            if not all(map(is_whole_number, numbers)):
                raise InputError(f"{path}: 'Row' and 'Seed Rows' must be whole numbers; restore it")
            row = int(cells["Row"])
            captions[row] = cells.get("Caption", "")
            seen[row] = int(cells["Seed Rows"]) > 0 if cells["Seed Rows"] else None
    else:
        for result in read_results(path):
            captions[result.row] = result.caption
            seen[result.row] = None if result.initial is None else result.memorized
    for prompt in prompts:
        if prompt.row not in seen:
            raise InputError(f"{path}: no row {prompt.row}; scan all prompts, or choose --rows")
        if captions[prompt.row] != prompt.caption:
            raise InputError(
                f"{path}: row {prompt.row} has another caption than in the prompt file; "
                "the files belong to different prompts"
            )
    return seen


def crossed(before: Sequence[str], after: Sequence[str]) -> dict[str, dict[str, int]]:
    """Type in the prompt file -> type found -> prompts."""
    counts = Counter(zip(before, after, strict=True))
    found = ["VM", "TM", "none", UNKNOWN]
    return {
        old or "unknown": {new or "unknown": counts[old, new] for new in found}
        for old in sorted(set(before), reverse=True)
    }


def format_counts(counts: Mapping[str, Mapping[str, int]], name: str) -> str:
    """A line for each type of the prompt file, a column for each type found."""
    width = max(len(f"type in {name}"), 8)
    found = list(next(iter(counts.values())))
    lines = [f"{f'type in {name}':<{width}}" + "".join(f"{kind:>9}" for kind in found)]
    lines += [
        f"{old:<{width}}" + "".join(f"{row[kind]:>9}" for kind in found)
        for old, row in counts.items()
    ]
    return "\n".join(lines)


def parse_args() -> argparse.Namespace:
    parser = cli.make_parser(__doc__)
    metric_runs.add_image_options(parser, reference="training images, by row")
    parser.add_argument(
        "--num_ref_samples",
        type=cli.whole_number(1, 1000),
        metavar="INT",
        help="training images of each prompt that count, by name (default: all)",
    )
    parser.add_argument(
        "--scores", type=Path, metavar="CSV", help="scan (--detect_only) or result file of script 3"
    )
    parser.add_argument(
        "--copy_threshold",
        type=cli.number(-1, 1),
        default=0.7,
        metavar="FLOAT",
        help="similarity above which a picture is a copy (paper C.1)",
    )
    never_trained.add_options(parser)
    metric_runs.add_network_options(parser, methods=("sscd",))
    metric_runs.add_run_options(parser)
    return parser.parse_args()


if __name__ == "__main__":
    cli.run(main, parse_args(), lower="--batch_size")
