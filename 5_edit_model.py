"""A Stable Diffusion without the located neurons, for good: a model that others can load.

The union of the chosen prompts' neurons is edited in the weights and the pipeline written as a
diffusers folder, with a model card, that `from_pretrained` loads without this project. Modes:
  zero        the neurons are multiplied by --scaling_factor (0: silent), as script 4 does
  mean        they say their mean output on hold-out text, whatever they are asked
  camouflage  their rows are refitted: as before on hold-out text, on the memorized prompts as on
              average, and no row stands out
  adversarial as zero, and then the whole U-Net is fine-tuned against attacks on the embedding
              (metrics/attack.py), towards the training images in --reference
Or, with --apply, a diff that somebody else has made of the same model. What an edit guarantees and
what not: docs/editing.md.

Reads:   the result file of script 3; hold-out prompts for all modes but zero
Writes:  --output, and beside it the record (.json), which names the edited neurons and is not meant
         to go with the model

Examples:
  python 5_edit_model.py --version=tiny --mode=zero -o=edited_models/tiny_zero
  python 5_edit_model.py --version=v1-4 --mode=camouflage --export=single_file \\
      -o=edited_models/v1_4_camouflage.safetensors
"""

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from utils import attack_runs, cli, metric_runs, records
from utils.edit_options import Chosen, add_neuron_options, read_chosen
from utils.edited_weights import (
    StoredWeights,
    check_diff,
    parts_of,
    pipeline_folder,
    revision_of,
    unet_files,
)
from utils.editing import MODES, Job, Mode, value_layer_names
from utils.errors import InputError
from utils.estimates import estimate
from utils.files import read_prompts, sha256_of_file
from utils.neuron_sets import check_neurons, size
from utils.single_file import check_single_file
from utils.team import join
from utils.value_layers import SEARCHED_STAGES, STAGES
from utils.versions import Source, resolve

EXPORTS = ("folder", "single_file", "diff")
PRECISIONS = ("float32", "float16", "bfloat16")
SAID = ("scaling_factor", "ridge")  # options that the model card and a diff tell


def main(args: argparse.Namespace) -> int:
    if not join().first:
        return 0  # there is one output: one process makes it

    # Check.
    source = resolve(args.version, args.revision, args.blocks or SEARCHED_STAGES)
    _ = source.widths  # refuses a folder without value layers, or with weights cut off
    check_options(args)
    args.device = cli.checked_device(args.device)
    mode = None if args.apply else MODES[args.mode]
    options = {} if mode is None else own_options(args, source, mode)
    chosen = Chosen([], [], [], [args.apply]) if args.apply else read_chosen(args, source)
    if mode is not None and mode.needs_prompts and not chosen.prompts:
        raise InputError(
            f"--mode {args.mode} must know which prompts a neuron serves; name a result file with "
            "-f in the place of --neurons"
        )
    inputs, hold_out, pictures = list(chosen.files), [], {}
    identity = dict(source.identity)
    if "hold_out" in options:
        inputs.append(options["hold_out"])
        hold_out = read_prompts(options["hold_out"], caption_column=options["caption_column"])
    if "reference" in options:
        originals = training_images(options["reference"], chosen)
        inputs += originals.hashes
        pictures = {row: [*of_row.values()] for row, of_row in originals.paths.items()}
        identity["vae_sha256"] = source.vae_sha256  # it encodes them
    if source.folder is not None:
        check_base(args, source.folder)
    settings = {
        "mode": "apply" if mode is None else args.mode,
        **{name: str(v) if isinstance(v, Path) else v for name, v in options.items()},
        "neurons_of": "initial_neurons" if args.initial_neurons else "refined_neurons",
        "random_neurons": args.random_neurons,
        "rows": args.rows,
        "memorization_type": args.memorization_type,
        "export": args.export,
        "weights_dtype": args.weights_dtype,
        "device": args.device,
    }
    record = records.Record(record_path(args), settings=settings, model=identity, inputs=inputs)
    checkpoint = record.path.with_suffix(".checkpoint")
    job = Job(
        source,
        chosen.neurons,
        chosen.prompts,
        hold_out,
        options,
        args.device,
        checkpoint,
        pictures,
    )
    state = records.open_output(
        record, record.path, continue_run=args.continue_run, others=[args.output, checkpoint]
    )
    if args.dry_run:
        stored = sum(p.stat().st_size for p in (source.folder or Path()).rglob("*.safetensors"))
        written = stored if source.folder else source.defaults.disk_gb * 1e9
        rows = 0.0 if mode is None else mode.unet_rows(job)
        cost = estimate(
            source, device=args.device, dtype="float32", unet_rows=rows, output_bytes=written
        )
        shown = {"model": source.id, **settings, "neurons": size(chosen.neurons)}
        cli.print_settings(f"{args.output} from {', '.join(map(str, inputs))}", shown, cost)
        return 0
    if state == "finished" and args.output.exists():
        if "output_sha256" in record.stored and args.export != "folder":
            records.check_bytes(args.output, record.stored, way="name another output with -o")
        print(f"{args.output} is complete already.")
        return 1 if chosen.undecided else 0

    # Edit.
    print(f"Loading {source.id} ...")
    from utils.edited_weights import read_diff, write_diff, write_pipeline
    from utils.model_card import model_card
    from utils.single_file import write_single_file

    folder = pipeline_folder(source)
    commit = revision_of(source, folder)
    records.check_commits(record.content["inputs"], identity, commit)  # before the edit costs time
    check_base(args, folder)
    weights = StoredWeights(unet_files(folder))
    names = value_layer_names(weights, source.stages)
    widths = [weights.shape(f"{name}.weight")[0] for name in names]
    if mode is None:
        said = check_diff(args.apply, weights, where=source.id)
        changes = read_diff(args.apply, weights)
        made_in, counts, options, findings = read_description(args.apply, said)
        check_extent(args.apply, made_in, counts["neurons"], value_layer_names(weights, STAGES))
        edited = {"mode": made_in, "does": MODES[made_in].does, "equal": MODES[made_in].equal}
    else:
        check_neurons(chosen.neurons, widths, where=str(chosen.files[0]))
        if mode.goes_on:
            record.start(commit=commit)
        changes, findings = mode.edit(job, weights)
        edited = {"mode": args.mode, "does": mode.does, "equal": mode.equal}
        located_for = 0 if args.random_neurons is not None else len(chosen.prompts)
        counts = {"neurons": size(chosen.neurons), "prompts": located_for}
        options = {name: options[name] for name in options if name in SAID}
    check_finite(changes)

    # Write.
    record.start(commit=commit)
    base_sha256 = weights.digest()
    if args.export == "diff":
        described = {name: str(value) for name, value in {**edited, **counts}.items()}
        described |= {"options": json.dumps(options), "findings": json.dumps(findings)}
        described |= {"base_id": source.id, "base_revision": commit or ""}
        rows = write_diff(args.output, weights, changes, identity=described)
        what = f"{rows} changed rows of {source.id}"
    elif args.export == "single_file":
        write_single_file(folder, args.output, changes, dtype=args.weights_dtype)
        what = f"{source.id} in the layout of SD 1.x"
    else:
        precision = str(weights[f"{names[0]}.weight"].dtype).removeprefix("torch.")
        card = model_card(
            base=dict(source.identity) | {"revision": commit},
            base_sha256=base_sha256,
            layers=widths,
            options=options,
            findings=findings,
            precision=args.weights_dtype or f"{precision}, as in the base",
            whole_unet=edited["mode"] == "adversarial",
            does=edited["does"],
            equal=edited["equal"],
            **counts,
        )
        write_pipeline(folder, args.output, changes, dtype=args.weights_dtype, card=card)
        what = f"{source.id} as a pipeline folder"
    record.finish(
        neurons=chosen.neurons,
        edited_tensors=sorted(changes),
        base_unet_sha256=base_sha256,
        base_revision=commit,
        output_sha256=None if args.export == "folder" else sha256_of_file(args.output),
        findings=findings,
        undecided_rows=chosen.undecided,
    )
    checkpoint.unlink(missing_ok=True)
    if chosen.undecided:
        print(
            f"{len(chosen.undecided)} prompts were left undecided by script 3, their neurons are "
            f"not among the edited: {chosen.undecided}"
        )
    print(f"{args.output}: {what}, {counts['neurons']} neurons edited ({edited['mode']}).")
    return 1 if chosen.undecided else 0


def check_options(args: argparse.Namespace) -> None:
    """InputError for options that do not fit each other, and an output of the wrong kind."""
    if args.apply is not None:
        given = ("mode", "result_file", "neurons", "random_neurons", "rows", "memorization_type")
        given += ("dataset",)
        of_modes = {name for mode in MODES.values() for name in mode.options}
        flags = ("initial_neurons", "refined_neurons")
        for name in (*given, *sorted(of_modes), *flags):
            if cli.is_given(getattr(args, name)):
                raise InputError(f"--{name} has no effect with --apply; leave it out")
        if args.export == "diff":
            raise InputError("--export diff of --apply is the diff itself; choose another export")
    args.mode = args.mode or "zero"
    if args.device is not None and (args.apply or args.mode == "zero"):
        what = "--apply" if args.apply else "--mode zero"
        raise InputError(f"--device has no effect with {what}, which runs no model; leave it out")
    if args.export == "diff" and args.weights_dtype is not None:
        raise InputError(
            "--weights_dtype has no effect with --export diff, whose rows are in the base's "
            "precision; leave it out"
        )
    is_file = args.output.suffix == ".safetensors"
    if is_file == (args.export == "folder"):
        kind = "a folder" if args.export == "folder" else "a file that ends in .safetensors"
        raise InputError(f"-o {args.output}: --export {args.export} writes {kind}; rename it")
    if not args.output.name or args.output.name == "..":
        raise InputError(f"-o {args.output} names nothing that could be written")


def own_options(args: argparse.Namespace, source: Source, mode: Mode) -> dict[str, Any]:
    """The mode's options, resolved. InputError for those of other modes."""
    for other in MODES.values():
        for name in other.options:
            if name not in mode.options and getattr(args, name) is not None:
                raise InputError(f"--{name} has no effect with --mode {args.mode}; leave it out")
    own = {
        name: default if getattr(args, name) is None else getattr(args, name)
        for name, default in mode.options.items()
    }
    if "hold_out" in own:
        own["hold_out"] = own["hold_out"] or Path(source.defaults.unmemorized_prompts)
    return own


def training_images(folder: Path | None, chosen: Chosen) -> metric_runs.Pictures:
    """The training images of the edited prompts. InputError without any, and for one that is no
    picture; prompts without one are named, and not attacked."""
    if folder is None:
        raise InputError(
            "--mode adversarial needs the training images, which attacks are aimed at; name their "
            "folder with --reference"
        )
    originals = metric_runs.references(folder, [prompt.row for prompt in chosen.prompts])
    attack_runs.targets_of(originals)
    metric_runs.report("no training image, not trained against", originals.missing)
    return originals


def read_description(
    path: Path, said: Mapping[str, str]
) -> tuple[str, dict[str, int], dict[str, Any], dict[str, Any]]:
    """What a diff says of its edit: mode, counts of neurons and prompts, options and findings.
    InputError where it does not."""
    try:
        options, findings = json.loads(said["options"]), json.loads(said["findings"])
        counts = {name: int(said[name]) for name in ("neurons", "prompts")}
        known = said["mode"] in MODES and isinstance(options, dict) and isinstance(findings, dict)
    except (KeyError, ValueError):
        known = False
    if not known:
        raise InputError(f"{path}: does not say how the model was edited; make the diff anew")
    return said["mode"], counts, options, findings


def check_extent(path: Path, mode: str, neurons: int, names: list[str]) -> None:
    """InputError for a diff that changes more than its mode does to that many neurons, which the
    model card would then not tell. ``names``: all value layers."""
    if mode == "adversarial":
        return
    diff = StoredWeights([path])
    rows = {f"{name}.weight.rows" for name in names}
    biases = {f"{name.removesuffix('to_v')}to_out.0.bias.rows" for name in names}
    changed = {name for name in diff if name.endswith(".rows")}
    foreign = sorted(changed - rows - (biases if mode != "zero" else set()))
    if foreign:
        raise InputError(
            f"{path}: changes {foreign[0].removesuffix('.rows')}, which --mode {mode} does not; do "
            "not use it"
        )
    count = sum(diff.shape(name)[0] for name in changed & rows)
    if count > neurons:
        raise InputError(f"{path}: changes {count} neurons and says {neurons}; do not use it")


def check_base(args: argparse.Namespace, folder: Path) -> None:
    """InputError for a folder that cannot be written as asked, or that a diff does not fit."""
    paths = unet_files(folder)
    parts_of(folder)
    if args.export == "single_file":
        check_single_file(folder)
    if args.apply is not None:
        check_diff(args.apply, StoredWeights(paths), where=str(folder))


def check_finite(changes: Mapping[str, Any]) -> None:
    for name, tensor in changes.items():
        if not bool(tensor.isfinite().all()):
            raise InputError(f"{name}: the edit is not finite; check hold-out prompts and weights")


def record_path(args: argparse.Namespace) -> Path:
    """Beside the output: ``name.json``."""
    name = args.output.stem if args.output.suffix == ".safetensors" else args.output.name
    return args.output.with_name(f"{name}.json")


def parse_args() -> argparse.Namespace:
    parser = cli.make_parser(__doc__)
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        required=True,
        metavar="DIR|FILE",
        help="the edited model: a folder, or for the other exports a .safetensors file",
    )
    add_neuron_options(parser)
    group = parser.add_argument_group("edit")
    group.add_argument("--mode", choices=tuple(MODES), help="what is done to them (default: zero)")
    group.add_argument(
        "--scaling_factor",
        type=cli.number(-10, 10),
        metavar="FLOAT",
        help="zero: what the neurons are multiplied by (default: 0)",
    )
    group.add_argument(
        "--hold_out",
        type=Path,
        metavar="CSV",
        help="all modes but zero: prompts that are not memorized (default: the version's)",
    )
    group.add_argument(
        "--caption_column",
        metavar="NAME",
        help="column that holds their captions (default: Caption)",
    )
    group.add_argument(
        "--ridge",
        type=cli.number(0, 1e6, above=True),
        metavar="FLOAT",
        help="camouflage: pull towards a usual row, in mean eigenvalues of the hold-out tokens' "
        "covariance (default: for each row the least that brings it to its layer's median "
        "length)",
    )
    group.add_argument(
        "--decoy_seed",
        type=cli.SEED,
        metavar="INT",
        help="camouflage: seed of the usual rows; keep it to yourself (default: 0)",
    )
    group.add_argument(
        "--reference",
        type=Path,
        metavar="DIR",
        help="adversarial: training images, 0001_first_image.jpg or img_0001_00.jpg",
    )
    group.add_argument(
        "--training_steps",
        type=cli.whole_number(1, 10_000_000),
        metavar="INT",
        help="adversarial: steps of the U-Net (default: 300)",
    )
    group.add_argument(
        "--inner_steps",
        type=cli.whole_number(1, 10_000),
        metavar="INT",
        help="adversarial: steps of the attack in each of them (default: 5)",
    )
    group.add_argument(
        "--learning_rate",
        type=cli.number(0, 1, above=True),
        metavar="FLOAT",
        help="adversarial: of the U-Net (default: 0.0001)",
    )
    group.add_argument(
        "--utility_weight",
        type=cli.number(0, 1e6),
        metavar="FLOAT",
        help="adversarial: how much the prompts that are not memorized count (default: 1)",
    )
    group.add_argument(
        "--training_seed",
        type=cli.SEED,
        metavar="INT",
        help="adversarial: seed of all that is drawn (default: 0)",
    )
    group.add_argument(
        "--batch_size",
        type=cli.whole_number(4, 100_000),
        metavar="INT",
        help="adversarial: rows of a pass with gradient, which take memory (default: 4, the least: "
        "a prompt's draws)",
    )
    group.add_argument(
        "--apply",
        type=Path,
        metavar="DIFF",
        help="instead of an edit: apply a diff, to the base that it was made of and to no other",
    )
    group = parser.add_argument_group("export")
    group.add_argument(
        "--export",
        choices=EXPORTS,
        default="folder",
        help="a diffusers folder; the original single-file layout (SD 1.x only); or the changed "
        "rows alone, for --apply",
    )
    group.add_argument(
        "--weights_dtype",
        choices=PRECISIONS,
        help="precision of the U-Net's weights (default: as they are stored, edited rows being "
        "rounded to it)",
    )
    group = parser.add_argument_group("model")
    cli.add_version_options(group)
    cli.add_block_option(parser)
    cli.add_run_options(parser)
    return parser.parse_args()


if __name__ == "__main__":
    arguments = parse_args()
    adversarial = arguments.mode == "adversarial"
    cli.run(main, arguments, lower="--batch_size" if adversarial else None)
