"""Compares two result files of script 3 prompt by prompt, e.g. ours with the published release's.

Rows are joined on the prompt's row number; their captions must agree. Per prompt: neurons in each
refined set, their Jaccard index (intersection over union) where either file calls the prompt
memorized, and the refined scores. Then the medians: of the neurons over each file's own memorized
prompts, of the Jaccard index over those of either. Prompts that only one file has, or that either
left undecided, are counted and named, and enter no median.

Reads:   two result files
Writes:  --output, one row a prompt, if asked for

Examples:
  python metrics/compare_results.py results/ours.csv results/theirs.csv
  python metrics/compare_results.py results/ours.csv results/theirs.csv -o=results/comparison.csv
"""

import argparse
import sys
from pathlib import Path
from statistics import mean, median

# `python metrics/compare_results.py` puts metrics/ on the path, not the project.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from utils import cli
from utils.errors import InputError
from utils.files import write_table
from utils.neuron_sets import NeuronSet, Result, read_results, size

COLUMNS = (
    "Row",
    "Caption",
    "First Neurons",
    "Second Neurons",
    "Jaccard",
    "First SSIM",
    "Second SSIM",
)


def jaccard(first: NeuronSet, second: NeuronSet) -> float:
    """Intersection over union of two sets; two empty sets are equal (1)."""
    ours, theirs = ({(l, i) for l, layer in enumerate(s) for i in layer} for s in (first, second))
    return len(ours & theirs) / len(ours | theirs) if ours | theirs else 1.0


def main(args: argparse.Namespace) -> int:
    first, second = ({r.row: r for r in read_results(path)} for path in (args.first, args.second))
    if args.output is not None and args.output.exists():
        raise InputError(f"{args.output} exists already; name another file with -o")
    both = sorted(first.keys() & second.keys())
    for row in both:
        if first[row].caption != second[row].caption:
            raise InputError(
                f"{args.second}: row {row} has another caption than in {args.first}; "
                "the files belong to different prompt files"
            )
    pairs: list[tuple[Result, Result]] = [(first[row], second[row]) for row in both]
    layers = {len(s.refined) for pair in pairs for s in pair if s.refined is not None}
    if len(layers) > 1:
        raise InputError(f"{args.second}: another number of layers than {args.first}; other models")
    decided = [pair for pair in pairs if all(result.refined is not None for result in pair)]
    if not decided:
        raise InputError(f"{args.second}: no decided prompt in common with {args.first}")
    found = [pair for pair in decided if any(result.memorized for result in pair)]
    similarities = {a.row: jaccard(a.refined or [], b.refined or []) for a, b in found}
    table = [
        (
            ours.row,
            ours.caption,
            size(ours.refined or []),
            size(theirs.refined or []),
            f"{similarities[ours.row]:.4f}" if ours.row in similarities else "",
            f"{ours.refined_score:.6f}",
            f"{theirs.refined_score:.6f}",
        )
        for ours, theirs in decided
    ]
    if args.output is not None:
        write_table(args.output, COLUMNS, table)
    own = [
        [size(result.refined or []) for result in results if result.memorized]
        for results in zip(*decided, strict=True)
    ]
    medians = [f"{median(sizes):g}" if sizes else "-" for sizes in own]
    gaps = [abs((a.refined_score or 0) - (b.refined_score or 0)) for a, b in decided]
    print(f"prompts in both: {len(both)}, decided in both: {len(decided)}")
    print(f"memorized: {len(own[0])} and {len(own[1])}, in either: {len(found)}")
    if found:
        same = sum(ours.refined == theirs.refined for ours, theirs in found)
        print(
            f"same set: {same}; Jaccard mean {mean(similarities.values()):.3f}, median "
            f"{median(similarities.values()):.3f}"
        )
    print(f"median neurons: {' and '.join(medians)}")
    print(f"largest difference of refined scores: {max(gaps):.6f}")
    for name, rows in (
        (f"only in {args.first}", sorted(first.keys() - second.keys())),
        (f"only in {args.second}", sorted(second.keys() - first.keys())),
        ("undecided in either", [a.row for a, b in pairs if (a, b) not in decided]),
    ):
        if rows:
            print(f"{name}: {len(rows)} prompts, rows {', '.join(map(str, rows))}")
    return 0


def parse_args() -> argparse.Namespace:
    parser = cli.make_parser(__doc__)
    parser.add_argument("first", type=Path, help="result file")
    parser.add_argument("second", type=Path, help="result file")
    parser.add_argument(
        "-o", "--output", type=Path, metavar="CSV", help="comparison, a row a prompt"
    )
    return parser.parse_args()


if __name__ == "__main__":
    cli.run(main, parse_args(), lower=None)
