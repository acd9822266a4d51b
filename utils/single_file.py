"""The original single-file layout of Stable Diffusion 1.x, from a diffusers folder.

One file holds the U-Net (``model.diffusion_model.``), the autoencoder (``first_stage_model.``) and
the text encoder (``cond_stage_model.transformer.``) under the names of the first release, where
blocks are numbered through: ``input_blocks``, ``middle_block``, ``output_blocks``. It says nothing
of the architecture, which its readers take for that of SD 1.x.
Public: ``check_single_file``, ``unet_name``, ``autoencoder_name``, ``text_encoder_name``,
``write_single_file``.
"""

import re
from pathlib import Path

from utils.edited_weights import Changes, StoredWeights, save_weights, unet_files
from utils.errors import InputError
from utils.files import read_json, replacing

DOWN = ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"]
LAYERS = 2  # residual blocks of a down block; an up block has one more
UNET = "model.diffusion_model."
AUTOENCODER = "first_stage_model."
TEXT_ENCODER = "cond_stage_model.transformer.text_model."

_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_UNET_ENDS = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
# The autoencoder's attention; the second name of each is that of diffusers before 0.15.
_AUTOENCODER_ATTENTION = {
    "group_norm": "norm",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "proj_out",
    "query": "q",
    "key": "k",
    "value": "v",
    "proj_attn": "proj_out",
}


def check_single_file(folder: Path) -> None:
    """InputError, with the reason, for a pipeline that SD 1.x's layout cannot hold."""
    index = read_json(folder / "model_index.json")
    unet = read_json(folder / "unet" / "config.json")
    scheduler = read_json(folder / "scheduler" / "scheduler_config.json")
    encoder = (index.get("text_encoder") or [None, None])[1]
    prediction = scheduler.get("prediction_type", "epsilon")
    reasons = {
        f"it is a {index.get('_class_name')}": index.get("_class_name")
        != "StableDiffusionPipeline",
        f"its text encoder is a {encoder}": encoder != "CLIPTextModel",
        f"it predicts {prediction}, which the file cannot say": prediction != "epsilon",
        "its transformers have linear projections (SD 2.x)": unet.get("use_linear_projection"),
        "its U-Net has other blocks": list(unet.get("down_block_types", DOWN)) != DOWN
        or unet.get("layers_per_block", LAYERS) != LAYERS,
    }
    for reason, holds in reasons.items():
        if holds:
            raise InputError(
                f"{folder}: --export single_file is the layout of Stable Diffusion 1.x, which does "
                f"not fit this model: {reason}; use --export folder"
            )


def unet_name(name: str) -> str:
    """diffusers' name of a U-Net tensor -> the original one."""
    stem, kind = _split(name)
    if stem in _UNET_ENDS:
        return f"{UNET}{_UNET_ENDS[stem]}.{kind}"
    match = re.fullmatch(r"(?:(down|up)_blocks\.(\d+)|mid_block)\.(\w+)\.(\d+)\.(.+)", stem)
    if match is None:
        raise InputError(f"U-Net tensor '{name}' has no place in SD 1.x's layout")
    way, block, part, number, rest = match.groups()
    at = int(number)
    # resnets and attentions alternate in the middle; elsewhere they share a number
    if way is None:
        place = f"middle_block.{2 * at if part == 'resnets' else 1}"
    else:
        per_block = LAYERS + 1
        first = int(block) * per_block
        if part == "downsamplers":
            return f"{UNET}input_blocks.{first + per_block}.0.op.{kind}"
        if part == "upsamplers":
            behind = 1 if block == "0" else 2  # the first up block has no attention
            return f"{UNET}output_blocks.{first + per_block - 1}.{behind}.conv.{kind}"
        sub = 0 if part == "resnets" else 1
        side, offset = ("input_blocks", 1) if way == "down" else ("output_blocks", 0)
        place = f"{side}.{first + at + offset}.{sub}"
    return f"{UNET}{place}.{_RESNET[rest] if part == 'resnets' else rest}.{kind}"


def autoencoder_name(name: str, levels: int) -> str:
    """diffusers' name of a VAE tensor -> the original one. ``levels``: blocks of the decoder, which
    the original numbers backwards."""
    stem, kind = _split(name)
    stem = re.sub(
        r"(down_blocks|up_blocks)\.(\d+)\.(resnets|downsamplers|upsamplers)\.(\d+)",
        lambda match: _level(*match.groups(), levels=levels),
        stem,
    )
    stem = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", stem)
    attention = re.fullmatch(r"(\w+)\.mid_block\.attentions\.0\.(.+)", stem)
    if attention:
        stem = f"{attention[1]}.mid.attn_1.{_AUTOENCODER_ATTENTION[attention[2]]}"
    stem = stem.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
    return f"{AUTOENCODER}{stem}.{kind}"


def _level(way: str, block: str, part: str, number: str, *, levels: int) -> str:
    side, at = ("down", int(block)) if way == "down_blocks" else ("up", levels - 1 - int(block))
    if part == "resnets":
        return f"{side}.{at}.block.{number}"
    return f"{side}.{at}.{part.removesuffix('rs')}"


def text_encoder_name(name: str) -> str:
    """transformers' name of a text encoder tensor, with the prefix ``text_model.`` or, since
    version 5, without it -> the original one."""
    return TEXT_ENCODER + name.removeprefix("text_model.")


def _split(name: str) -> tuple[str, str]:
    stem, _, kind = name.rpartition(".")
    return stem, kind


def write_single_file(folder: Path, output: Path, changes: Changes, *, dtype: str | None) -> None:
    """The pipeline in ``folder`` with the changed U-Net tensors as one safetensors file,
    atomically.

    ``dtype``: precision of the U-Net's weights (None: as they are stored). InputError as
    ``check_single_file``.
    """
    import torch

    check_single_file(folder)
    tensors: dict[str, torch.Tensor] = {}
    unet = StoredWeights(unet_files(folder))
    for name in unet:
        stored = unet[name]
        precision = getattr(torch, dtype) if dtype else stored.dtype
        tensors[unet_name(name)] = changes.get(name, stored).to(precision).contiguous()
    levels = len(read_json(folder / "vae" / "config.json")["up_block_types"])
    autoencoder = StoredWeights(_main_files(folder / "vae"))
    for name in autoencoder:
        tensor, place = autoencoder[name], autoencoder_name(name, levels)
        if ".attn_1." in place and tensor.ndim == 2:
            tensor = tensor[:, :, None, None]  # once a convolution of one pixel
        tensors[place] = tensor.contiguous()
    encoder = StoredWeights(_main_files(folder / "text_encoder"))
    tensors |= {text_encoder_name(name): encoder[name].contiguous() for name in encoder}
    with replacing(output) as temporary:
        save_weights(tensors, temporary, {"format": "pt"})


def _main_files(folder: Path) -> list[Path]:
    """The safetensors files of a part that is no variant. InputError if there is none."""
    found = [path for path in sorted(folder.glob("*.safetensors")) if path.name.count(".") == 1]
    if not found:
        raise InputError(f"{folder}: no safetensors file; save the pipeline with save_pretrained")
    return found
