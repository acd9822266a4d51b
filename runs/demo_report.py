"""What the demo found: a table on the screen, and a contact sheet of pictures before and after.

Reads what `runs/demo.sh` leaves in results/ and generated_images/, and the training images of the
small model. A copy is measured by the pixels' correlation with the training image (for a template:
over its fixed part, with whichever of its training images is nearest).

Examples:
  python runs/demo_report.py
  python runs/demo_report.py --rows=0,3,16 -o=docs/demo.png
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median

import numpy as np
from PIL import Image, ImageDraw

# `python runs/demo_report.py` puts runs/ on the path, not the project.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from utils import cli
from utils.errors import InputError
from utils.files import Prompt, read_prompts, read_table, replacing
from utils.images import image_name, pixel_correlation
from utils.neuron_sets import Result, read_results
from utils.versions import resolve

TINY = Path("tiny_model")
BEFORE, AFTER = Path("generated_images/tiny_unblocked"), Path("generated_images/tiny_blocked")
CELL, GAP, CAPTION = 72, 8, 16  # pixels of the contact sheet


def main(args: argparse.Namespace) -> int:
    source = resolve("tiny")
    results = {result.row: result for result in read_results(source.results)}
    scanned = {int(cells["Row"]): cells for cells in read_table(source.scores)[1]}
    prompts = read_prompts(Path(source.defaults.memorized_prompts), rows=args.rows)
    check_rows(source.results, {row: r.caption for row, r in results.items()}, prompts)
    check_rows(source.scores, {row: c["Caption"] for row, c in scanned.items()}, prompts)
    print(
        f"{'prompt':<44} {'type':<4} {'memorized':<9} {'neurons per layer':<22} {'score':<15} copy"
    )
    blocks, before, after = [], [], []
    for prompt in prompts:
        result = results[prompt.row]
        references, fixed = training_images(prompt.row)
        pictures = [samples(folder, prompt.row) for folder in (BEFORE, AFTER)]
        copies = [similarity(row, references, fixed) for row in pictures]
        before.append(copies[0])
        after.append(copies[1])
        layers = " ".join(str(len(layer)) for layer in result.refined or [])
        print(
            f"{prompt.caption[:44]:<44} {prompt.type:<4} {yes_or_no(result):<9} {layers:<22} "
            f"{score(scanned[prompt.row]['Score'])} -> {score(result.refined_score or '')}    "
            f"{copies[0]:.2f} -> {copies[1]:.2f}"
        )
        blocks.append(
            block(f"{prompt.row} {prompt.type}: {prompt.caption}", references[0], pictures)
        )
    found = sum(results[prompt.row].memorized for prompt in prompts)
    print(
        f"\n{found} of {len(prompts)} prompts are memorized. Median similarity to the training "
        f"image: {median(before):.2f} with all neurons on, {median(after):.2f} with the located "
        "ones off."
    )
    with replacing(args.output) as temporary:
        contact_sheet(blocks, columns=3 if len(blocks) > 6 else 2).save(temporary, format="PNG")
    print(
        f"Contact sheet (training image; above without, below with blocked neurons): {args.output}"
    )
    return 0


def check_rows(path: Path, captions: Mapping[int, str], prompts: Sequence[Prompt]) -> None:
    """InputError if a file, of which this is row -> caption, lacks a prompt's row or has another
    prompt in it."""
    again = "remove the file and its record, and run runs/demo.sh"
    for prompt in prompts:
        if prompt.row not in captions:
            raise InputError(f"{path}: no row {prompt.row}; choose --rows, or {again}")
        if captions[prompt.row] != prompt.caption:
            raise InputError(
                f"{path}: row {prompt.row} has another caption than in the prompt file; {again}"
            )


def score(value: str | float) -> str:
    """Two digits, or a dash where there is no score (undecided, or not memorized)."""
    return f"{float(value):.2f}" if value else "-"


def yes_or_no(result: Result) -> str:
    return "undecided" if result.initial is None else "yes" if result.memorized else "no"


def training_images(row: int) -> tuple[list[np.ndarray], np.ndarray | None]:
    """The prompt's training images, and for a template the mask of its fixed part."""
    files = sorted((TINY / "training_images").glob(f"{row:04d}_*_image.jpg"))
    if not files:
        raise InputError(f"{TINY}/training_images: no picture for row {row}; restore the folder")
    mask = TINY / "fixed_parts" / f"{row:04d}.png"
    fixed = np.asarray(Image.open(mask)) > 0 if mask.exists() else None
    return [np.asarray(Image.open(file).convert("RGB")) for file in files], fixed


def samples(folder: Path, row: int) -> list[np.ndarray]:
    """All generated pictures of a prompt, in the order of their seeds."""
    pictures: list[np.ndarray] = []
    while (path := folder / image_name(row, len(pictures))).exists():
        pictures.append(np.asarray(Image.open(path).convert("RGB")))
    if not pictures:
        raise InputError(f"{folder}: no picture {image_name(row, 0)}; run runs/demo.sh")
    return pictures


def similarity(
    pictures: list[np.ndarray], references: list[np.ndarray], fixed: np.ndarray | None
) -> float:
    """Median over samples of the correlation with the nearest training image."""
    return median(max(pixel_correlation(p, r, fixed) for r in references) for p in pictures)


def block(title: str, reference: np.ndarray, rows: list[list[np.ndarray]]) -> Image.Image:
    """One prompt: its training image, and beside it a row of samples before, a row after."""
    side = 2 * CELL
    width = side + GAP + CELL * max(map(len, rows))
    sheet = Image.new("RGB", (width, CAPTION + side), "white")
    ImageDraw.Draw(sheet).text((0, 0), title[: width // 6], fill="black")
    sheet.paste(Image.fromarray(reference).resize((side, side)), (0, CAPTION))
    for y, row in enumerate(rows):
        for x, picture in enumerate(row):
            cell = Image.fromarray(picture).resize((CELL, CELL))
            sheet.paste(cell, (side + GAP + x * CELL, CAPTION + y * CELL))
    return sheet


def contact_sheet(blocks: list[Image.Image], columns: int) -> Image.Image:
    """All blocks side by side, in reading order."""
    width, height = blocks[0].width + 2 * GAP, blocks[0].height + 2 * GAP
    rows = -(-len(blocks) // columns)
    sheet = Image.new("RGB", (columns * width, rows * height), "white")
    for position, picture in enumerate(blocks):
        y, x = divmod(position, columns)
        sheet.paste(picture, (x * width + GAP, y * height + GAP))
    return sheet


def png_file(text: str) -> Path:
    """The name of a PNG."""
    path = Path(text)
    if path.suffix != ".png":
        raise argparse.ArgumentTypeError(f"'{text}' does not end in .png")
    return path


def parse_args() -> argparse.Namespace:
    parser = cli.make_parser(__doc__)
    parser.add_argument("--rows", type=cli.row_list, metavar="LIST", help="only these prompts")
    parser.add_argument(
        "-o",
        "--output",
        type=png_file,
        default=Path("results/demo_contact_sheet.png"),
        metavar="PNG",
        help="contact sheet",
    )
    return parser.parse_args()


if __name__ == "__main__":
    cli.run(main, parse_args(), lower="--rows")
