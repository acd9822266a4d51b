r"""SSCD_Orig: how alike generated pictures and the prompt's training image are.

Per prompt the largest, over samples, of the cosine similarity with the training image (with the
nearest, where a prompt has several); the median over samples too. Then median and median absolute
deviation over all, VM and TM prompts (paper Sec. 4), and the share of copies: prompts whose largest
similarity is above 0.7 (paper C.1), and pictures above it.

Reads:   a prompt file, generated pictures, training images 0001_first_image.jpg or img_0001_00.jpg
Writes:  --output, a row a prompt (empty where picture or training image is missing), and its
         summary (.json) beside it; embeddings in <folder>.embeddings/

Examples:
  python metrics/compute_sscd_orig.py -p=prompts/memorized_laion_prompts.csv \
      -f=generated_images_blocked -r=original_images
  python metrics/compute_sscd_orig.py -p=prompts/memorized_laion_prompts.csv \
      -f=generated_images_blocked -r=original_images --sscd_protocol=all
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# `python metrics/compute_sscd_orig.py` puts metrics/ on the path, not the project.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from utils import cli, metric_runs
from utils.embeddings import SSCD_PROTOCOLS


def main(args: argparse.Namespace) -> int:
    # Check.
    metric_runs.check_device(args)
    prompts = metric_runs.read_targets(args)
    spaces = metric_runs.chosen_spaces(args)
    rows = [prompt.row for prompt in prompts]
    generated = metric_runs.generated(args.folder, rows, args.num_samples)
    originals = metric_runs.references(args.reference, rows, args.num_ref_samples)
    run = metric_runs.MetricRun(
        f"SSCD_Orig ({', '.join(spaces)})",
        metric_runs.output_path(args, "sscd_orig", args.folder),
        args,
        settings=metric_runs.settings(args, num_samples=args.num_samples or generated.samples),
        spaces=spaces.values(),
        files=[args.prompts],
        folders=[generated, originals],
    )
    if run.over():
        return 0

    # Embed and score.
    from utils.prompt_scores import score, to_nearest

    scores: dict[str, list[float | None]] = {}
    copies: dict[str, Any] = {}
    corrupt: dict[str, str] = {}
    types = [prompt.type for prompt in prompts]
    for protocol, space in spaces.items():
        embedder = metric_runs.embedder(space, args, run.team)
        first, second = (pictures.embed(embedder, corrupt) for pictures in (generated, originals))
        similar = [
            to_nearest(first.get(row, {}), list(second.get(row, {}).values())) for row in rows
        ]
        statistics = SSCD_PROTOCOLS[protocol].statistics
        columns = {name: [score(one, name) for one in similar] for name in statistics}
        scores |= metric_runs.named(columns, protocol, spaces)
        shares = [score(one, "Share Above 0.7") for one in similar]
        copies[protocol] = share_of_copies(shares, [len(one) for one in similar], types)
    run.write(
        prompts,
        scores,
        counts=[len(one) for one in similar],
        corrupt=corrupt,
        notes=[said(protocol, found) for protocol, found in copies.items()],
        copies=copies,
    )
    return 0


def share_of_copies(
    shares: Sequence[float | None], samples: Sequence[int], types: Sequence[str]
) -> dict[str, dict[str, Any]]:
    """``shares``: of each prompt's pictures, those that are copies (None: unknown). For all and for
    each type: how many of the known prompts have at least one, and which share of all pictures is
    one."""
    found = {}
    for kind in ("all", *sorted({kind for kind in types if kind}, reverse=True)):
        known = [
            (share, count)
            for share, count, own in zip(shares, samples, types, strict=True)
            if share is not None and kind in ("all", own)
        ]
        pictures = sum(count for _, count in known)
        found[kind] = {
            "prompts": sum(share > 0 for share, _ in known),
            "of_prompts": len(known),
            "pictures": round(sum(share * count for share, count in known)),
            "of_pictures": pictures,
        }
    return found


def said(protocol: str, copies: dict[str, dict[str, Any]]) -> str:
    """The share of copies as one line."""
    parts = [
        f"{kind} {found['prompts']} of {found['of_prompts']} prompts, "
        f"{found['pictures']} of {found['of_pictures']} pictures"
        for kind, found in copies.items()
    ]
    return f"copies above 0.7 ({protocol}): " + "; ".join(parts)


def parse_args() -> argparse.Namespace:
    parser = cli.make_parser(__doc__)
    metric_runs.add_image_options(
        parser, reference="training images, 0001_first_image.jpg or img_0001_00.jpg, several a row"
    )
    parser.add_argument(
        "--num_ref_samples",
        type=cli.whole_number(1, 1000),
        metavar="INT",
        help="training images of each prompt that count, by name (default: all)",
    )
    metric_runs.add_network_options(parser, methods=("sscd",))
    metric_runs.add_run_options(parser)
    return parser.parse_args()


if __name__ == "__main__":
    cli.run(main, parse_args(), lower="--batch_size")
