"""The paper's figures, PNG and PDF, from the records of all runs.

Distribution of memorization scores with thresholds; neurons per prompt (VM and TM), per layer and
shared; score against number of blocked neurons; noise differences of one prompt over the seeds;
grid of pictures (training image, all neurons on, located off, each mitigation); ROC; trade-off of
copying against alignment for all methods; scaling factor; blocking the most frequent neurons. They
are readable in grey.

Reads:   what runs/paper.sh left: results/, generated_images/, statistics/, and training images; two
         figures make U-Net passes with the model
Writes:  the folder --output, anew each time: <figure>.png and <figure>.pdf. Which figure could not
         be made, and the command that makes its input, is printed, and the exit code is 1

Examples:
  python metrics/make_figures.py --version=tiny --originals=tiny_model/training_images
  python metrics/make_figures.py -p=prompts/memorized_laion_prompts.csv --only=roc_curves
"""

import argparse
import sys
from pathlib import Path

# `python metrics/make_figures.py` puts metrics/ on the path, not the project.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from utils import cli
from utils.errors import InputError
from utils.paper_options import add_paper_options, check_folder, read_runs
from utils.paper_plan import command_for, planned
from utils.paper_runs import NotRunError


def main(args: argparse.Namespace) -> int:
    # Check.
    runs = read_runs(args)
    device = cli.checked_device(args.device)
    plan = planned(args.version)
    output = args.output or Path(f"results/figures_{runs.source.tag}")
    check_folder(output)
    wanted = None if args.only is None else args.only.split(",")

    # Draw.
    from utils.figures import save
    from utils.paper_figures import PaperFigures

    kinds = PaperFigures(runs, plan, args.originals, device=device).kinds()
    for name in wanted or []:
        if name not in kinds:
            raise InputError(f"--only: '{name}' is none of {', '.join(kinds)}")
    missing = 0
    for name in wanted or kinds:
        try:
            save(kinds[name](), output, name)
        except NotRunError as error:
            missing += 1
            command = command_for(error.path, plan, runs.source)
            print(f"{name}: not made, {error}. Command: {command}")
        else:
            print(f"{output / name}.png")
    return 1 if missing else 0


def parse_args() -> argparse.Namespace:
    parser = cli.make_parser(__doc__)
    add_paper_options(parser)
    parser.add_argument(
        "--originals",
        type=Path,
        default=Path("original_images"),
        metavar="DIR",
        help="training images, for the grid",
    )
    parser.add_argument(
        "--only", metavar="LIST", help="these figures (names as of their files), with commas"
    )
    parser.add_argument(
        "--device", metavar="DEVICE", help="cpu, cuda or cuda:N (default: cuda if any)"
    )
    parser.add_argument(
        "-o",
        "--output",
        type=cli.output_folder,
        metavar="DIR",
        help="folder of the figures (default: results/figures_<version>)",
    )
    return parser.parse_args()


if __name__ == "__main__":
    cli.run(main, parse_args(), lower=None)
