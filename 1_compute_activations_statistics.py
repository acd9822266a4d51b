"""Activation statistics of hold-out prompts: what every value-layer neuron does on ordinary text.

For each prompt the activation of a neuron is the mean over all token positions of its absolute
output (paper Sec. 3.2); it depends on the text alone, so no U-Net pass is made. Mean and standard
deviation over all prompts are what script 3 computes z-scores with. One prompt at a time, as
script 3 reads its own: a batch would change last digits, and with them who is a candidate.

Reads:   a prompt file (CSV with ';', a caption column)
Writes:  --output, torch.save((means, stds)), and its record (.json) beside it

Examples:
  python 1_compute_activations_statistics.py --version=tiny
  python 1_compute_activations_statistics.py --prompts=prompts/additional_laion_prompts.csv
"""

import argparse
from pathlib import Path

from utils import cli, records
from utils.errors import InputError
from utils.estimates import estimate
from utils.files import FloatRows, read_prompts, sha256_of_file
from utils.team import join

SAVE_EVERY = 100  # prompts between two saves of the running sums


def main(args: argparse.Namespace) -> int:
    # Check.
    source = cli.resolve_model(args)
    path = args.prompts or Path(source.defaults.statistics_prompts)
    prompts = read_prompts(path, caption_column=args.caption_column, rows=args.rows)
    if len(prompts) < 2 and not args.no_statistics:
        raise InputError(f"{path}: {len(prompts)} prompt given; statistics need at least two")
    output = args.output or source.own_statistics
    partial = output.with_name(f".{output.name}.sums")
    settings = {
        "prompts": len(prompts),
        "rows": args.rows,
        "caption_column": args.caption_column,
        "statistics": not args.no_statistics,
        "protocol": args.protocol,
        "dtype": args.dtype,
        "device": args.device,
    }
    team = join()
    if not team.first:
        return 0  # a text encoder is done in minutes: one process does it
    record = records.Record(
        output.with_suffix(".json"), settings=settings, model=source.identity, inputs=[path]
    )
    state = records.open_output(
        record, output, continue_run=args.continue_run or team.restarted, others=[partial]
    )
    if args.dry_run:
        size = 4 * sum(source.widths or []) * (len(prompts) if args.no_statistics else 2)
        cost = estimate(
            source, device=args.device, dtype=args.dtype, unet_rows=0, output_bytes=size
        )
        cli.print_settings(f"{output} from {path}", {"model": source.id, **settings}, cost)
        return 0
    if state == "finished":
        partial.unlink(missing_ok=True)
        print(f"{output} is complete already.")
        return 0

    # Load.
    print(f"Loading {source.id} ...")
    import torch
    from tqdm import tqdm

    from utils.activation_statistics import RunningStatistics, save_tensors
    from utils.stable_diffusion import encode_prompt, load_model
    from utils.value_layers import layer_widths

    model = load_model(source, device=team.device(args.device), dtype=args.dtype)
    widths = layer_widths(model.value_layers)
    record.start(**model.provenance)
    running = RunningStatistics(widths)
    raw = FloatRows(partial, sum(widths)) if args.no_statistics else None
    if raw is None and partial.exists():
        running.restore(partial)
    done = running.count if raw is None else raw.count

    # Stream.
    progress = tqdm(prompts[done:], initial=done, total=len(prompts), unit="prompt")
    for count, prompt in enumerate(progress, start=done + 1):
        activations = model.value_reader.activations(
            encode_prompt(model, prompt.caption).embedding[0]
        )
        if not all(bool(torch.isfinite(layer).all()) for layer in activations):
            # Nothing of this run helps one without that row: it shall find its output's name free.
            record.path.unlink()
            partial.unlink(missing_ok=True)
            raise InputError(
                f"{path}: row {prompt.row} has activations that are not finite with this model; "
                "leave it out with --rows"
            )
        if raw is not None:
            raw.add(torch.cat(activations).numpy())
            continue
        running.add(activations)
        if count % SAVE_EVERY == 0:
            running.save(partial)

    # Write.
    if raw is not None:
        save_tensors(list(torch.from_numpy(raw.read().copy()).split(widths, dim=1)), output)
    else:
        statistics = running.result()
        save_tensors((statistics.means, statistics.stds), output)
    record.finish(
        value_layers=dict(zip(model.value_layers, widths, strict=True)),
        output_sha256=sha256_of_file(output),
    )
    partial.unlink(missing_ok=True)
    what = "activations" if args.no_statistics else "means and standard deviations"
    print(
        f"{output}: {what} of {sum(widths)} neurons in {len(widths)} layers, "
        f"{len(prompts)} prompts."
    )
    return 0


def parse_args() -> argparse.Namespace:
    parser = cli.make_parser(__doc__)
    parser.add_argument(
        "--prompts", type=Path, metavar="CSV", help="hold-out prompts (default: the version's own)"
    )
    parser.add_argument(
        "-o",
        "--output",
        type=cli.output_file,
        metavar="FILE",
        help="statistics file (default: statistics/statistics_<version>.pt)",
    )
    parser.add_argument(
        "--no_statistics",
        action="store_true",
        help="keep the raw activations instead: L tensors (prompts, width)",
    )
    cli.add_model_options(
        parser,
        dtype_help="precision that the U-Net is held in (default: float16 on CUDA, float32 on a "
        "CPU); activations are computed in float32 from the weights as they are stored",
        protocol_help="kept in the record alone: activations have no timestep, and script 3 takes "
        "the same statistics in both protocols",
    )
    cli.add_block_option(parser)
    cli.add_prompt_options(parser)
    cli.add_run_options(parser)
    return parser.parse_args()


if __name__ == "__main__":
    cli.run(main, parse_args(), lower=None)
