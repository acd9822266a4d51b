r"""Token attribution: which tokens of a prompt make the text-conditional noise large.

g_t is the gradient of mean_i ||e_c - e_u|| by the prompt embedding at step t of guided sampling of
a few images; a token's score is the mean over steps of ||g_t[token]|| (Wen et al., ICLR 2024). The
tokens of largest score are those to take out, or to write otherwise, of a prompt that brings back a
training image. Begin and end of text and padding are not shown.

Reads:   a prompt file (CSV with ';', a caption column)
Writes:  --output (Row;Position;Token;Score; position in the embedding, the first token is 1), its
         record (.json) beside it, and a folder of the same name with a picture for each prompt,
         row_0000.png: its words coloured by the largest score of their tokens

Examples:
  python metrics/attribute_tokens.py --version=tiny --prompts=prompts/tiny_memorized_prompts.csv \
      --rows=0-1
  python metrics/attribute_tokens.py --prompts=prompts/memorized_laion_prompts.csv --rows=0-99
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

# `python metrics/attribute_tokens.py` puts metrics/ on the path, not the project.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from utils import cli, records
from utils.decided_rows import DecidedRows
from utils.errors import InputError
from utils.estimates import estimate
from utils.files import Prompt, read_prompts, read_table, sha256_of_file, write_table
from utils.team import join

if TYPE_CHECKING:
    from utils.stable_diffusion import Model

COLUMNS = ("Row", "Position", "Token", "Score")
SCALE = "norm of the gradient of the text-conditional noise"
PASSES_PER_STEP = 5  # two halves, and a conditional pass with its gradient, which costs two


def main(args: argparse.Namespace) -> int:
    # Check.
    source = cli.resolve_model(args, steps=args.num_inference_steps)
    if args.guidance_scale == 1:
        raise InputError("--guidance_scale 1: attribution follows guided sampling; give more")
    if args.protocol is not None:
        raise InputError(
            f"--protocol {args.protocol} has no effect here, where sampling is looked at; leave it "
            "out"
        )
    prompts = read_prompts(args.prompts, caption_column=args.caption_column, rows=args.rows)
    output = args.output or Path(f"results/attribution/{source.tag}_{args.prompts.stem}.csv")
    pictures = output.with_suffix("")
    # a row a prompt while they are made, a row a token at the end
    decided = DecidedRows(
        output.with_name(f".{output.name}.scores"), ("Row", "Caption", "Scores"), prompts
    )
    settings = {
        "prompts": len(prompts),
        "rows": args.rows,
        "caption_column": args.caption_column,
        "seed": args.seed,
        "samples_per_prompt": args.samples_per_prompt,
        "num_inference_steps": args.num_inference_steps,
        "guidance_scale": args.guidance_scale,
        "batch_size": args.batch_size,
        "dtype": args.dtype,
        "device": args.device,
    }
    record = records.Record(
        output.with_suffix(".json"), settings=settings, model=source.identity, inputs=[args.prompts]
    )
    team = join()

    def begin() -> str:
        state = records.open_output(
            record,
            output,
            continue_run=args.continue_run or team.restarted,
            others=[pictures, decided.path, *decided.parts()],
        )
        if state == "continued":
            decided.check()
        if state == "finished" and any(
            not picture(pictures, row).is_file() for row in read_scores(output)
        ):
            return "without pictures"
        return state

    state = team.agree("state", begin)
    if args.dry_run:
        rows = len(prompts) * args.samples_per_prompt * args.num_inference_steps
        cost = estimate(
            source,
            device=args.device,
            dtype=args.dtype,
            unet_rows=rows * PASSES_PER_STEP,
            output_bytes=20_000 * len(prompts),
        )
        if team.first:
            cli.print_settings(
                f"{output} from {args.prompts}", {"model": source.id, **settings}, cost
            )
        return 0
    if state == "finished":
        if team.first:
            decided.path.unlink(missing_ok=True)
        team.say(f"{output} is complete already.")
        return 1 if record.stored.get("undecided_rows") else 0

    if state == "without pictures" and not team.first:  # there is nothing to share
        return 0

    # Load.
    team.say(f"Loading {source.id} ...")

    from utils.prompt_tokens import token_scores
    from utils.stable_diffusion import encode_unconditional, initial_noise, load_model

    model = load_model(
        source, device=team.device(args.device), dtype=args.dtype, steps=args.num_inference_steps
    )
    if state == "without pictures":
        draw(model, prompts, read_scores(output), pictures)
        print(f"{output} was complete already; its pictures are drawn again.")
        return 1 if record.stored.get("undecided_rows") else 0
    unconditional = encode_unconditional(model)
    noise = initial_noise(model, args.samples_per_prompt, args.seed)
    if team.first:
        record.start(**model.provenance)
    decided.open(team)

    # Attribute.
    def attribute(prompt: Prompt, _: object) -> list[str]:
        found = token_scores(
            model,
            prompt.caption,
            unconditional,
            noise,
            steps=args.num_inference_steps,
            guidance_scale=args.guidance_scale,
            batch_size=args.batch_size,
        )
        return [json.dumps([(token, f"{score:.6g}") for token, score in found])]

    if not decided.decide(team, attribute, undecided=[""]):
        return 0

    # Draw and write.
    _, table = read_table(decided.path)
    scores = {int(cells["Row"]): json.loads(cells["Scores"]) for cells in table if cells["Scores"]}
    undecided = [prompt.row for prompt in prompts if prompt.row not in scores]
    draw(model, prompts, scores, pictures)
    write_table(
        output,
        COLUMNS,
        [
            (row, position, token, score)
            for row, tokens in scores.items()
            for position, (token, score) in enumerate(tokens, start=1)
        ],
    )
    record.finish(undecided_rows=undecided, output_sha256=sha256_of_file(output))
    decided.path.unlink(missing_ok=True)
    if undecided:
        print(f"{len(undecided)} prompts have a score that is not finite: rows {undecided}")
    print(f"Written to {output}, {len(scores)} pictures in {pictures}.")
    return 1 if undecided else 0


def draw(
    model: "Model",
    prompts: Sequence[Prompt],
    scores: dict[int, list[tuple[str, str]]],
    folder: Path,
) -> None:
    """A picture of the words of every prompt that has scores."""
    from utils.prompt_tokens import joined_words
    from utils.word_pictures import draw_words

    for row in (prompt.row for prompt in prompts if prompt.row in scores):
        tokens = [token for token, _ in scores[row]]
        words = joined_words(model, tokens, [float(score) for _, score in scores[row]])
        draw_words(words, picture(folder, row), scale=SCALE)


def picture(folder: Path, row: int) -> Path:
    """A prompt's picture."""
    return folder / f"row_{row:04d}.png"


def read_scores(path: Path) -> dict[int, list[tuple[str, str]]]:
    """Row -> its tokens and their scores, from a finished table."""
    scores: dict[int, list[tuple[str, str]]] = {}
    for cells in read_table(path)[1]:
        scores.setdefault(int(cells["Row"]), []).append((cells["Token"], cells["Score"]))
    return scores


def parse_args() -> argparse.Namespace:
    parser = cli.make_parser(__doc__)
    parser.add_argument(
        "--prompts", type=Path, required=True, metavar="CSV", help="prompts to look at"
    )
    parser.add_argument(
        "-o",
        "--output",
        type=cli.output_file_of_pictures,
        metavar="CSV",
        help="scores; the pictures' folder has this name without its ending (default: "
        "results/attribution/<version>_<prompt file>.csv)",
    )
    cli.add_model_options(parser)
    # No noise difference is looked at.
    parser.set_defaults(protocol=None)
    group = parser.add_argument_group("sampling")
    group.add_argument(
        "-s", "--seed", type=cli.SEED, default=1, metavar="INT", help="seed of the initial noises"
    )
    group.add_argument(
        "--samples_per_prompt",
        type=cli.whole_number(1, 1000),
        default=4,
        metavar="INT",
        help="images per prompt",
    )
    group.add_argument(
        "--num_inference_steps", type=cli.STEPS, default=50, metavar="INT", help="DDIM steps"
    )
    group.add_argument(
        "--guidance_scale",
        type=cli.GUIDANCE,
        default=7.5,
        metavar="FLOAT",
        help="classifier-free guidance",
    )
    group.add_argument(
        "--batch_size",
        type=cli.BATCH,
        metavar="INT",
        help="images per gradient pass, for a device with little memory (default: all of a "
        "prompt; fewer may change a score by rounding)",
    )
    cli.add_prompt_options(parser)
    cli.add_run_options(parser)
    return parser.parse_args()


if __name__ == "__main__":
    cli.run(main, parse_args(), lower="--batch_size")
