r"""A_CLIP: how well pictures fit their caption.

Per prompt the median, over samples, of the cosine similarity of picture and caption in an
image-text model; then median and median absolute deviation over all, VM and TM prompts (paper
Sec. 4: CLIP ViT-B/32).

Reads:   a prompt file, generated pictures
Writes:  --output, a row a prompt (empty where picture or caption is missing), and its summary
         (.json) beside it; embeddings in <folder>.embeddings/

Examples:
  python metrics/compute_prompt_alignment.py -p=prompts/memorized_laion_prompts.csv \
      -f=generated_images_blocked
  python metrics/compute_prompt_alignment.py -p=prompts/memorized_laion_prompts.csv \
      -f=generated_images_blocked --clip_model=ViT-L-14 --clip_pretrained=openai
"""

import argparse
import sys
from pathlib import Path

# `python metrics/compute_prompt_alignment.py` puts metrics/ on the path, not the project.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from utils import cli, metric_runs


def main(args: argparse.Namespace) -> int:
    # Check.
    metric_runs.check_device(args)
    prompts = metric_runs.read_targets(args)
    space = metric_runs.clip_from(args)
    rows = [prompt.row for prompt in prompts]
    generated = metric_runs.generated(args.folder, rows, args.num_samples)
    run = metric_runs.MetricRun(
        "A_CLIP",
        metric_runs.output_path(args, "alignment", args.folder),
        args,
        settings=metric_runs.settings(args, num_samples=args.num_samples or generated.samples),
        spaces=[space],
        files=[args.prompts],
        folders=[generated],
    )
    if run.over():
        return 0

    # Embed and score.
    from utils.prompt_scores import score, to_caption

    corrupt: dict[str, str] = {}
    embedder = metric_runs.embedder(space, args, run.team)
    found = generated.embed(embedder, corrupt)
    captions = embedder.texts([p.caption for p in prompts if p.caption], generated.folder)
    similar = [to_caption(found.get(p.row, {}), captions.get(p.caption)) for p in prompts]
    run.write(
        prompts,
        {"Median": [score(similarities, "Median") for similarities in similar]},
        counts=[len(similarities) for similarities in similar],
        corrupt=corrupt,
        missing_captions=[prompt.row for prompt in prompts if not prompt.caption],
    )
    return 0


def parse_args() -> argparse.Namespace:
    parser = cli.make_parser(__doc__)
    metric_runs.add_image_options(parser)
    metric_runs.add_network_options(parser, methods=("clip",))
    metric_runs.add_run_options(parser)
    return parser.parse_args()


if __name__ == "__main__":
    cli.run(main, parse_args(), lower="--batch_size")
