r"""SSCD_Gen: how alike the blocked and the unblocked picture of the same seed are.

Per prompt the median, over samples, of the cosine similarity of the two pictures' embeddings; then
median and median absolute deviation over all, VM and TM prompts (paper Sec. 4). High for neurons
that do nothing, low where blocking them took the memorized picture away.

Reads:   a prompt file, two folders of pictures that were made from the same seeds
Writes:  --output, a row a prompt (empty where there is no pair of pictures), and its summary
         (.json) beside it; embeddings in <folder>.embeddings/

Examples:
  python metrics/compute_sscd_gen.py -p=prompts/memorized_laion_prompts.csv \
      -f=generated_images_blocked -r=generated_images_unblocked
  python metrics/compute_sscd_gen.py -p=prompts/memorized_laion_prompts.csv \
      -f=generated_images_blocked -r=generated_images_unblocked --sscd_protocol=all
"""

import argparse
import sys
from pathlib import Path

# `python metrics/compute_sscd_gen.py` puts metrics/ on the path, not the project.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from utils import cli, metric_runs


def main(args: argparse.Namespace) -> int:
    # Check.
    metric_runs.check_device(args)
    prompts = metric_runs.read_targets(args)
    spaces = metric_runs.chosen_spaces(args)
    rows = [prompt.row for prompt in prompts]
    blocked = metric_runs.generated(args.folder, rows, args.num_samples)
    unblocked = metric_runs.generated(args.reference, rows, args.num_samples or blocked.samples)
    run = metric_runs.MetricRun(
        f"SSCD_Gen ({', '.join(spaces)})",
        metric_runs.output_path(args, "sscd_gen", args.folder),
        args,
        settings=metric_runs.settings(args, num_samples=args.num_samples or blocked.samples),
        spaces=spaces.values(),
        files=[args.prompts],
        folders=[blocked, unblocked],
    )
    if run.over():
        return 0

    # Embed and score.
    from utils.prompt_scores import same_sample, score

    scores: dict[str, list[float | None]] = {}
    corrupt: dict[str, str] = {}
    for protocol, space in spaces.items():
        embedder = metric_runs.embedder(space, args, run.team)
        first, second = (pictures.embed(embedder, corrupt) for pictures in (blocked, unblocked))
        pairs = [same_sample(first.get(row, {}), second.get(row, {})) for row in rows]
        columns = {"Median": [score(similarities, "Median") for similarities in pairs]}
        scores |= metric_runs.named(columns, protocol, spaces)
    run.write(prompts, scores, counts=[len(pair) for pair in pairs], corrupt=corrupt)
    return 0


def parse_args() -> argparse.Namespace:
    parser = cli.make_parser(__doc__)
    metric_runs.add_image_options(
        parser, reference="unblocked pictures of the same prompts and seeds"
    )
    metric_runs.add_network_options(parser)
    metric_runs.add_run_options(parser)
    return parser.parse_args()


if __name__ == "__main__":
    cli.run(main, parse_args(), lower="--batch_size")
