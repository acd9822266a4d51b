r"""Scores of a detector: how much each prompt looks memorized, by one of three methods.

text_conditional_noise  mean norm of the text-conditional noise e_c - e_u along guided sampling,
                        over all steps (Score) or of the first (Score First Step), of 4 images
                        (Wen et al., ICLR 2024)
attention_entropy       entropy of cross-attention late in guided sampling (Score: their score D),
                        or of its fourth layer at the first step (Score E), of one image
                        (Ren et al., ECCV 2024)
pairwise_ssim           the largest SSIM of two noise differences over 10 initial noises
                        (paper Sec. 3.1), as script 3 --detect_only

The higher, the more memorized. metrics/compute_detection.py compares two such tables.

Reads:   a prompt file (CSV with ';', a caption column)
Writes:  --output (Row;Caption;Score and the detector's further readings), a row a prompt as soon as
         it is scored, and its record (.json) beside it

Examples:
  python metrics/compute_detector_scores.py --detector=text_conditional_noise --version=tiny \
      --prompts=prompts/tiny_memorized_prompts.csv
  python metrics/compute_detector_scores.py --detector=attention_entropy \
      --prompts=prompts/unmemorized_laion_prompts.csv --rows=0-499
"""

import argparse
import sys
from pathlib import Path

# `python metrics/compute_detector_scores.py` puts metrics/ on the path, not the project.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from utils import cli, records
from utils.decided_rows import DecidedRows
from utils.detectors import DETECTORS, checked_options, make_detector, unet_rows
from utils.estimates import estimate
from utils.files import read_prompts, read_table, sha256_of_file
from utils.summary import format_summary, summarize_scores
from utils.team import join
from utils.versions import Source


def main(args: argparse.Namespace) -> int:
    # Check.
    source = cli.resolve_model(args, steps=args.num_inference_steps)
    settings = {
        "detector": args.detector,
        **checked_options(args.detector, vars(args)),
        "seed": args.seed,
        "num_inference_steps": args.num_inference_steps,
        "exchanged_guidance": False,
        "batch_size": args.batch_size,
        "rows": args.rows,
        "caption_column": args.caption_column,
        "dtype": args.dtype,
        "device": args.device,
    }
    prompts = read_prompts(args.prompts, caption_column=args.caption_column, rows=args.rows)
    output = args.output or default_output(args.detector, source, args.prompts)
    readings = DETECTORS[args.detector].readings
    decided = DecidedRows(output, ("Row", "Caption", *readings), prompts)
    record = records.Record(
        output.with_suffix(".json"),
        settings={"prompts": len(prompts), **settings},
        model=source.identity,
        inputs=[args.prompts],
    )
    team = join()

    def begin() -> str:
        state = records.open_output(
            record,
            output,
            continue_run=args.continue_run or team.restarted,
            others=decided.parts(),
        )
        if state == "continued":
            decided.check()
        return state

    state = team.agree("state", begin)
    if args.dry_run:
        cost = estimate(
            source,
            device=args.device,
            dtype=args.dtype,
            unet_rows=len(prompts) * unet_rows(args.detector, settings),
            output_bytes=100 * len(prompts),
        )
        if team.first:
            cli.print_settings(
                f"{output} from {args.prompts}", {"model": source.id, **settings}, cost
            )
        return 0
    if state == "finished":
        team.say(f"{output} is complete already.")
        return 1 if record.stored.get("undecided_rows") else 0

    # Load.
    team.say(f"Loading {source.id} ...")

    from utils.stable_diffusion import load_model

    model = load_model(
        source, device=team.device(args.device), dtype=args.dtype, steps=args.num_inference_steps
    )
    detector = make_detector(args.detector, model, settings)
    if team.first:
        record.start(**model.provenance)
    decided.open(team)

    # Score.
    if not decided.decide(
        team,
        lambda prompt, _: [f"{score:.6f}" for score in detector(prompt.caption)],
        undecided=[""] * len(readings),
    ):
        return 0

    # Sum up.
    _, table = read_table(output)
    undecided = [int(cells["Row"]) for cells in table if not cells[readings[0]]]
    types = [prompt.type for prompt in prompts]
    columns = {
        name: [float(cells[name]) if cells[name] else None for cells in table] for name in readings
    }
    summaries = {name: summarize_scores(column, types) for name, column in columns.items()}
    shown = format_summary(args.detector, summaries)
    record.finish(
        scores=summaries,
        undecided_rows=undecided,
        table=shown.splitlines(),
        output_sha256=sha256_of_file(output),
    )
    print(shown)
    if undecided:
        print(f"{len(undecided)} prompts have a score that is not finite: rows {undecided}")
    print(f"Written to {output}.")
    return 1 if undecided else 0


def default_output(detector: str, source: Source, prompts: Path) -> Path:
    """results/detectors/<detector>_<version>_<which prompts>.csv"""
    usual = {
        Path(source.defaults.memorized_prompts): "memorized",
        Path(source.defaults.unmemorized_prompts): "unmemorized",
    }
    which = usual.get(prompts, prompts.stem)
    return Path("results/detectors") / f"{detector}_{source.tag}_{which}.csv"


def parse_args() -> argparse.Namespace:
    parser = cli.make_parser(__doc__)
    parser.add_argument("--detector", choices=DETECTORS, required=True, help="method (see above)")
    parser.add_argument(
        "--prompts", type=Path, required=True, metavar="CSV", help="prompts to score"
    )
    parser.add_argument(
        "-o",
        "--output",
        type=cli.output_file,
        metavar="CSV",
        help="scores (default: results/detectors/<detector>_<version>_<memorized|unmemorized>.csv)",
    )
    cli.add_model_options(parser)
    # Only one of the detectors looks at a noise difference.
    parser.set_defaults(protocol=None)
    group = parser.add_argument_group("detector")
    group.add_argument(
        "-s", "--seed", type=cli.SEED, default=1, metavar="INT", help="seed of the initial noises"
    )
    group.add_argument(
        "--samples_per_prompt",
        type=cli.whole_number(1, 1000),
        metavar="INT",
        help="images (initial noises) per prompt (default: the method's own, see above)",
    )
    group.add_argument(
        "--num_inference_steps", type=cli.STEPS, default=50, metavar="INT", help="DDIM steps"
    )
    group.add_argument(
        "--guidance_scale",
        type=cli.GUIDANCE,
        metavar="FLOAT",
        help="classifier-free guidance (default: 7.5; pairwise_ssim: 1, none)",
    )
    group.add_argument(
        "--batch_size",
        type=cli.BATCH,
        metavar="INT",
        help="images per pass, for a device with little memory (default: all of a prompt; fewer "
        "may change a score by rounding)",
    )
    cli.add_prompt_options(parser)
    cli.add_run_options(parser)
    return parser.parse_args()


if __name__ == "__main__":
    cli.run(main, parse_args(), lower="--batch_size")
