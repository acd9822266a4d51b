"""What edits of a model come to, one line an edit: copies left, other pictures, what weights show.

Per run, from the summaries that runs/tiny_edits.sh (or the same commands on another model) left:
memorized prompts that still give a copy (SSCD_Orig above 0.7), pictures that are one, SSCD_Orig,
copies under attack (metrics/attack.py: the start from the prompt, --attack_steps or as many as
there are; below the table whether the attack counts, by its controls), A_CLIP of memorized and of
unmemorized prompts, FID, KID and CLIP-FID on unmemorized prompts, and the AUROC of finding the
edited rows from the weights alone, and that of as many ordinary rows edited alike. A value that
nobody measured is an empty cell, and the command that makes it is named.

Reads:   summaries (.json) in --scores
Writes:  --output (CSV) and the same as Markdown beside it, anew each time; with --card the
         measured effect into the model cards of the edited folders

Examples:
  python metrics/make_edit_table.py --runs unedited zero mean camouflage \\
      -o=results/tables/edits_tiny.csv
  python metrics/make_edit_table.py --runs unedited zero --card=edited_models/tiny_ \\
      -o=results/tables/edits_tiny.csv
"""

import argparse
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

# `python metrics/make_edit_table.py` puts metrics/ on the path, not the project.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from utils import attack_runs, cli
from utils.errors import InputError
from utils.files import read_json, write_bytes, write_table
from utils.model_card import with_measurements
from utils.tables import check_table_output, markdown_table

UNEDITED, NEVER_TRAINED = "unedited", "never_trained"


@dataclass(frozen=True)
class Column:
    """``metric``: the summary <metric>_edit_<run>.json that ``value`` reads it from, made by
    ``command``."""

    title: str
    metric: str
    command: str
    value: Callable[[Mapping[str, Any]], str]


def share(kind: str) -> Callable[[Mapping[str, Any]], str]:
    def value(summary: Mapping[str, Any]) -> str:
        (copies,) = summary["copies"].values()
        return f"{copies['all'][kind]} of {copies['all'][f'of_{kind}']}"

    return value


def middle(score: str) -> Callable[[Mapping[str, Any]], str]:
    return lambda summary: number(summary["scores"][score]["all"]["median"])


def quality(metric: str) -> Callable[[Mapping[str, Any]], str]:
    return lambda summary: number(summary["quality"].get(metric))


def auroc(detector: str) -> Callable[[Mapping[str, Any]], str]:
    def value(summary: Mapping[str, Any]) -> str:
        found = summary["detection"][detector]
        low, high = found["intervals"]["auroc"]
        return f"{found['auroc']:.3f} ({low:.3f}-{high:.3f})"

    return value


def attacked(summary: Mapping[str, Any], steps: int) -> str:
    """Prompts with a copy after so many steps, or after the most there are below that."""
    own = [
        entry
        for entry in summary["summary"]
        if entry["start"] == "prompt" and 0 < entry["steps"] <= steps
    ]
    if not own:
        return ""
    last = max(own, key=lambda entry: entry["steps"])
    return f"{last['copied_prompts']} of {last['prompts']} ({last['steps']} steps)"


def number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


ORIGINAL, ALIGNMENT = "metrics/compute_sscd_orig.py", "metrics/compute_prompt_alignment.py"
QUALITY, ROWS = "metrics/compute_quality.py", "metrics/detect_edited_rows.py"
ATTACKED = "Copied Under Attack"


def columns(attack_steps: int) -> tuple[Column, ...]:
    under_attack = partial(attacked, steps=attack_steps)
    return (
        Column("Prompts Copied", "sscd_orig", ORIGINAL, share("prompts")),
        Column("Pictures Copied", "sscd_orig", ORIGINAL, share("pictures")),
        Column("SSCD_Orig", "sscd_orig", ORIGINAL, middle("Max")),
        Column(ATTACKED, "attack", "metrics/attack.py", under_attack),
        Column("A_CLIP", "alignment", ALIGNMENT, middle("Median")),
        Column("A_CLIP Unmemorized", "alignment_unmemorized", ALIGNMENT, middle("Median")),
        Column("FID Unmemorized", "quality", QUALITY, quality("fid")),
        Column("KID Unmemorized", "quality", QUALITY, quality("kid")),
        Column("CLIP-FID Unmemorized", "quality", QUALITY, quality("clip_fid")),
        Column("AUROC Rows", "edited_rows", ROWS, auroc("rows")),
        Column("AUROC Ordinary Rows", "edited_rows_ordinary", ROWS, auroc("rows")),
        Column("AUROC Rows And Columns", "edited_rows", ROWS, auroc("rows and columns")),
    )


def main(args: argparse.Namespace) -> int:
    twice = next((run for run in args.runs if args.runs.count(run) > 1), None)
    if twice is not None:
        raise InputError(f"--runs: {twice} is named twice")
    asked = columns(args.attack_steps)
    header = ["Edit", *(column.title for column in asked)]
    check_table_output(args.output, header)
    missing: dict[str, str] = {}  # what was not measured -> the command that measures it
    table: dict[str, list[str]] = {}
    for run in args.runs:
        table[run] = []
        for column in asked:
            path = args.scores / f"{column.metric}_edit_{run}.json"
            summary = finished(path)
            text = "" if summary is None else cell(column, summary, path)
            if not text:
                what = str(path) if summary is None else f"{column.title} in {path}"
                missing[what] = column.command
            table[run].append(text)
    cards = {run: card(args, run) for run in args.runs if args.card and run != UNEDITED}
    if not any(any(cells) for cells in table.values()):
        raise InputError(
            f"{args.scores}: no summary of any of these runs has a value; see runs/tiny_edits.sh"
        )
    text = markdown_table(header, [[run, *cells] for run, cells in table.items()])
    if any(cells[header.index(ATTACKED) - 1] for cells in table.values()):
        controls = (args.scores / f"attack_edit_{run}.csv" for run in (UNEDITED, NEVER_TRAINED))
        tables = (attack_runs.read_attack(p) if p.is_file() else None for p in controls)
        text += f"\n{attack_runs.verdict(*tables, args.attack_steps)}\n"
    write_table(args.output, header, [[run, *cells] for run, cells in table.items()])
    write_bytes(args.output.with_suffix(".md"), text.encode())
    for run, (path, before) in cards.items():
        lines = [[name, *cells] for name, cells in table.items() if name in (UNEDITED, run)]
        # a column a line: the card has two or three values of each
        turned = [list(line) for line in zip(header, *lines, strict=True)]
        measured = markdown_table(turned[0], turned[1:])
        write_bytes(path, with_measurements(before, measured).encode())
    print(text, end="")
    for what, command in missing.items():
        print(f"not measured: {what}; make it with {command}")
    print(f"Written to {args.output} and {args.output.with_suffix('.md')}.")
    return 0


def finished(path: Path) -> dict[str, Any] | None:
    """A summary, None where there is none or its run has not finished."""
    if not path.is_file():
        return None
    summary = read_json(path)
    return summary if summary.get("finished") else None


def cell(column: Column, summary: Mapping[str, Any], path: Path) -> str:
    try:
        return column.value(summary)
    except (LookupError, TypeError, ValueError, AttributeError):
        raise InputError(f"{path}: no summary of {column.command}; restore or remake it") from None


def card(args: argparse.Namespace, run: str) -> tuple[Path, str]:
    """An edited folder's model card, and what it says now. InputError if it is none of ours."""
    path = Path(f"{args.card}{run}") / "README.md"
    if not path.is_file():
        raise InputError(f"{path}: no model card; --card is what edited folders' names begin with")
    text = path.read_text(encoding="utf-8")
    try:
        with_measurements(text, "")
    except ValueError:
        raise InputError(f"{path}: no place for measurements in it; restore the card") from None
    return path, text


def parse_args() -> argparse.Namespace:
    parser = cli.make_parser(__doc__)
    parser.add_argument(
        "--runs",
        nargs="+",
        required=True,
        metavar="NAME",
        help=f"what summaries are named by; '{UNEDITED}' is the model before",
    )
    parser.add_argument(
        "--scores",
        type=Path,
        default=Path("results/metrics_tiny"),
        metavar="DIR",
        help="where the summaries are",
    )
    parser.add_argument(
        "--attack_steps",
        type=cli.whole_number(1, 1_000_000),
        default=attack_runs.ATTACK_STEPS,
        metavar="INT",
        help="steps of the attack that are looked at",
    )
    parser.add_argument(
        "--card",
        metavar="PREFIX",
        help="write the measured effect into the model card of each edited folder PREFIX<run>",
    )
    parser.add_argument(
        "-o",
        "--output",
        type=cli.output_file,
        required=True,
        metavar="CSV",
        help="the table; .md lies beside it",
    )
    return parser.parse_args()


if __name__ == "__main__":
    cli.run(main, parse_args(), lower=None)
