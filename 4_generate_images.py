"""Images of prompts with a chosen set of neurons switched off, or with all of them on.

DDIM with classifier-free guidance from the same noises in every run (paper B.4), so that images of
two runs with the same seed differ by the blocked neurons alone. One mode must be chosen; K counts
over the refined sets of the whole result file.

Reads:   the result file of script 3, for --original_images a prompt file
Writes:  the folder --output: images img_{prompt:04d}_{sample:02d}.jpg (prompt = row in the prompt
         file) and config.json, the record of the run

Examples:
  python 4_generate_images.py --version=tiny --refined_neurons -o=generated_images/tiny_blocked
  python 4_generate_images.py --original_images -o=generated_images_unblocked
"""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path

from utils import cli
from utils.blocking import MODES, OWN_SETS, sets_to_block
from utils.errors import InputError
from utils.estimates import estimate
from utils.files import Prompt, read_json, read_prompts
from utils.images import batches_left, image_name, save_jpeg
from utils.neuron_sets import NeuronSet, Result, check_neurons, read_results, size
from utils.thresholds import check_same_model
from utils.versions import Source

PER_PROMPT = -1  # --block_random_neurons without a number


def main(args: argparse.Namespace) -> int:
    # Check.
    source = cli.resolve_model(args)
    mode = next(name for name in MODES if getattr(args, name) not in (None, False))
    k = getattr(args, mode) if type(getattr(args, mode)) is int else None
    k = None if k == PER_PROMPT else k
    prompts, results, located, inputs = read_inputs(args, source, mode, k)
    factor = args.scaling_factor or 0.0
    settings = {
        "mode": mode,
        "k": k,
        "prompts": len(prompts),
        "rows": args.rows,
        "caption_column": args.caption_column,
        "memorization_type": args.memorization_type,
        "scaling_factor": None if mode == "original_images" else factor,
        "random_seed": args.random_seed if "random" in mode else None,
        "seed": args.seed,
        "num_samples": args.num_samples,
        "steps": args.steps,
        "guidance_scale": args.guidance_scale,
        "batch_size": args.batch_size,
        "protocol": args.protocol,
        "dtype": args.dtype,
        "device": args.device,
    }
    rows = [prompt.row for prompt in prompts]

    def sets(widths: Sequence[int]) -> Mapping[int, NeuronSet | None]:
        return sets_to_block(mode, k, results, rows, widths, seed=args.random_seed, located=located)

    blocked = {} if source.widths is None else sets(source.widths)
    record = cli.Record(
        args.output / "config.json", settings=settings, model=source.identity, inputs=inputs
    )
    state = cli.open_output(
        record,
        record.path,
        continue_run=args.continue_run,
        others=sorted(args.output.glob("img_*.jpg"))[:1],
    )
    if args.dry_run:
        images = len(prompts) * args.num_samples
        cost = estimate(
            source,
            device=args.device,
            dtype=args.dtype,
            unet_rows=images * args.steps * (1 if args.guidance_scale == 1 else 2),
            output_bytes=images * (4e3 if args.version == "tiny" else 100e3),
        )
        shown = {"model": source.id, **settings, "images": images}
        cli.print_settings(f"{args.output} from {', '.join(map(str, inputs))}", shown, cost)
        return 0
    undecided = [r.row for r in results if r.refined is None and r.row in rows]
    undecided = undecided if mode in OWN_SETS and k is None else []
    decided = [row for row in rows if row not in undecided]
    batches = batches_left(decided, args.num_samples, args.batch_size, args.output)
    if state == "finished" and not batches:
        print(f"{args.output} is complete already.")
        return 1 if undecided else 0

    # Load.
    print(f"Loading {source.id} ...")
    from tqdm import tqdm

    from utils.stable_diffusion import (
        Conditioning,
        decode,
        encode_prompt,
        encode_unconditional,
        initial_noise,
        load_model,
        sample_latents,
    )
    from utils.value_layers import deactivated, layer_widths

    model = load_model(source, device=args.device, dtype=args.dtype)
    widths = layer_widths(model.value_layers)
    if source.widths is None:
        for result in located:
            for neurons in filter(None, (result.initial, result.refined)):
                check_neurons(neurons, widths, where=f"{inputs[0]}: row {result.row}")
        blocked = sets(widths)
    captions = {prompt.row: prompt.caption for prompt in prompts}
    noise = initial_noise(model, args.num_samples, args.seed)
    unconditional = encode_unconditional(model)
    if mode not in ("original_images", "initial_neurons", "refined_neurons"):
        record.content["blocked"] = {str(row): blocked[row] for row in decided}
    record.start()

    # Generate.
    encoded: dict[int, Conditioning] = {}
    progress = tqdm(total=len(decided) * args.num_samples, unit="image")
    progress.update(progress.total - sum(map(len, batches)))
    for batch in batches:
        encoded = {row: encoded.get(row) or encode_prompt(model, captions[row]) for row, _ in batch}
        off = [blocked[row] or [[] for _ in widths] for row, _ in batch]
        with deactivated(model.value_layers, off, factor=factor):
            latents = sample_latents(
                model,
                Conditioning.cat([encoded[row] for row, _ in batch]),
                unconditional,
                noise[[sample for _, sample in batch]],
                steps=args.steps,
                guidance_scale=args.guidance_scale,
            )
        for (row, sample), image in zip(batch, decode(model, latents), strict=True):
            path = args.output / image_name(row, sample)
            if not path.exists():
                save_jpeg(image, path)
        progress.update(len(batch))
    progress.close()
    counts = [size(blocked[row] or []) for row in decided]
    record.finish(images=len(decided) * args.num_samples, undecided_rows=undecided)
    if undecided:
        print(f"{len(undecided)} prompts were left undecided by script 3, no images: {undecided}")
    print(
        f"{args.output}: {len(decided) * args.num_samples} images of {len(decided)} prompts, "
        f"{min(counts, default=0)} to {max(counts, default=0)} neurons blocked."
    )
    return 1 if undecided else 0


def read_inputs(
    args: argparse.Namespace, source: Source, mode: str, k: int | None
) -> tuple[list[Prompt], list[Result], list[Result], list[Path]]:
    """(prompts to generate, located prompts that count, all located prompts, the files read)."""
    others = args.unmemorized_prompts
    if others == Path():
        others = Path(source.defaults.unmemorized_prompts)
    dataset = args.dataset or Path(source.defaults.memorized_prompts)
    if mode == "original_images" and args.scaling_factor is not None:
        raise InputError("--scaling_factor has no effect with --original_images; leave one out")
    if others is not None and (mode in OWN_SETS and k is None):
        raise InputError(
            f"--{mode} blocks each memorized prompt's own neurons, which --unmemorized_prompts do "
            "not have; choose one set for all with --block_top_k_neurons K"
        )

    # The located sets.
    results: list[Result] = []
    inputs: list[Path] = []
    if mode != "original_images":
        path = args.result_file or source.results
        if not path.is_file():
            raise InputError(
                f"{path}: no such result file; make it with script 3 or name one with -f"
            )
        results = read_results(path, widths=source.widths)
        inputs.append(path)
        check_result_record(path, source, args.protocol)
    elif args.result_file is not None:
        raise InputError(
            f"-f {args.result_file} has no effect with --original_images; leave one out"
        )

    # VM or TM: the prompt file says.
    typed: set[int] | None = None
    from_dataset = mode == "original_images" and others is None
    if args.memorization_type is not None or from_dataset:
        of_dataset = read_prompts(dataset, caption_column=args.caption_column)
        inputs.append(dataset)
        if args.memorization_type is not None:
            typed = {p.row for p in of_dataset if p.type == args.memorization_type}
            if not typed:
                raise InputError(
                    f"{dataset}: no prompt of type {args.memorization_type} in column 'type'; "
                    "leave out --memorization_type or name another file with -d"
                )
            captions = {p.row: p.caption for p in of_dataset}
            for result in results:
                if captions.get(result.row) != result.caption:
                    raise InputError(
                        f"{inputs[0]}: row {result.row} is not the caption of that row in "
                        f"{dataset}; name the prompt file of these results with -d"
                    )
    elif args.dataset is not None:
        raise InputError(f"-d {args.dataset} has no effect here; leave it out")
    counted = [r for r in results if typed is None or r.row in typed]

    # The prompts to generate.
    if others is not None:
        inputs.append(others)
        prompts = read_prompts(others, caption_column=args.caption_column, rows=args.rows)
        return prompts, counted, results, inputs
    if from_dataset:
        prompts = read_prompts(dataset, caption_column=args.caption_column, rows=args.rows)
    else:
        known = {result.row: Prompt(result.row, result.caption, result.url) for result in results}
        missing = [row for row in args.rows or [] if row not in known]
        if missing:
            raise InputError(f"{inputs[0]}: no row {missing[0]}; mend --rows")
        prompts = [known[row] for row in args.rows or sorted(known)]
    prompts = [prompt for prompt in prompts if typed is None or prompt.row in typed]
    if not prompts:
        raise InputError(f"{inputs[0]}: no prompt is left; mend --rows or --memorization_type")
    return prompts, counted, results, inputs


def check_result_record(path: Path, source: Source, protocol: str) -> None:
    """InputError if the record beside a result file (the authors' files have none) names another
    model or protocol, or an unfinished run."""
    record_path = path.with_suffix(".json")
    if not record_path.is_file():
        return
    record = read_json(record_path)
    check_same_model(record, source, where=path)
    found = record.get("settings", {}).get("protocol")
    if found != protocol:
        raise InputError(f"{path}: found with protocol {found}; add --protocol={found}")
    if not record.get("finished"):
        raise InputError(
            f"{path}: the run is not finished; complete it with script 3 and --continue_run"
        )


def parse_args() -> argparse.Namespace:
    parser = cli.make_parser(__doc__)
    parser.add_argument(
        "-f",
        "--result_file",
        type=Path,
        metavar="CSV",
        help="result file of script 3 (default: results/memorization_statistics_<version>.csv)",
    )
    parser.add_argument(
        "-o", "--output", type=Path, required=True, metavar="DIR", help="image folder"
    )
    parser.add_argument(
        "-d",
        "--dataset",
        type=Path,
        metavar="CSV",
        help="prompt file of the memorized prompts: captions for --original_images, types for "
        "--memorization_type (default: the version's)",
    )
    parser.add_argument(
        "--unmemorized_prompts",
        type=Path,
        nargs="?",
        const=Path(),
        metavar="CSV",
        help="generate these prompts instead (without a file: the version's hold-out prompts)",
    )
    parser.add_argument(
        "--memorization_type",
        choices=("VM", "TM"),
        help="only verbatim or only template prompts are counted and generated",
    )
    modes = parser.add_argument_group("what is blocked (one of)").add_mutually_exclusive_group(
        required=True
    )
    modes.add_argument("--original_images", action="store_true", help="nothing")
    modes.add_argument("--initial_neurons", action="store_true", help="each prompt's initial set")
    modes.add_argument("--refined_neurons", action="store_true", help="each prompt's refined set")
    count = cli.whole_number(1, 1_000_000)
    modes.add_argument(
        "--block_top_k_neurons",
        type=count,
        metavar="K",
        help="for all prompts: the K neurons located most often",
    )
    modes.add_argument(
        "--block_top_k_neurons_per_layer",
        type=count,
        metavar="K",
        help="for all prompts: in each layer the K neurons located most often",
    )
    modes.add_argument(
        "--block_top_k_neuron_subgroups",
        type=count,
        metavar="K",
        help="for all prompts: the K whole sets located most often",
    )
    modes.add_argument(
        "--block_random_neurons",
        type=count,
        nargs="?",
        const=PER_PROMPT,
        metavar="K",
        help="for each prompt as many random neurons as its refined set has, from the same layers, "
        "none of them located for any prompt; with K the same for --block_top_k_neurons K",
    )
    modes.add_argument(
        "--block_random_neuron_subgroups",
        type=count,
        metavar="K",
        help="for all prompts: random neurons, as many as --block_top_k_neuron_subgroups K blocks",
    )
    group = parser.add_argument_group("generation (paper B.4)")
    group.add_argument(
        "--scaling_factor",
        type=cli.number(-10, 10),
        metavar="FLOAT",
        help="what blocked neurons are multiplied by (default: 0)",
    )
    group.add_argument(
        "--random_seed", type=cli.SEED, default=0, metavar="INT", help="seed of random neurons"
    )
    group.add_argument(
        "--seed", type=cli.SEED, default=2, metavar="INT", help="seed of the initial noises"
    )
    group.add_argument(
        "-n",
        "--num_samples",
        type=cli.whole_number(1, 1000),
        default=10,
        metavar="INT",
        help="images per prompt",
    )
    group.add_argument("--steps", type=cli.STEPS, default=50, metavar="INT", help="DDIM steps")
    group.add_argument(
        "--guidance_scale",
        type=cli.GUIDANCE,
        default=7.0,
        metavar="FLOAT",
        help="classifier-free guidance; 1 is none",
    )
    group.add_argument(
        "-b",
        "--batch_size",
        type=cli.BATCH,
        default=10,
        metavar="INT",
        help="images per batch, of several prompts where it reaches over",
    )
    cli.add_model_options(parser)
    cli.add_prompt_options(parser)
    cli.add_run_options(parser)
    return parser.parse_args()


if __name__ == "__main__":
    cli.run(main, parse_args(), lower="-b/--batch_size")
