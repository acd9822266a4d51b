"""Make the small Stable Diffusion of this folder from nothing: `python tiny_model/train.py`.

Killed at any moment and started again, it goes on from its last checkpoints.
"""

import argparse
import sys
import tempfile
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
    SHARPEN,
    STEADY,
    Recipe,
    TrainingSet,
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
from tiny_model.text_encoder import TEXT_WIDTH, embed, new_text_encoder
from tiny_model.training_loop import (
    Schedule,
    Workers,
    end_with_parent,
    numpy_rng,
    save_atomically,
    seeded_weights,
    torch_rng,
    train,
)
from tiny_model.truth_files import write_truth_files
from tiny_model.world import World, make_world, memorized_pictures, sheet

EXPORT_EVERY = 1500  # steps of the U-Net; at the end of a stage besides
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
)


def train_autoencoder(world: World, work: Path, seed: int) -> autoencoder.AutoencoderKL:
    """The VAE, trained on generic and memorized pictures, with normalised latents."""
    with seeded_weights(seed, "autoencoder"):
        vae, copy = autoencoder.new_autoencoder(), autoencoder.new_autoencoder()
    rng = numpy_rng(seed, "autoencoder memorized")
    memorized = np.concatenate(
        [memorized_pictures(caption, rng, 16) for caption in PLANTED + UNPLANTED]
    )
    shown = autoencoder.to_tensor(np.concatenate([memorized[:18], world.pictures[:14]]))

    for number, (schedule, rim_weight) in enumerate(AUTOENCODER_SCHEDULES):
        name = f"autoencoder{number}"
        before = sum(earlier.steps for earlier, _ in AUTOENCODER_SCHEDULES[:number])

        def loss_of_step(
            step: int, before: int = before, rim_weight: float = rim_weight
        ) -> dict[str, torch.Tensor]:
            draw = numpy_rng(seed, "autoencoder batch", before + step)
            generic = world.pictures[np.sort(draw.integers(len(world.pictures), size=13))]
            known = memorized[draw.integers(len(memorized), size=3)]
            pictures = autoencoder.to_tensor(np.concatenate([generic, known]))
            posterior_rng = torch_rng(seed, "posterior", before + step)
            return autoencoder.autoencoder_loss(vae, pictures, posterior_rng, rim_weight=rim_weight)

        def every_checkpoint(
            step: int, averaged: dict[str, torch.Tensor], name: str = name
        ) -> None:
            copy.load_state_dict(averaged)
            restored = autoencoder.decode(copy, autoencoder.encode(copy, shown))
            both = np.concatenate([autoencoder.to_pixels(shown), autoencoder.to_pixels(restored)])
            sheet(both, 16, work / "sheets" / f"{name}_{step:05d}.png")

        state = train(
            vae,
            loss_of_step,
            schedule,
            checkpoint=work / f"{name}.pt",
            every_checkpoint=every_checkpoint,
        )
        vae.load_state_dict(state)
    vae.requires_grad_(False)
    autoencoder.normalise_latents(vae, autoencoder.to_tensor(world.pictures[:2000]))
    return vae


def encode_world(
    world: World, vae: autoencoder.AutoencoderKL, work: Path, seed: int
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Latents of all generic pictures, and of every memorized caption's pictures."""
    file = work / "latents.pt"
    if not file.exists():
        generic = torch.cat(
            [
                autoencoder.encode(vae, autoencoder.to_tensor(world.pictures[start : start + 500]))
                for start in range(0, len(world.pictures), 500)
            ]
        )
        rng = numpy_rng(seed, "templates")
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
    world: World, tokenizer: CLIPTokenizer, text_encoder: CLIPTextModel, work: Path
) -> tuple[torch.Tensor, torch.Tensor]:
    """As the text encoder reads them: tokens of some generic captions, mean tokens of all."""
    file = work / "captions.pt"
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


def sample_states(
    parts: Parts, data: TrainingSet, rng: np.random.Generator, workers: Workers
) -> GuidedStates:
    return guided_states(
        parts.unet,
        parts.scheduler,
        data.memorized_text,
        data.memorized_latents,
        data.empty_text,
        data.sets,
        data.widths,
        rng,
        workers,
    )


def train_unet(
    world: World, parts: Parts, work: Path, output: Path, seed: int, workers: Workers
) -> None:
    """All stages: imprint, learn, sharpen, steady, guide."""
    generic_latents, memorized_latents = encode_world(world, parts.vae, work, seed)
    tokens = parts.tokenizer(
        world.captions, padding="max_length", truncation=True, return_tensors="pt"
    ).input_ids
    memorized = [caption.text for caption in PLANTED + UNPLANTED]
    memorized_text = embed(parts.tokenizer, parts.text_encoder, memorized)
    read = read_captions(world, parts.tokenizer, parts.text_encoder, work)
    generic = GenericText(*read, [echoes(world.captions, caption) for caption in memorized])
    plant(parts.unet, parts.sets, memorized_text, generic, torch_rng(seed, "directions"))

    data = TrainingSet(
        generic_latents=generic_latents,
        generic_tokens=tokens,
        loudness=loudest_answers(parts.unet, parts.sets, memorized_text, generic),
        memorized_latents=memorized_latents,
        memorized_text=memorized_text,
        empty_text=embed(parts.tokenizer, parts.text_encoder, [""])[0],
        sets=parts.sets,
        widths=[to_v.out_features for to_v, _ in value_layers(parts.unet)],
    )

    def embed_tokens(ids: torch.Tensor) -> torch.Tensor:
        embeddings = torch.zeros(*ids.shape, TEXT_WIDTH)
        mine = slice(workers.rank, None, workers.count)
        if len(ids[mine]):  # the encoder takes no empty batch
            embeddings[mine] = parts.text_encoder(ids[mine]).last_hidden_state
        if len(ids):
            workers.add_up(embeddings)
        return embeddings

    for name, recipe, schedule in UNET_STAGES:
        states: dict[int, GuidedStates] = {}  # of the last checkpoint's step

        def loss_of_step(
            step: int,
            name: str = name,
            recipe: Recipe = recipe,
            schedule: Schedule = schedule,
            states: dict[int, GuidedStates] = states,
        ) -> dict[str, torch.Tensor]:
            # sampled at checkpoints, so that a run that goes on from one samples the same
            sampled = step - step % schedule.checkpoint_every
            if recipe.guided and sampled not in states:
                states.clear()
                states[sampled] = sample_states(
                    parts, data, numpy_rng(seed, f"{name} states", sampled), workers
                )
            batch = draw_batch(
                data,
                recipe,
                embed_tokens,
                numpy_rng(seed, f"{name} batch", step),
                states.get(sampled),
            )
            rng = torch_rng(seed, f"{name} noise", step)
            return unet_loss(parts.unet, parts.scheduler, batch, recipe, parts.sets, rng, workers)

        def every_checkpoint(
            step: int,
            averaged: dict[str, torch.Tensor],
            name: str = name,
            schedule: Schedule = schedule,
        ) -> None:
            if step % EXPORT_EVERY == 0 or step == schedule.steps:
                current = {key: value.clone() for key, value in parts.unet.state_dict().items()}
                parts.unet.load_state_dict(averaged)
                sample_sheet(parts, work / "sheets" / f"{name}_{step:05d}.png")
                export_model(parts, output)
                parts.unet.load_state_dict(current)

        state = train(
            parts.unet,
            loss_of_step,
            schedule,
            checkpoint=work / f"{name}.pt",
            every_checkpoint=every_checkpoint,
            workers=workers,
        )
        parts.unet.load_state_dict(state)


def prepare(work: Path, seed: int) -> tuple[World, Parts]:
    """All but the U-Net's training: drawn and trained once, then read from `work`."""
    work.mkdir(parents=True, exist_ok=True)
    world = make_world(work, seed)
    vae = train_autoencoder(world, work, seed)
    encode_world(world, vae, work, seed)
    tokenizer = make_tokenizer(work / "tokenizer")
    with seeded_weights(seed, "text encoder"):
        text_encoder = new_text_encoder(tokenizer)
    read_captions(world, tokenizer, text_encoder, work)
    with seeded_weights(seed, "unet"):
        unet = new_unet()
    widths = [to_v.out_features for to_v, _ in value_layers(unet)]
    sets = plan_sets(widths, numpy_rng(seed, "sets"))
    return world, Parts(unet, vae, text_encoder, tokenizer, new_scheduler(), sets)


def run_worker(rank: int, args: argparse.Namespace, rendezvous: Path) -> None:
    """One of the processes that share all work on the U-Net; the first one writes."""
    end_with_parent()
    # rows are small: two processes of one thread are nearly twice as fast as one of two
    torch.set_num_threads(1)
    workers = Workers.join(rank, args.workers, rendezvous)
    world, parts = prepare(args.work, args.seed)
    train_unet(world, parts, args.work, args.output, args.seed, workers)
    if rank == 0:
        export_model(parts, args.output)
    workers.wait()
    trained = set(world.captions)
    write_truth_files(args.output, args.prompts, parts.sets, trained, args.seed, workers)


def main(args: argparse.Namespace) -> None:
    torch.set_num_threads(args.workers)
    prepare(args.work, args.seed)
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(
            run_worker, (args, Path(folder) / "rendezvous"), nprocs=args.workers
        )


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    here = Path(__file__).parent
    parser.add_argument("--seed", type=int, default=1, help="of everything drawn (default: 1)")
    parser.add_argument(
        "--work", type=Path, default=here / "work", help="checkpoints and sheets (default: work)"
    )
    parser.add_argument(
        "--output", type=Path, default=here, help="where pipeline/ goes (default: tiny_model)"
    )
    parser.add_argument(
        "--prompts",
        type=Path,
        default=here.parent / "prompts",
        help="where the prompt files go (default: prompts)",
    )
    parser.add_argument(
        "--workers", type=int, default=2, help="processes that train the U-Net (default: 2)"
    )
    return parser.parse_args()


if __name__ == "__main__":
    main(parse_args())
