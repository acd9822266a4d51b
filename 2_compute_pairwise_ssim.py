"""The memorization threshold: how alike the noise differences of ordinary prompts are over seeds.

For each hold-out prompt that is not memorized: one U-Net pass over n initial noises, their noise
differences (paper Alg. 1), and the SSIM of all n (n - 1) / 2 pairs. The threshold tau is mean plus
one standard deviation, over prompts, of the prompt's largest pairwise score (paper Sec. 3.1).

Reads:   a prompt file (CSV with ';', a caption column)
Writes:  --output, a dict of tensors: scores (prompts x pairs), rows, mean, std, threshold, and its
         record (.json) beside it, from which script 3 takes the threshold and checks that it fits

Examples:
  python 2_compute_pairwise_ssim.py --version=tiny
  python 2_compute_pairwise_ssim.py --prompts=prompts/unmemorized_laion_prompts.csv
"""

import argparse
import json
import math
from pathlib import Path

from utils import cli, records
from utils.decided_rows import DecidedRows
from utils.errors import InputError
from utils.estimates import estimate
from utils.files import read_prompts, read_table, sha256_of_file
from utils.team import join
from utils.thresholds import pairs, summary

COLUMNS = ("Caption", "URL", "Scores", "Row")  # of the scores that are kept while they are made


def main(args: argparse.Namespace) -> int:
    # Check.
    source = cli.resolve_model(args, steps=args.num_inference_steps)
    path = args.prompts or Path(source.defaults.unmemorized_prompts)
    prompts = read_prompts(path, caption_column=args.caption_column, rows=args.rows)
    if len(prompts) < 2:
        raise InputError(f"{path}: {len(prompts)} prompt given; a threshold needs at least two")
    output = args.output or source.threshold
    decided = DecidedRows(output.with_name(f".{output.name}.scores"), COLUMNS, prompts)
    settings = {
        "prompts": len(prompts),
        "rows": args.rows,
        "caption_column": args.caption_column,
        **cli.noise_settings(args),
    }
    record = records.Record(
        output.with_suffix(".json"), settings=settings, model=source.identity, inputs=[path]
    )
    team = join()

    def begin() -> str:
        state = records.open_output(
            record,
            output,
            continue_run=args.continue_run or team.restarted,
            others=[decided.path, *decided.parts()],
        )
        if state == "continued":
            decided.check()
        return state

    state = team.agree("state", begin)
    columns = pairs(args.samples_per_prompt)
    if args.dry_run:
        rows = len(prompts) * args.samples_per_prompt * (1 if args.guidance_scale == 1 else 2)
        cost = estimate(
            source,
            device=args.device,
            dtype=args.dtype,
            unet_rows=rows,
            output_bytes=4 * len(prompts) * len(columns),
        )
        if team.first:
            cli.print_settings(f"{output} from {path}", {"model": source.id, **settings}, cost)
        return 0
    if state == "finished":
        if team.first:
            decided.path.unlink(missing_ok=True)
        team.say(f"{output} is complete already.")
        return 1 if record.stored.get("undecided_rows") else 0

    # Load.
    team.say(f"Loading {source.id} ...")
    import torch

    from utils.activation_statistics import save_tensors
    from utils.noise_difference import NoiseSettings
    from utils.scoring import Detector
    from utils.stable_diffusion import load_model

    model = load_model(
        source, device=team.device(args.device), dtype=args.dtype, steps=args.num_inference_steps
    )
    detector = Detector(
        model,
        NoiseSettings.from_options(settings),
        rows=args.samples_per_prompt,
        seed=args.seed,
        batch_size=args.batch_size,
    )
    if team.first:
        record.start(**model.provenance)
    decided.open(team)

    # Score.
    if not decided.decide(
        team,
        lambda prompt, _: [json.dumps(detector.pairwise(prompt.caption).tolist())],
        undecided=[json.dumps([math.nan] * len(columns))],
    ):
        return 0

    # Write.
    table = torch.tensor([json.loads(cells["Scores"]) for cells in read_table(decided.path)[1]])
    finite = torch.isfinite(table).all(dim=1)
    undecided = [p.row for p, known in zip(prompts, finite.tolist(), strict=True) if not known]
    if len(prompts) - len(undecided) < 2:
        print(f"No threshold: fewer than two prompts have finite scores; not finite: {undecided}")
        return 1
    result = summary(table[finite].tolist())
    readings = {
        name: torch.tensor(value, dtype=torch.float64)
        for name, value in result["largest_pair_per_prompt"].items()
    }
    save_tensors(
        {"scores": table, "rows": torch.tensor([p.row for p in prompts]), **readings}, output
    )
    record.finish(**result, undecided_rows=undecided, output_sha256=sha256_of_file(output))
    decided.path.unlink(missing_ok=True)
    if undecided:
        print(
            f"{len(undecided)} prompts have scores that are not finite and count nowhere: "
            f"{undecided}"
        )
    for name in ("largest_pair_per_prompt", "all_pairs"):
        mean, std, threshold = result[name].values()
        print(f"{name}: mean {mean:.4f}, std {std:.4f}, mean + 1 std {threshold:.4f}")
    print(
        f"{output}: threshold {result['threshold']:.4f} from "
        f"{len(prompts) - len(undecided)} prompts."
    )
    return 1 if undecided else 0


def parse_args() -> argparse.Namespace:
    parser = cli.make_parser(__doc__)
    parser.add_argument(
        "--prompts",
        type=Path,
        metavar="CSV",
        help="prompts that are not memorized (default: the version's own)",
    )
    parser.add_argument(
        "-o",
        "--output",
        type=cli.output_file,
        metavar="FILE",
        help="threshold file (default: statistics/pairwise_ssim_<version>.pt)",
    )
    cli.add_model_options(parser)
    cli.add_noise_options(parser)
    cli.add_prompt_options(parser)
    cli.add_run_options(parser)
    return parser.parse_args()


if __name__ == "__main__":
    cli.run(main, parse_args(), lower="--batch_size")
