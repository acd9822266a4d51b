"""Randomly initialised Stable Diffusion folders in the public architectures, widths scaled down.

The real weights cannot be had where tests run; structure, prediction type, text encoders and
scheduler are those of the public configurations of SD 1.5, SD 2.1 and SDXL, so that a folder is
loaded through the path a user's model takes.
"""

from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
)

TEXT_WIDTH = 32
SCHEDULER = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "steps_offset": 1,
    "clip_sample": False,
    "set_alpha_to_one": False,
}
SD1_UNET: dict[str, Any] = {
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    "block_out_channels": (32, 64, 96, 96),
    "layers_per_block": 2,
    "attention_head_dim": 2,
    "cross_attention_dim": TEXT_WIDTH,
    "sample_size": 16,
}
UNETS: dict[str, dict[str, Any]] = {
    "sd1": SD1_UNET,
    "sd2": {**SD1_UNET, "attention_head_dim": (1, 2, 3, 3), "use_linear_projection": True},
    "xl": {
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "block_out_channels": (32, 64, 96),
        "layers_per_block": 2,
        "transformer_layers_per_block": (1, 2, 3),
        "attention_head_dim": (1, 2, 3),
        "use_linear_projection": True,
        "cross_attention_dim": 2 * TEXT_WIDTH,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": TEXT_WIDTH + 6 * 8,
        "sample_size": 16,
    },
}
ARCHITECTURES = tuple(UNETS)


def small_tokenizer() -> CLIPTokenizer:
    """A byte-level CLIP tokenizer without merges: every caption becomes single characters."""
    printable = [chr(c) for c in range(33, 127)]
    pieces = [*printable, *(c + "</w>" for c in printable), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    return CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=77)


def _text_config(tokenizer: CLIPTokenizer, **changes: Any) -> CLIPTextConfig:
    settings = {
        "vocab_size": len(tokenizer),
        "hidden_size": TEXT_WIDTH,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 77,
        "projection_dim": TEXT_WIDTH,
        "initializer_factor": 3.0,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    return CLIPTextConfig(**{**settings, **changes})


def small_pipeline(architecture: str, *, seed: int = 0, **unet_changes: Any) -> DiffusionPipeline:
    """A random pipeline of one of ``ARCHITECTURES``; ``unet_changes`` replace U-Net settings."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tokenizer = small_tokenizer()
        unet = UNet2DConditionModel(**{**UNETS[architecture], **unet_changes})
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3,
            block_out_channels=(32, 32, 32),
            latent_channels=4,
            sample_size=64,
        )
        scheduler = DDIMScheduler(
            **SCHEDULER, prediction_type="v_prediction" if architecture == "sd2" else "epsilon"
        )
        if architecture == "xl":
            return StableDiffusionXLPipeline(
                vae,
                CLIPTextModel(_text_config(tokenizer)),
                CLIPTextModelWithProjection(_text_config(tokenizer, hidden_act="gelu")),
                tokenizer,
                small_tokenizer(),
                unet,
                scheduler,
                add_watermarker=False,
            )
        return StableDiffusionPipeline(
            vae,
            CLIPTextModel(_text_config(tokenizer)),
            tokenizer,
            unet,
            scheduler,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )


def save_small_model(folder: Path, architecture: str, **changes: Any) -> Path:
    """Writes a random pipeline as a diffusers folder and returns the folder."""
    small_pipeline(architecture, **changes).save_pretrained(folder)
    return folder
