r"""Runs of metrics/attack.py side by side, with the published rates, and whether the attack counts.

A row for each run (named by its file): the share of prompts with a copy, and SSCD_Orig, without the
attack and after --steps; what DoRI reports of the same method on SD v1.4 beside. An attack counts
only if its controls behave: on the unedited model it must bring 90% of the copies back, from starts
other than the prompt, and of pictures that were never trained on 10% at the most.

Reads:   tables of metrics/attack.py and their summaries
Writes:  --output (.csv), the same as Markdown (.md), which ends with the verdict, and the curves
         (.png) beside it, anew each time

Examples:
  python metrics/attack_table.py results/metrics_tiny/attack_edit_*.csv \
      --control=results/metrics_tiny/attack_edit_unedited.csv \
      --never_trained=results/metrics_tiny/attack_edit_never_trained.csv \
      -o=results/tables/attacks_tiny.csv
  python metrics/attack_table.py results/attacks/*.csv --start=gaussian --steps=500 \
      -o=results/attacks.csv
"""

import argparse
import sys
from pathlib import Path

# `python metrics/attack_table.py` puts metrics/ on the path, not the project.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from utils import attack_runs, cli
from utils.embedding_attack import STARTS
from utils.errors import InputError
from utils.files import write_bytes, write_table
from utils.tables import check_table_output, markdown_table


def main(args: argparse.Namespace) -> int:
    check_table_output(args.output, attack_runs.comparison_columns(args.steps))
    controls = [path for path in (args.control, args.never_trained) if path is not None]
    paths = dict.fromkeys([*controls, *args.tables])  # each once
    tables = {path: attack_runs.read_attack(path) for path in paths}
    runs = {}
    for path, table in tables.items():
        name = path.stem.removeprefix("attack_").removeprefix("edit_")
        if name in runs:
            raise InputError(f"{path}: another run is called {name}; rename one")
        if not any(row["Start"] == args.start for row in table):
            raise InputError(f"{path}: no attack from start '{args.start}'; name another --start")
        runs[name] = (attack_runs.summarize(table), attack_runs.read_method(path))

    verdict = attack_runs.verdict(
        tables.get(args.control), tables.get(args.never_trained), args.steps
    )
    lines = attack_runs.format_comparison(runs, args.start, args.steps)
    write_table(args.output, lines[0], lines[1:])
    text = f"{markdown_table(lines[0], lines[1:])}\n{verdict}\n"
    write_bytes(args.output.with_suffix(".md"), text.encode())
    curves = {
        name: [entry for entry in summary if entry["start"] == args.start]
        for name, (summary, _) in runs.items()
    }
    title = f"attack on the embedding, from start {args.start}"
    attack_runs.draw_curve(args.output.with_suffix(".png"), title, curves)
    print(text, end="")
    return 0


def parse_args() -> argparse.Namespace:
    parser = cli.make_parser(__doc__)
    parser.add_argument("tables", type=Path, nargs="+", metavar="CSV", help="tables of attacks")
    parser.add_argument(
        "--steps",
        type=cli.whole_number(1, 1_000_000),
        default=attack_runs.ATTACK_STEPS,
        metavar="INT",
        help="steps after which runs are compared",
    )
    parser.add_argument(
        "--control", type=Path, metavar="CSV", help="the attack on the unedited model"
    )
    parser.add_argument(
        "--never_trained",
        type=Path,
        metavar="CSV",
        help="the attack on it that aims at pictures that were never trained on",
    )
    parser.add_argument("--start", choices=STARTS, default="prompt", help="of the attack")
    parser.add_argument(
        "-o", "--output", type=cli.output_file, required=True, metavar="CSV", help="the table"
    )
    return parser.parse_args()


if __name__ == "__main__":
    cli.run(main, parse_args(), lower=None)
