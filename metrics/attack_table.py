r"""Runs of metrics/attack.py side by side, with the published rates.

A row for each run (named by its file): the share of prompts with a copy, and SSCD_Orig, without the
attack and after --steps; what DoRI reports of the same method on SD v1.4 beside.

Reads:   tables of metrics/attack.py and their summaries
Writes:  --output (.csv), the same as Markdown (.md) and the curves (.png) beside it

Examples:
  python metrics/attack_table.py results/metrics_tiny/attack_original_images.csv \
      results/metrics_tiny/attack_refined_neurons.csv -o=results/metrics_tiny/attacks.csv
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
from utils.files import read_json, write_bytes, write_table


def main(args: argparse.Namespace) -> int:
    runs = {}
    for path in args.tables:
        if path.stem in runs:
            raise InputError(f"{path}: another run is called {path.stem}; rename one")
        summary = attack_runs.summarize(attack_runs.read_attack(path))
        settings = read_json(path.with_suffix(".json")).get("settings") or {}
        if not any(entry["start"] == args.start for entry in summary):
            raise InputError(f"{path}: no attack from start '{args.start}'; name another --start")
        runs[path.stem] = (summary, settings.get("method"))
    for path in (args.output, args.output.with_suffix(".md"), args.output.with_suffix(".png")):
        if path.exists():
            raise InputError(f"{path} exists already; name another output with -o")

    lines = attack_runs.format_comparison(runs, args.start, args.steps)
    markdown = ["| " + " | ".join(cells) + " |" for cells in lines]
    markdown.insert(1, "|" + "---|" * len(lines[0]))
    write_table(args.output, lines[0], lines[1:])
    text = "\n".join(markdown) + "\n"
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
    parser.add_argument("--start", choices=STARTS, default="prompt", help="of the attack")
    parser.add_argument(
        "-o", "--output", type=cli.output_file, required=True, metavar="CSV", help="the table"
    )
    return parser.parse_args()


if __name__ == "__main__":
    cli.run(main, parse_args(), lower=None)
