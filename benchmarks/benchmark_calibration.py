"""Whether classify_memorization.py --calibrated keeps its promise, where the truth is known.

On the small model: pictures of the memorized and of some hold-out prompts are generated once by
script 4, and for each hold-out caption some drawings are made that were never trained on. Each of
many draws then gives every hold-out prompt one of its drawings, takes some of these prompts for the
null and some to be tested beside the memorized ones, and counts what is found wrongly (the false
discovery rate) and what rightly (power). The fixed threshold of 0.7 stands beside it.

Reads:   the small model and its evaluator
Writes:  calibration.csv, its picture, RESULTS.md; pictures and embeddings stay in --work, so that a
         run that was killed goes on from them

Examples:
  python benchmarks/benchmark_calibration.py
  python benchmarks/benchmark_calibration.py --hold_out=24 --samples=1 --steps=2 --draws=20
"""

import argparse
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

# `python benchmarks/benchmark_calibration.py` puts benchmarks/ on the path, not the project.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import report
from utils import cli
from utils.embeddings import Embedder, default_workers, sscd_space
from utils.errors import InputError
from utils.files import read_prompts
from utils.metric_runs import Pictures, generated, references
from utils.versions import PROJECT_ROOT, resolve

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.axes import Axes

SCRIPT = PROJECT_ROOT / "4_generate_images.py"
DETECTOR = PROJECT_ROOT / "tiny_model" / "evaluators" / "copy_detector.pt"
TRAINING_IMAGES = PROJECT_ROOT / "tiny_model" / "training_images"
LEVELS = (0.05, 0.1, 0.2)
FIXED = 0.7  # paper C.1
NULL_SHARE = 2 / 3  # of the hold-out prompts; the others are tested
COLUMNS = (
    "rule",
    "null",
    "never_trained",
    "memorized",
    "nominal_fdr",
    "realised_fdr",
    "standard_error",
    "power",
)


@dataclass(frozen=True)
class Draws:
    """What many draws came to: shares, one a draw."""

    false: "np.ndarray"  # of what was found
    power: "np.ndarray"  # of the memorized prompts


def main(args: argparse.Namespace) -> int:
    # Check.
    source = resolve("tiny")
    memorized = len(read_prompts(Path(source.defaults.memorized_prompts)))
    captions = [p.caption for p in read_prompts(Path(source.defaults.unmemorized_prompts))]
    if args.hold_out > len(captions):
        raise InputError(f"--hold_out={args.hold_out}: there are {len(captions)} hold-out prompts")
    space = sscd_space("nemo", DETECTOR)
    report.prepare(args)

    # Score once.
    generate(args, args.work / "memorized", "--original_images")
    hold_out = ["--original_images", "--unmemorized_prompts", f"--rows=0-{args.hold_out - 1}"]
    generate(args, args.work / "hold_out", *hold_out)
    draw_pictures(args.work / "never_trained", captions[: args.hold_out], args.pictures)
    embedder = Embedder(space, device=args.device, batch_size=64, workers=default_workers())
    rows = range(args.hold_out)
    trained = scores(
        embedder,
        generated(args.work / "memorized", range(memorized), args.samples),
        references(TRAINING_IMAGES, range(memorized), 1),
    )[:, 0]
    never = scores(
        embedder,
        generated(args.work / "hold_out", rows, args.samples),
        references(args.work / "never_trained", rows, args.pictures),
    )

    # Draw.
    null = round(NULL_SHARE * args.hold_out)
    table = []
    for kept in sorted({memorized, memorized // 4}, reverse=True):
        for level in LEVELS:
            found = draws(trained, never, null=null, memorized=kept, level=level, count=args.draws)
            table.append(["by rank", *line(found, null, len(never) - null, kept, f"{level:g}")])
        found = draws(trained, never, null=null, memorized=kept, level=None, count=args.draws)
        table.append([f"above {FIXED}", *line(found, null, len(never) - null, kept, "-")])

    # Write.
    remarks = [
        f"{args.draws} draws a line, numbers are their means: {args.samples} pictures a prompt, "
        f"{args.pictures} never-trained drawings of each of {args.hold_out} hold-out captions. At "
        "level q the realised rate is to be at most q times the share of never-trained prompts. "
        "standard_error is of the draws alone, which all are of the same prompts and pictures: how "
        "much others would differ is not in it.",
        f"Largest similarity: memorized prompts, median {median(trained):.3f}, lowest "
        f"{trained.min():.3f}; never trained, median {median(never):.3f}, highest "
        f"{never.max():.3f}.",
    ]
    result = report.Table("calibration", "Calibrated classification", COLUMNS, table, remarks)
    report.publish(args.output, args.device, result, lambda axes: draw_scores(axes, trained, never))
    return 0


def generate(args: argparse.Namespace, folder: Path, *options: str) -> None:
    """Runs script 4 as a user does, with all neurons on; goes on where it was interrupted."""
    done = subprocess.run(
        [
            *(sys.executable, str(SCRIPT), "--version=tiny", *options, f"-o={folder.resolve()}"),
            *(f"-n={args.samples}", f"--steps={args.steps}", "-b=24", f"--device={args.device}"),
            *(["--continue_run"] if folder.exists() else []),
        ],
        cwd=PROJECT_ROOT,
        env={**os.environ, **({"OMP_NUM_THREADS": str(args.threads)} if args.threads else {})},
        stdout=subprocess.DEVNULL,
    )
    if done.returncode:
        raise InputError(f"{SCRIPT.name} failed; mend that, or name another folder with --work")


def draw_pictures(folder: Path, captions: Sequence[str], count: int) -> None:
    """``count`` drawings of each caption that are in no training set, img_{row}_{n}.jpg: the shape
    that the caption names, if it names one, is their largest."""
    import numpy as np
    from PIL import Image

    from tiny_model.captions import words_of
    from tiny_model.drawings import SHAPES, generic_picture
    from utils.images import image_name, save_jpeg

    for row, caption in enumerate(captions):
        random = np.random.default_rng([1, row])
        named = [word for word in words_of(caption) if word in SHAPES]
        for number in range(count):
            picture = generic_picture(random)
            while named and picture.shape not in named:
                picture = generic_picture(random)
            path = folder / image_name(row, number)
            if not path.exists():
                save_jpeg(Image.fromarray(picture.pixels), path)


def scores(embedder: Embedder, shown: Pictures, compared: Pictures) -> "np.ndarray":
    """The largest similarity over a prompt's samples, (prompts, references)."""
    import numpy as np

    from utils.prompt_scores import to_all

    first, second = (pictures.embed(embedder, {}) for pictures in (shown, compared))
    found = [to_all(first[row], list(second[row].values())).max(axis=0) for row in sorted(first)]
    return np.stack(found)


def draws(
    trained: "np.ndarray",
    never: "np.ndarray",
    *,
    null: int,
    memorized: int,
    level: float | None,
    count: int,
) -> Draws:
    """Tests ``memorized`` of the trained scores (n,) and those never-trained prompts, of (m,
    pictures), that are not among the ``null`` first of a random order; at ``level``, or by the
    fixed threshold where it is None. The same draws for every level."""
    import numpy as np

    from utils.calibration import discoveries, p_value, q_values

    random = np.random.default_rng(0)
    false, power = np.empty(count), np.empty(count)
    for number in range(count):
        order = random.permutation(len(never))
        one_each = never[order, random.integers(0, never.shape[1], len(never))]
        chosen = random.choice(trained, memorized, replace=False)
        tested = np.append(one_each[null:], chosen)
        if level is None:
            found = tested > FIXED
        else:
            found = discoveries(q_values([p_value(s, one_each[:null]) for s in tested]), level)
        false[number] = found[:-memorized].sum() / max(1, found.sum())
        power[number] = found[-memorized:].mean()
    return Draws(false, power)


def line(found: Draws, null: int, never: int, memorized: int, level: str) -> list[str]:
    """Cells of the table behind the rule."""
    error = found.false.std() / len(found.false) ** 0.5
    shares = [f"{found.false.mean():.4f}", f"{error:.4f}", f"{found.power.mean():.3f}"]
    return [str(null), str(never), str(memorized), level, *shares]


def median(values: "np.ndarray") -> float:
    """Of all values."""
    import numpy as np

    return float(np.median(values))


def draw_scores(axes: "Axes", trained: "np.ndarray", never: "np.ndarray") -> None:
    """Both kinds' scores, each kind's bars adding up to 1."""
    bins = [number / 40 for number in range(-8, 41)]
    for values, name in ((never.ravel(), "never trained"), (trained, "memorized")):
        weights = [1 / len(values)] * len(values)
        axes.hist(values, bins=bins, weights=weights, alpha=0.6, label=name)
    axes.axvline(FIXED, color="black", linestyle=":", label=f"{FIXED}")
    axes.set(xlabel="largest similarity", ylabel="share of prompts")
    axes.legend()


def parse_args() -> argparse.Namespace:
    parser = cli.make_parser(__doc__)
    parser.add_argument(
        "--hold_out",
        type=cli.whole_number(3, 100_000),
        default=150,
        metavar="INT",
        help="only the first so many hold-out prompts",
    )
    parser.add_argument(
        "--samples", type=cli.whole_number(1, 1000), default=4, metavar="INT", help="a prompt"
    )
    parser.add_argument("--steps", type=cli.STEPS, default=50, metavar="INT", help="DDIM steps")
    parser.add_argument(
        "--pictures",
        type=cli.whole_number(1, 1000),
        default=20,
        metavar="INT",
        help="never-trained drawings of a caption",
    )
    parser.add_argument(
        "--draws", type=cli.whole_number(1, 1_000_000), default=2000, metavar="INT", help="a line"
    )
    parser.add_argument(
        "--work",
        type=Path,
        default=Path("results/calibration"),
        metavar="DIR",
        help="folder of the pictures",
    )
    report.add_options(parser, repeats=None)
    return parser.parse_args()


if __name__ == "__main__":
    cli.run(main, parse_args(), lower="--hold_out")
