"""Draws pictures that the small model was never trained on, for the rows of a prompt file: controls
of attacks. (A null of the calibrated classification wants pictures that fit their captions;
benchmarks/benchmark_calibration.py draws such.)

    python tiny_model/draw_never_trained.py -p prompts/tiny_memorized_prompts.csv -o never_trained

Each is a generic drawing as those of the training set, from a seed of its own, named by row like a
training image (0001_first_image.jpg); what it shows has nothing to do with the row's caption.
"""

import argparse
import shutil
import sys
from pathlib import Path

from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a script: find the project

from tiny_model.drawings import generic_picture
from tiny_model.training_loop import numpy_rng
from utils import cli
from utils.errors import InputError
from utils.files import read_table
from utils.images import save_jpeg
from utils.training_images import image_path

STAGE = "never trained"  # the training set's seeds have other stages


def main(args: argparse.Namespace) -> int:
    _, table = read_table(args.prompts)
    if args.output.exists():
        raise InputError(f"{args.output} exists already; name another folder with -o")
    # The folder is there once all of it is.
    partial = args.output.with_name(f"{args.output.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for row in range(len(table)):
        drawing = generic_picture(numpy_rng(args.seed, STAGE, row))
        save_jpeg(Image.fromarray(drawing.pixels), image_path(partial, row))
    partial.rename(args.output)
    print(f"{args.output}: {len(table)} pictures.")
    return 0


def parse_args() -> argparse.Namespace:
    parser = cli.make_parser(__doc__)
    parser.add_argument(
        "-p", "--prompts", type=Path, required=True, metavar="CSV", help="prompt file"
    )
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="DIR", help="folder")
    parser.add_argument("--seed", type=cli.SEED, default=0, metavar="INT", help="of the drawings")
    return parser.parse_args()


if __name__ == "__main__":
    cli.run(main, parse_args(), lower=None)
