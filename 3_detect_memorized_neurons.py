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
from collections import defaultdict
from pathlib import Path

from utils import cli, records, search_options, thresholds
from utils.decided_rows import DecidedRows
from utils.estimates import estimate
from utils.files import (
    Prompt,
    read_prompts,
    read_table,
    sha256_of_file,
    write_table,
)
from utils.localization import Outcome, Search, Thresholds, UndecidedError, kept_rows
from utils.neuron_sets import RESULT_COLUMNS, Result, read_results, result_cells
from utils.summary import summarize_results, summarize_scan
from utils.team import join

SCAN_COLUMNS = ("Caption", "URL", "Score", "Seed Rows", "Row")
PASSES_PER_PROMPT = 300  # for the estimate: about the mean over the published prompts


def main(args: argparse.Namespace) -> int:
    # Check.
    source = cli.resolve_model(args)
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
        "search_method": None if args.detect_only else args.search or "exact",
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
    state = team.agree(
        "state", lambda: open_table(record, rows, args.continue_run or team.restarted)
    )
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
        team.say(f"{output} is complete already.")
        return 1 if record.stored.get("undecided_rows") else 0

    # Load.
    team.say(f"Loading {source.id} ...")
    team.say(f"Threshold: {said}")
    from tqdm import tqdm

    from utils.noise_difference import NoiseSettings
    from utils.scoring import Detector
    from utils.stable_diffusion import load_model
    from utils.value_layers import layer_widths

    model = load_model(source, device=team.device(args.device), dtype=args.dtype)
    if statistics_path is not None:
        check_fit(statistics, layer_widths(model.value_layers), statistics_path)
    detector = Detector(
        model,
        NoiseSettings.from_options(settings),
        rows=args.samples_per_prompt,
        seed=args.seed,
        factor=settings["scaling_factor"] or 0.0,
        batch_size=args.batch_size,
    )
    if settings["search_method"] in ("exact", "bisect"):
        team.say(detector.pace())

    def show(prompt: Prompt, stage: str, left: int, passes: int) -> None:
        text = f"row {prompt.row}, {stage}, {left} candidates, {passes} evaluations"
        progress.set_postfix_str(text, refresh=False)
        progress.update(0)  # draws the bar if it is time to

    def rank(prompt: Prompt) -> list[str]:
        pairwise = detector.pairwise(prompt.caption)
        rows = kept_rows(pairwise, args.samples_per_prompt, levels["pairwise_ssim_threshold"])
        return [f"{pairwise.max().item():.6f}", str(len(rows))]

    def find_neurons(prompt: Prompt) -> list[str]:
        finding = detector.find(
            prompt.caption,
            statistics,
            search=Search(**search),
            thresholds=Thresholds(
                *(levels.get(name, math.nan) for name in search_options.THRESHOLD_FLAGS)
            ),
            method=settings["search_method"],
            report=lambda *state: show(prompt, *state),
        )
        nothing: list[list[int]] = [[] for _ in model.value_layers]
        if finding.outcome and finding.outcome.check_failed:
            searched_again.append(prompt.row)
        found = finding.outcome or Outcome(nothing, 0.0, nothing, 0.0, fell_back=False)
        result = Result(
            prompt.row,
            prompt.caption,
            prompt.url,
            found.initial,
            found.initial_score,
            found.refined,
            found.refined_score,
        )
        return result_cells(result)[2:-1]

    # Decide prompt by prompt.
    decide = rank if args.detect_only else find_neurons
    seconds: dict[str, list[float]] = defaultdict(list)  # of the prompts that this process decided
    searched_again: list[int] = []  # by --search bisect: its result failed the check
    if team.first:
        record.start()
    rows.open(team)
    known = rows.captions()
    before = len(rows)
    with tqdm(
        total=len(prompts),
        initial=before,
        unit="prompt",
        mininterval=0.5,
        miniters=0,
        disable=not team.first,
    ) as progress:
        for unit in team.deal(len(prompts)):
            prompt = prompts[unit]
            if rows.known(prompt.row):
                continue
            if prompt.caption not in known:
                began = time.monotonic()
                try:
                    known[prompt.caption] = decide(prompt)
                except UndecidedError as error:
                    progress.write(f"row {prompt.row}: undecided, {error}")
                    known[prompt.caption] = [""] * len(columns[2:-1])
                seconds[prompt.type or "all"].append(time.monotonic() - began)
            rows.add(prompt, known[prompt.caption])
            progress.update(before + team.done() - progress.n)
    if searched_again:
        print(f"bisect: {len(searched_again)} prompts searched again with exact: {searched_again}")
    team.finish()
    if not team.first:
        return 0
    rows.close()

    # Sum up.
    if args.detect_only:
        ranked = sorted(read_table(output)[1], key=lambda cells: -float(cells["Score"] or "-inf"))
        write_table(output, columns, [[cells[name] for name in columns] for cells in ranked])
        summary = summarize_scan(ranked)
    else:
        types = {prompt.row: prompt.type for prompt in prompts}
        summary = summarize_results(read_results(output), types)
    cost = {
        kind: {"prompts": len(each), "seconds": round(sum(each), 3)}
        for kind, each in seconds.items()
    }
    record.finish(**summary, cost=cost, output_sha256=sha256_of_file(output))
    for name, value in summary.items():
        print(f"{name.replace('_', ' ')}: {value}")
    print(f"Written to {output}.")
    return 1 if summary["undecided_rows"] else 0


def open_table(record: records.Record, rows: DecidedRows, continue_run: bool) -> str:
    """How the run begins (see ``records.open_output``), also with a look at what was decided."""
    state = records.open_output(record, rows.path, continue_run=continue_run, others=rows.parts())
    if state == "continued":
        rows.check()
    return state


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
    cli.add_noise_options(parser)
    search_options.add_search_options(parser)
    cli.add_prompt_options(parser)
    cli.add_run_options(parser)
    return parser.parse_args()


if __name__ == "__main__":
    cli.run(main, parse_args(), lower="--batch_size")
