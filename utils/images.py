"""Image files of a generation run: names, atomic JPEG writing, and which batches are left.

Public: ``image_name``, ``save_jpeg``, ``batches_left``,
``pixel_correlation``.
"""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

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


def batches_left(
    rows: Sequence[int], samples: int, batch_size: int, folder: Path
) -> list[list[tuple[int, int]]]:
    """Batches of (row, sample) that still miss an image in ``folder``.

    The partition does not depend on what is there: an interrupted batch is computed whole again, so
    that a resumed run ends with the same bytes.
    """
    jobs = [(row, sample) for row in rows for sample in range(samples)]
    batches = [jobs[start : start + batch_size] for start in range(0, len(jobs), batch_size)]
    return [
        batch for batch in batches if not all((folder / image_name(*job)).exists() for job in batch)
    ]


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
