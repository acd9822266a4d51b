"""What is written for users: the pipeline folder and the sample sheets.

Public names: Parts, export_model, sample_sheet.
"""

import copy
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTokenizer

from tiny_model.autoencoder import decode, to_pixels
from tiny_model.captions import PLANTED, UNPLANTED
from tiny_model.guided_states import sampled
from tiny_model.planting import NeuronSet
from tiny_model.text_encoder import embed
from tiny_model.world import sheet


@dataclass(frozen=True)
class Parts:
    """The parts of the pipeline, in float32, and the planted set of every memorized row."""

    unet: UNet2DConditionModel
    vae: AutoencoderKL
    text_encoder: CLIPTextModel
    tokenizer: CLIPTokenizer
    scheduler: DDIMScheduler
    sets: list[NeuronSet]


def export_model(parts: Parts, output: Path) -> None:
    """Write `output`/pipeline in float16; the old folder stays until the new one is whole."""
    pipeline = StableDiffusionPipeline(
        vae=copy.deepcopy(parts.vae).half(),
        text_encoder=copy.deepcopy(parts.text_encoder).half(),
        tokenizer=parts.tokenizer,
        unet=copy.deepcopy(parts.unet).half(),
        scheduler=parts.scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    folder, new, old = (output / name for name in ("pipeline", "pipeline.new", "pipeline.old"))
    for leftover in (new, old):
        shutil.rmtree(leftover, ignore_errors=True)
    pipeline.save_pretrained(new, safe_serialization=True)
    # what older releases of transformers read
    for name in ("vocab.json", "merges.txt"):
        if not (new / "tokenizer" / name).exists():
            shutil.copy(Path(parts.tokenizer.name_or_path) / name, new / "tokenizer" / name)
    if folder.exists():
        folder.rename(old)
    new.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


@torch.no_grad()
def sample_sheet(parts: Parts, path: Path) -> None:
    """Two seeds of every memorized caption and of four generic ones, with guidance 7."""
    texts = [caption.text for caption in PLANTED + UNPLANTED]
    texts += ["A red star by the tea house", "Green circle with winter and fox"]
    texts += ["Copper painting, ski bowl of the jazz", "Fairy drawing with chess knight"]
    text = embed(parts.tokenizer, parts.text_encoder, texts).repeat_interleave(2, dim=0)
    empty_text = embed(parts.tokenizer, parts.text_encoder, [""])[0]
    noise = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(2))
    noise = noise.repeat(len(texts), 1, 1, 1)
    sampling = DDIMScheduler.from_config(parts.scheduler.config)
    sampling.set_timesteps(10)
    *_, latents = sampled(parts.unet, sampling, noise, text, empty_text, guidance=7.0)
    sheet(to_pixels(decode(parts.vae, latents)), 20, path)
