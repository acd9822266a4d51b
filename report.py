"""One HTML page of a run: summary, tables, figures and a card for each prompt.

The page is one file that asks for nothing: no network, no script from elsewhere, pictures inside it
as thumbnails. It can be searched, sorted, printed and sent by mail. A part that the run does not
have is named in the page as missing.

Reads:   RUN_FOLDER: what its run.json names (keys title, results, scores, threshold, prompts,
         training_images, metrics, tables, figures, attack, and images: {"unblocked": DIR, ...};
         paths count from RUN_FOLDER), and for the rest the scripts' default names below it
Writes:  --output, made anew each time: the same bytes for the same run

Examples:
  python report.py . --version=tiny -o=results/report_tiny.html
  python report.py results/paper --samples=2
"""

import argparse
from pathlib import Path

from utils import cli
from utils.errors import InputError
from utils.files import write_bytes
from utils.run_folder import PARTS, find_parts
from utils.versions import resolve


def main(args: argparse.Namespace) -> int:
    # Check.
    tag = None if args.version is None else resolve(args.version).tag
    run = find_parts(args.run_folder, tag=tag, labels=args.images)
    output = args.output or args.run_folder / "report.html"
    check_output(output)
    if args.dry_run:
        parts = {part: str(run[part]) for part in PARTS if run[part]}
        pictures = {f"pictures '{label}'": str(folder) for label, folder in run.images.items()}
        cli.print_settings(f"{output}: {run.title}", {**parts, **pictures}, {})
        for note in run.missing:
            print(f"  {note}")
        return 0

    # Write.
    from utils.html_report import Options, make_report

    page = make_report(run, Options(args.samples, args.thumbnail)).encode()
    write_bytes(output, page)
    for note in run.missing:
        print(note)
    print(f"Written to {output}, {len(page) / 1e6:.1f} MB.")
    return 0


def check_output(path: Path) -> None:
    """InputError if the page would take the place of something that is no report."""
    from utils.html_report import GENERATOR

    if path.is_dir():
        raise InputError(f"{path}: a folder; name a file with -o")
    if path.exists() and GENERATOR.encode() not in path.read_bytes()[:2000]:
        raise InputError(f"{path} exists and is no report of ours; name another file with -o")


def parse_args() -> argparse.Namespace:
    parser = cli.make_parser(__doc__)
    parser.add_argument("run_folder", type=Path, metavar="RUN_FOLDER", help="what a run left")
    parser.add_argument(
        "-v",
        "--version",
        metavar="NAME",
        help="only default names of this model count, also below the working directory",
    )
    parser.add_argument(
        "-o",
        "--output",
        type=cli.output_file,
        metavar="FILE",
        help="the page (default: report.html in RUN_FOLDER)",
    )
    parser.add_argument(
        "--images",
        type=lambda text: text.split(","),
        default=[],
        metavar="LABELS",
        help="more folders of pictures by their labels, e.g. guidance_static,wanda (default: "
        "those that run.json names, else unblocked and blocked)",
    )
    parser.add_argument(
        "--samples",
        type=cli.whole_number(1, 100),
        default=4,
        metavar="INT",
        help="pictures of each folder on a card",
    )
    parser.add_argument(
        "--thumbnail",
        type=cli.whole_number(16, 1024),
        default=112,
        metavar="INT",
        help="pixels of a picture's longer side",
    )
    parser.add_argument(
        "--dry_run", action="store_true", help="name the parts that were found, write nothing"
    )
    return parser.parse_args()


if __name__ == "__main__":
    cli.run(main, parse_args(), lower=None)
