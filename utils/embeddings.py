"""From image folders to embeddings: one vector a picture, cached beside the folder.

A picture is embedded once for each network and preprocessing, whatever its name and however many
metrics ask for it. Several processes (``utils.team``) share the batches and end with one cache.
torch is imported where a network is loaded, so that scripts can list and check folders before they
pay for it.
Public: ``numbered_images``, ``reference_images``, ``all_images``, ``Space``, ``Network``,
``SSCD_PROTOCOLS``, ``sscd_space``, ``clip_space``, ``feature_space``, ``inception_space``,
``Embedder``, ``Embedded``.
"""

import hashlib
import importlib.util
import json
import logging
import os
import re
import time
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from utils.errors import InputError, out_of_memory
from utils.files import replacing, sha256_of_file
from utils.team import Team, processes_here

if TYPE_CHECKING:
    import numpy as np
    import torch
    from PIL.Image import Image

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")
_NUMBERED = re.compile(r"img_(\d{4,})_(\d{2,})")
_REFERENCE = re.compile(r"(\d{4,})_.+")
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
SSCD_FOLDER = Path()  # where prompts/download.py puts the networks
SAVE_EVERY = 60.0  # seconds of work that a killed run may lose
OF_THE_DEVICE = ("CUDA", "CUBLAS", "CUDNN")  # in errors that are not the network's


# Folders.


def all_images(folder: Path) -> list[Path]:
    """Every picture of a folder and the folders in it, by name. InputError if there is none."""
    if not folder.is_dir():
        raise InputError(f"{folder}: no such image folder; check the path")
    found = sorted(p for p in folder.rglob("*") if p.suffix.lower() in EXTENSIONS and p.is_file())
    if not found:
        raise InputError(f"{folder}: no picture in it ({', '.join(EXTENSIONS)}); check the path")
    return found


def numbered_images(folder: Path) -> dict[int, dict[int, Path]]:
    """Row -> sample -> picture of a generation run, read from the names that
    ``images.image_name`` gives. InputError for no such picture, or two of one row and sample."""
    found: dict[int, dict[int, Path]] = {}
    for path in all_images(folder):
        match = _NUMBERED.fullmatch(path.stem)
        if match is None or path.parent != folder:
            continue
        samples = found.setdefault(int(match[1]), {})
        if int(match[2]) in samples:
            raise InputError(
                f"{path}: {samples[int(match[2])].name} is the same row and sample; keep one"
            )
        samples[int(match[2])] = path
    if not found:
        raise InputError(f"{folder}: no picture named like img_0001_00.jpg; rename the pictures")
    return found


def reference_images(folder: Path) -> dict[int, list[Path]]:
    """Row -> its reference pictures, by name: ``0001_first_image.jpg`` or ``img_0001_00.jpg``, any
    number a row. InputError if no picture is named so."""
    found: dict[int, list[Path]] = {}
    for path in all_images(folder):
        match = _NUMBERED.fullmatch(path.stem) or _REFERENCE.fullmatch(path.stem)
        if match is not None and path.parent == folder:
            found.setdefault(int(match[1]), []).append(path)
    if not found:
        raise InputError(
            f"{folder}: no picture named like 0001_first_image.jpg or img_0001_00.jpg; "
            "rename the pictures by the row of their prompt"
        )
    return found


# Spaces: a network, and how a picture becomes its input.


@dataclass(frozen=True)
class Network:
    """A loaded network. ``transform``: picture -> (3, H, W) float32, run in decoding workers;
    ``encode``: (B, 3, H, W) on the device -> (B, d); ``encode_text``: B captions -> (B, d)."""

    transform: "Callable[[Image], torch.Tensor]"
    encode: "Callable[[torch.Tensor], torch.Tensor]"
    encode_text: "Callable[[list[str]], torch.Tensor] | None" = None


@dataclass(frozen=True)
class Space:
    """Where embeddings live. ``model`` says which weights (a sha256, or the name and tag of
    published ones), ``preprocessing`` what is done to a picture: together they are the identity of
    a cached embedding. ``load(device)`` gives the network, in evaluation mode, float32."""

    name: str
    model: Mapping[str, str]
    preprocessing: str
    load: Callable[[str], Network]

    def key(self, device: str) -> str:
        """Hex digest of model, preprocessing and the kind of ``device``: another kind rounds
        otherwise."""
        kind = device.partition(":")[0]
        made = (sorted(self.model.items()), self.preprocessing, *([] if kind == "cpu" else [kind]))
        return hashlib.sha256(repr(made).encode()).hexdigest()


@dataclass(frozen=True)
class SSCDProtocol:
    """How a paper measures copies with SSCD. Numbers of different protocols are not comparable."""

    weights: str  # file name of the published TorchScript
    resize: int | tuple[int, int]  # shorter side, or height and width (aspect not kept)
    crop: int | None
    mean: tuple[float, ...]
    std: tuple[float, ...]
    statistics: tuple[str, ...]  # what it reports of a prompt's scores against training images


SSCD_PROTOCOLS = {
    "nemo": SSCDProtocol(
        "sscd_disc_mixup.torchscript.pt", (320, 320), None, *IMAGENET, ("Max", "Median")
    ),
    "wen": SSCDProtocol(
        "sscd_disc_large.torchscript.pt", 256, 224, (0.5,) * 3, (0.5,) * 3, ("Max", "Median")
    ),
    "membench": SSCDProtocol(
        "sscd_disc_large.torchscript.pt",
        (288, 288),
        None,
        *IMAGENET,
        ("Max", "Top-3 Mean", "Share Above 0.5"),
    ),
}


def _torchscript(path: Path, *, flag: str, get: str) -> Mapping[str, str]:
    """Identity of a TorchScript file. InputError if it is missing or of another kind; ``get`` says
    how to come by it."""
    if not path.is_file():
        raise InputError(f"{path}: no such weights; {get} or name a TorchScript file with {flag}")
    if not zipfile.is_zipfile(path):
        raise InputError(f"{path}: not a TorchScript file, or cut off; {get} or mend {flag}")
    return {"file": path.name, "sha256": sha256_of_file(path)}


def _load_torchscript(path: Path, device: str) -> Any:
    import torch

    _exact_float32()
    try:
        return torch.jit.load(str(path), map_location=device).eval()
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[0][:200]
        raise InputError(f"{path}: not a TorchScript file ({reason}); remake it") from None


def _exact_float32() -> None:
    """TF32 has 10 bits of mantissa: embeddings would depend on the device."""
    import torch

    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False


def sscd_space(protocol: str, weights: Path) -> Space:
    """SSCD in one of ``SSCD_PROTOCOLS`` (bilinear resizing, as all three papers do)."""
    setting = SSCD_PROTOCOLS[protocol]

    def load(device: str) -> Network:
        from torchvision import transforms

        size = setting.resize if isinstance(setting.resize, int) else list(setting.resize)
        steps: list[Any] = [transforms.Resize(size)]
        if setting.crop is not None:
            steps.append(transforms.CenterCrop(setting.crop))
        steps += [
            transforms.ToTensor(),
            transforms.Normalize(list(setting.mean), list(setting.std)),
        ]
        return Network(transforms.Compose(steps), _load_torchscript(weights, device))

    steps = f"resize {setting.resize}, crop {setting.crop}, mean {setting.mean}, std {setting.std}"
    model = _torchscript(
        weights, flag="--sscd_weights", get="get them with: python prompts/download.py sscd,"
    )
    return Space(f"sscd {protocol}", model, steps, load)


def clip_space(model: str, pretrained: str) -> Space:
    """An image-text model of open_clip: a built-in name with a pretrained tag or a weights file, or
    a local folder with ``open_clip_config.json`` and weights. InputError if there is none such.

    The published tag ``openai`` needs the QuickGELU activation, which the built-in ``ViT-B-32``
    does not have and open_clip only warns about: the tag decides here. A weights file says nothing
    of it: there the name decides, and a warning says so.
    """
    folder = Path(model)
    if folder.is_dir():
        if not (folder / "open_clip_config.json").is_file():
            raise InputError(f"{folder}: no open_clip_config.json; name an open_clip folder")
        if not any(p.suffix in (".safetensors", ".bin", ".pth") for p in folder.iterdir()):
            # open_clip would go on with random weights.
            raise InputError(f"{folder}: no weights (.safetensors, .bin, .pth); add them")
        digest = hashlib.sha256()
        for path in sorted(p for p in folder.iterdir() if p.is_file() and p.name[0] != "."):
            digest.update(f"{path.name} {sha256_of_file(path)}\n".encode())
        identity = {"folder": folder.name, "sha256": digest.hexdigest()}
        name, tag = f"local-dir:{folder.resolve()}", None
    else:
        package = importlib.util.find_spec("open_clip")
        assert package is not None and package.submodule_search_locations is not None
        configs = Path(package.submodule_search_locations[0]) / "model_configs"
        name, tag = model.replace("/", "-"), pretrained  # ViT-B/32 in the papers
        if not (configs / f"{name}.json").is_file():
            raise InputError(f"--clip_model {model}: neither an open_clip model nor such a folder")
        identity = {"name": name, "pretrained": pretrained}
        if Path(pretrained).is_file():
            identity["sha256"] = sha256_of_file(Path(pretrained))
            if (configs / f"{name}-quickgelu.json").is_file():
                logging.warning(
                    "--clip_pretrained %s: a file does not say its activation, %s is GELU; for "
                    "OpenAI's weights name --clip_model %s-quickgelu",
                    *(pretrained, name, name),
                )

    def load(device: str) -> Network:
        import open_clip
        import torch

        _exact_float32()
        published = open_clip.get_pretrained_cfg(name, tag) if tag else {}
        quick_gelu = published.get("quick_gelu", False)
        # open_clip logs as an error what is reported below, in one line.
        logged, logging.root.disabled = logging.root.disabled, True
        try:
            network, _, transform = open_clip.create_model_and_transforms(
                name, pretrained=tag, device=device, force_quick_gelu=quick_gelu
            )
            tokenizer = open_clip.get_tokenizer(name)
        except (OSError, RuntimeError, ValueError) as error:
            reason = " ".join(str(error).split())[:120]
            raise InputError(
                f"--clip_model {model}: cannot load it ({reason}); check the network or name a "
                "local open_clip folder"
            ) from None
        finally:
            logging.root.disabled = logged
        network.eval()

        def encode_text(captions: list[str]) -> torch.Tensor:
            return network.encode_text(tokenizer(captions).to(device))

        return Network(transform, network.encode_image, encode_text)

    shown = folder.name if tag is None else name
    return Space(f"clip {shown}", identity, "open_clip's own", load)


class _CleanResize:
    """clean-fid's input for a feature extractor: (3, 299, 299) float32 in [0, 255], resized by its
    mode "clean"."""

    def __init__(self) -> None:
        from cleanfid.resize import build_resizer

        self._build = build_resizer
        self._resize: Any = None  # a closure, which no worker process could be sent

    def __call__(self, image: "Image") -> "torch.Tensor":
        import numpy as np
        import torch

        if self._resize is None:
            self._resize = self._build("clean")
        resized = self._resize(np.array(image))  # (299, 299, 3)
        return torch.from_numpy(np.ascontiguousarray(resized.transpose(2, 0, 1)))

    def __getstate__(self) -> dict[str, Any]:
        return {"_build": self._build, "_resize": None}


CLEAN_FID = "clean-fid clean 299x299"


def feature_space(weights: Path) -> Space:
    """A TorchScript feature extractor behind clean-fid's resizing: (B, 3, 299, 299) float32 in
    [0, 255] -> (B, d), the contract of clean-fid's ``custom_feat_extractor``."""
    model = _torchscript(weights, flag="--feature_model", get="check the path")

    def load(device: str) -> Network:
        return Network(_CleanResize(), _load_torchscript(weights, device))

    return Space("features", model, CLEAN_FID, load)


def inception_space() -> Space:
    """clean-fid's Inception, which it fetches when it is first loaded."""

    def load(device: str) -> Network:
        import torch
        from cleanfid.features import build_feature_extractor

        _exact_float32()
        try:
            network = build_feature_extractor("clean", torch.device(device), use_dataparallel=False)
        except (OSError, RuntimeError) as error:  # no network; a download that was cut off
            reason = str(error).strip().splitlines()[0][:200]
            raise InputError(
                f"clean-fid's Inception cannot be had ({reason}); check the network, remove "
                "/tmp/inception-2015-12-05.pt if it is cut off, or name a TorchScript feature "
                "extractor with --feature_model"
            ) from None
        return Network(_CleanResize(), network)

    return Space("inception", {"name": "inception-2015-12-05"}, CLEAN_FID, load)


# Embedding.

_Batch = tuple[list[str], "torch.Tensor"]  # sha256 of what was embedded, (B, d)


@dataclass(frozen=True)
class Embedded:
    """Embeddings of a folder. ``vectors``: picture -> (d,) float32; ``corrupt``: picture -> why it
    has none (it does not decode, or its embedding is zero or not finite)."""

    vectors: "dict[Path, np.ndarray]"
    corrupt: dict[Path, str]


class Embedder:
    """Embeds pictures and captions in one space. The network is loaded when something is not in the
    cache, at most once; ``computed`` counts what went through it in this process.

    Of a team, each process embeds some of the batches and all of them get all vectors, if all ask
    for the same in the same order.
    """

    def __init__(
        self,
        space: Space,
        *,
        device: str,
        batch_size: int,
        workers: int,
        team: Team | None = None,
    ) -> None:
        self.space = space
        self.computed = 0
        self._batch_size, self._workers = batch_size, workers
        self._team = team or Team()
        self._device = self._team.device(device)
        self._network: Network | None = None

    @property
    def network(self) -> Network:
        """The network, loaded on first use."""
        if self._network is None:
            self._team.say(f"Loading {self.space.name} ...")
            self._network = self.space.load(self._device)
        return self._network

    def images(self, hashes: Mapping[Path, str], folder: Path) -> Embedded:
        """Embeds pictures (path -> sha256 of its bytes); the cache lies beside ``folder``.

        Pictures of equal bytes are computed once. Raises InputError if the network cannot take
        what the preprocessing makes.
        """
        paths = {sha256: path for path, sha256 in hashes.items()}
        reasons: dict[str, str] = {}

        def embed(batches: Iterator[list[str]], left: int) -> "Iterator[_Batch]":
            return self._decoded(paths, batches, left, reasons)

        title = f"{self.space.name}: {folder.name}"
        found = self._embedded(list(paths), folder, "images", embed, reasons, title=title)
        corrupt = {path: reasons[sha] for path, sha in hashes.items() if sha in reasons}
        vectors = {path: found[sha] for path, sha in hashes.items() if sha not in reasons}
        bad = [path for path, vector in vectors.items() if not _usable(vector)]
        corrupt.update(dict.fromkeys(bad, "its embedding is zero or not finite"))
        for path in bad:
            del vectors[path]
        return Embedded(vectors, corrupt)

    def texts(self, captions: Iterable[str], folder: Path) -> "dict[str, np.ndarray]":
        """Caption -> (d,) float32, cached beside ``folder``. Captions whose embedding is zero or
        not finite are named and left out."""
        hashes = {caption: hashlib.sha256(caption.encode()).hexdigest() for caption in captions}
        texts = {sha256: caption for caption, sha256 in hashes.items()}

        def embed(batches: Iterator[list[str]], left: int) -> "Iterator[_Batch]":
            for keys in batches:
                assert self.network.encode_text is not None
                yield keys, self.network.encode_text([texts[key] for key in keys])

        title = f"{self.space.name}: captions"
        found = self._embedded(list(texts), folder, "captions", embed, {}, title=title)
        vectors = {caption: found[sha256] for caption, sha256 in hashes.items()}
        bad = [caption for caption, vector in vectors.items() if not _usable(vector)]
        if bad and self._team.first:
            logging.warning("%s left out, whose embedding is zero or not finite: %s", title, bad)
        for caption in bad:
            del vectors[caption]
        return vectors

    def _decoded(
        self,
        paths: Mapping[str, Path],
        batches: Iterator[list[str]],
        left: int,
        reasons: dict[str, str],
    ) -> "Iterator[_Batch]":
        """Decodes in worker processes and encodes; what does not decode goes to ``reasons``."""
        from torch.utils.data import DataLoader

        # Starting processes takes longer than decoding a few pictures.
        workers = self._workers if left > 2 * self._batch_size else 0
        loader: Any = DataLoader(
            _Pictures(paths, self.network.transform),  # type: ignore[arg-type]
            batch_sampler=batches,
            num_workers=workers,
            prefetch_factor=1 if workers else None,  # of a team, what one takes no other gets
            collate_fn=_collate,
        )
        for keys, batch, failed in loader:
            reasons.update(failed)
            if keys:
                try:
                    yield keys, self.network.encode(batch.to(self._device))
                except RuntimeError as error:
                    if out_of_memory(error) or any(sign in str(error) for sign in OF_THE_DEVICE):
                        raise
                    reason = " ".join(str(error).split())[-200:]
                    raise InputError(
                        f"{self.space.name}: the network does not take pictures of "
                        f"{tuple(batch.shape[1:])}: {reason}; name other weights"
                    ) from None

    def _embedded(
        self,
        keys: list[str],
        folder: Path,
        what: str,
        embed: "Callable[[Iterator[list[str]], int], Iterator[_Batch]]",
        reasons: dict[str, str],
        *,
        title: str,
    ) -> "dict[str, np.ndarray]":
        """sha256 -> vector of all ``keys`` but those that get a reason. ``embed`` makes vectors of
        batches of keys, of so many in all. What is made is saved every minute and at the end."""
        team = self._team.section()
        cache = _Cache(folder, self.space, self._device, what, team)
        # Batches are cut before it is looked up what is known: a continued run, or several
        # processes, make each vector in the same company as one undisturbed process.
        batches = [
            [key for key in keys[start : start + self._batch_size] if key not in cache.vectors]
            for start in range(0, len(keys), self._batch_size)
        ]
        batches = [batch for batch in batches if batch]
        left = sum(map(len, batches))
        if not left:
            return cache.vectors
        import torch
        from tqdm import tqdm

        team.once("network", lambda: self.network)  # what loading downloads, one downloads
        _ = self.network  # loaded before the bar begins to count time
        saved = time.monotonic()
        progress = tqdm(
            total=len(keys),
            initial=len(keys) - left,
            desc=title,
            unit="item",
            disable=not team.first,
        )
        mine = (batches[unit] for unit in team.deal(len(batches)))
        try:
            with progress, torch.no_grad():
                for done, vectors in embed(mine, left):
                    arrays = vectors.float().cpu().numpy().reshape(len(done), -1)
                    cache.add(done, arrays)
                    self.computed += len(done)
                    progress.update(len(done))
                    if time.monotonic() - saved > SAVE_EVERY:
                        cache.save()
                        saved = time.monotonic()
        finally:
            cache.save()
        for theirs in team.gather("reasons", json.dumps(reasons)):
            reasons.update(json.loads(theirs))
        cache.share()
        if missing := [key for key in keys if key not in cache.vectors and key not in reasons]:
            raise InputError(
                f"{cache.folder}: {len(missing)} embeddings of the other processes are not in it; "
                "make it writable for all of them, or start one process"
            )
        return cache.vectors


def _usable(vector: "np.ndarray") -> bool:
    import numpy as np

    return bool(np.isfinite(vector).all() and vector.any())


class _Pictures:
    """A data set for torch's DataLoader: sha256 -> (sha256, input or None, what was wrong)."""

    def __init__(
        self, paths: Mapping[str, Path], transform: "Callable[[Image], torch.Tensor]"
    ) -> None:
        self._paths, self._transform = paths, transform

    def __getitem__(self, sha256: str) -> "tuple[str, torch.Tensor | None, str]":
        from PIL import Image

        try:
            with Image.open(self._paths[sha256]) as file:
                picture = file.convert("RGB")
        except Exception as error:  # decoders raise anything from SyntaxError to struct.error
            return sha256, None, f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        return sha256, self._transform(picture), ""


def _collate(
    items: "list[tuple[str, torch.Tensor | None, str]]",
) -> "tuple[list[str], torch.Tensor, dict[str, str]]":
    import torch

    good = [(sha256, picture) for sha256, picture, _ in items if picture is not None]
    failed = {sha256: reason for sha256, picture, reason in items if picture is None}
    batch = torch.stack([picture for _, picture in good]) if good else torch.empty(0)
    return [sha256 for sha256, _ in good], batch, failed


class _Cache:
    """Embeddings of one space, computed on one kind of device, by the sha256 of what was embedded,
    in ``<folder>.embeddings/``.

    A file that cannot be read is made anew; where the place cannot be written to, nothing is kept
    and a warning says so. Each process of a team saves what it adds in a part file beside it; the
    first one puts the parts into the file, when it opens it (parts of a run that died) and when all
    ``share``.
    """

    def __init__(self, folder: Path, space: Space, device: str, what: str, team: Team) -> None:
        place = folder.resolve()
        self._key = space.key(device)
        name = f"{re.sub(r'[^0-9A-Za-z]+', '_', space.name)}_{what}_{self._key[:16]}.safetensors"
        self.folder = place.with_name(f"{place.name}.embeddings")
        self._path = self.folder / name
        self._team = team
        self.vectors: dict[str, np.ndarray] = {}
        self._mine: dict[str, np.ndarray] = {}  # added here
        self._saved = 0  # of them
        self._collect("opened")

    def add(self, keys: Sequence[str], vectors: "np.ndarray") -> None:
        """Adds embeddings, (keys, d) float32."""
        self._mine.update(zip(keys, vectors, strict=True))
        self.vectors.update(zip(keys, vectors, strict=True))

    def save(self) -> None:
        """Writes what was added here, if anything was."""
        if len(self._mine) == self._saved:
            return
        if self._team.size == 1:
            self._write(self._path, self.vectors)
        else:
            self._write(self._part(self._team.rank), self._mine)
        self._saved = len(self._mine)

    def share(self) -> None:
        """Puts what all processes have saved into the file; every one has all of it afterwards."""
        if self._team.size > 1:
            self._collect("shared")

    def _collect(self, moment: str) -> None:
        """Reads the file, after the first process has put all parts into it."""

        def gather() -> str:
            self.vectors.update(self._read(self._path))
            parts = sorted(self.folder.glob(f"{self._path.name}.part-*"))
            for part in parts:
                self.vectors.update(self._read(part))
            if parts and self._write(self._path, self.vectors):
                for part in parts:
                    part.unlink()
            return ""

        self._team.agree(moment, gather)
        if not self._team.first:
            self.vectors.update(self._read(self._path))

    def _part(self, rank: int) -> Path:
        return self._path.with_name(f"{self._path.name}.part-{rank}")

    def _read(self, path: Path) -> "dict[str, np.ndarray]":
        if not path.is_file():
            return {}
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="numpy") as file:
                if (file.metadata() or {}).get("space") != self._key:
                    return {}
                digests, vectors = file.get_tensor("sha256"), file.get_tensor("vectors")
        except (SafetensorError, OSError) as error:
            logging.warning("%s: cannot be read (%s), made anew", path, error)
            return {}
        return {bytes(digest).hex(): row for digest, row in zip(digests, vectors, strict=True)}

    def _write(self, path: Path, found: "Mapping[str, np.ndarray]") -> bool:
        """Writes a file atomically, the same bytes in whatever order its embeddings came; whether
        it could be written."""
        import numpy as np
        from safetensors import SafetensorError
        from safetensors.numpy import save_file

        keys = sorted(found)
        tensors: dict[str, Any] = {
            "sha256": np.frombuffer(bytes.fromhex("".join(keys)), np.uint8).reshape(-1, 32),
            "vectors": np.stack([found[key] for key in keys]).astype(np.float32),
        }
        try:
            with replacing(path) as temporary:
                save_file(tensors, temporary, metadata={"space": self._key})
            ignore = self.folder / ".gitignore"
            if not ignore.exists():
                ignore.write_text("*\n")  # what can be made anew is not for version control
        except (OSError, SafetensorError) as error:  # the latter of a full disk
            logging.warning("%s: embeddings are not kept (%s)", self.folder, error)
            return False
        return True


def default_workers() -> int:
    """Decoding processes: one for each processor this process may use, at most eight; the processes
    of a team on this machine share its processors."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return min(8, max(1, (usable or 1) // processes_here()))
