"""The demo's metrics in one table: with all neurons on and with the located ones off.

Reads the summaries that the metrics leave in results/metrics_tiny/. SSCD, CLIP and Inception are
the small evaluators of tiny_model/evaluators/, so these are no numbers of the paper.

Examples:
  python runs/demo_metrics.py
  python runs/demo_metrics.py --folder=results/metrics_tiny
"""

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

# `python runs/demo_metrics.py` puts runs/ on the path, not the project.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from utils import cli
from utils.errors import InputError
from utils.files import read_json

# Metric -> score of its summary, and what it says.
PAIRED = {
    "sscd_orig": ("Max", "SSCD_Orig: largest similarity to the training image"),
    "diversity": ("Median", "D_SSCD: similarity between samples"),
    "alignment": ("Median", "A_CLIP: similarity to the caption"),
}
DETECTION = {"auroc": "AUROC", "accuracy": "accuracy", "tpr_at_1_fpr_below": "TPR below 1% FPR"}
WIDTH = 58  # of what a line is about


def main(args: argparse.Namespace) -> int:
    print(f"{'median +- MAD over prompts':<{WIDTH}} {'all on':>16} {'located off':>16}")
    for name, (score, title) in PAIRED.items():
        before, after = (
            summary(args.folder, f"{name}_{run}")["scores"][score]
            for run in ("unblocked", "blocked")
        )
        for kind in before:
            print(line(f"{title}, {kind}", spread(before[kind]), spread(after[kind])))
    blocked = summary(args.folder, "sscd_gen")["scores"]["Median"]
    for kind, found in blocked.items():
        print(line(f"SSCD_Gen: similarity to the picture with all on, {kind}", "", spread(found)))
    quality = summary(args.folder, "quality")["quality"]
    for metric, value in quality.items():
        print(line(f"{metric.upper().replace('_', '-')} to the pictures with all on", "", value))
    print("\ndetection of memorized prompts")
    for kind, found in summary(args.folder, "detection")["detection"].items():
        for key, title in DETECTION.items():
            print(line(f"{title}, {kind}", found[key], ""))
    print("\n" + "\n".join(summary(args.folder, "classification")["table"]))
    return 0


def summary(folder: Path, name: str) -> dict[str, Any]:
    """The finished record of one metric. InputError if there is none."""
    path = folder / f"{name}.json"
    content = read_json(path)
    if "metric" not in content:
        raise InputError(f"{path}: no finished summary; run runs/demo.sh")
    return content


def spread(found: Mapping[str, Any]) -> str:
    """Median and median absolute deviation; a dash where no prompt has a score."""
    return "-" if found["median"] is None else f"{found['median']:.3f} +- {found['mad']:.3f}"


def line(title: str, before: str | float, after: str | float) -> str:
    cells = [cell if isinstance(cell, str) else f"{cell:.3f}" for cell in (before, after)]
    return f"{title:<{WIDTH}} {cells[0]:>16} {cells[1]:>16}".rstrip()


def parse_args() -> argparse.Namespace:
    parser = cli.make_parser(__doc__)
    parser.add_argument(
        "--folder",
        type=Path,
        default=Path("results/metrics_tiny"),
        metavar="DIR",
        help="where the summaries are",
    )
    return parser.parse_args()


if __name__ == "__main__":
    cli.run(main, parse_args(), lower=None)
