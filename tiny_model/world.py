"""The training set: generic drawings with captions, kept in the work folder once drawn.

Public names: World, make_world, memorized_pictures, sheet.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from tiny_model.captions import MemorizedCaption, generic_caption
from tiny_model.drawings import SCENES, generic_picture, scene_picture, template_picture
from tiny_model.training_loop import check_settings, numpy_rng
from utils.files import write_bytes

GENERIC_PICTURES = 24_000


@dataclass(frozen=True)
class World:
    """Generic drawings (n, 64, 64, 3) uint8 and the caption of each."""

    pictures: np.ndarray
    captions: list[str]


def make_world(work: Path, seed: int) -> World:
    """Draw the generic pictures, or read those that were drawn before. InputError if these were
    drawn from another seed."""
    pictures_file, captions_file = work / "generic_pictures.npy", work / "generic_captions.json"
    wanted = {"seed": seed, "pictures": GENERIC_PICTURES}
    check_settings(work / "world.json", wanted, made=captions_file.name)
    if not captions_file.exists():
        rng = numpy_rng(seed, "world")
        drawings = [generic_picture(rng) for _ in range(GENERIC_PICTURES)]
        captions = [generic_caption(rng, drawing.shape) for drawing in drawings]
        np.save(pictures_file, np.stack([drawing.pixels for drawing in drawings]))
        write_bytes(captions_file, json.dumps(captions).encode())  # last: it says that all is done
    return World(np.load(pictures_file, mmap_mode="r"), json.loads(captions_file.read_text()))


def memorized_pictures(
    caption: MemorizedCaption, rng: np.random.Generator, count: int
) -> np.ndarray:
    """Pictures of a memorized caption, (count or 1, 64, 64, 3): a scene has only the one."""
    if caption.picture in SCENES:
        return scene_picture(caption.picture)[None]
    return np.stack([template_picture(caption.picture, rng) for _ in range(count)])


def sheet(pictures: np.ndarray, columns: int, path: Path) -> None:
    """Write pictures (n, H, W, 3) as one PNG, row by row with a thin gap."""
    rows = -(-len(pictures) // columns)
    blank = np.zeros((rows * columns, *pictures.shape[1:]), dtype=np.uint8)
    blank[: len(pictures)] = pictures
    framed = np.pad(blank, ((0, 0), (1, 1), (1, 1), (0, 0)))
    height, width = framed.shape[1:3]
    grid = framed.reshape(rows, columns, height, width, 3).swapaxes(1, 2)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(grid.reshape(rows * height, columns * width, 3)).save(path)
