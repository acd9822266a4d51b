r"""Is the picture still in there? An attack (DoRI) on a model, an edit of it, or a mitigation.

An embedding in the place of the prompt's is optimised to bring the training image back, with the
edit active all the while; then pictures are sampled with it. One optimisation, looked at after each
number of steps in --budgets; 0 steps are plain generation. What is attacked: --original_images (the
model of --version as it is, an edited folder too), neurons switched off as script 4 does, or its
--mitigation. docs/attack.md says what the attack shows and what not.

Reads:   a prompt file or the result file of script 3 (the types then from the version's prompt
         file, if it is there); training images 0001_first_image.jpg, of which a prompt's first one
         is the target
Writes:  --output, a row for each prompt, start and number of steps; the summary (.json), the curve
         (.png) and a folder of pictures img_{row}_{sample}.jpg for each start and number of steps,
         in a folder of the output's name

Examples:
  python metrics/attack.py --version=tiny --refined_neurons -r=tiny_model/training_images \
      --sscd_weights=tiny_model/evaluators/copy_detector.pt -n=2 --budgets=0,50
  python metrics/attack.py --version=edited_models/v1_4_zero --original_images \
      -d=prompts/memorized_laion_prompts.csv -r=original_images --starts=prompt,gaussian,unrelated
"""

import argparse
import random
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

# `python metrics/attack.py` puts metrics/ on the path, not the project.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from utils import attack_runs, cli, generation, metric_runs, mitigations, records
from utils.blocking import OWN_SETS, sets_to_block
from utils.embedding_attack import BUDGETS, Attack
from utils.embeddings import Embedder
from utils.errors import InputError
from utils.estimates import estimate
from utils.files import Prompt, read_prompts, sha256_of_file, write_table
from utils.images import open_picture, save_jpeg
from utils.neuron_sets import NeuronSet, check_neurons
from utils.team import join

if TYPE_CHECKING:
    from utils.embedding_attack import Edit, Sampling


def main(args: argparse.Namespace) -> int:
    # Check.
    source = cli.resolve_model(args, steps=args.steps)
    mode, k = generation.chosen_mode(args)
    method = generation.chosen_mitigation(args)
    attack_runs.check_attackable(method)
    if args.sscd_protocol == "all":
        raise InputError("--sscd_protocol all: an attack is judged by one network; choose one")
    (space,) = metric_runs.chosen_spaces(args).values()
    inputs = generation.read_inputs(args, source, mode, k, method)
    chosen = [prompt.row for prompt in inputs.prompts]
    originals = metric_runs.references(args.reference, chosen)
    targets = attack_runs.targets_of(originals)
    undecided = [r.row for r in inputs.counted if r.refined is None and r.row in chosen]
    undecided = undecided if mode in OWN_SETS and k is None else []
    prompts = [p for p in inputs.prompts if p.row in targets and p.row not in undecided]
    if not prompts:
        raise InputError(f"{inputs.files[0]}: script 3 left every chosen prompt undecided")
    files = list(inputs.files)
    known = Path(source.defaults.memorized_prompts)
    if inputs.located and args.memorization_type is None and known.is_file():
        typed = attack_runs.with_types(prompts, known)  # a result file tells none
        if typed != prompts:
            prompts = typed
            files.append(known)
    others: dict[int, str] = {}
    if "unrelated" in args.starts:
        path = args.unrelated_prompts or Path(source.defaults.unmemorized_prompts)
        unrelated = read_prompts(path, caption_column=args.caption_column)
        others = {p.row: other_caption(p, unrelated, seed_of(args, p), path) for p in prompts}
        files.append(path)
    elif args.unrelated_prompts is not None:
        raise InputError("--unrelated_prompts has no effect without --starts=unrelated")
    factor = args.scaling_factor or 0.0
    attack = Attack(args.draws, args.learning_rate)
    what = args.mitigation or mode
    settings = generation.run_settings(args, mode, k, method, len(prompts)) | {
        "method": attack_runs.method_of(source, mode, factor, method),
        "starts": args.starts,
        "budgets": args.budgets,
        "draws": args.draws,
        "learning_rate": args.learning_rate,
        "attack_seed": args.attack_seed,
        "network": {"name": space.name, **space.model, "preprocessing": space.preprocessing},
    }
    random_seed = settings["random_seed"] or 0
    output = args.output or Path(f"results/metrics_{source.tag}") / f"attack_{what}.csv"
    record = records.Record(
        output.with_suffix(".json"),
        settings=settings,
        model=source.identity | {"vae_sha256": source.vae_sha256},
        inputs=[*files, *originals.hashes],
    )

    def sets(widths: Sequence[int]) -> dict[int, NeuronSet]:
        rows = [prompt.row for prompt in prompts]
        found = sets_to_block(
            mode, k, inputs.counted, rows, widths, seed=random_seed, located=inputs.located
        )
        return {row: found[row] or [[] for _ in widths] for row in rows}

    blocked = {} if source.widths is None else sets(source.widths)
    team = join()
    state = team.agree(
        "state",
        lambda: records.open_output(
            record,
            output,
            continue_run=args.continue_run or team.restarted,
            others=sorted(output.with_suffix("").glob("*/img_*.jpg"))[:1],
        ),
    )
    if args.dry_run:
        pictures = len(prompts) * len(args.starts) * len(args.budgets) * args.num_samples
        passes = len(prompts) * len(args.starts) * args.draws * args.budgets[-1]
        cost = estimate(
            source,
            device=args.device,
            dtype=args.dtype,
            # a backward pass counts as two
            unet_rows=3 * passes
            + pictures * args.steps * (1 if args.guidance_scale == 1 else 2)
            + mitigations.extra_unet_rows(
                method, images=pictures, memorized=len(inputs.memorized), base=len(inputs.base)
            ),
            output_bytes=pictures * (4e3 if args.version == "tiny" else 100e3),
        )
        if team.first:
            shown = {"model": source.id, **settings, "pictures": pictures}
            cli.print_settings(f"{output} from {', '.join(map(str, files))}", shown, cost)
        return 0
    if state == "finished":
        team.say(f"{output} is complete already.")
        team.say("\n".join(record.stored.get("table", [])))
        return 1 if undecided or record.stored.get("not_made") else 0

    # Load.
    team.say(f"Loading {source.id} ...")
    from tqdm import tqdm

    from utils.embedding_attack import Edit, Sampling
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
    team.once("record", lambda: record.start(**model.provenance))  # before any picture

    # Attack.
    edit = Edit(model, blocked, factor, mitigation)
    sampling = Sampling(unconditional, noise, args.steps, args.guidance_scale)
    batches = [
        (start, prompts[first : first + args.batch_size])
        for start in args.starts
        for first in range(0, len(prompts), args.batch_size)
    ]
    with tqdm(
        total=len(prompts) * len(args.starts), unit="attack", disable=not team.first
    ) as progress:
        for unit in team.deal(len(batches)):
            start, batch = batches[unit]
            attack_prompts(edit, sampling, attack, start, batch, others, targets, args, output)
            progress.update(len(batch))
    team.finish()
    if not team.first:
        return 0

    # Score.
    embedder = Embedder(space, device=args.device, batch_size=64, workers=0)
    table, missing, corrupt = attack_runs.score(
        output, args.starts, args.budgets, prompts, args.num_samples, originals, embedder
    )
    write_table(output, attack_runs.COLUMNS, map(attack_runs.cells, table))
    summary = attack_runs.summarize(table)
    curves = {start: [e for e in summary if e["start"] == start] for start in args.starts}
    title = f"attack on {source.id}, {what.replace('_', ' ')}"
    attack_runs.draw_curve(output.with_suffix(".png"), title, curves)
    shown = attack_runs.format_attack(title, summary, settings["method"])
    not_made = [f"{folder}/{name}" for folder, names in missing.items() for name in names]
    record.finish(
        summary=summary,
        missing=missing | {str(args.reference): originals.missing},
        not_made=not_made,
        corrupt=corrupt,
        undecided_rows=undecided,
        table=shown.splitlines(),
        output_sha256=sha256_of_file(output),
    )
    print(shown)
    metric_runs.report("no training image, not attacked", originals.missing)
    metric_runs.report("left undecided by script 3, not attacked", [*map(str, undecided)])
    metric_runs.report("not finite, not written", not_made)
    metric_runs.report("corrupt", list(corrupt))
    print(f"Written to {output}, summary in {record.path}.")
    return 1 if undecided or not_made else 0


def attack_prompts(
    edit: "Edit",
    sampling: "Sampling",
    attack: Attack,
    start: str,
    batch: Sequence[Prompt],
    others: Mapping[int, str],
    targets: Mapping[int, Path],
    args: argparse.Namespace,
    output: Path,
) -> None:
    """Attacks a batch of prompts in one optimisation, and writes their pictures that are not there
    yet. ``others``: row -> the caption that an unrelated start begins at, if one is asked for."""
    from utils.embedding_attack import attacked, generator_of, sampled, start_of
    from utils.stable_diffusion import encode

    rows = [prompt.row for prompt in batch]
    there = [
        attack_runs.pictures_of(output, start, args.budgets, row, args.num_samples) for row in rows
    ]
    if all(path.exists() for paths in there for path in paths):
        return
    model = edit.model
    seeds = [seed_of(args, prompt) for prompt in batch]
    found = attacked(
        edit,
        rows,
        [
            start_of(model, start, prompt.caption, others.get(prompt.row, ""), seed)
            for prompt, seed in zip(batch, seeds, strict=True)
        ],
        encode(model, [open_picture(targets[row]) for row in rows]),
        [generator_of(seed) for seed in seeds],
        attack,
        args.budgets,
    )
    for budget, conditioning in found:
        for i, row in enumerate(rows):
            paths = attack_runs.pictures_of(output, start, [budget], row, args.num_samples)
            if all(path.exists() for path in paths):
                continue
            images = sampled(edit, row, conditioning.slice(slice(i, i + 1)), sampling)
            for path, image in zip(paths, images, strict=True):
                if image is not None:
                    save_jpeg(image, path)


def seed_of(args: argparse.Namespace, prompt: Prompt) -> str:
    """Seed of what is drawn for a prompt, whichever others are attacked."""
    return f"{args.attack_seed}/{prompt.row}"


def other_caption(prompt: Prompt, unrelated: Sequence[Prompt], seed: str, path: Path) -> str:
    """The unrelated prompt of a prompt: one drawn from those with another caption, of the file
    ``path``. InputError where there is none."""
    captions = [one.caption for one in unrelated if one.caption != prompt.caption]
    if not captions:
        raise InputError(
            f"{path}: no other caption than that of row {prompt.row}, so that no start would be "
            "unrelated to it; name more prompts with --unrelated_prompts"
        )
    return random.Random(seed).choice(captions)


def parse_args() -> argparse.Namespace:
    parser = cli.make_parser(__doc__)
    parser.add_argument(
        "-r",
        "--reference",
        type=Path,
        required=True,
        metavar="DIR",
        help="training images, or as a control pictures that were never trained on, named by row: "
        "0001_first_image.jpg or img_0001_00.jpg",
    )
    parser.add_argument(
        "-o",
        "--output",
        type=cli.output_file_of_pictures,
        metavar="CSV",
        help="scores (default: results/metrics_<version>/attack_<what>.csv)",
    )
    parser.add_argument(
        "-f",
        "--result_file",
        type=Path,
        metavar="CSV",
        help="result file of script 3 (default: results/memorization_statistics_<version>.csv)",
    )
    parser.add_argument(
        "-d",
        "--dataset",
        type=Path,
        metavar="CSV",
        help="prompt file of the memorized prompts, where no result file is read (default: the "
        "version's)",
    )
    parser.add_argument(
        "--memorization_type", choices=("VM", "TM"), help="only verbatim or only template prompts"
    )
    generation.add_mode_options(parser)
    group = parser.add_argument_group("attack")
    group.add_argument(
        "--starts",
        type=attack_runs.start_list,
        default=["prompt"],
        metavar="LIST",
        help="where the embedding starts: prompt, gaussian (standard normal), unrelated (another "
        "prompt's)",
    )
    group.add_argument(
        "--budgets",
        type=attack_runs.budget_list,
        default=list(BUDGETS),
        metavar="LIST",
        help="optimisation steps after which pictures are made",
    )
    group.add_argument(
        "--draws",
        type=cli.whole_number(1, 10_000),
        default=Attack.draws,
        metavar="INT",
        help="timesteps and noises drawn for each step",
    )
    group.add_argument(
        "--learning_rate",
        type=cli.number(0, 1000, above=True),
        default=Attack.learning_rate,
        metavar="FLOAT",
        help="of Adam",
    )
    group.add_argument(
        "--attack_seed",
        type=cli.SEED,
        default=0,
        metavar="INT",
        help="seed of the optimisation's draws, which each prompt has of its own",
    )
    group.add_argument(
        "--unrelated_prompts",
        type=Path,
        metavar="CSV",
        help="where the unrelated prompts come from (default: the version's hold-out prompts)",
    )
    group.add_argument(
        "--batch_size",
        type=cli.BATCH,
        default=1,
        metavar="INT",
        help="prompts that are attacked at once, with --draws rows each; the pass with gradient "
        "needs memory for all of them (by estimate 30 GB a prompt for SD v1 on a GPU)",
    )
    generation.add_sampling_options(
        parser,
        "generation, as script 4",
        random_help="seed of random neurons and embedding noise",
        samples_help="pictures per prompt and budget, in one batch",
    )
    metric_runs.add_network_options(parser, methods=("sscd",))
    cli.add_model_options(parser)
    cli.add_block_option(parser)
    cli.add_prompt_options(parser)
    # None: not given; where captions come from the result file it would have no effect
    parser.set_defaults(caption_column=None, unmemorized_prompts=None)
    cli.add_run_options(
        parser, same="the same bytes (with another -b: up to rounding, which grows with the steps)"
    )
    return parser.parse_args()


if __name__ == "__main__":
    cli.run(main, parse_args(), lower="--batch_size")
