r"""Make the small evaluators from nothing: a copy detector and an image-text model for the pictures
of this world, in the formats of SSCD and CLIP.

Reads:   the drawn world (--work; drawn if it is not there)
Writes:  --output/copy_detector.pt for --sscd_weights and --feature_model,
         --output/image_text/ for --clip_model, and what was measured: --output/measured.json

A killed run goes on from its last checkpoint, which lies in --work.

Examples:
  python tiny_model/train_evaluators.py
  python tiny_model/train_evaluators.py --measure
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
from transformers import CLIPTokenizer

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a script: find tiny_model

from tiny_model.alterations import altered
from tiny_model.captions import PLANTED, UNPLANTED, make_tokenizer
from tiny_model.copy_detector import CopyDetector, detector_loss, write_detector
from tiny_model.image_text import (
    image_text_loss,
    new_image_text,
    shortened,
    tokens_of,
    write_image_text,
)
from tiny_model.measure_evaluators import (
    detector_on_training_images,
    detector_shares,
    image_text_figures,
)
from tiny_model.training_loop import (
    Schedule,
    check_settings,
    numpy_rng,
    seeded_weights,
    train,
)
from tiny_model.world import World, make_world, memorized_pictures
from utils import cli
from utils.embeddings import SSCD_PROTOCOLS, clip_space, sscd_space
from utils.files import write_json

DETECTOR, IMAGE_TEXT = "copy_detector.pt", "image_text"  # below --output
UNSEEN, HOLD_OUT_PAIRS = 500, 100  # what is measured on

BATCH, MEMORIZED_IN_BATCH = 128, 12
TEMPLATE_PICTURES = 256  # per template
DETECTOR_SCHEDULE = Schedule(steps=700, learning_rate=2e-3, average=0.99)
IMAGE_TEXT_SCHEDULE = Schedule(steps=3000, learning_rate=3e-3, average=0.99)


def draw_batch(
    world: World, memorized: list[np.ndarray], rng: np.random.Generator, *, of_caption: int
) -> tuple[np.ndarray, list[str]]:
    """Pictures (128, 64, 64, 3) and their captions, a few of memorized captions: of each of these
    its one picture, or as many as `of_caption` different ones of a template."""
    pictures, captions = [], []
    for at in rng.choice(len(memorized), MEMORIZED_IN_BATCH, replace=False):
        own = memorized[at]
        chosen = rng.choice(len(own), min(of_caption, len(own)), replace=False)
        pictures.append(own[chosen])
        captions += [(PLANTED + UNPLANTED)[at].text] * len(chosen)
    count = BATCH - len(captions)
    generic = np.sort(rng.choice(len(world.pictures), count, replace=False))
    captions += [world.captions[at] for at in generic]
    return np.concatenate([*pictures, world.pictures[generic]]), captions


def train_detector(
    world: World, memorized: list[np.ndarray], work: Path, seed: int
) -> CopyDetector:
    with seeded_weights(seed, "copy detector"):
        detector = CopyDetector()

    def loss_of_step(step: int) -> dict[str, torch.Tensor]:
        rng = numpy_rng(seed, "copy detector batch", step)
        # Two examples of a template are not copies of each other.
        pictures, _ = draw_batch(world, memorized, rng, of_caption=2)
        return detector_loss(detector, altered(pictures, rng), altered(pictures, rng))

    state = train(detector, loss_of_step, DETECTOR_SCHEDULE, checkpoint=work / "copy_detector.pt")
    detector.load_state_dict(state)
    return detector


def train_image_text(
    world: World,
    memorized: list[np.ndarray],
    tokenizer: CLIPTokenizer,
    work: Path,
    seed: int,
) -> open_clip.CLIP:
    with seeded_weights(seed, "image-text"):
        model = new_image_text(tokenizer)

    def loss_of_step(step: int) -> dict[str, torch.Tensor]:
        rng = numpy_rng(seed, "image-text batch", step)
        # A caption has but one right picture in a batch.
        pictures, captions = draw_batch(world, memorized, rng, of_caption=1)
        tokens = tokens_of(tokenizer, [shortened(caption, rng) for caption in captions])
        return image_text_loss(model, altered(pictures, rng), tokens)

    state = train(model, loss_of_step, IMAGE_TEXT_SCHEDULE, checkpoint=work / "image_text.pt")
    model.load_state_dict(state)
    return model


def make_evaluators(args: argparse.Namespace) -> None:
    work = args.work / "evaluators"
    work.mkdir(parents=True, exist_ok=True)
    schedules = {"detector": str(DETECTOR_SCHEDULE), "image-text": str(IMAGE_TEXT_SCHEDULE)}
    wanted = {"seed": args.seed, "threads": args.threads, **schedules}
    check_settings(work / "settings.json", wanted)
    world = make_world(args.work, args.seed)
    rng = numpy_rng(args.seed, "evaluators memorized")
    memorized = [
        memorized_pictures(caption, rng, TEMPLATE_PICTURES) for caption in PLANTED + UNPLANTED
    ]
    detector = train_detector(world, memorized, work, args.seed)
    write_detector(detector, args.output / DETECTOR)
    tokenizer = make_tokenizer(work / "tokenizer")
    image_text = train_image_text(world, memorized, tokenizer, work, args.seed)
    write_image_text(image_text, tokenizer, args.output / IMAGE_TEXT)


def measure(output: Path, seed: int) -> dict[str, Any]:
    """The figures of the evaluators in `output`, loaded as the metrics load them."""
    references = Path(__file__).parent / "training_images"
    image_text = clip_space(str(output / IMAGE_TEXT), "").load("cpu")
    found: dict[str, Any] = {}
    for protocol in SSCD_PROTOCOLS:
        detector = sscd_space(protocol, output / DETECTOR).load("cpu")
        found[protocol] = {
            "unseen": detector_shares(detector, seed, UNSEEN),
            "training images": detector_on_training_images(detector, references),
        }
    found["image-text"] = image_text_figures(image_text, references, seed, HOLD_OUT_PAIRS)
    return found


def main(args: argparse.Namespace) -> int:
    torch.set_num_threads(args.threads)
    if not args.measure:
        make_evaluators(args)
    measured = measure(args.output, args.seed)
    write_json(args.output / "measured.json", measured)
    print(json.dumps(measured, indent=2))
    return 0


def parse_args() -> argparse.Namespace:
    parser = cli.make_parser(__doc__)
    here = Path(__file__).parent
    parser.add_argument(
        "--seed", type=cli.SEED, default=1, metavar="INT", help="of everything drawn"
    )
    parser.add_argument(
        "--work",
        type=Path,
        default=here / "work",
        metavar="DIR",
        help="the world and checkpoints",
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=here / "evaluators",
        metavar="DIR",
        help="where the evaluators go",
    )
    parser.add_argument(
        "--measure", action="store_true", help="only measure what lies in --output, without work"
    )
    parser.add_argument(
        "--threads", type=cli.whole_number(1, 64), default=2, metavar="INT", help="of torch"
    )
    return parser.parse_args()


if __name__ == "__main__":
    cli.run(main, parse_args(), lower=None)
