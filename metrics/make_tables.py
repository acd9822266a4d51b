"""The paper's tables: ours beside the published values, from the records of all runs.

Tables 1 to 4 (main results, cost, disentanglement, ablations) and the appendix's: detection (B.4),
neurons of each prompt and layer, neurons that prompts share, blocking the k most frequent neurons,
value layers of the up blocks (C.8); and where the two protocols differ. The difference is in units
of the published deviation. What was not run says so and names the command that makes it; a summary
of another model, protocol or run is not taken.

Reads:   metrics/paper_tables.csv and paper_values.csv (arXiv 2406.02366; see paper_tables.md), and
         what runs/paper.sh left: results/, generated_images/, statistics/
Writes:  the folder --output, anew each time: every table as .md, .csv and .tex, all together as
         tables.md and tables.tex (pdflatex makes it; the columns of a longtable are right after
         three or four runs)

Examples:
  python metrics/make_tables.py --version=tiny
  python metrics/make_tables.py -p=prompts/memorized_laion_prompts.csv -o=tables
"""

import argparse
import sys
from pathlib import Path

# `python metrics/make_tables.py` puts metrics/ on the path, not the project.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from utils import cli
from utils.paper_options import add_paper_options, check_folder, read_runs
from utils.paper_plan import planned
from utils.paper_tables import Builder, read_published
from utils.tables import NOT_RUN, write_tables

HERE = Path(__file__).resolve().parent


def main(args: argparse.Namespace) -> int:
    runs = read_runs(args)
    output = args.output or Path(f"results/tables_{runs.source.tag}")
    check_folder(output)
    published = read_published(HERE / "paper_tables.csv", HERE / "paper_values.csv")
    tables = Builder(runs, published, planned(args.version)).tables()
    write_tables(tables, output)
    for table in tables:
        gaps = sum(note.startswith(NOT_RUN) for note in table.notes)
        print(f"{table.title}: {len(table.rows)} lines" + (f", {gaps} not run" if gaps else ""))
    print(f"Written to {output}.")
    return 0


def parse_args() -> argparse.Namespace:
    parser = cli.make_parser(__doc__)
    add_paper_options(parser)
    parser.add_argument(
        "-o",
        "--output",
        type=cli.output_folder,
        metavar="DIR",
        help="folder of the tables (default: results/tables_<version>)",
    )
    return parser.parse_args()


if __name__ == "__main__":
    cli.run(main, parse_args(), lower=None)
