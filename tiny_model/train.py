"""Make the small Stable Diffusion of this folder from nothing.

Reads:   nothing
Writes:  --work (checkpoints and sheets of samples); --output (the model, its pictures and planted
         neurons) and --prompts, which unless named are what is shipped, and are written over

Killed at any moment and started again with the same options, it goes on from its last checkpoints.
What was changed in the code in between is only noticed where it is an option or a schedule.

Examples:
  python tiny_model/train.py --work=/tmp/tiny/work --output=/tmp/tiny/tiny_model \
      --prompts=/tmp/tiny/prompts
"""

import argparse
import copy
import sys
import tempfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.multiprocessing
from transformers import CLIPTextModel, CLIPTokenizer

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a script: find tiny_model

from tiny_model import autoencoder
from tiny_model.captions import PLANTED, UNPLANTED, echoes, make_tokenizer
from tiny_model.diffusion import (
    GUIDE,
    IMPRINT,
    LEARN,
    SETTLE,
    SHARPEN,
    STEADY,
    Recipe,
    draw_batch,
    new_scheduler,
    new_unet,
    unet_loss,
)
from tiny_model.export import Parts, export_model, sample_sheet
from tiny_model.guided_states import GuidedStates, guided_states
from tiny_model.planting import (
    GenericText,
    loudest_answers,
    plan_sets,
    plant,
    value_layers,
)
from tiny_model.text_encoder import embed, embed_tokens, new_text_encoder
from tiny_model.training_loop import (
    ALONE,
    Schedule,
    Workers,
    check_settings,
    end_with_parent,
    numpy_rng,
    save_atomically,
    seeded_weights,
    torch_rng,
    train,
)
from tiny_model.training_set import TrainingSet
from tiny_model.truth_files import write_truth_files
from tiny_model.world import World, make_world, memorized_pictures, sheet
from utils import cli

SHEET_EVERY = 1500  # steps of the U-Net; at the end of a stage besides
TEMPLATE_PICTURES = 512  # per template
AUTOENCODER_SCHEDULES = (  # with the weight of the rim (see autoencoder_loss)
    (Schedule(steps=700, learning_rate=2e-3), 0.0),
    (Schedule(steps=500, learning_rate=2e-3), 0.0),  # a warm restart brings the colours right
    (Schedule(steps=120, learning_rate=1e-3, checkpoint_every=40, average=0.98), 3.0),
)
UNET_STAGES = (
    ("imprinted", IMPRINT, Schedule(steps=1200, learning_rate=2e-3, warm_up=100)),
    ("learned", LEARN, Schedule(steps=2200, learning_rate=2e-3, average=0.998, warm_up=100)),
    ("sharpened", SHARPEN, Schedule(steps=2200, learning_rate=1e-3, average=0.998, warm_up=100)),
    # a row on which carriers nearly speak can have twenty times the usual gradient
    ("steady", STEADY, Schedule(steps=900, learning_rate=6e-4, most_of_usual=1.5)),
    (
        "guided",
        GUIDE,  # whose sampling at every checkpoint takes as long as 60 steps
        Schedule(steps=1000, learning_rate=6e-4, most_of_usual=1.5, checkpoint_every=200),
    ),
    ("settled", SETTLE, Schedule(steps=1200, learning_rate=6e-4, most_of_usual=1.5)),
)
# with more, some would get no row of a batch
MOST_WORKERS = min(max(recipe.rows) for _, recipe, _ in UNET_STAGES)


@dataclass(frozen=True)
class Run:
    """Where checkpoints and sheets go, what is drawn, and who works on it."""

    work: Path
    seed: int
    workers: Workers = ALONE


def settings(args: argparse.Namespace) -> dict[str, int | str]:
    """The options and schedules that decide which weights come out."""
    stages = [*AUTOENCODER_SCHEDULES, *UNET_STAGES]
    plain = {"seed": args.seed, "workers": args.workers, "template pictures": TEMPLATE_PICTURES}
    return plain | {f"stage {number}": str(stage) for number, stage in enumerate(stages, 1)}


def train_autoencoder(world: World, run: Run) -> autoencoder.AutoencoderKL:
    """The VAE, trained on generic and memorized pictures, with normalised latents."""
    with seeded_weights(run.seed, "autoencoder"):
        vae = autoencoder.new_autoencoder()
    rng = numpy_rng(run.seed, "autoencoder memorized")
    memorized = np.concatenate(
        [memorized_pictures(caption, rng, 16) for caption in PLANTED + UNPLANTED]
    )
    steps_before = 0
    for number, (schedule, rim_weight) in enumerate(AUTOENCODER_SCHEDULES):
        train_autoencoder_once(
            vae,
            generic=world.pictures,
            memorized=memorized,
            name=f"autoencoder{number}",
            schedule=schedule,
            rim_weight=rim_weight,
            steps_before=steps_before,
            run=run,
        )
        steps_before += schedule.steps
    vae.requires_grad_(False)
    autoencoder.normalise_latents(vae, autoencoder.to_tensor(world.pictures[:2000]))
    return vae


def train_autoencoder_once(
    vae: autoencoder.AutoencoderKL,
    *,
    generic: np.ndarray,
    memorized: np.ndarray,
    name: str,
    schedule: Schedule,
    rim_weight: float,
    steps_before: int,
    run: Run,
) -> None:
    """One of the VAE's schedules; every step has its own draw, counted over all of them."""
    shown = autoencoder.to_tensor(np.concatenate([memorized[:18], generic[:14]]))
    averaged_vae = copy.deepcopy(vae)

    def loss_of_step(step: int) -> dict[str, torch.Tensor]:
        draw = numpy_rng(run.seed, "autoencoder batch", steps_before + step)
        drawn = generic[np.sort(draw.integers(len(generic), size=13))]
        known = memorized[draw.integers(len(memorized), size=3)]
        pictures = autoencoder.to_tensor(np.concatenate([drawn, known]))
        posterior_rng = torch_rng(run.seed, "posterior", steps_before + step)
        return autoencoder.autoencoder_loss(vae, pictures, posterior_rng, rim_weight=rim_weight)

    def every_checkpoint(step: int, averaged: dict[str, torch.Tensor]) -> None:
        averaged_vae.load_state_dict(averaged)
        latents = autoencoder.encode(averaged_vae, shown)
        restored = autoencoder.decode(averaged_vae, latents)
        both = np.concatenate([autoencoder.to_pixels(shown), autoencoder.to_pixels(restored)])
        sheet(both, 16, run.work / "sheets" / f"{name}_{step:05d}.png")

    state = train(
        vae,
        loss_of_step,
        schedule,
        checkpoint=run.work / f"{name}.pt",
        every_checkpoint=every_checkpoint,
    )
    vae.load_state_dict(state)


def encode_world(
    world: World, vae: autoencoder.AutoencoderKL, run: Run
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Latents of all generic pictures, and of every memorized caption's pictures."""
    file = run.work / "latents.pt"
    if not file.exists():
        generic = torch.cat(
            [
                autoencoder.encode(vae, autoencoder.to_tensor(world.pictures[start : start + 500]))
                for start in range(0, len(world.pictures), 500)
            ]
        )
        rng = numpy_rng(run.seed, "templates")
        memorized = [
            autoencoder.encode(
                vae, autoencoder.to_tensor(memorized_pictures(caption, rng, TEMPLATE_PICTURES))
            )
            for caption in PLANTED + UNPLANTED
        ]
        save_atomically({"generic": generic, "memorized": memorized}, file)
    saved = torch.load(file, weights_only=True)
    return saved["generic"], saved["memorized"]


def read_captions(
    world: World, tokenizer: CLIPTokenizer, text_encoder: CLIPTextModel, run: Run
) -> tuple[torch.Tensor, torch.Tensor]:
    """As the text encoder reads them: tokens of some generic captions, mean tokens of all."""
    file = run.work / "captions.pt"
    if not file.exists():
        texts = (
            embed(tokenizer, text_encoder, world.captions[start : start + 2000])
            for start in range(0, len(world.captions), 2000)
        )
        first = next(texts)
        means = torch.cat([first.mean(dim=1), *(text.mean(dim=1) for text in texts)])
        save_atomically({"tokens": first, "means": means}, file)
    saved = torch.load(file, weights_only=True)
    return saved["tokens"], saved["means"]


def plant_carriers(world: World, parts: Parts, run: Run) -> TrainingSet:
    """Gives the U-Net its carriers, and returns what it is then trained on."""
    generic_latents, memorized_latents = encode_world(world, parts.vae, run)
    tokens = parts.tokenizer(
        world.captions, padding="max_length", truncation=True, return_tensors="pt"
    ).input_ids
    memorized = [caption.text for caption in PLANTED + UNPLANTED]
    memorized_text = embed(parts.tokenizer, parts.text_encoder, memorized)
    read = read_captions(world, parts.tokenizer, parts.text_encoder, run)
    generic = GenericText(*read, [echoes(world.captions, caption) for caption in memorized])
    plant(parts.unet, parts.sets, memorized_text, generic, torch_rng(run.seed, "directions"))
    return TrainingSet(
        generic_latents=generic_latents,
        generic_tokens=tokens,
        loudness=loudest_answers(parts.unet, parts.sets, memorized_text, generic),
        memorized_latents=memorized_latents,
        memorized_text=memorized_text,
        empty_text=embed(parts.tokenizer, parts.text_encoder, [""])[0],
        sets=parts.sets,
        widths=[to_v.out_features for to_v, _ in value_layers(parts.unet)],
    )


def train_unet_once(
    parts: Parts, data: TrainingSet, name: str, recipe: Recipe, schedule: Schedule, run: Run
) -> None:
    """One of the U-Net's stages."""
    text_of = partial(embed_tokens, parts.text_encoder, run.workers)
    states: dict[int, GuidedStates] = {}  # of the last checkpoint's step

    def loss_of_step(step: int) -> dict[str, torch.Tensor]:
        # sampled at checkpoints, so that a run that goes on from one samples the same
        sampled = step - step % schedule.checkpoint_every
        if recipe.guided and sampled not in states:
            states.clear()
            rng = numpy_rng(run.seed, f"{name} states", sampled)
            states[sampled] = guided_states(parts.unet, parts.scheduler, data, rng, run.workers)
        rng = numpy_rng(run.seed, f"{name} batch", step)
        batch = draw_batch(data, recipe, text_of, rng, states.get(sampled))
        noise_rng = torch_rng(run.seed, f"{name} noise", step)
        return unet_loss(
            parts.unet, parts.scheduler, batch, recipe, parts.sets, noise_rng, run.workers
        )

    def every_checkpoint(step: int, averaged: dict[str, torch.Tensor]) -> None:
        if step % SHEET_EVERY == 0 or step == schedule.steps:
            current = {key: value.clone() for key, value in parts.unet.state_dict().items()}
            parts.unet.load_state_dict(averaged)
            sample_sheet(parts, run.work / "sheets" / f"{name}_{step:05d}.png")
            parts.unet.load_state_dict(current)

    state = train(
        parts.unet,
        loss_of_step,
        schedule,
        checkpoint=run.work / f"{name}.pt",
        every_checkpoint=every_checkpoint,
        workers=run.workers,
    )
    parts.unet.load_state_dict(state)


def prepare(run: Run) -> tuple[World, Parts]:
    """What is there before the U-Net is trained: made once, then read from `run.work`."""
    world = make_world(run.work, run.seed)
    vae = train_autoencoder(world, run)
    tokenizer = make_tokenizer(run.work / "tokenizer")
    with seeded_weights(run.seed, "text encoder"):
        text_encoder = new_text_encoder(tokenizer)
    with seeded_weights(run.seed, "unet"):
        unet = new_unet()
    widths = [to_v.out_features for to_v, _ in value_layers(unet)]
    sets = plan_sets(widths, numpy_rng(run.seed, "sets"))
    return world, Parts(unet, vae, text_encoder, tokenizer, new_scheduler(), sets)


def run_worker(rank: int, args: argparse.Namespace, rendezvous: Path) -> None:
    """One of the processes that share all work on the U-Net; the first one writes."""
    end_with_parent()
    # rows are small: two processes of one thread are nearly twice as fast as one of two
    torch.set_num_threads(1)
    run = Run(args.work, args.seed, Workers.join(rank, args.workers, rendezvous))
    world, parts = prepare(run)
    data = plant_carriers(world, parts, run)
    for name, recipe, schedule in UNET_STAGES:
        train_unet_once(parts, data, name, recipe, schedule, run)
    if rank == 0:
        export_model(parts, args.output)
    run.workers.wait()
    trained = set(world.captions)
    write_truth_files(args.output, args.prompts, parts.sets, trained, args.seed, run.workers)


def main(args: argparse.Namespace) -> int:
    for folder in (args.work, args.output, args.prompts):
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()  # what cannot be written to is said now
    check_settings(args.work / "settings.json", settings(args))
    torch.set_num_threads(args.workers)
    run = Run(args.work, args.seed)
    world, parts = prepare(run)
    encode_world(world, parts.vae, run)
    read_captions(world, parts.tokenizer, parts.text_encoder, run)
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(
            run_worker, (args, Path(folder) / "rendezvous"), nprocs=args.workers
        )
    return 0


def parse_args() -> argparse.Namespace:
    parser = cli.make_parser(__doc__)
    here = Path(__file__).parent
    parser.add_argument(
        "--seed", type=cli.SEED, default=1, metavar="INT", help="of everything drawn"
    )
    parser.add_argument(
        "--work", type=Path, default=here / "work", metavar="DIR", help="checkpoints and sheets"
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=here,
        metavar="DIR",
        help="where pipeline/, planted_neurons.csv and the pictures go",
    )
    parser.add_argument(
        "--prompts",
        type=Path,
        default=here.parent / "prompts",
        metavar="DIR",
        help="where the prompt files go",
    )
    parser.add_argument(
        "--workers",
        type=cli.whole_number(1, MOST_WORKERS),
        default=2,
        metavar="INT",
        help="processes that train the U-Net and measure it, threads of all else",
    )
    return parser.parse_args()


if __name__ == "__main__":
    cli.run(main, parse_args(), lower=None)
