"""Stable Diffusion 1.5's U-Net in its public configuration, with random weights.

The real weights change no cost, and need no download here.
Public: ``full_size_unet``, ``full_size_model``, ``TEXT``.
"""

from types import SimpleNamespace
from typing import Any

import torch
from diffusers import DDIMScheduler, UNet2DConditionModel

from utils.stable_diffusion import DTYPES, Model, settle_layout, settle_precision
from utils.value_layers import ValueReader, find_value_layers
from utils.versions import VERSIONS, Source

TEXT = (77, 768)  # tokens and width of the text embedding
# runwayml/stable-diffusion-v1-5, unet/config.json; what it does not name is diffusers' default.
UNET = {
    "sample_size": 64,
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
    "block_out_channels": (320, 640, 1280, 1280),
    "layers_per_block": 2,
}
SCHEDULER = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
    "clip_sample": False,
    "set_alpha_to_one": False,
}


def full_size_unet() -> Any:
    """The U-Net on the meta device: shapes without numbers."""
    with torch.device("meta"):
        unet: Any = UNet2DConditionModel(**UNET)
    return unet.eval().requires_grad_(False)


def full_size_model(device: str, dtype: str) -> Model:
    """A model that is its U-Net alone, settled as a loaded one, with small random weights so that
    nothing overflows."""
    settle_precision()
    unet = full_size_unet().to(DTYPES[dtype]).to_empty(device=device)
    generator = torch.Generator(device).manual_seed(0)
    for parameter in unet.parameters():
        parameter.normal_(std=0.02, generator=generator)
    settle_layout(unet)
    layers = find_value_layers(unet)
    return Model(
        pipeline=SimpleNamespace(unet=unet),
        source=Source("v1-5", "random weights", None, None, "random", VERSIONS["v1-5"]),
        device=torch.device(device),
        dtype=DTYPES[dtype],
        scheduler=DDIMScheduler(**SCHEDULER),
        value_layers=layers,
        value_reader=ValueReader(layers),
    )
