r"""Disentanglement: how much a cross-attention's output changes when k of its neurons are blocked.

Per prompt one U-Net pass on the initial noises, at the timestep of the noise difference. Then every
searched cross-attention runs again on the same input with k neurons of its value layer at zero; the
score is the cosine similarity of the two outputs' vectors, averaged over positions and samples
(paper table 3). With --together, k neurons of every layer are blocked in one further pass, so that
a later layer also sees what changed before it. The neurons are random ones, drawn anew for every
prompt, or those that were located most often (-f).

Reads:   a prompt file, and for located neurons a result file of script 3
Writes:  --output, a row a prompt as soon as it is scored, a column for each k and layer, and its
         summary (.json) beside it

Examples:
  python metrics/compute_disentanglement.py --version=tiny --rows=0-9
  python metrics/compute_disentanglement.py -p=prompts/memorized_laion_prompts.csv -k=1,5,10 \
      -f=results/memorization_statistics_v1_4.csv
"""

import argparse
import random
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

# `python metrics/compute_disentanglement.py` puts metrics/ on the path, not the project.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from utils import cli, metric_runs
from utils.decided_rows import DecidedRows, part_files
from utils.errors import InputError
from utils.estimates import estimate
from utils.files import Prompt, read_prompts, read_table
from utils.neuron_sets import NeuronSet, most_frequent_neurons_per_layer, read_results
from utils.records import check_result_record
from utils.summary import summarize_scores
from utils.versions import Source

if TYPE_CHECKING:
    import torch

    from utils.stable_diffusion import Model


def main(args: argparse.Namespace) -> int:
    # Check.
    source = cli.resolve_model(args, steps=args.num_inference_steps)
    path = args.prompts or Path(source.defaults.memorized_prompts)
    prompts = read_prompts(path, caption_column=args.caption_column, rows=args.rows)
    located = None if args.result_file is None else read_located(args, source)
    if source.widths is not None:
        check_counts(args.neurons_per_layer, source.widths, located)
    inputs = [path, *([args.result_file] if args.result_file else [])]
    output = metric_runs.output_path(args, "disentanglement", Path(source.tag))
    run = metric_runs.MetricRun(
        "Disentanglement",
        output,
        args,
        settings={
            "prompts": len(prompts),
            "rows": args.rows,
            "caption_column": args.caption_column,
            "neurons_per_layer": args.neurons_per_layer,
            "neurons": "random" if located is None else "located",
            "together": args.together,
            "seed": args.seed,
            "random_seed": args.random_seed,
            "num_samples": args.num_samples,
            "num_inference_steps": args.num_inference_steps,
            "protocol": args.protocol,
            "dtype": args.dtype,
            "device": args.device,
        },
        source=source,
        files=inputs,
        others=part_files(output),
    )
    # Without --together the cross-attentions alone run again, which costs little.
    passes = 1 + (len(args.neurons_per_layer) if args.together else 0)
    cost = estimate(
        source,
        device=args.device,
        dtype=args.dtype,
        unet_rows=len(prompts) * args.num_samples * passes,
        output_bytes=1000 * len(prompts),
    )
    if run.over(cost):
        return run.exit_code()

    # Load.
    run.team.say(f"Loading {source.id} ...")
    from utils.noise_difference import scored_timestep
    from utils.stable_diffusion import initial_noise, load_model
    from utils.value_layers import layer_widths

    model = load_model(
        source,
        device=run.team.device(args.device),
        dtype=args.dtype,
        steps=args.num_inference_steps,
    )
    widths = layer_widths(model.value_layers)
    check_counts(args.neurons_per_layer, widths, located)
    noise = initial_noise(model, args.num_samples, args.seed)
    step = scored_timestep(model, args.num_inference_steps, args.protocol)

    columns = {
        (k, layer): f"k={k} layer {layer}"
        for k in args.neurons_per_layer
        for layer in range(len(widths))
    }
    decided = DecidedRows(output, ("Row", "Caption", "type", *columns.values()), prompts)

    def begin() -> None:
        decided.check()
        run.record.start(**model.provenance)

    run.team.once("begun", begin)
    decided.open(run.team)

    # Compare.
    def compare(prompt: Prompt, _: object) -> list[str]:
        sets = {
            k: chosen_neurons(k, widths, located, seed=args.random_seed, row=prompt.row)
            for k in args.neurons_per_layer
        }
        found = attention_cosines(model, prompt.caption, noise, step, sets, together=args.together)
        return [cell(found[k][layer]) for k, layer in columns]

    if not decided.decide(
        run.team,
        compare,
        undecided=[""] * len(columns),
        by_caption=located is not None,  # random neurons are each row's own
    ):
        return 0

    # Sum up.
    _, table = read_table(output)
    scores = {
        name: [float(cells[name]) if cells[name] else None for cells in table]
        for name in columns.values()
    }
    types = [prompt.type for prompt in prompts]
    summaries = {name: summarize_scores(column, types) for name, column in scores.items()}
    means = {
        str(k): [mean(scores[columns[k, layer]]) for layer in range(len(widths))]
        for k in args.neurons_per_layer
    }
    left = undecided(prompts, scores)
    run.finish(
        format_means(means, list(model.value_layers)),
        means=means,
        layers=list(model.value_layers),
        scores=summaries,
        undecided_rows=left,
    )
    metric_runs.report("undecided, a score is not finite", [f"row {row}" for row in left])
    return 1 if left else 0


def cell(score: float | None) -> str:
    return "" if score is None else f"{score:.6f}"


def mean(column: Sequence[float | None]) -> float | None:
    """Mean of the known scores; None where none is known."""
    known = [score for score in column if score is not None]
    return sum(known) / len(known) if known else None


def undecided(prompts: Sequence[Prompt], scores: Mapping[str, list[float | None]]) -> list[int]:
    """The rows of prompts with a score that is not finite."""
    return [
        prompt.row
        for i, prompt in enumerate(prompts)
        if any(column[i] is None for column in scores.values())
    ]


def chosen_neurons(
    k: int, widths: Sequence[int], located: list[NeuronSet] | None, *, seed: int, row: int
) -> NeuronSet:
    """k neurons of every layer: random ones of this prompt's own (a larger k adds to a smaller
    one's), or those located most often (all that were located, in a layer where fewer were)."""
    if located is not None:
        return most_frequent_neurons_per_layer(located, k)
    orders = (
        random.Random(f"{seed}/{row}/{layer}").sample(range(width), width)
        for layer, width in enumerate(widths)
    )
    return [sorted(order[:k]) for order in orders]


def attention_cosines(
    model: "Model",
    caption: str,
    noise: "torch.Tensor",
    step: "torch.Tensor",
    sets: Mapping[int, NeuronSet],
    *,
    together: bool,
) -> dict[int, list[float | None]]:
    """k -> for each searched layer the mean cosine of its cross-attention's outputs with and
    without that k's neurons, over positions and the n rows of ``noise`` (n, C, H, W). None where it
    is not finite. A layer without blocked neurons scores 1."""
    import torch

    from utils.stable_diffusion import encode_prompt, starting_latents, unet_output
    from utils.value_layers import deactivated

    conditioning = encode_prompt(model, caption).repeat(len(noise))
    latents = starting_latents(model, noise)
    attentions = {
        name: model.unet.get_submodule(name.removesuffix(".to_v")) for name in model.value_layers
    }

    def pass_through() -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        """One U-Net pass: each cross-attention's (arguments, keyword arguments), and output."""
        inputs: dict[str, Any] = {}
        outputs: dict[str, torch.Tensor] = {}
        handles = []
        try:
            for name, module in attentions.items():

                def keep(
                    _: object, args: Any, kwargs: Any, output: torch.Tensor, name: str = name
                ) -> None:
                    inputs[name], outputs[name] = (args, kwargs), output

                handles.append(module.register_forward_hook(keep, with_kwargs=True))
            unet_output(model, latents, step, conditioning)
        finally:
            for handle in handles:
                handle.remove()
        return inputs, outputs

    inputs, whole = pass_through()
    found: dict[int, list[float | None]] = {}
    for k, neurons in sets.items():
        with torch.no_grad(), deactivated(model.value_layers, [neurons]):
            if together:
                blocked = pass_through()[1]
            else:
                blocked = {
                    name: module(*inputs[name][0], **inputs[name][1])
                    for name, module in attentions.items()
                }
        means = [
            torch.cosine_similarity(whole[name].double(), blocked[name].double(), dim=-1)
            .mean()
            .item()
            for name in attentions
        ]
        found[k] = [value if abs(value) < 2 else None for value in means]  # None for NaN
    return found


def read_located(args: argparse.Namespace, source: Source) -> list[NeuronSet]:
    """The refined sets of ``-f``; prompts that were left undecided are named. InputError if it
    belongs to another model or protocol, is not finished, or located nothing."""
    path = args.result_file
    results = read_results(path, widths=source.widths)
    check_result_record(path, source, args.protocol)
    undecided = [f"row {result.row}" for result in results if result.refined is None]
    metric_runs.report(f"left undecided in {path}, not counted", undecided)
    sets = [result.refined for result in results if result.refined is not None]
    if not any(any(neurons) for neurons in sets):
        raise InputError(f"{path}: no neuron was located; name another result file with -f")
    return sets


def check_counts(
    counts: Sequence[int], widths: Sequence[int], located: list[NeuronSet] | None
) -> None:
    """InputError if a layer is narrower than k, or no layer has k located neurons."""
    for k in counts:
        if k > min(widths):
            raise InputError(f"-k {k}: the narrowest layer has {min(widths)} neurons; take fewer")
        if located is not None:
            most_frequent_neurons_per_layer(located, k)
    if located is not None and any(len(neurons) != len(widths) for neurons in located):
        raise InputError(f"-f: its sets do not have the model's {len(widths)} layers")


def format_means(means: Mapping[str, Sequence[float | None]], layers: Sequence[str]) -> str:
    """A line for each layer, a column for each k: mean cosines."""
    width = max(map(len, layers))
    lines = [f"{'mean cosine of outputs':<{width}}" + "".join(f"{f'k={k}':>9}" for k in means)]
    for position, name in enumerate(layers):
        cells = (column[position] for column in means.values())
        shown = "".join(f"{'-' if value is None else f'{value:.4f}':>9}" for value in cells)
        lines.append(f"{name.removesuffix('.to_v'):<{width}}{shown}")
    return "\n".join(lines)


def count_list(text: str) -> list[int]:
    """``1,5,10`` -> numbers of neurons, rising, each once."""
    parse = cli.whole_number(1, 100_000)
    return sorted({parse(part) for part in text.split(",")})


def parse_args() -> argparse.Namespace:
    parser = cli.make_parser(__doc__)
    parser.add_argument(
        "-p",
        "--prompts",
        type=Path,
        metavar="CSV",
        help="prompts to look at (default: the version's memorized prompts)",
    )
    parser.add_argument(
        "-k",
        "--neurons_per_layer",
        type=count_list,
        default=[1, 5, 10],
        metavar="LIST",
        help="how many neurons of each layer are blocked",
    )
    parser.add_argument(
        "-f",
        "--result_file",
        type=Path,
        metavar="CSV",
        help="block the neurons that this result file of script 3 located most often (default: "
        "random ones)",
    )
    parser.add_argument(
        "--together", action="store_true", help="block all layers at once, in a pass of their own"
    )
    parser.add_argument(
        "-s", "--seed", type=cli.SEED, default=1, metavar="INT", help="seed of the initial noises"
    )
    parser.add_argument(
        "--random_seed", type=cli.SEED, default=0, metavar="INT", help="seed of random neurons"
    )
    parser.add_argument(
        "--num_samples",
        type=cli.whole_number(1, 1000),
        default=10,
        metavar="INT",
        help="initial noises of each prompt",
    )
    parser.add_argument(
        "--num_inference_steps",
        type=cli.STEPS,
        default=50,
        metavar="INT",
        help="DDIM steps, which give the timestep that is looked at",
    )
    cli.add_model_options(parser)
    cli.add_block_option(parser)
    cli.add_prompt_options(parser)
    metric_runs.add_output_options(parser)
    return parser.parse_args()


if __name__ == "__main__":
    cli.run(main, parse_args(), lower=None)
