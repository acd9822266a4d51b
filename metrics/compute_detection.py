r"""Detection: do the scores of memorized prompts stand out from those of other prompts?

The score of a prompt is its largest pairwise SSIM (paper Sec. 3.1), or that of another detector.
Over all memorized prompts, and over VM and TM alone, each against all other prompts: AUROC,
accuracy, and the true positive rate at 1% false positives, in the two readings in use (at the last
ROC point below 1%; at the point nearest to 1%), with 95% percentile bootstrap intervals (they have
no width where all resamples agree, which is no certainty). "accuracy" is taken at the best
threshold of its own group, "at common" at the one that is best for all memorized prompts.

Reads:   for either kind of prompt a threshold file of script 2 (.pt), a scan of script 3
         (--detect_only), a table of compute_detector_scores.py (--score_column names another
         of its readings), or any CSV with ';', a score column and, to join types, a column Row
Writes:  --output, a row a prompt; beside it the summary (.json), *_roc.png and *_histogram.png

Examples:
  python metrics/compute_detection.py --memorized=results/memorization_scores_tiny.csv \
      --unmemorized=statistics/pairwise_ssim_tiny.pt -p=prompts/tiny_memorized_prompts.csv
  python metrics/compute_detection.py --memorized=results/memorization_scores_v1_4.csv \
      --unmemorized=results/scores_unmemorized.csv -p=prompts/memorized_laion_prompts.csv
"""

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# `python metrics/compute_detection.py` puts metrics/ on the path, not the project.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from utils import cli, metric_runs
from utils.errors import InputError
from utils.files import CAPTION_COLUMN, is_whole_number, read_json, read_table
from utils.thresholds import BELONGS_TO

COLUMNS = ("Row", "Caption", "Set", "type", "Score")
SCORE_COLUMN = "Score"  # of the tables that scripts of the project write


@dataclass(frozen=True)
class Scored:
    """A prompt with its score; None where it was left undecided."""

    row: int
    caption: str
    score: float | None


def main(args: argparse.Namespace) -> int:
    # Check.
    check_options(args)
    files = {"memorized": args.memorized, "unmemorized": args.unmemorized}
    check_files(files, args.score_column)
    prompts = {name: read_scores(path, args.score_column) for name, path in files.items()}
    types = read_types(args, prompts["memorized"])
    output = metric_runs.output_path(args, "detection", args.memorized)
    pictures = [output.with_name(f"{output.stem}_{kind}.png") for kind in ("roc", "histogram")]
    run = metric_runs.MetricRun(
        "Detection",
        output,
        args,
        settings={
            "score_column": args.score_column,
            "bootstrap": args.bootstrap,
            "caption_column": args.caption_column,
        },
        files=[*files.values(), *([args.prompts] if args.prompts else [])],
        others=pictures,
    )
    if run.over() or not run.team.first:  # there is nothing to share
        return 0

    # Evaluate.
    import numpy as np

    from utils.detection_metrics import accuracy_at, best_accuracy, bootstrap, evaluate, roc
    from utils.figures import roc_curves, score_distributions, write_figure

    known = {
        name: np.array([prompt.score for prompt in some if prompt.score is not None])
        for name, some in prompts.items()
    }
    for name, scores in known.items():
        if not len(scores):
            raise InputError(f"{files[name]}: no prompt in it has a score")
    groups = {"all": known["memorized"]}
    for kind in sorted(set(types.values()) - {""}, reverse=True):
        own = [p.score for p in prompts["memorized"] if types.get(p.row) == kind]
        if any(score is not None for score in own):
            groups[kind] = np.array([score for score in own if score is not None])
    others = known["unmemorized"]
    curves = {kind: roc(scores, others) for kind, scores in groups.items()}
    common = best_accuracy(curves["all"])[1]
    found: dict[str, dict[str, Any]] = {}
    for kind, scores in groups.items():
        values = evaluate(scores, others)
        found[kind] = {
            "memorized": len(scores),
            "unmemorized": len(others),
            **values,
            "accuracy_at_common": accuracy_at(curves[kind], common),
            "intervals": bootstrap(scores, others, resamples=args.bootstrap),
        }

    # Write.
    rows = [
        [p.row, p.caption, name, types.get(p.row, "") if name == "memorized" else "", shown(p)]
        for name, some in prompts.items()
        for p in some
    ]
    against = {kind: (scores, others) for kind, scores in groups.items()}
    best = {"best accuracy": common} if math.isfinite(common) else {}
    histogram = score_distributions(
        {name: scores.tolist() for name, scores in known.items()}, best, score="score"
    )
    run.write_rows(COLUMNS, rows)
    for figure, path in zip((roc_curves(against), histogram), pictures, strict=True):
        write_figure(figure, path)
    missing = {
        str(files[name]): [f"row {p.row}" for p in some if p.score is None]
        for name, some in prompts.items()
    }
    run.finish(
        table(found),
        detection=found,
        common_threshold=common if math.isfinite(common) else None,
        missing=missing,
    )
    return 0


def shown(prompt: Scored) -> str:
    return "" if prompt.score is None else f"{prompt.score:.6f}"


def check_options(args: argparse.Namespace) -> None:
    """Fills in the columns. InputError for one that nothing is read from."""
    if args.caption_column is not None and args.prompts is None:
        raise InputError("--caption_column has no effect without -p; name the prompt file")
    files = (args.memorized, args.unmemorized)
    if args.score_column is not None and not any(path.suffix == ".csv" for path in files):
        raise InputError("--score_column has no effect without a CSV of scores; leave it out")
    args.caption_column = args.caption_column or CAPTION_COLUMN
    args.score_column = args.score_column or SCORE_COLUMN


def check_files(files: dict[str, Path], column: str) -> None:
    """InputError for a file that is missing or has no scores; where their records say so, for one
    that is not finished, and for two that were measured with different models or settings."""
    for path in files.values():
        if path.suffix == ".csv":
            header, _ = read_table(path)
            if column not in header:
                raise InputError(f"{path}: no column '{column}'; name it with --score_column")
        elif not path.is_file():
            raise InputError(f"{path}: no such file; make it with script 2 or 3")
    places = {path: path.with_suffix(".json") for path in files.values()}
    records = {path: read_json(place) for path, place in places.items() if place.is_file()}
    for path, record in records.items():
        if not record.get("finished", True):
            raise InputError(
                f"{path}: the run is not finished; complete it with --continue_run of the script "
                "that makes it"
            )
    if len(records) < 2:
        return
    first, second = (record.get("settings", {}) for record in records.values())
    pairs = {
        name: (first.get(name), second.get(name)) for name in (*BELONGS_TO, "samples_per_prompt")
    }
    # scripts 2 and 3 have one detector and do not name it
    pairs["detector"] = tuple(one.get("detector", "pairwise_ssim") for one in (first, second))
    models = [record.get("model", {}) for record in records.values()]
    same = ("sha256",) if all(model.get("sha256") for model in models) else ("id", "revision")
    pairs |= {f"model {name}": (models[0].get(name), models[1].get(name)) for name in same}
    for name, (there, here) in pairs.items():
        if there != here:
            raise InputError(
                f"{files['unmemorized']}: measured with {name} = {here}, the memorized prompts "
                f"with {there}; such scores cannot be compared, measure one of them again"
            )


def read_types(args: argparse.Namespace, scored: Sequence[Scored]) -> dict[int, str]:
    """Row -> "VM", "TM" or "" of the memorized prompts; nothing without ``-p``. InputError for a
    prompt file of other prompts."""
    if args.prompts is None:
        return {}
    args.rows, args.mem_type = None, None
    prompts = {prompt.row: prompt for prompt in metric_runs.read_targets(args)}
    if args.memorized.suffix == ".csv":
        header, _ = read_table(args.memorized)
        if not {"Row", "Caption"} & set(header):
            raise InputError(
                f"{args.memorized}: without a column 'Row' or 'Caption' its prompts cannot be told "
                "apart; add one, or leave out -p"
            )
    for one in scored:
        if one.row not in prompts:
            raise InputError(
                f"{args.prompts}: has no row {one.row}, which {args.memorized} scores; name the "
                "prompt file of these scores"
            )
        if one.caption and one.caption != prompts[one.row].caption:
            raise InputError(
                f"{args.prompts}: row {one.row} has another caption than in {args.memorized}; name "
                "the prompt file of these scores"
            )
    return {row: prompt.type for row, prompt in prompts.items()}


def read_scores(path: Path, column: str) -> list[Scored]:
    """One score for each prompt: the largest of its pairs, or the cell of a CSV. InputError for
    what is neither."""
    if path.suffix == ".csv":
        _, table = read_table(path)
        for place, cells in enumerate(table):
            text = cells.setdefault("Row", str(place))
            if not is_whole_number(text):
                raise InputError(f"{path}: '{cells['Row']}' in column 'Row' is not a whole number")
        return [
            Scored(int(cells["Row"]), cells.get("Caption", ""), number(cells, column, path))
            for cells in table
        ]
    import torch

    try:
        content = torch.load(path, weights_only=True, map_location="cpu")
    except Exception as error:  # torch raises whatever its unpickler meets
        raise InputError(f"{path}: not a file of script 2 ({type(error).__name__})") from None
    scores = content.get("scores") if isinstance(content, dict) else None
    if not isinstance(scores, torch.Tensor) or scores.ndim != 2 or not scores.shape[1]:
        raise InputError(f"{path}: no scores (prompts x pairs) in it; make it with script 2")
    rows = content.get("rows", torch.arange(len(scores))).tolist()
    largest = [max(pairs) if all(map(math.isfinite, pairs)) else None for pairs in scores.tolist()]
    return [Scored(row, "", score) for row, score in zip(rows, largest, strict=True)]


def number(cells: dict[str, str], column: str, path: Path) -> float | None:
    """A cell's number; None if the cell is empty. InputError if it holds anything else."""
    if not cells[column]:
        return None
    try:
        value = float(cells[column])
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise InputError(f"{path}: '{cells[column][:40]}' in column '{column}' is not a number")
    return value


def table(found: dict[str, dict[str, Any]]) -> str:
    """A line for each group of memorized prompts."""
    heads = {
        "auroc": "AUROC",
        "accuracy": "accuracy",
        "tpr_at_1_fpr_below": "TPR, FPR < 1%",
        "tpr_at_1_fpr_nearest": "TPR, FPR ~ 1%",
    }
    lines = [f"{'Detection':<9} {'n':>6}  " + "".join(f"{head:<24}" for head in heads.values())]
    lines[0] += "accuracy at common"
    for kind, values in found.items():
        cells = [
            f"{values[name]:.4f} ({low:.4f}-{high:.4f})"
            for name in heads
            for low, high in [values["intervals"][name]]
        ]
        line = f"{kind:<9} {values['memorized']:>6}  " + "".join(f"{c:<24}" for c in cells)
        lines.append(f"{line}{values['accuracy_at_common']:.4f}")
    lines.append(f"against {found['all']['unmemorized']} unmemorized prompts")
    return "\n".join(lines)


def parse_args() -> argparse.Namespace:
    parser = cli.make_parser(__doc__)
    for name in ("memorized", "unmemorized"):
        parser.add_argument(
            f"--{name}",
            type=Path,
            required=True,
            metavar="PT|CSV",
            help=f"scores of {name} prompts",
        )
    parser.add_argument(
        "-p",
        "--prompts",
        type=Path,
        metavar="CSV",
        help="prompt file of the memorized prompts, whose column 'type' says VM and TM",
    )
    parser.add_argument(
        "--caption_column",
        type=cli.column,
        metavar="NAME",
        help=f"column of -p that holds the captions (default: {CAPTION_COLUMN})",
    )
    parser.add_argument(
        "--score_column",
        type=cli.column,
        metavar="NAME",
        help=f"column of a CSV; higher: memorized (default: {SCORE_COLUMN})",
    )
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
