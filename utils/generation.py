"""What a generation run is made of: the mode, the prompts, the located sets (script 4).

Public: ``HOLD_OUT``, ``Inputs``, ``add_mode_options``, ``add_sampling_options``, ``chosen_mode``,
``chosen_mitigation``, ``read_inputs``, ``run_settings``, ``Sampling``, ``write_pictures``.
"""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from utils import cli, mitigations
from utils.blocking import MODES, NOTHING_BLOCKED, OWN_SETS
from utils.errors import InputError
from utils.files import CAPTION_COLUMN, Prompt, read_prompts
from utils.images import image_name, save_jpeg
from utils.neuron_sets import NeuronSet, Result, read_results, rows_of_type
from utils.records import check_result_record
from utils.versions import Source

if TYPE_CHECKING:
    import torch

    from utils.stable_diffusion import Conditioning, Model

PER_PROMPT = -1  # --block_random_neurons without a number
HOLD_OUT = Path("the version's own")  # --unmemorized_prompts without a file


@dataclass(frozen=True)
class Inputs:
    """``prompts`` are to be generated; of the ``located`` prompts of a result file those ``count``
    whose type was asked for; ``files`` are what was read. Wanda compares all ``memorized`` prompts
    (of that type) of the prompt file with the ``base`` prompts, whichever are generated."""

    prompts: list[Prompt]
    counted: list[Result]
    located: list[Result]
    files: list[Path]
    memorized: Sequence[Prompt] = ()
    base: Sequence[Prompt] = ()


def add_mode_options(parser: argparse.ArgumentParser) -> None:
    """One of the modes: what is blocked, or which other method mitigates."""
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
        "none of them in the refined set of any prompt; with K the same for "
        "--block_top_k_neurons K",
    )
    modes.add_argument(
        "--block_random_neuron_subgroups",
        type=count,
        metavar="K",
        help="for all prompts: random neurons, as many as --block_top_k_neuron_subgroups K blocks, "
        "none of them in the refined set of any prompt",
    )
    modes.add_argument(
        "--mitigation",
        choices=tuple(mitigations.METHODS),
        metavar="NAME",
        help="nothing, but another method against memorization (docs/mitigations.md): "
        + ", ".join(mitigations.METHODS),
    )
    parser.add_argument(
        "--mitigation_options",
        metavar="KEY=VALUE,...",
        help="settings of the method (default: the published ones): "
        + "; ".join(
            f"{name}: {', '.join(method.options)}"
            for name, method in mitigations.METHODS.items()
            if method.options
        ),
    )


def add_sampling_options(
    parser: argparse.ArgumentParser, title: str, *, random_help: str, samples_help: str
) -> argparse._ArgumentGroup:
    """How pictures are sampled, in a group of its own, which is returned."""
    group = parser.add_argument_group(title)
    group.add_argument(
        "--scaling_factor",
        type=cli.number(-10, 10),
        metavar="FLOAT",
        help="what blocked neurons are multiplied by (default: 0)",
    )
    group.add_argument(
        "--random_seed", type=cli.SEED, metavar="INT", help=f"{random_help} (default: 0)"
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
        help=samples_help,
    )
    group.add_argument("--steps", type=cli.STEPS, default=50, metavar="INT", help="DDIM steps")
    group.add_argument(
        "--guidance_scale",
        type=cli.GUIDANCE,
        default=7.0,
        metavar="FLOAT",
        help="classifier-free guidance; 1 is none",
    )
    return group


def chosen_mode(args: argparse.Namespace) -> tuple[str, int | None]:
    """(mode, K): K is None where each prompt's own set counts."""
    mode = next(name for name in MODES if getattr(args, name) not in (None, False))
    k = getattr(args, mode)
    return mode, k if type(k) is int and k != PER_PROMPT else None


def chosen_mitigation(args: argparse.Namespace) -> mitigations.Settings | None:
    """The settings of ``--mitigation``; InputError where they are bad, or do not fit the
    sampling."""
    settings = mitigations.parse(args.mitigation, args.mitigation_options)
    mitigations.check(settings, steps=args.steps, guidance_scale=args.guidance_scale)
    return settings


def read_inputs(
    args: argparse.Namespace,
    source: Source,
    mode: str,
    k: int | None,
    mitigation: mitigations.Settings | None = None,
) -> Inputs:
    """Reads what the mode needs. InputError for options without effect, a result file of another
    model, protocol or an unfinished run, and for a choice that leaves no prompt."""
    nothing, own_sets = mode in NOTHING_BLOCKED, mode in OWN_SETS and k is None
    pruning = isinstance(mitigation, mitigations.Wanda)
    others = args.unmemorized_prompts
    if others is HOLD_OUT:
        others = Path(source.defaults.unmemorized_prompts)
    if others is not None and own_sets:
        raise InputError(
            f"--{mode} blocks each memorized prompt's own neurons, which --unmemorized_prompts do "
            "not have; choose one set for all with --block_top_k_neurons K"
        )
    reads_dataset = args.memorization_type is not None or pruning or (nothing and others is None)
    without_effect = {
        "scaling_factor": (nothing, f"with --{mode}"),
        "result_file": (nothing, f"with --{mode}"),
        "blocks": (nothing, f"with --{mode}"),
        "memorization_type": (
            nothing and others is not None and not pruning,
            f"with --{mode} of --unmemorized_prompts",
        ),
        "dataset": (not reads_dataset, "here: the captions are those of the result file"),
        "caption_column": (
            not reads_dataset and others is None,
            "here: the captions are those of the result file",
        ),
        "random_seed": (
            "random" not in mode and not mitigations.is_random(mitigation),
            f"with --{mode}",
        ),
    }
    for name, (unused, why) in without_effect.items():
        if unused and getattr(args, name) is not None:
            raise InputError(f"--{name} {getattr(args, name)} has no effect {why}; leave it out")

    files: list[Path] = []
    located: list[Result] = []
    if not nothing:
        path = args.result_file or source.results
        if not path.is_file():
            raise InputError(
                f"{path}: no such result file; make it with script 3 or name one with -f"
            )
        check_result_record(path, source, args.protocol)
        located = read_results(path, widths=source.widths)
        files.append(path)
    of_dataset: list[Prompt] = []
    if reads_dataset:
        dataset = args.dataset or Path(source.defaults.memorized_prompts)
        whole = args.memorization_type is not None or pruning
        rows = None if whole else args.rows
        of_dataset = read_prompts(dataset, caption_column=args.caption_column, rows=rows)
        files.append(dataset)
    typed = None
    if args.memorization_type is not None:
        typed = rows_of_type(
            args.memorization_type, of_dataset, located, dataset=files[-1], path=files[0]
        )
    counted = [result for result in located if typed is None or result.row in typed]
    memorized = [prompt for prompt in of_dataset if typed is None or prompt.row in typed]
    base: list[Prompt] = []
    if isinstance(mitigation, mitigations.Wanda) and mitigation.base is not None:
        base = read_prompts(mitigation.base, caption_column=args.caption_column)
        files.append(mitigation.base)

    if others is not None:
        files.append(others)
        prompts = read_prompts(others, caption_column=args.caption_column, rows=args.rows)
        return Inputs(prompts, counted, located, files, memorized, base)
    types = {prompt.row: prompt.type for prompt in of_dataset}
    known = {prompt.row: prompt for prompt in of_dataset if nothing} or {
        result.row: Prompt(result.row, result.caption, result.url, types.get(result.row, ""))
        for result in located
    }
    missing = [row for row in args.rows or [] if row not in known]
    if missing:
        last = max(known, default=-1)
        raise InputError(f"{files[0]}: no row {missing[0]}, the last one is {last}; mend --rows")
    prompts = [known[row] for row in args.rows or sorted(known)]
    prompts = [prompt for prompt in prompts if typed is None or prompt.row in typed]
    if not prompts:
        raise InputError(f"{files[0]}: no prompt is left; mend --rows or --memorization_type")
    return Inputs(prompts, counted, located, files, memorized, base)


def run_settings(
    args: argparse.Namespace,
    mode: str,
    k: int | None,
    mitigation: mitigations.Settings | None,
    prompts: int,
) -> dict[str, Any]:
    """The settings of the run's record; None for what has no effect in this mode."""
    by_chance = "random" in mode or mitigations.is_random(mitigation)
    return {
        "mode": mode,
        "k": k,
        "prompts": prompts,
        "rows": args.rows,
        "caption_column": args.caption_column or CAPTION_COLUMN,
        "memorization_type": args.memorization_type,
        "scaling_factor": None if mode in NOTHING_BLOCKED else args.scaling_factor or 0.0,
        "random_seed": (args.random_seed or 0) if by_chance else None,
        "seed": args.seed,
        "num_samples": args.num_samples,
        "steps": args.steps,
        "guidance_scale": args.guidance_scale,
        "batch_size": args.batch_size,
        "protocol": args.protocol,
        "dtype": args.dtype,
        "device": args.device,
        **mitigations.described(args.mitigation, mitigation),
    }


@dataclass
class Sampling:
    """What all batches of a run share. ``noise``: of all samples of a prompt; ``blocked``: row ->
    neuron set, None for nothing; ``settings``: of ``run_settings``."""

    model: "Model"
    noise: "torch.Tensor"
    unconditional: "Conditioning"
    mitigation: mitigations.Mitigation
    blocked: Mapping[int, NeuronSet | None]
    settings: Mapping[str, Any]
    _encoded: dict[int, "Conditioning"] = field(default_factory=dict)  # rows of the latest batch

    def latents(self, batch: Sequence[tuple[int, int]]) -> "torch.Tensor":
        """Clean latents of a batch of (row, sample), and of copies behind them: what a picture
        shares its batch with must not change it, so a short batch is filled up."""
        from utils.stable_diffusion import Conditioning, sample_latents
        from utils.value_layers import deactivated

        layers = self.model.value_layers
        filled = [*batch, *batch[:1] * (self.settings["batch_size"] - len(batch))]
        rows = [row for row, _ in filled]
        self._encoded = {
            row: self._encoded.get(row) or self.mitigation.encode(row) for row, _ in batch
        }
        off = [self.blocked[row] or [[] for _ in layers] for row in rows]
        factor = self.settings["scaling_factor"] or 0.0
        with deactivated(layers, off, factor=factor), self.mitigation.around(rows):
            return sample_latents(
                self.model,
                Conditioning.cat([self._encoded[row] for row in rows]),
                self.unconditional,
                self.noise[[sample for _, sample in filled]],
                steps=self.settings["steps"],
                guidance_scale=self.settings["guidance_scale"],
                schedule=self.mitigation.schedule(),
            )


def write_pictures(
    model: "Model", latents: "torch.Tensor", batch: Sequence[tuple[int, int]], folder: Path
) -> int:
    """Decodes (B, C, H, W) clean latents and writes the pictures of a batch of (row, sample), its
    first rows; how many it wrote: not those that are there already, or not finite."""
    from utils.stable_diffusion import decode

    written = 0
    for (row, sample), picture in zip(batch, decode(model, latents), strict=False):
        path = folder / image_name(row, sample)
        if picture is not None and not path.exists():
            save_jpeg(picture, path)
            written += 1
    return written
