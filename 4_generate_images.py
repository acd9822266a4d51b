"""Images of prompts with a chosen set of neurons switched off, with all of them on, or with another
mitigation.

DDIM with classifier-free guidance from the same noises in every run (paper B.4), so that images of
two runs with the same seed differ by the blocked neurons alone. One mode must be chosen; K counts
over the refined sets of the whole result file.

Reads:   the result file of script 3; for --original_images and --mitigation a prompt file
Writes:  the folder --output: images img_{prompt:04d}_{sample:02d}.jpg (prompt = row in the prompt
         file) and config.json, the record of the run

Examples:
  python 4_generate_images.py --version=tiny --refined_neurons -o=generated_images/tiny_blocked
  python 4_generate_images.py --original_images -o=generated_images_unblocked
"""

import argparse
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from utils import cli, generation, mitigations, records
from utils.behind import Behind
from utils.blocking import NOTHING_BLOCKED, OWN_SETS, sets_to_block
from utils.estimates import estimate
from utils.images import all_batches, image_name, missing_images
from utils.neuron_sets import NeuronSet, check_neurons, size
from utils.team import join

ROUNDING = "up to rounding (4 grey levels after JPEG)"


def main(args: argparse.Namespace) -> int:
    # Check.
    source = cli.resolve_model(args, steps=args.steps)
    mode, k = generation.chosen_mode(args)
    method = generation.chosen_mitigation(args)
    inputs = generation.read_inputs(args, source, mode, k, method)
    prompts = inputs.prompts
    settings = generation.run_settings(args, mode, k, method, len(prompts))
    random_seed = settings["random_seed"] or 0
    rows = [prompt.row for prompt in prompts]

    def sets(widths: Sequence[int]) -> Mapping[int, NeuronSet | None]:
        return sets_to_block(
            mode, k, inputs.counted, rows, widths, seed=random_seed, located=inputs.located
        )

    blocked = {} if source.widths is None else sets(source.widths)
    record = records.Record(
        args.output / "config.json",
        settings=settings,
        model=source.identity | {"vae_sha256": source.vae_sha256},
        inputs=inputs.files,
    )
    team = join()
    state = team.agree(
        "state",
        lambda: records.open_output(
            record,
            record.path,
            continue_run=args.continue_run or team.restarted,
            others=sorted(args.output.glob("img_*.jpg"))[:1],
        ),
    )
    images = len(prompts) * args.num_samples
    computed = -(-images // args.batch_size) * args.batch_size
    if args.dry_run:
        cost = estimate(
            source,
            device=args.device,
            dtype=args.dtype,
            unet_rows=computed * args.steps * (1 if args.guidance_scale == 1 else 2)
            + mitigations.extra_unet_rows(
                method, images=images, memorized=len(inputs.memorized), base=len(inputs.base)
            ),
            output_bytes=images * (4e3 if args.version == "tiny" else 100e3),
        )
        filled = {"images": images, "copies that fill the last batch": computed - images}
        shown = {"model": source.id, **settings, **filled}
        if team.first:
            cli.print_settings(
                f"{args.output} from {', '.join(map(str, inputs.files))}", shown, cost
            )
        return 0
    undecided = [r.row for r in inputs.counted if r.refined is None and r.row in rows]
    undecided = undecided if mode in OWN_SETS and k is None else []
    decided = [row for row in rows if row not in undecided]
    missing = missing_images(decided, args.num_samples, args.output)
    if team.agree("left", lambda: str(len(missing))) == "0" and state == "finished":
        team.say(f"{args.output} is complete already.")
        return 1 if undecided else 0

    # Load.
    if args.batch_size > images:
        team.say(
            f"The batch of {args.batch_size} is filled up with copies of the {images} images, and "
            f"takes as long as {args.batch_size} would; -b={images} does without."
        )
    team.say(f"Loading {source.id} ...")
    from tqdm import tqdm

    from utils.stable_diffusion import encode_unconditional, initial_noise, load_model
    from utils.value_layers import layer_widths

    model = load_model(source, device=team.device(args.device), dtype=args.dtype, steps=args.steps)
    widths = layer_widths(model.value_layers)
    if source.widths is None:
        for result in inputs.located:
            for neurons in filter(None, (result.initial, result.refined)):
                check_neurons(neurons, widths, where=f"{inputs.files[0]}: row {result.row}")
        blocked = sets(widths)
    noise = initial_noise(model, args.num_samples, args.seed)
    unconditional = encode_unconditional(model)
    mitigation = mitigations.begin(
        method,
        model,
        {prompt.row: prompt.caption for prompt in prompts},
        unconditional,
        noise,
        steps=args.steps,
        guidance_scale=args.guidance_scale,
        seed=random_seed,
        memorized=inputs.memorized,
        base=inputs.base,
        progress=lambda some: tqdm(some, unit="prompt", disable=not team.first),
    )
    record.content.update(mitigation.found)
    if mode not in (*NOTHING_BLOCKED, "initial_neurons", "refined_neurons"):
        record.content["blocked"] = {str(row): blocked[row] for row in decided}

    # no picture without its record, whoever is faster
    team.once("record", partial(record.start, **model.provenance))

    # Generate.
    batches = all_batches(decided, args.num_samples, args.batch_size)
    sampling = generation.Sampling(model, noise, unconditional, mitigation, blocked, settings)
    before = len(decided) * args.num_samples - len(missing)

    def written(pictures: int) -> None:
        for _ in range(pictures):
            progress.update(before + team.done() - progress.n)

    with (
        tqdm(
            total=len(decided) * args.num_samples,
            initial=before,
            unit="image",
            disable=not team.first,
        ) as progress,
        Behind(written, at_once=model.device.type == "cpu") as behind,
    ):
        for unit in team.deal(len(batches)):
            batch = batches[unit]
            if all((args.output / image_name(*job)).exists() for job in batch):
                continue
            latents = sampling.latents(batch)
            behind(partial(generation.write_pictures, model, latents, batch, args.output))
    team.finish()
    if not team.first:
        return 0
    not_finite = missing_images(decided, args.num_samples, args.output)
    made = len(decided) * args.num_samples - len(not_finite)
    record.finish(images=made, undecided_rows=undecided, not_finite=not_finite)
    if undecided:
        print(f"{len(undecided)} prompts were left undecided by script 3, no images: {undecided}")
    if not_finite:
        print(f"{len(not_finite)} images are not finite and were not written: {not_finite}")
    counts = [size(blocked[row] or []) for row in decided]
    how = f"{min(counts, default=0)} to {max(counts, default=0)} neurons blocked"
    how = how if method is None else f"with {args.mitigation}"
    print(f"{args.output}: {made} images of {len(decided)} prompts, {how}.")
    return 1 if undecided or not_finite else 0


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
        "-o", "--output", type=cli.output_folder, required=True, metavar="DIR", help="image folder"
    )
    parser.add_argument(
        "-d",
        "--dataset",
        type=Path,
        metavar="CSV",
        help="prompt file of the memorized prompts: captions for --original_images and "
        "--mitigation, types for --memorization_type (default: the version's)",
    )
    parser.add_argument(
        "--unmemorized_prompts",
        type=Path,
        nargs="?",
        const=generation.HOLD_OUT,
        metavar="CSV",
        help="generate these prompts instead (without a file: the version's hold-out prompts)",
    )
    parser.add_argument(
        "--memorization_type",
        choices=("VM", "TM"),
        help="only verbatim or only template prompts are counted and generated",
    )
    generation.add_mode_options(parser)
    group = generation.add_sampling_options(
        parser,
        "generation (paper B.4)",
        random_help="seed of random neurons, words and embedding noise",
        samples_help="images per prompt",
    )
    group.add_argument(
        "-b",
        "--batch_size",
        type=cli.BATCH,
        default=10,
        metavar="INT",
        help="images per batch, of several prompts where it reaches over; a short one is filled up "
        f"with copies. Another size, or other --rows, change a picture {ROUNDING} only",
    )
    cli.add_model_options(
        parser,
        dtype_help=f"{cli.PRECISION_HELP}; text encoders are always float32",
        protocol_help="that the neurons of the result file were found with; others are refused",
    )
    cli.add_block_option(parser)
    cli.add_prompt_options(parser)
    # None: not given; where captions come from the result file it would have no effect
    parser.set_defaults(caption_column=None)
    cli.add_run_options(parser, same=f"the same bytes (with another -b: {ROUNDING})")
    return parser.parse_args()


if __name__ == "__main__":
    cli.run(main, parse_args(), lower="-b/--batch_size")
