"""The null of a calibrated classification, from the command line: never-trained references.

Public: ``NeverTrained``, ``add_options``, ``read``.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from utils import cli, metric_runs
from utils.embeddings import Embedder, Space
from utils.errors import InputError
from utils.files import read_json, read_table
from utils.metric_runs import Pictures
from utils.records import part_of

if TYPE_CHECKING:
    from utils.calibration import Null

FDR = 0.05
SCORE_COLUMNS = ("Max", "Max SSCD")  # of compute_sscd_orig.py and of classify_memorization.py


def add_options(parser: argparse.ArgumentParser) -> None:
    """``--calibrated --null --null_reference --fdr``."""
    group = parser.add_argument_group("calibration")
    group.add_argument(
        "--calibrated",
        action="store_true",
        help="p-values by rank in the null, and which prompts are memorized at --fdr",
    )
    group.add_argument(
        "--null",
        type=Path,
        metavar="DIR|CSV",
        help="generated pictures of prompts whose references were never trained on, made like "
        "those of --folder and of the same kind; or their table by compute_sscd_orig.py",
    )
    group.add_argument(
        "--null_reference",
        type=Path,
        metavar="DIR",
        help="with a folder: the never-trained pictures, named by row like training images",
    )
    group.add_argument(
        "--fdr",
        type=cli.number(0, 1, above=True),
        metavar="FLOAT",
        help=f"false discovery rate (default: {FDR})",
    )


@dataclass(frozen=True)
class NeverTrained:
    """What the null is made of: ``folders`` of generated pictures and of the references that they
    are compared with, row by row, or a table of (largest similarity, samples); ``size`` is how many
    references that are."""

    fdr: float
    size: int
    files: list[Path]
    folders: list[Pictures]
    table: list[tuple[float, int]]

    def null(self, embedder: Embedder, corrupt: dict[str, str]) -> "Null":
        """Embeds the pictures."""
        from utils.calibration import Compared, null_of_pictures, null_of_scores
        from utils.prompt_scores import to_all

        if not self.folders:
            return null_of_scores(*zip(*self.table, strict=True))
        first, second = (pictures.embed(embedder, corrupt) for pictures in self.folders)
        both = sorted(first.keys() & second.keys())
        found = [
            Compared(sorted(first[row]), to_all(first[row], list(second[row].values())))
            for row in both
        ]
        return null_of_pictures([known for known in found if known.similarities.size])


def read(
    args: argparse.Namespace, generated: Pictures, originals: Pictures, space: Space
) -> NeverTrained | None:
    """What the options say of the null; None without --calibrated. InputError for options without
    effect, and for a null of another network, of training images, with fewer samples or references
    a prompt, or too small for the level."""
    from utils.calibration import smallest_null

    for option in ("null", "null_reference", "fdr"):
        if not args.calibrated and getattr(args, option) is not None:
            raise InputError(f"--{option} has no effect without --calibrated; leave it out")
    if not args.calibrated:
        return None
    if args.null is None:
        raise InputError(
            "--calibrated needs --null: pictures or scores of never-trained references"
        )
    fdr = FDR if args.fdr is None else args.fdr
    if args.null.is_dir():
        if args.null_reference is None:
            raise InputError(
                f"--null={args.null}: generated pictures need --null_reference, the never-trained "
                "pictures to compare them with"
            )
        rows = sorted(metric_runs.numbered_images(args.null))
        shown = metric_runs.generated(args.null, rows, args.num_samples)
        fresh = metric_runs.references(args.null_reference, rows, args.num_ref_samples)
        trained = {sha256: path for path, sha256 in originals.hashes.items()}
        for path, sha256 in fresh.hashes.items():
            if sha256 in trained:
                raise InputError(f"{path}: is a training image ({trained[sha256]}); take it out")
        samples, references = shown.samples, _most(fresh)
        size = len(shown.paths.keys() & fresh.paths.keys())
        never = NeverTrained(fdr, size, [], [shown, fresh], [])
    else:
        if args.null_reference is not None:
            raise InputError("--null_reference has no effect with a table; leave it out")
        table = _read_table(args.null, space)
        samples, references = max((count for _, count in table), default=0), 1
        never = NeverTrained(fdr, len(table), [args.null], [], table)
    if never.size < smallest_null(fdr):
        raise InputError(
            f"--null={args.null}: {never.size} never-trained references; no p-value can be below "
            f"{1 / (never.size + 1):.4f}, and --fdr={fdr:g} needs {smallest_null(fdr)}; add some, "
            "or raise --fdr"
        )
    for name, ours, theirs in (
        ("num_samples", generated.samples, samples),
        ("num_ref_samples", _most(originals), references),
    ):
        if ours > theirs:
            raise InputError(
                f"--null={args.null}: the largest of {ours} cannot be compared with that of "
                f"{theirs}; add --{name}={theirs}, or enlarge the null"
            )
    return never


def _most(references: Pictures) -> int:
    """The largest number of references that a row has."""
    return max(len(of_row) for of_row in references.paths.values())


def _read_table(path: Path, space: Space) -> list[tuple[float, int]]:
    """(largest similarity, samples) of each row that has a score. InputError for a file without
    these columns, or, as its record says, of another network."""
    header, table = read_table(path)
    column = next((name for name in SCORE_COLUMNS if name in header), None)
    if column is None or "Samples" not in header:
        raise InputError(
            f"{path}: needs the columns Max and Samples; make it with metrics/compute_sscd_orig.py "
            "and one --sscd_protocol"
        )
    if path.with_suffix(".json").is_file():
        network = part_of(read_json(path.with_suffix(".json")), "model").get(space.name)
        if network != {**space.model, "preprocessing": space.preprocessing}:
            raise InputError(f"{path}: scores of another network; make it anew with this one")
    found = []
    for cells in table:
        if not cells[column]:
            continue
        try:
            samples = cli.whole_number(1, 1_000_000)(cells["Samples"])
            found.append((cli.number(-1, 1)(cells[column]), samples))
        except (ValueError, argparse.ArgumentTypeError):
            raise InputError(
                f"{path}: '{cells[column]}', '{cells['Samples']}': not a similarity and a number "
                "of samples; restore it"
            ) from None
    return found
