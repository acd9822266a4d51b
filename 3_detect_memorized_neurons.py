"""Memorization neurons of every prompt: which prompts are memorized, and by which neurons (NeMo).

Per prompt: n noise differences (paper Alg. 1); if the best pair of seed rows is no more alike than
the threshold, the prompt is not memorized. Else neurons with unusual activations are collected
until deactivating them brings the score down to the threshold (Alg. 2 and 3), and those that are
not needed for it are given back, whole layers first, then one by one (Alg. 4).

Reads:   a prompt file, the statistics of script 1, the threshold of script 2
Writes:  --output, one row a prompt as soon as it is decided (Caption;URL;Initial Neurons;Initial
         SSIM;Refined Neurons;Refined SSIM;Row), and its record (.json) beside it; with
         --detect_only the prompts ranked by score instead

Examples:
  python 3_detect_memorized_neurons.py --version=tiny
  python 3_detect_memorized_neurons.py -d=prompts/memorized_laion_prompts.csv --rows=0-99
"""

import argparse
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from utils import cli, records, search_options, thresholds
from utils.cost_log import CostLog
from utils.decided_rows import DecidedRows
from utils.decisions import SCAN_COLUMNS, Decision, locate, rank
from utils.estimates import estimate
from utils.files import Prompt, read_prompts, read_table, sha256_of_file, write_table
from utils.localization import Search, Thresholds, UndecidedError
from utils.neuron_sets import RESULT_COLUMNS, read_results
from utils.summary import in_words, summarize_results, summarize_scan
from utils.team import join

if TYPE_CHECKING:
    from tqdm import tqdm

# For the estimate: 112 verbatim prompts of about 100 and 388 template prompts of about 700 passes.
PASSES_PER_PROMPT = 566


def main(args: argparse.Namespace) -> int:
    # Check.
    source = cli.resolve_model(args, steps=args.num_inference_steps)
    path = args.dataset or Path(source.defaults.memorized_prompts)
    prompts = read_prompts(path, caption_column=args.caption_column, rows=args.rows)
    noise = cli.noise_settings(args)
    if args.detect_only:
        search_options.check_scan_options(args)
    search = {} if args.detect_only else search_options.search_settings(args)
    flags = {name: getattr(args, name) for name in search_options.used_thresholds(args)}
    levels, said, threshold_file = thresholds.choose(
        file=args.threshold_file,
        flags=flags,
        source=source,
        settings=noise,
        stds=args.threshold_stds,
    )
    statistics_path = None if args.detect_only else args.statistics or source.statistics
    if statistics_path is not None:
        records.check_statistics_record(statistics_path, source)
    inputs = [p for p in (path, statistics_path, threshold_file) if p is not None]
    output = args.output or (source.scores if args.detect_only else source.results)
    settings = {
        "prompts": len(prompts),
        "rows": args.rows,
        "caption_column": args.caption_column,
        "detect_only": args.detect_only,
        "search_method": search_options.search_method(args),
        "scaling_factor": None if args.detect_only else args.scaling_factor or 0.0,
        **noise,
        "threshold_stds": args.threshold_stds,
        **levels,
        **search,
    }
    record = records.Record(
        output.with_suffix(".json"), settings=settings, model=source.identity, inputs=inputs
    )
    columns = SCAN_COLUMNS if args.detect_only else RESULT_COLUMNS
    rows = DecidedRows(output, columns, prompts)
    team = join()
    costs = CostLog(output, team.rank)

    def begin() -> str:
        state = records.open_output(
            record,
            output,
            continue_run=args.continue_run or team.restarted,
            others=[*rows.parts(), *costs.files()],
        )
        if state == "continued":
            rows.check()
        return state

    state = team.agree("state", begin)
    if statistics_path is not None:
        from utils.activation_statistics import check_fit, load_statistics  # last: imports torch

        statistics = load_statistics(statistics_path, widths=source.widths)
    if args.dry_run:
        passes = len(prompts) * (1 if args.detect_only else PASSES_PER_PROMPT)
        unet_rows = passes * args.samples_per_prompt * (1 if args.guidance_scale == 1 else 2)
        cost = estimate(
            source,
            device=args.device,
            dtype=args.dtype,
            unet_rows=unet_rows,
            output_bytes=1000 * len(prompts),
        )
        shown = {"model": source.id, "threshold from": said, **settings}
        if team.first:
            cli.print_settings(f"{output} from {', '.join(map(str, inputs))}", shown, cost)
        return 0
    if state == "finished":
        if team.first:
            costs.remove()
        team.say(f"{output} is complete already.")
        return 1 if record.stored.get("undecided_rows") else 0

    # Load.
    team.say(f"Loading {source.id} ...")
    team.say(f"Threshold: {said}")
    from utils.noise_difference import NoiseSettings
    from utils.scoring import Detector
    from utils.stable_diffusion import load_model
    from utils.value_layers import layer_widths

    model = load_model(
        source, device=team.device(args.device), dtype=args.dtype, steps=args.num_inference_steps
    )
    widths = layer_widths(model.value_layers)
    if statistics_path is not None:
        check_fit(statistics, widths, statistics_path)
    detector = Detector(
        model,
        NoiseSettings.from_options(settings),
        rows=args.samples_per_prompt,
        seed=args.seed,
        factor=settings["scaling_factor"] or 0.0,
        batch_size=args.batch_size,
    )
    if not args.detect_only and args.search != "plain":
        team.say(detector.pace())

    def decide(prompt: Prompt, progress: "tqdm[Any]") -> Decision:
        def show(stage: str, left: int, passes: int) -> None:
            text = f"row {prompt.row}, {stage}, {left} candidates, {passes} evaluations"
            progress.set_postfix_str(text, refresh=False)
            progress.update(0)  # draws the bar if it is time to

        if args.detect_only:
            (threshold,) = levels.values()
            return rank(detector, prompt, rows=args.samples_per_prompt, threshold=threshold)
        return locate(
            detector,
            prompt,
            statistics,
            search=Search(**search),
            thresholds=Thresholds(
                *(levels.get(name, math.nan) for name in search_options.THRESHOLD_FLAGS)
            ),
            method=settings["search_method"],
            report=show,
        )

    def timed(prompt: Prompt, progress: "tqdm[Any]") -> Sequence[object]:
        began = time.monotonic()
        try:
            decision = decide(prompt, progress)
        except UndecidedError:
            costs.add(prompt, time.monotonic() - began, searched_again=False)
            raise
        costs.add(prompt, time.monotonic() - began, searched_again=decision.searched_again)
        return decision.cells

    # Decide prompt by prompt.
    if team.first:
        record.start(**model.provenance)
    rows.open(team)
    costs.open()
    if not rows.decide(team, timed, undecided=[""] * len(columns[2:-1])):
        return 0

    # Sum up.
    if args.detect_only:
        ranked = sorted(read_table(output)[1], key=lambda cells: -float(cells["Score"] or "-inf"))
        write_table(output, columns, [[cells[name] for name in columns] for cells in ranked])
        summary = summarize_scan(ranked)
    else:
        types = {prompt.row: prompt.type for prompt in prompts}
        summary = summarize_results(read_results(output), types)
    cost, searched_again = costs.totals()
    if not args.detect_only:
        summary["layers"] = dict(zip(model.value_layers, widths, strict=True))
        summary["searched_again"] = len(searched_again)
    record.finish(**summary, cost=cost, output_sha256=sha256_of_file(output))
    costs.remove()
    print(*in_words(summary), sep="\n")
    if searched_again:
        print(
            f"{len(searched_again)} of them were searched again with exact, since what bisect "
            f"found failed its check: rows {', '.join(map(str, searched_again))}."
        )
    print(f"Written to {output}.")
    return 1 if summary["undecided_rows"] else 0


def parse_args() -> argparse.Namespace:
    parser = cli.make_parser(__doc__)
    parser.add_argument(
        "-d",
        "--dataset",
        type=Path,
        metavar="CSV",
        help="prompts to look at (default: the version's memorized prompts)",
    )
    parser.add_argument(
        "-o",
        "--output",
        type=cli.output_file,
        metavar="FILE",
        help="result file (default: results/memorization_statistics_<version>.csv)",
    )
    parser.add_argument(
        "--statistics",
        type=Path,
        metavar="FILE",
        help="activation statistics of script 1 (default: the version's own; the published ones "
        "for v1-4)",
    )
    parser.add_argument(
        "--detect_only",
        action="store_true",
        help="score and rank the prompts, find no neurons: a scan of a large caption list "
        "(default output: results/memorization_scores_<version>.csv)",
    )
    cli.add_model_options(parser)
    cli.add_block_option(parser)
    cli.add_noise_options(parser, batch_help=search_options.BATCH_HELP)
    search_options.add_search_options(parser)
    cli.add_prompt_options(parser)
    cli.add_run_options(parser)
    return parser.parse_args()


if __name__ == "__main__":
    cli.run(
        main,
        parse_args(),
        lower="--batch_size (below --samples_per_prompt it is another search, with another -o)",
    )
