"""Image files of a generation run: names, atomic JPEG writing, batches, and what is missing.

Public: ``image_name``, ``save_jpeg``, ``open_picture``, ``all_batches``, ``missing_images``,
``pixel_correlation``.
"""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from utils.errors import InputError
from utils.files import write_bytes

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image

JPEG_QUALITY = 95


def image_name(row: int, sample: int) -> str:
    """File name of a sample of the prompt in this row; every metric joins on it."""
    return f"img_{row:04d}_{sample:02d}.jpg"


def save_jpeg(image: "Image", path: Path) -> None:
    """Writes a picture atomically."""
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=JPEG_QUALITY)
    write_bytes(path, buffer.getvalue())


def open_picture(path: Path) -> "Image":
    """The whole picture, RGB. InputError for one that is not there, is none, or is damaged."""
    from PIL import Image

    try:
        with Image.open(path) as file:
            return file.convert("RGB")
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; check the path") from None
    except Exception as error:  # decoders raise anything from SyntaxError to struct.error
        reason = " ".join(str(error).split())[:200]
        raise InputError(
            f"{path}: not a picture ({type(error).__name__}: {reason}); restore it, or take it out"
        ) from None


def all_batches(rows: Sequence[int], samples: int, batch_size: int) -> list[list[tuple[int, int]]]:
    """Batches of (row, sample): the same whatever is there already, so that several processes and
    a resumed run agree on them."""
    jobs = [(row, sample) for row in rows for sample in range(samples)]
    return [jobs[start : start + batch_size] for start in range(0, len(jobs), batch_size)]


def missing_images(rows: Sequence[int], samples: int, folder: Path) -> list[str]:
    """Names of the images that are not in ``folder`` (yet)."""
    names = [image_name(row, sample) for row in rows for sample in range(samples)]
    return [name for name in names if not (folder / name).exists()]


def pixel_correlation(
    image: "np.ndarray", reference: "np.ndarray", fixed: "np.ndarray | None" = None
) -> float:
    """Correlation of the pixels of two (H, W, 3) uint8 pictures, over all of them or where
    ``fixed`` (H, W) is True: 1 for a copy, about 0 for unrelated pictures. 0 if either is constant
    there."""
    import numpy as np

    where = np.ones(image.shape[:2], dtype=bool) if fixed is None else fixed
    first, second = (picture[where].astype(np.float64).ravel() for picture in (image, reference))
    first, second = first - first.mean(), second - second.mean()
    length = np.linalg.norm(first) * np.linalg.norm(second)
    return float(first @ second / length) if length > 0 else 0.0
