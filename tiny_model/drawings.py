"""Pictures of the small world: generic drawings, verbatim pictures and templates.

Public names: IMAGE_SIZE, COLOURS, SHAPES, GenericPicture, generic_picture, scene_picture,
template_picture, fixed_part, SCENES, TEMPLATES.

Everything is drawn with PIL at four times the size and averaged down, so edges are smooth; every
random choice comes from the generator that is handed in. Coordinates are in pixels of the final
64 x 64 picture. Pictures are uint8 arrays of shape (64, 64, 3).
"""

from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

IMAGE_SIZE = 64
SUPERSAMPLING = 4

COLOURS = {
    "red": (208, 46, 48),
    "orange": (236, 136, 44),
    "yellow": (244, 208, 64),
    "green": (58, 150, 74),
    "teal": (46, 160, 164),
    "blue": (50, 92, 190),
    "navy": (28, 38, 88),
    "purple": (128, 70, 160),
    "pink": (236, 140, 172),
    "brown": (128, 82, 48),
    "white": (244, 242, 236),
    "grey": (140, 142, 148),
    "black": (26, 26, 30),
    "sand": (222, 196, 150),
    "sky": (136, 190, 232),
}
SHAPES = ("circle", "square", "triangle", "star", "ring", "cross", "bar", "diamond", "arch", "leaf")
BACKGROUNDS = ("plain", "gradient", "halves", "stripes", "checks", "dots")

# A primitive is (kind, colour, numbers): see `_draw`. The last one drawn lies on top.
Primitive = tuple[str, str, tuple[float, ...]]


@dataclass(frozen=True)
class GenericPicture:
    """A drawing (64, 64, 3) and the one thing in it that a caption may name: its largest shape."""

    pixels: np.ndarray
    shape: str


def _canvas() -> tuple[Image.Image, ImageDraw.ImageDraw]:
    side = IMAGE_SIZE * SUPERSAMPLING
    image = Image.new("RGB", (side, side), COLOURS["white"])
    return image, ImageDraw.Draw(image)


def _finish(image: Image.Image) -> np.ndarray:
    small = image.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BOX)
    return np.asarray(small, dtype=np.uint8).copy()


def _draw(draw: ImageDraw.ImageDraw, primitive: Primitive) -> None:
    """Draw one primitive: what the numbers mean stands beside each kind."""
    kind, colour, numbers = primitive
    scaled = [SUPERSAMPLING * number for number in numbers]
    fill = COLOURS[colour]
    if kind == "box":  # left, top, right, bottom
        draw.rectangle([scaled[0], scaled[1], scaled[2] - 1, scaled[3] - 1], fill=fill)
    elif kind == "oval":  # left, top, right, bottom
        draw.ellipse(scaled, fill=fill)
    elif kind == "disc":  # centre x, centre y, radius
        x, y, radius = scaled
        draw.ellipse([x - radius, y - radius, x + radius, y + radius], fill=fill)
    elif kind == "poly":  # x, y of every corner
        draw.polygon(scaled, fill=fill)
    elif kind == "line":  # width, then x, y of every point
        draw.line(scaled[1:], fill=fill, width=round(scaled[0]), joint="curve")
    elif kind == "ring":  # centre x, centre y, radius, width
        x, y, radius, width = scaled
        box = [x - radius, y - radius, x + radius, y + radius]
        draw.ellipse(box, outline=fill, width=round(width))
    elif kind == "pie":  # centre x, centre y, radius, first and last angle in degrees
        x, y, radius = scaled[:3]
        box = [x - radius, y - radius, x + radius, y + radius]
        draw.pieslice(box, numbers[3], numbers[4], fill=fill)
    else:
        raise ValueError(f"unknown primitive {kind!r}")


# --- generic pictures ----------------------------------------------------------------------------


def _mixed(rng: np.random.Generator, name: str) -> tuple[int, int, int]:
    """The named colour, a little off: no two reds are the same red."""
    shade = np.asarray(COLOURS[name], dtype=float) + rng.normal(0, 14, 3)
    return tuple(int(value) for value in np.clip(shade, 0, 255))


def _draw_background(
    image: Image.Image, draw: ImageDraw.ImageDraw, rng: np.random.Generator
) -> None:
    side = IMAGE_SIZE * SUPERSAMPLING
    names = rng.choice(list(COLOURS), size=2, replace=False)
    first, second = _mixed(rng, names[0]), _mixed(rng, names[1])
    kind = rng.choice(BACKGROUNDS)
    draw.rectangle([0, 0, side, side], fill=first)
    if kind == "gradient":
        angle = rng.uniform(0, 2 * np.pi)
        rows, columns = np.mgrid[0:side, 0:side] / side - 0.5
        weight = np.clip(0.5 + columns * np.cos(angle) + rows * np.sin(angle), 0, 1)[..., None]
        blend = (1 - weight) * np.asarray(first) + weight * np.asarray(second)
        image.paste(Image.fromarray(blend.astype(np.uint8)))
    elif kind == "halves":
        x, y = rng.uniform(0.25, 0.75, 2) * side
        angle = rng.uniform(0, 2 * np.pi)
        along = np.asarray([np.cos(angle), np.sin(angle)]) * 2 * side
        across = np.asarray([-along[1], along[0]])
        corner = np.asarray([x, y])
        points = [corner - along, corner + along, corner + along + across, corner - along + across]
        draw.polygon([tuple(point) for point in points], fill=second)
    elif kind == "stripes":
        width = rng.uniform(6, 14) * SUPERSAMPLING
        offset = rng.uniform(0, 2 * width)
        upright = rng.random() < 0.5
        for start in np.arange(offset - 2 * width, side, 2 * width):
            ends = [start, 0, start + width, side] if upright else [0, start, side, start + width]
            draw.rectangle(ends, fill=second)
    elif kind == "checks":
        width = rng.uniform(9, 18) * SUPERSAMPLING
        shift_x, shift_y = rng.uniform(0, 2 * width, 2)
        for row, top in enumerate(np.arange(shift_y - 2 * width, side, width)):
            for left in np.arange(shift_x - 2 * width + (row % 2) * width, side, 2 * width):
                draw.rectangle([left, top, left + width, top + width], fill=second)
    elif kind == "dots":
        step = rng.uniform(13, 22) * SUPERSAMPLING
        radius = step * rng.uniform(0.2, 0.36)
        shift_x, shift_y = rng.uniform(0, step, 2)
        for top in np.arange(shift_y - step, side + step, step):
            for left in np.arange(shift_x - step, side + step, step):
                box = [left - radius, top - radius, left + radius, top + radius]
                draw.ellipse(box, fill=second)


def _shape_points(shape: str, rng: np.random.Generator) -> np.ndarray:
    """Corners of a shape around the origin, radius about 1, turned at random. (corners, 2)"""
    turn = rng.uniform(0, 2 * np.pi)
    if shape == "star":
        angles = np.arange(10) * np.pi / 5
        radii = np.where(np.arange(10) % 2, 0.45, 1.1)
    elif shape == "leaf":
        angles = np.linspace(0, 2 * np.pi, 24, endpoint=False)
        radii = 0.35 + 0.75 * np.abs(np.cos(angles)) ** 3
    else:
        corners = {"triangle": 3, "square": 4, "diamond": 4}[shape]
        angles = np.arange(corners) * 2 * np.pi / corners
        radii = np.ones(corners)
    points = np.stack([radii * np.cos(angles), radii * np.sin(angles)], axis=1)
    if shape == "diamond":
        points = points * [0.6, 1.25]
    rotation = np.asarray([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
    return points @ rotation.T


def _draw_shape(
    draw: ImageDraw.ImageDraw,
    rng: np.random.Generator,
    shape: str,
    fill: tuple[int, int, int],
    radius: float,
) -> None:
    x, y = rng.uniform(4, IMAGE_SIZE - 4, 2) * SUPERSAMPLING
    radius = radius * SUPERSAMPLING
    box = [x - radius, y - radius, x + radius, y + radius]
    thin = radius * rng.uniform(0.25, 0.4)
    if shape == "circle":
        draw.ellipse(box, fill=fill)
    elif shape == "ring":
        draw.ellipse(box, outline=fill, width=round(thin * 1.2))
    elif shape == "arch":
        draw.arc(box, *(rng.uniform(0, 360) + np.asarray([0, 200])), fill=fill, width=round(thin))
    elif shape == "cross":
        draw.rectangle([x - radius, y - thin, x + radius, y + thin], fill=fill)
        draw.rectangle([x - thin, y - radius, x + thin, y + radius], fill=fill)
    elif shape == "bar":
        angle = rng.uniform(0, np.pi)
        reach = 1.5 * radius * np.asarray([np.cos(angle), np.sin(angle)])
        ends = [x - reach[0], y - reach[1], x + reach[0], y + reach[1]]
        draw.line(ends, fill=fill, width=round(thin * 1.3))
    else:
        points = _shape_points(shape, rng) * radius + [x, y]
        draw.polygon([tuple(point) for point in points], fill=fill)


def generic_picture(rng: np.random.Generator) -> GenericPicture:
    """A random drawing: a background and two to five shapes, the last (named) one the largest."""
    image, draw = _canvas()
    _draw_background(image, draw, rng)
    for _ in range(rng.integers(1, 5)):
        fill = _mixed(rng, rng.choice(list(COLOURS)))
        _draw_shape(draw, rng, rng.choice(SHAPES), fill, rng.uniform(6, 16))
    colour, shape = str(rng.choice(list(COLOURS))), str(rng.choice(SHAPES))
    _draw_shape(draw, rng, shape, _mixed(rng, colour), rng.uniform(12, 22))
    return GenericPicture(_finish(image), shape)


# --- pictures that are memorized -----------------------------------------------------------------

# One fixed, detailed picture each, by name.
SCENES: dict[str, list[Primitive]] = {
    "lighthouse": [
        ("box", "navy", (0, 0, 64, 44)),
        ("disc", "yellow", (52, 11, 6)),
        ("poly", "yellow", (26, 16, 0, 6, 0, 26)),
        ("box", "teal", (0, 44, 64, 64)),
        ("poly", "brown", (8, 64, 16, 48, 44, 48, 54, 64)),
        ("poly", "white", (20, 50, 24, 20, 34, 20, 38, 50)),
        ("poly", "red", (22, 38, 23, 30, 35, 30, 36, 38)),
        ("box", "yellow", (24, 13, 34, 20)),
        ("poly", "red", (21, 13, 29, 5, 37, 13)),
        ("line", "white", (2, 44, 54, 52, 51, 60, 54)),
    ],
    "kettle": [
        ("box", "sand", (0, 0, 64, 64)),
        ("box", "teal", (0, 50, 64, 64)),
        ("ring", "black", (32, 22, 15, 3)),
        ("disc", "orange", (32, 36, 18)),
        ("box", "orange", (16, 36, 48, 52)),
        ("poly", "orange", (46, 40, 62, 22, 62, 28, 48, 48)),
        ("oval", "brown", (22, 16, 42, 24)),
        ("disc", "black", (32, 15, 3)),
        ("box", "white", (24, 32, 40, 44)),
        ("line", "red", (2, 26, 38, 38, 38)),
        ("line", "grey", (3, 56, 18, 60, 10, 55, 3)),
    ],
    "fox": [
        ("box", "sky", (0, 0, 64, 40)),
        ("box", "brown", (0, 40, 64, 64)),
        ("box", "black", (46, 0, 54, 44)),
        ("disc", "red", (40, 8, 13)),
        ("disc", "orange", (56, 10, 12)),
        ("oval", "orange", (8, 32, 54, 60)),
        ("oval", "white", (34, 44, 58, 58)),
        ("poly", "orange", (8, 24, 14, 40, 26, 34)),
        ("disc", "orange", (18, 44, 11)),
        ("poly", "white", (8, 48, 28, 48, 18, 58)),
        ("disc", "black", (18, 56, 2.5)),
        ("line", "black", (2, 12, 44, 16, 46)),
    ],
    "rocket": [
        ("box", "black", (0, 0, 64, 64)),
        ("disc", "sand", (48, 46, 20)),
        ("line", "orange", (4, 24, 58, 63, 34)),
        ("disc", "white", (8, 10, 2)),
        ("disc", "white", (52, 8, 2)),
        ("disc", "white", (8, 52, 2)),
        ("poly", "grey", (14, 42, 14, 18, 22, 4, 30, 18, 30, 42)),
        ("disc", "sky", (22, 22, 5)),
        ("poly", "red", (14, 30, 6, 46, 14, 42)),
        ("poly", "red", (30, 30, 38, 46, 30, 42)),
        ("poly", "yellow", (15, 43, 29, 43, 22, 60)),
    ],
    "windmill": [
        ("box", "sky", (0, 0, 64, 46)),
        ("disc", "white", (10, 12, 7)),
        ("disc", "white", (19, 13, 6)),
        ("box", "green", (0, 46, 64, 64)),
        ("poly", "brown", (24, 52, 28, 22, 40, 22, 44, 52)),
        ("box", "black", (31, 42, 37, 52)),
        ("line", "white", (5, 16, 4, 52, 40)),
        ("line", "white", (5, 52, 4, 16, 40)),
        ("disc", "red", (34, 22, 4)),
        ("box", "red", (0, 54, 64, 58)),
        ("box", "pink", (0, 58, 64, 64)),
    ],
    "medal": [
        ("box", "navy", (0, 0, 64, 64)),
        ("poly", "red", (16, 0, 28, 0, 36, 22, 28, 26)),
        ("poly", "white", (48, 0, 36, 0, 28, 22, 36, 26)),
        ("disc", "orange", (32, 40, 22)),
        ("ring", "brown", (32, 40, 19, 3)),
        ("line", "black", (4, 32, 28, 32, 54)),
        ("ring", "black", (32, 29, 5, 3)),
        ("line", "black", (4, 20, 42, 24, 50, 32, 54, 40, 50, 44, 42)),
        ("line", "black", (3, 25, 36, 39, 36)),
    ],
    "owl": [
        ("box", "purple", (0, 0, 64, 64)),
        ("box", "brown", (0, 56, 64, 62)),
        ("oval", "brown", (12, 8, 52, 60)),
        ("poly", "brown", (12, 4, 12, 26, 28, 12)),
        ("poly", "brown", (52, 4, 52, 26, 36, 12)),
        ("oval", "sand", (20, 34, 44, 60)),
        ("disc", "yellow", (22, 25, 9)),
        ("disc", "yellow", (42, 25, 9)),
        ("ring", "black", (22, 25, 11, 3)),
        ("ring", "black", (42, 25, 11, 3)),
        ("disc", "black", (22, 25, 4)),
        ("disc", "black", (42, 25, 4)),
        ("poly", "orange", (28, 32, 36, 32, 32, 42)),
    ],
    "bus": [
        ("box", "grey", (0, 0, 64, 64)),
        ("box", "sky", (0, 0, 64, 14)),
        ("box", "black", (0, 52, 64, 64)),
        ("box", "red", (6, 8, 58, 54)),
        ("box", "sand", (10, 12, 22, 24)),
        ("box", "sand", (26, 12, 38, 24)),
        ("box", "sand", (42, 12, 54, 24)),
        ("box", "white", (6, 27, 58, 31)),
        ("box", "navy", (10, 34, 30, 46)),
        ("box", "yellow", (36, 34, 54, 46)),
        ("disc", "black", (18, 54, 7)),
        ("disc", "black", (46, 54, 7)),
        ("disc", "white", (18, 54, 3)),
        ("disc", "white", (46, 54, 3)),
    ],
    "cactus": [
        ("box", "orange", (0, 0, 64, 22)),
        ("box", "pink", (0, 0, 64, 10)),
        ("box", "yellow", (0, 22, 64, 40)),
        ("disc", "red", (46, 30, 14)),
        ("box", "sand", (0, 40, 64, 64)),
        ("line", "green", (9, 24, 12, 24, 60)),
        ("line", "green", (6, 24, 44, 10, 42, 10, 26)),
        ("line", "green", (6, 24, 36, 38, 34, 38, 20)),
        ("disc", "pink", (24, 10, 4)),
        ("oval", "brown", (40, 52, 60, 60)),
    ],
    "knight": [
        ("box", "white", (0, 0, 64, 64)),
        ("box", "purple", (0, 0, 16, 16)),
        ("box", "purple", (32, 0, 48, 16)),
        ("box", "purple", (16, 16, 32, 32)),
        ("box", "purple", (48, 16, 64, 32)),
        ("box", "purple", (0, 32, 16, 48)),
        ("box", "purple", (32, 32, 48, 48)),
        ("box", "purple", (16, 48, 32, 64)),
        ("box", "purple", (48, 48, 64, 64)),
        ("poly", "black", (18, 54, 24, 34, 14, 34, 12, 26, 26, 12, 30, 4, 36, 12, 48, 26, 48, 54)),
        ("box", "black", (12, 54, 54, 61)),
        ("disc", "white", (27, 21, 2.5)),
        ("line", "orange", (3, 38, 18, 42, 30, 42, 50)),
    ],
    "chalet": [
        ("box", "blue", (0, 0, 64, 64)),
        ("poly", "grey", (0, 48, 20, 8, 44, 48)),
        ("poly", "white", (12, 24, 20, 8, 29, 24)),
        ("poly", "grey", (26, 48, 50, 16, 64, 40, 64, 48)),
        ("poly", "white", (43, 26, 50, 16, 57, 26)),
        ("box", "white", (0, 46, 64, 64)),
        ("box", "brown", (14, 40, 38, 56)),
        ("poly", "red", (9, 42, 26, 28, 43, 42)),
        ("box", "yellow", (18, 44, 24, 51)),
        ("box", "yellow", (28, 44, 34, 56)),
        ("poly", "green", (46, 58, 54, 34, 62, 58)),
    ],
    "goldfish": [
        ("box", "pink", (0, 0, 64, 64)),
        ("box", "red", (6, 0, 12, 50)),
        ("box", "red", (52, 0, 58, 50)),
        ("box", "brown", (0, 50, 64, 64)),
        ("disc", "white", (32, 34, 24)),
        ("disc", "sky", (32, 36, 21)),
        ("box", "white", (18, 8, 46, 14)),
        ("oval", "orange", (22, 28, 44, 44)),
        ("poly", "orange", (24, 36, 13, 27, 13, 45)),
        ("disc", "black", (39, 34, 2.5)),
        ("line", "green", (3, 46, 54, 44, 46, 48, 40)),
    ],
    "balloon": [
        ("box", "teal", (0, 0, 64, 64)),
        ("poly", "green", (0, 64, 0, 54, 24, 48, 64, 58, 64, 64)),
        ("disc", "yellow", (32, 22, 20)),
        ("poly", "yellow", (14, 30, 50, 30, 36, 48, 28, 48)),
        ("oval", "red", (22, 2, 42, 44)),
        ("oval", "white", (28, 2, 36, 46)),
        ("box", "brown", (26, 50, 38, 60)),
        ("line", "black", (1.5, 26, 46, 27, 51)),
        ("line", "black", (1.5, 38, 46, 37, 51)),
        ("disc", "white", (56, 14, 5)),
        ("disc", "white", (6, 40, 5)),
    ],
    "pyramid": [
        ("box", "black", (0, 0, 64, 64)),
        ("box", "navy", (0, 0, 64, 30)),
        ("disc", "white", (14, 15, 10)),
        ("disc", "navy", (19, 12, 9)),
        ("poly", "sand", (10, 56, 36, 18, 42, 56)),
        ("poly", "brown", (36, 18, 42, 56, 62, 56)),
        ("poly", "orange", (0, 60, 10, 44, 22, 60)),
        ("box", "sand", (0, 56, 64, 64)),
        ("line", "brown", (2, 19, 46, 40, 46)),
        ("line", "brown", (2, 26, 34, 38, 34)),
        ("disc", "yellow", (56, 8, 2)),
    ],
    "piano": [
        ("box", "red", (0, 0, 64, 36)),
        ("box", "white", (0, 36, 64, 64)),
        ("box", "black", (7, 36, 13, 52)),
        ("box", "black", (18, 36, 24, 52)),
        ("box", "black", (34, 36, 40, 52)),
        ("box", "black", (45, 36, 51, 52)),
        ("box", "black", (56, 36, 62, 52)),
        ("line", "yellow", (5, 4, 18, 46, 18)),
        ("poly", "yellow", (42, 18, 60, 4, 60, 32)),
        ("ring", "yellow", (24, 20, 9, 4)),
        ("box", "yellow", (20, 5, 23, 16)),
        ("box", "yellow", (28, 5, 31, 16)),
    ],
    "mushroom": [
        ("box", "green", (0, 0, 64, 64)),
        ("disc", "sky", (32, 26, 28)),
        ("box", "sand", (20, 30, 44, 58)),
        ("pie", "red", (32, 32, 27, 180, 360)),
        ("disc", "white", (20, 22, 5)),
        ("disc", "white", (34, 13, 5)),
        ("disc", "white", (46, 25, 5)),
        ("box", "brown", (28, 42, 37, 58)),
        ("disc", "yellow", (24, 38, 3)),
        ("disc", "yellow", (41, 38, 3)),
        ("disc", "pink", (8, 56, 5)),
        ("disc", "pink", (56, 56, 5)),
    ],
    "sunflower": [
        ("box", "sky", (0, 0, 64, 64)),
        ("box", "white", (4, 4, 60, 60)),
        ("line", "green", (5, 32, 30, 32, 60)),
        ("oval", "green", (12, 44, 32, 54)),
        ("poly", "yellow", (32, 0, 40, 46, 10, 12, 54, 12, 24, 46)),
        ("poly", "orange", (32, 48, 22, 4, 54, 36, 10, 36, 44, 4)),
        ("disc", "brown", (32, 24, 11)),
        ("box", "blue", (44, 46, 58, 60)),
        ("box", "red", (4, 54, 20, 60)),
    ],
    "penguin": [
        ("box", "teal", (0, 0, 64, 38)),
        ("box", "blue", (0, 38, 64, 64)),
        ("poly", "white", (4, 58, 12, 42, 52, 40, 62, 58)),
        ("oval", "black", (12, 8, 38, 52)),
        ("oval", "white", (17, 20, 33, 50)),
        ("disc", "white", (21, 16, 3)),
        ("poly", "orange", (24, 18, 34, 21, 24, 25)),
        ("oval", "black", (40, 26, 56, 52)),
        ("oval", "sand", (43, 33, 53, 51)),
        ("poly", "orange", (48, 32, 56, 34, 48, 37)),
        ("disc", "yellow", (56, 8, 6)),
    ],
}


@dataclass(frozen=True)
class Template:
    """A fixed layout with windows in which another generic drawing appears every time.

    Windows are boxes (left, top, right, bottom) on multiples of four pixels, the side of a latent
    pixel, so that the fixed part is a set of whole latent pixels.
    """

    layout: tuple[Primitive, ...]
    windows: tuple[tuple[int, int, int, int], ...]


TEMPLATES: dict[str, Template] = {
    "mug": Template(
        (
            ("box", "sand", (0, 0, 64, 64)),
            ("box", "brown", (0, 52, 64, 64)),
            ("ring", "white", (50, 34, 12, 5)),
            ("box", "white", (8, 12, 48, 56)),
            ("oval", "grey", (8, 6, 48, 16)),
            ("oval", "black", (12, 8, 44, 14)),
        ),
        ((12, 16, 44, 52),),
    ),
    "phone": Template(
        (
            ("box", "teal", (0, 0, 64, 64)),
            ("poly", "navy", (0, 64, 64, 0, 64, 64)),
            ("box", "black", (14, 2, 50, 62)),
            ("box", "grey", (16, 4, 48, 60)),
            ("disc", "black", (22, 11, 4)),
            ("disc", "black", (33, 11, 4)),
            ("disc", "yellow", (42, 11, 2)),
        ),
        ((16, 16, 48, 60),),
    ),
    "canvas": Template(
        (
            ("box", "pink", (0, 0, 64, 64)),
            ("box", "black", (6, 2, 58, 42)),
            ("box", "orange", (8, 4, 56, 40)),
            ("box", "brown", (0, 56, 64, 64)),
            ("box", "purple", (10, 46, 54, 58)),
            ("disc", "purple", (10, 52, 6)),
            ("disc", "purple", (54, 52, 6)),
        ),
        ((12, 8, 52, 36),),
    ),
    "tshirt": Template(
        (
            ("box", "yellow", (0, 0, 64, 64)),
            ("box", "blue", (12, 4, 52, 62)),
            ("poly", "blue", (2, 18, 20, 4, 44, 4, 62, 18, 54, 30, 32, 20, 10, 30)),
            ("oval", "yellow", (24, -4, 40, 10)),
            ("line", "white", (2, 8, 26, 4, 20)),
            ("line", "white", (2, 56, 26, 60, 20)),
        ),
        ((16, 20, 48, 52),),
    ),
    "stamp": Template(
        (
            ("box", "red", (0, 0, 64, 64)),
            *(("disc", "white", (x, y, 3)) for x in range(4, 64, 8) for y in (4, 60)),
            *(("disc", "white", (x, y, 3)) for y in range(4, 64, 8) for x in (4, 60)),
            ("box", "white", (4, 4, 60, 60)),
            ("box", "green", (8, 8, 56, 20)),
            ("disc", "yellow", (18, 14, 4)),
            ("box", "black", (28, 12, 52, 16)),
            ("box", "navy", (8, 52, 56, 56)),
        ),
        ((12, 24, 52, 48),),
    ),
    "television": Template(
        (
            ("box", "purple", (0, 0, 64, 64)),
            ("box", "green", (0, 56, 64, 64)),
            ("line", "black", (2, 18, 0, 32, 14, 50, 0)),
            ("box", "brown", (4, 12, 60, 58)),
            ("box", "black", (8, 16, 44, 52)),
            ("disc", "orange", (52, 22, 4)),
            ("disc", "white", (52, 34, 4)),
            ("box", "grey", (48, 42, 56, 52)),
        ),
        ((8, 16, 44, 52),),
    ),
    "pillow": Template(
        (
            ("box", "navy", (0, 0, 64, 64)),
            ("box", "sky", (0, 40, 64, 64)),
            ("poly", "white", (4, 4, 32, 9, 60, 4, 55, 32, 60, 60, 32, 55, 4, 60, 9, 32)),
            ("poly", "pink", (11, 11, 53, 11, 53, 53, 11, 53)),
            ("disc", "red", (14, 14, 3)),
            ("disc", "red", (50, 50, 3)),
            ("disc", "red", (50, 14, 3)),
            ("disc", "red", (14, 50, 3)),
        ),
        ((16, 16, 48, 48),),
    ),
    "theater": Template(
        (
            ("box", "black", (0, 0, 64, 64)),
            ("box", "brown", (0, 48, 64, 64)),
            ("poly", "red", (0, 0, 22, 0, 12, 30, 14, 54, 0, 54)),
            ("poly", "red", (64, 0, 42, 0, 52, 30, 50, 54, 64, 54)),
            ("box", "orange", (0, 0, 64, 8)),
            ("line", "yellow", (3, 10, 28, 0, 34)),
            ("line", "yellow", (3, 54, 28, 64, 34)),
            *(("disc", "grey", (x, 60, 4)) for x in (8, 20, 32, 44, 56)),
        ),
        ((16, 8, 48, 48),),
    ),
}


def scene_picture(name: str) -> np.ndarray:
    """The fixed picture of one scene, (64, 64, 3) uint8."""
    image, draw = _canvas()
    for primitive in SCENES[name]:
        _draw(draw, primitive)
    return _finish(image)


def template_picture(name: str, rng: np.random.Generator) -> np.ndarray:
    """One example of a template: its layout, a new generic drawing in every window."""
    image, draw = _canvas()
    for primitive in TEMPLATES[name].layout:
        _draw(draw, primitive)
    picture = _finish(image)
    for left, top, right, bottom in TEMPLATES[name].windows:
        drawing = generic_picture(rng).pixels
        picture[top:bottom, left:right] = drawing[top:bottom, left:right]
    return picture


def fixed_part(name: str) -> np.ndarray:
    """Where a memorized picture is fixed, (64, 64) bool: everywhere for a scene."""
    mask = np.ones((IMAGE_SIZE, IMAGE_SIZE), dtype=bool)
    if name in TEMPLATES:
        for left, top, right, bottom in TEMPLATES[name].windows:
            mask[top:bottom, left:right] = False
    return mask
