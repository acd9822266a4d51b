r"""D_SSCD: how alike the pictures of one prompt are over seeds (lower is more diverse).

Per prompt the median, over all pairs of samples, of the cosine similarity of their embeddings; then
median and median absolute deviation over all, VM and TM prompts (paper Sec. 4). CLIP's embeddings
in place of SSCD's with --method=clip.

Reads:   a prompt file, generated pictures
Writes:  --output, a row a prompt (empty where there are fewer than two pictures), and its summary
         (.json) beside it; embeddings in <folder>.embeddings/

Examples:
  python metrics/compute_diversity.py -p=prompts/memorized_laion_prompts.csv \
      -f=generated_images_blocked
  python metrics/compute_diversity.py -p=prompts/memorized_laion_prompts.csv \
      -f=generated_images_blocked --method=clip
"""

import argparse
import sys
from pathlib import Path

# `python metrics/compute_diversity.py` puts metrics/ on the path, not the project.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from utils import cli, metric_runs


def main(args: argparse.Namespace) -> int:
    # Check.
    metric_runs.check_device(args)
    prompts = metric_runs.read_targets(args)
    spaces = metric_runs.chosen_spaces(args)
    rows = [prompt.row for prompt in prompts]
    generated = metric_runs.generated(args.folder, rows, args.num_samples)
    run = metric_runs.MetricRun(
        f"D ({', '.join(spaces)})",
        metric_runs.output_path(args, "diversity", args.folder),
        args,
        settings=metric_runs.settings(args, num_samples=args.num_samples or generated.samples),
        spaces=spaces.values(),
        files=[args.prompts],
        folders=[generated],
    )
    if run.over():
        return 0

    # Embed and score.
    from utils.prompt_scores import between_samples, score

    scores: dict[str, list[float | None]] = {}
    corrupt: dict[str, str] = {}
    for protocol, space in spaces.items():
        found = generated.embed(metric_runs.embedder(space, args, run.team), corrupt)
        pairs = [between_samples(found.get(row, {})) for row in rows]
        columns = {"Median": [score(similarities, "Median") for similarities in pairs]}
        scores |= metric_runs.named(columns, protocol, spaces)
    counts = [len(found.get(row, {})) for row in rows]
    run.write(prompts, scores, counts=counts, corrupt=corrupt)
    return 0


def parse_args() -> argparse.Namespace:
    parser = cli.make_parser(__doc__)
    metric_runs.add_image_options(parser)
    metric_runs.add_network_options(parser)
    metric_runs.add_run_options(parser)
    return parser.parse_args()


if __name__ == "__main__":
    cli.run(main, parse_args(), lower="--batch_size")
