"""Weights of an edited U-Net on disk: read, compared, written as a pipeline folder or as a diff.

Everything goes from file to file: what an edit leaves alone keeps its bytes. torch is imported
where a tensor is made; identities and diffs are checked without it.
Public: ``Changes``, ``StoredWeights``, ``pipeline_folder``, ``unet_folder``, ``revision_of``,
``unet_files``, ``save_weights``, ``check_diff``, ``read_diff``, ``write_diff``, ``parts_of``,
``write_pipeline``.
"""

import contextlib
import hashlib
import json
import os
import re
import shutil
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from utils.errors import InputError
from utils.files import read_json, replacing, write_bytes
from utils.versions import Source, check_pipeline_class, read_header

if TYPE_CHECKING:
    import torch

Changes = Mapping[str, "torch.Tensor"]  # U-Net tensor -> all of it as it is to be, float

# The weights that from_pretrained reads when no variant is asked for, whole or in shards.
UNET_FILES = "diffusion_pytorch_model"
# Copied from the other parts of a pipeline: no pickles, which loaders of ours never read.
COPIED = (".json", ".txt", ".model", ".safetensors")
CHUNK = 1 << 24
DIFF_FORMAT = "changed rows of a U-Net, 1"
ROWS = ".rows"  # follows a tensor's name in a diff: which of its rows are there


def unet_files(folder: Path) -> list[Path]:
    """The U-Net's safetensors files of a diffusers folder, without those of a variant such as fp16.
    InputError if there is none."""
    found = [
        path
        for path in sorted((folder / "unet").glob(f"{UNET_FILES}*.safetensors"))
        if path.name.count(".") == 1
    ]
    if not found:
        raise InputError(
            f"{folder}: no unet/{UNET_FILES}.safetensors; save the pipeline with save_pretrained"
        )
    return found


def pipeline_folder(source: Source) -> Path:
    """The model's own folder, or that of the hub's cache, fetched where it is not there yet.
    InputError if it cannot be had, or is of a kind that has no value layers."""
    if source.folder is not None:
        return source.folder
    from diffusers import DiffusionPipeline

    try:
        place = DiffusionPipeline.download(
            source.id, revision=source.revision, use_safetensors=True
        )
    except (OSError, ValueError) as error:
        raise _unreachable(source, error) from error
    check_pipeline_class(read_json(Path(place) / "model_index.json"), where=source.id)
    return Path(place)


def unet_folder(source: Source) -> Path:
    """As ``pipeline_folder``, of a hub model without what only a whole pipeline needs."""
    if source.folder is not None:
        return source.folder
    from huggingface_hub import snapshot_download

    wanted = ["model_index.json", "unet/*.json", f"unet/{UNET_FILES}*.safetensors"]
    try:
        place = snapshot_download(
            source.id,
            revision=source.revision,
            allow_patterns=wanted,
            ignore_patterns=["*.fp16.*", "*.non_ema.*"],
        )
    except (OSError, ValueError) as error:
        raise _unreachable(source, error) from error
    check_pipeline_class(read_json(Path(place) / "model_index.json"), where=source.id)
    return Path(place)


def revision_of(source: Source, folder: Path) -> str | None:
    """The commit of a hub model: its folder in the cache has that name."""
    return None if source.folder is not None else folder.name


def _unreachable(source: Source, error: Exception) -> InputError:
    reason = " ".join(str(error).split())[:300]
    return InputError(
        f"--version {source.name}: cannot load {source.id}: {reason}; check the name or the network"
    )


class StoredWeights(Mapping[str, "torch.Tensor"]):
    """The tensors of safetensors files, by name, in the precision they are stored in; each is read
    when it is asked for. InputError for a file that is none, or is cut off."""

    def __init__(self, paths: list[Path]) -> None:
        self._places: dict[str, tuple[Path, dict[str, Any], int]] = {}
        for path in paths:
            header, start = read_header(path)
            for name, entry in header.items():
                if name != "__metadata__":
                    self._places[name] = (path, entry, start)

    def __getitem__(self, name: str) -> "torch.Tensor":
        from safetensors import safe_open

        with safe_open(self._places[name][0], framework="pt") as file:
            return file.get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def shape(self, name: str) -> tuple[int, ...]:
        """Without reading the tensor."""
        return tuple(self._places[name][1]["shape"])

    def digest(self) -> str:
        """Sha256 over name, type, shape and bytes of all tensors in the order of their names: the
        same however they are spread over files."""
        digest = hashlib.sha256()
        with contextlib.ExitStack() as stack:
            files: dict[Path, BinaryIO] = {}
            for name in sorted(self):
                path, entry, start = self._places[name]
                if path not in files:
                    files[path] = stack.enter_context(path.open("rb"))
                digest.update(f"{name} {entry['dtype']} {entry['shape']}\n".encode())
                first, end = entry["data_offsets"]
                files[path].seek(start + first)
                for at in range(first, end, CHUNK):
                    digest.update(files[path].read(min(CHUNK, end - at)))
        return digest.hexdigest()


def save_weights(
    tensors: Mapping[str, "torch.Tensor"], path: Path, metadata: Mapping[str, str] | None
) -> None:
    """The same bytes every time: safetensors itself writes metadata in an order of chance.
    InputError where they cannot be written, as on a full disk."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file(dict(tensors), path, metadata=dict(metadata) if metadata else None)
    except SafetensorError as error:
        raise InputError(f"{path.parent}: {error}; mend that, or name another output") from None
    with path.open("r+b") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
        if "__metadata__" in header:
            header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        assert len(text) <= length
        file.seek(8)
        file.write(text.ljust(length))


# Diffs.


def write_diff(
    path: Path, base: StoredWeights, changes: Changes, *, identity: Mapping[str, str]
) -> int:
    """Writes the changed rows alone, in the base's precision, atomically; returns how many.

    Of every tensor T that changed: ``T`` (k, ...), its changed rows, and ``T.rows`` (k,), their
    numbers. ``identity``: what the diff belongs to, beside the base's own digest.
    """
    import torch

    tensors: dict[str, torch.Tensor] = {}
    for name, changed in changes.items():
        stored = base[name]
        new = changed.to(stored.dtype)
        # bits, since 0 equals -0
        before, after = (
            tensor.reshape(len(tensor), -1).contiguous().view(torch.uint8)
            for tensor in (stored, new)
        )
        rows = (before != after).any(dim=1)
        indices = rows.nonzero().flatten()
        if len(indices):
            tensors[name] = new[indices].contiguous()
            tensors[name + ROWS] = indices
    metadata = {"format": DIFF_FORMAT, "base_sha256": base.digest(), **identity}
    with replacing(path) as temporary:
        save_weights(tensors, temporary, metadata)
    return sum(len(tensor) for name, tensor in tensors.items() if name.endswith(ROWS))


def check_diff(path: Path, base: StoredWeights, *, where: str) -> dict[str, str]:
    """What a diff says of itself. InputError if it is none, or of another base than this one."""
    header, _ = read_header(path)
    said = header.get("__metadata__") or {}
    if said.get("format") != DIFF_FORMAT:
        raise InputError(f"{path}: not a diff of 5_edit_model.py; make one with --export=diff")
    here = base.digest()
    if said.get("base_sha256") != here:
        of = " ".join(filter(None, (said.get("base_id"), said.get("base_revision"))))
        raise InputError(
            f"{path}: a diff of {of} (U-Net sha256 {said.get('base_sha256')}), but {where} has "
            f"{here}; name its own base with --version"
        )
    names = {name for name in header if name != "__metadata__"}
    for name in names:
        rest = header[name]["shape"]
        if name.endswith(ROWS):
            whole = name.removesuffix(ROWS)
            fits = whole in names and len(rest) == 1 and header[name]["dtype"] == "I64"
        else:
            fits = name in base and name + ROWS in names and rest[1:] == [*base.shape(name)[1:]]
            fits = fits and rest[:1] == header[name + ROWS]["shape"]
        if not fits:
            raise InputError(f"{path}: tensor '{name}' does not fit the base; make the diff anew")
    return said


def read_diff(path: Path, base: StoredWeights) -> dict[str, "torch.Tensor"]:
    """The changed tensors, whole, of a diff that ``check_diff`` has passed. InputError for rows
    that the base does not have, or that are not finite."""
    import torch

    diff = StoredWeights([path])
    changes = {}
    for name in diff:
        if name.endswith(ROWS):
            continue
        whole, rows, values = base[name].clone(), diff[name + ROWS], diff[name]
        inside = bool(((rows >= 0) & (rows < len(whole))).all())
        if not inside or values.dtype != whole.dtype or not bool(torch.isfinite(values).all()):
            raise InputError(f"{path}: tensor '{name}' does not fit the base; make the diff anew")
        whole[rows] = values
        changes[name] = whole
    return changes


# Pipeline folders.


def write_pipeline(
    folder: Path, output: Path, changes: Changes, *, dtype: str | None, card: str
) -> None:
    """A copy of the pipeline in ``folder`` whose U-Net has the ``changes``, as ``output``: written
    to a temporary folder, then renamed.

    ``dtype``: precision of the U-Net's weights (None: as they are stored; the new ones are rounded
    to it). Only the parts that model_index.json names are copied, and of the U-Net only the files
    that were edited: no other copy of the weights, a variant or a checkpoint, goes along.
    """
    parts = parts_of(folder)
    temporary = output.with_name(f".{output.name}.partial")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        for part in parts:
            if part != "unet":
                _copy(folder / part, temporary / part)
        (temporary / "unet").mkdir()
        for path in sorted((folder / "unet").glob("*.json")):
            _copy_file(path, temporary / "unet" / path.name)
        for path in unet_files(folder):
            _write_edited(path, temporary / "unet" / path.name, changes, dtype)
        for path in (folder / "model_index.json", *sorted(folder.glob("LICENSE*"))):
            _copy_file(path, temporary / path.name)
        write_bytes(temporary / "README.md", card.encode())
        if output.exists():  # of a run that was killed before its record was complete
            shutil.rmtree(output)
        os.replace(temporary, output)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def parts_of(folder: Path) -> list[str]:
    """The folders of a pipeline that its model_index.json names. InputError for a name that leads
    elsewhere: a stranger's index must not say what is copied from where to where."""
    found = []
    for part in sorted(read_json(folder / "model_index.json")):
        if not re.fullmatch(r"\w+", part):
            raise InputError(
                f"{folder}/model_index.json: '{part}' is no name of a part; restore it"
            )
        if (folder / part).is_dir():
            found.append(part)
    return found


def _copy(source: Path, target: Path) -> None:
    files = [path for path in sorted(source.rglob("*")) if path.is_file()]
    endings = {path.suffix for path in files}
    if ".bin" in endings and ".safetensors" not in endings:
        raise InputError(f"{source}: weights as a pickle alone; save them as safetensors")
    for path in files:
        if path.suffix in COPIED:
            _copy_file(path, target / path.relative_to(source))


def _copy_file(source: Path, target: Path) -> None:
    """The bytes alone: a hub's cache holds links, and times are nobody's business."""
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)


def _write_edited(source: Path, target: Path, changes: Changes, dtype: str | None) -> None:
    import torch

    stored = StoredWeights([source])
    tensors = {}
    for name in stored:
        tensor = stored[name]
        precision = getattr(torch, dtype) if dtype and tensor.is_floating_point() else tensor.dtype
        tensors[name] = changes.get(name, tensor).to(precision).contiguous()
    header, _ = read_header(source)
    save_weights(tensors, target, header.get("__metadata__"))
