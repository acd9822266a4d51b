"""A Stable Diffusion model: loading, prompt encoding, noise prediction, sampling, decoding.

All differences between architectures (SD 1.x, 2.x with v-prediction, SDXL) live in this module.
Public: ``DTYPES``, ``PREDICTION_TYPES``, ``Model``, ``Conditioning``, ``settle_precision``,
``settle_layout``, ``reproducible_gradient``, ``load_model``,
``encode_prompt``, ``encode_unconditional``, ``initial_noise``, ``starting_latents``,
``unet_output``, ``to_noise_prediction``, ``Step``, ``Schedule``, ``sample_latents``, ``encode``,
``decode``.
"""

import contextlib
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers import DDIMScheduler, DiffusionPipeline
from huggingface_hub import try_to_load_from_cache
from PIL import Image, ImageOps
from safetensors import SafetensorError
from torch.nn.attention import SDPBackend, sdpa_kernel

from utils.errors import InputError
from utils.value_layers import ValueReader, find_value_layers
from utils.versions import TOKENIZERS, Source, check_pipeline_class, check_steps, stored_names

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
PREDICTION_TYPES = ("epsilon", "v_prediction")


@dataclass(frozen=True)
class Model:
    """A loaded pipeline with its value layers, on one device.

    U-Net and VAE are in ``dtype``; text encoders stay in float32, since activations are read from
    their output in float32 whatever the U-Net's precision.
    """

    pipeline: Any
    source: Source
    device: torch.device
    dtype: torch.dtype
    scheduler: Any  # a DDIMScheduler; diffusers sets most of its attributes at run time
    value_layers: dict[str, torch.nn.Module]
    value_reader: ValueReader
    commit: str | None = None  # of a hub model
    fused: bool = False  # whether the U-Net runs on ``utils.fused``

    @property
    def provenance(self) -> dict[str, str | None]:
        """What a record keeps beside settings and model: the hub model's ``commit``, and what
        rounding depends on, the ``machine``."""
        if self.device.type == "cuda":
            machine = torch.cuda.get_device_name(self.device)
            machine += ", fused kernels" if self.fused else ""
        else:
            machine = f"{self.device.type}, {torch.get_num_threads()} threads"
        return {"commit": self.commit, "machine": machine}

    @property
    def unet(self) -> Any:
        """The U-Net, in evaluation mode."""
        return self.pipeline.unet

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of one latent at the size the model was made for."""
        size = self.unet.config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        return self.unet.config.in_channels, height, width


@dataclass(frozen=True)
class Conditioning:
    """What the U-Net sees of B prompts: embeddings (B, tokens, width), float32, and for SDXL the
    pooled embeddings and time ids, (B, ...) each."""

    embedding: torch.Tensor
    added: dict[str, torch.Tensor]

    def repeat(self, rows: int) -> "Conditioning":
        """One prompt (B = 1) for ``rows`` batch rows."""
        return Conditioning(
            self.embedding.expand(rows, -1, -1),
            {name: value.expand(rows, -1) for name, value in self.added.items()},
        )

    def slice(self, rows: slice) -> "Conditioning":
        """Some of the batch rows."""
        added = {name: value[rows] for name, value in self.added.items()}
        return Conditioning(self.embedding[rows], added)

    @staticmethod
    def cat(parts: Sequence["Conditioning"]) -> "Conditioning":
        """Batches one behind the other."""
        return Conditioning(
            torch.cat([part.embedding for part in parts]),
            {name: torch.cat([part.added[name] for part in parts]) for name in parts[0].added},
        )


def _ddim(config: Any) -> Any:
    """The model's own scheduler as DDIM. Where its class knows no clipping of samples, there is
    none: DDIM's default would clip latents to [-1, 1]."""
    return DDIMScheduler.from_config({"clip_sample": False, "set_alpha_to_one": False, **config})


def settle_precision() -> None:
    """Switches TF32 and half-precision sums off and cuDNN's deterministic mode on, for the whole
    process."""
    # TF32 has 10 bits of mantissa; what is float32 here, scores above all, is to be float32.
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    # Whether a product is summed in parts depends on the number of rows.
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    torch.backends.cudnn.deterministic = True


@contextlib.contextmanager
def reproducible_gradient() -> Iterator[None]:
    """With gradients, and with the attention whose gradient is summed in the same order on every
    run."""
    with sdpa_kernel(SDPBackend.MATH), torch.enable_grad():
        yield


def settle_layout(unet: Any) -> bool:
    """Lets a U-Net in half precision on a GPU work with channels last and fused kernels
    (``utils.fused``), where Triton is there to compile them: a pass takes two thirds of the time.
    Channels last alone would be slower than channels first, since diffusers' modules copy it.
    Returns whether it does."""
    if unet.device.type != "cuda" or unet.dtype == torch.float32:
        return False
    try:
        from utils.fused import fuse

        fuse(unet)
    # No Triton, no C compiler for it, a GPU too old for it, a folder it may not write to ...
    except Exception as error:
        reason = str(error).partition("\n")[0]
        logging.warning("no fused kernels here, passes of the U-Net take longer: %s", reason)
        return False
    return True


def load_model(source: Source, *, device: str, dtype: str, steps: int | None = None) -> Model:
    """Loads a model from its folder, the hub's cache or the hub; safetensors only.

    Settles the precision of the whole process (``settle_precision``). Raises InputError if the
    model cannot be loaded, is not a U-Net pipeline, predicts something other than noise or
    velocity, or has no timesteps for ``steps``.
    """
    diffusers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    where = str(source.folder or source.id)
    weights = DTYPES[dtype]
    settle_precision()
    try:
        with warnings.catch_warnings():  # of an argument that diffusers gives the hub still
            warnings.filterwarnings("ignore", message=".*local_dir_use_symlinks")
            index, commit = DiffusionPipeline.load_config(
                where, revision=source.revision, return_commit_hash=True
            )
        check_pipeline_class(index, where=where)
        unchecked = {"safety_checker": None} if "safety_checker" in index else {}
        pipeline = DiffusionPipeline.from_pretrained(
            where,
            revision=commit or source.revision,  # the branch may move on meanwhile
            use_safetensors=True,
            variant=source.variant,
            dtype={
                "default": weights,
                "unet": torch.float32,
                "text_encoder": torch.float32,
                "text_encoder_2": torch.float32,
            },
            **unchecked,
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        # transformers says so of weights of other shapes than the configuration's
        misfit = isinstance(error, RuntimeError) and "ignore_mismatched_sizes" in str(error)
        if isinstance(error, InputError) or (isinstance(error, RuntimeError) and not misfit):
            raise
        reason = " ".join(str(error).split())[:300]
        raise InputError(
            f"--version {source.name}: cannot load {where}: {reason}; "
            "check the name, the network or the folder"
        ) from error
    _check_complete(pipeline, source, commit, where)
    if pipeline.unet.config.sample_size is None:
        raise InputError(f"{where}: unet/config.json sets no sample_size (of a latent); restore it")
    scheduler = _ddim(pipeline.scheduler.config)
    prediction = scheduler.config.prediction_type
    if prediction not in PREDICTION_TYPES:
        raise InputError(
            f"{where}: prediction type '{prediction}' gives no noise difference; "
            f"supported are {', '.join(PREDICTION_TYPES)}"
        )
    if steps is not None:
        check_steps(steps, scheduler.config, where=where)
    for name in TOKENIZERS:
        tokenizer = getattr(pipeline, name, None)
        encoder = getattr(pipeline, name.replace("tokenizer", "text_encoder"), None)
        # Where the tokenizer's files do not say a length, it is astronomical.
        if not (tokenizer and encoder):
            continue
        if tokenizer.model_max_length > encoder.config.max_position_embeddings:
            raise InputError(
                f"{where}: {name}/tokenizer_config.json sets no model_max_length that the text "
                "encoder can read; restore it"
            )
    pipeline.set_progress_bar_config(disable=True)
    layers = find_value_layers(pipeline.unet, source.stages)
    # Values are read in the weights' full precision: copied before the U-Net is cast.
    reader = ValueReader(layers, copies=weights != torch.float32)
    pipeline.unet.to(weights)
    pipeline.to(device)
    fused = settle_layout(pipeline.unet)
    reader.to(device)
    for part in pipeline.components.values():
        if isinstance(part, torch.nn.Module):
            part.eval().requires_grad_(False)
    return Model(
        pipeline,
        source,
        torch.device(device),
        weights,
        scheduler,
        layers,
        reader,
        commit=commit,
        fused=fused,
    )


def _folder_of(part: str, source: Source, commit: str | None) -> Path:
    """Where the files of a part of a loaded model lie: of a hub model in the cache."""
    if source.folder is not None:
        return source.folder / part
    revision = commit or source.revision
    found = try_to_load_from_cache(source.id, f"{part}/config.json", revision=revision)
    assert isinstance(found, str)  # it was loaded from there
    return Path(found).parent


def _check_complete(pipeline: Any, source: Source, commit: str | None, where: str) -> None:
    """InputError for a weight that is in no file: diffusers leaves it empty, and transformers would
    draw it at random without a word."""
    for name, part in pipeline.components.items():
        if not isinstance(part, torch.nn.Module):
            continue
        missing = [weight for weight, value in part.named_parameters() if value.is_meta]
        if name.startswith("text_encoder"):
            folder = _folder_of(name, source, commit)
            # A class may put this before its names, or may not, whatever the file does.
            stored = {key.removeprefix("text_model.") for key in stored_names(folder)}
            names = [weight for weight, _ in part.named_parameters()]
            missing += [n for n in names if n.removeprefix("text_model.") not in stored]
        if missing:
            raise InputError(
                f"{where}: the weights of {name} lack {missing[0]}; restore the model's files"
            )


def _time_ids(model: Model, pooled: torch.Tensor) -> torch.Tensor:
    """SDXL's size conditioning for an uncropped image of the model's own size, (1, 6)."""
    _, height, width = model.latent_shape
    scale = model.pipeline.vae_scale_factor
    size = (height * scale, width * scale)
    ids = model.pipeline._get_add_time_ids(
        size, (0, 0), size, dtype=pooled.dtype, text_encoder_projection_dim=pooled.shape[-1]
    )
    return ids.to(model.device)


@torch.no_grad()
def _encode(model: Model, caption: str, *, unconditional: bool) -> Conditioning:
    encoded = model.pipeline.encode_prompt(
        caption,
        device=model.device,
        num_images_per_prompt=1,
        do_classifier_free_guidance=unconditional,
    )
    chosen = 1 if unconditional else 0
    if len(encoded) == 2:
        return Conditioning(encoded[chosen], {})
    pooled = encoded[2 + chosen]
    return Conditioning(
        encoded[chosen], {"text_embeds": pooled, "time_ids": _time_ids(model, pooled)}
    )


def encode_prompt(model: Model, caption: str) -> Conditioning:
    """The caption exactly as given, padded and truncated to the tokenizer's length (B = 1)."""
    return _encode(model, caption, unconditional=False)


def encode_unconditional(model: Model) -> Conditioning:
    """What the diffusers pipeline uses for the unconditional half (the empty caption; zeros for an
    SDXL that asks for them), B = 1."""
    return _encode(model, "", unconditional=True)


def initial_noise(model: Model, rows: int, seed: int) -> torch.Tensor:
    """The ``rows`` initial noises of a prompt, (rows, C, H, W), float32, on the device.

    Drawn as one tensor from one CPU generator: the same numbers on every machine. The seed is set
    anew at every call: every prompt has the same noises.
    """
    generator = torch.Generator("cpu").manual_seed(seed)
    noise = torch.randn((rows, *model.latent_shape), generator=generator)
    return noise.to(model.device)


def starting_latents(model: Model, noise: torch.Tensor) -> torch.Tensor:
    """Initial noises as sampling begins with them, in the model's dtype."""
    latents: torch.Tensor = noise.to(model.dtype) * model.scheduler.init_noise_sigma
    return latents


def unet_output(
    model: Model, latents: torch.Tensor, timestep: torch.Tensor, conditioning: Conditioning
) -> torch.Tensor:
    """One U-Net pass: (B, C, H, W) latents -> raw prediction in the model's dtype (noise or
    velocity). The weights ask for no gradient; an embedding that does gets one."""
    added = {name: value.to(model.dtype) for name, value in conditioning.added.items()}
    return model.unet(
        latents.to(model.dtype),
        timestep,
        # Rows of their own, which a repeated prompt has not: the same kernel multiplies either.
        encoder_hidden_states=conditioning.embedding.to(model.dtype).contiguous(),
        added_cond_kwargs=added or None,
        return_dict=False,
    )[0]


def to_noise_prediction(
    model: Model, output: torch.Tensor, latents: torch.Tensor, timestep: torch.Tensor
) -> torch.Tensor:
    """Raw prediction at ``latents`` -> predicted noise, float32. ``timestep``: one for all rows, or
    one of each, (B,). The one place where velocity becomes noise:
    eps = sqrt(abar_t) v + sqrt(1 - abar_t) x."""
    output = output.float()
    if model.scheduler.config.prediction_type == "epsilon":
        return output
    # float64 on the CPU, which rounds once; (1 or B, 1, 1, 1) on the device.
    alpha_bar = model.scheduler.alphas_cumprod[timestep.cpu()].double().reshape(-1, 1, 1, 1)
    signal, noise = (share.sqrt().float().to(output.device) for share in (alpha_bar, 1 - alpha_bar))
    return signal * output + noise * latents.float()


@dataclass(frozen=True)
class Step:
    """One step of guided sampling, before the latents advance: B latents x_t (B, C, H, W) and the
    raw predictions of the two halves for them, all in the model's dtype."""

    timestep: torch.Tensor
    latents: torch.Tensor
    without: torch.Tensor
    with_text: torch.Tensor


# The guidance scale of a step: one number, or one of each latent, (B, 1, 1, 1) in the step's dtype.
Schedule = Callable[[Step], float | torch.Tensor]


@torch.no_grad()
def sample_latents(
    model: Model,
    conditioning: Conditioning,
    unconditional: Conditioning,
    noise: torch.Tensor,
    *,
    steps: int,
    guidance_scale: float,
    observe: Callable[[Step], None] = lambda step: None,
    schedule: Schedule | None = None,
    only: int | None = None,
) -> torch.Tensor:
    """DDIM (eta 0) from ``noise`` (B, C, H, W) to clean latents, guided by
    eps_u + w (eps_c - eps_u); no unconditional rows are computed for w = 1.

    Batch rows are [unconditional; conditional], so a mask of B rows fits both halves. ``observe``
    hears each step of guided sampling; ``schedule`` says each step's w, where it is not the same
    all along. With ``only``, that many steps are made and the latents are still noisy.
    """
    scheduler = _ddim(model.scheduler.config)
    scheduler.set_timesteps(steps)  # on the CPU, where the scheduler looks its factors up
    latents = starting_latents(model, noise)
    rows = latents.shape[0]
    guided = guidance_scale != 1.0
    if guided:
        conditioning = Conditioning.cat([unconditional.repeat(rows), conditioning])
    for timestep in scheduler.timesteps[:only]:
        batch = torch.cat([latents, latents]) if guided else latents
        output = unet_output(
            model, scheduler.scale_model_input(batch, timestep), timestep, conditioning
        )
        if guided:
            without, with_text = output.chunk(2)
            step = Step(timestep, latents, without, with_text)
            observe(step)
            scale = guidance_scale if schedule is None else schedule(step)
            output = without + scale * (with_text - without)
        latents = scheduler.step(output, timestep, latents, return_dict=False)[0]
    return latents


@contextlib.contextmanager
def _upcast_where_needed(model: Model) -> Iterator[None]:
    """An SDXL VAE that overflows in half precision runs in float32, as its own configuration
    asks."""
    vae = model.pipeline.vae
    upcast = (
        model.dtype == torch.float16
        and type(model.pipeline).__name__ == "StableDiffusionXLPipeline"
        and vae.config.force_upcast
    )
    try:
        if upcast:
            vae.to(torch.float32)
        yield
    finally:
        if upcast:
            vae.to(model.dtype)


@torch.no_grad()
def encode(model: Model, pictures: Sequence[Image.Image]) -> torch.Tensor:
    """B pictures of any size -> (B, C, H, W) clean latents of the size the model was made for, in
    the U-Net's dtype: the middle is cut out, as training does, and the latent is the mode of the
    VAE's posterior. One at a time: a latent does not depend on the others."""
    vae = model.pipeline.vae
    factor = model.pipeline.vae_scale_factor
    _, height, width = model.latent_shape
    size = (width * factor, height * factor)
    latents = []
    with _upcast_where_needed(model):
        for picture in pictures:
            fitted = ImageOps.fit(picture.convert("RGB"), size, Image.Resampling.LANCZOS)
            pixels = model.pipeline.image_processor.preprocess(fitted)
            posterior = vae.encode(pixels.to(vae.device, vae.dtype)).latent_dist
            latents.append(posterior.mode() * vae.config.scaling_factor)
    return torch.cat(latents).to(model.dtype)


@torch.no_grad()
def decode(model: Model, latents: torch.Tensor) -> list[Image.Image | None]:
    """(B, C, H, W) clean latents -> B pictures, None for one that is not finite. An SDXL VAE that
    overflows in half precision is decoded in float32, as its own configuration asks."""
    vae = model.pipeline.vae
    with _upcast_where_needed(model):
        scaled = latents.to(vae.dtype) / vae.config.scaling_factor
        images = vae.decode(scaled, return_dict=False)[0]
    finite = torch.isfinite(images).flatten(1).all(dim=1).tolist()
    pictures = model.pipeline.image_processor.postprocess(images.nan_to_num(), output_type="pil")
    return [picture if good else None for picture, good in zip(pictures, finite, strict=True)]
