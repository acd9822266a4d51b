"""Whether downloaded bytes are a picture that may stand for a prompt's training image.

A server that lost a picture often sends another one in its place: a logo, "image not available",
one white pixel. Public: ``PictureError``, ``Picture``, ``inspect``, ``near``, ``placeholders``.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from io import BytesIO
from itertools import combinations

import numpy as np
from PIL import Image, ImageStat

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
MIN_SIDE = 50  # pixels; the smallest thumbnails among LAION's links are larger
MIN_DEVIATION = 1.0  # of 255, in the most varied channel; plain carpets are well above
# Near-duplicates are told by thumbnails, not by a perceptual hash: on one T-shirt two prints are as
# close in a pHash as one picture at two JPEG qualities, but a cell of the thumbnail shows them.
THUMBNAIL = (16, 16)
NEAR = 12  # of 255, the largest difference in any cell and channel; recompression stays below 8
COMMON_WORDS = frozenset(
    ("a", "an", "and", "at", "by", "for", "from", "in", "is", "of", "on", "or", "the", "to", "with")
)


class PictureError(Exception):
    """Bytes that are no usable picture. ``status`` is one of not_an_image, undecodable,
    too_many_pixels, tiny, uniform, placeholder."""

    def __init__(self, status: str, detail: str) -> None:
        super().__init__(f"{status}: {detail}")
        self.status, self.detail = status, detail


@dataclass(frozen=True)
class Picture:
    """What is kept of a decoded picture besides its bytes."""

    width: int
    height: int
    thumbnail: bytes  # 16x16 RGB


def inspect(data: bytes, *, max_pixels: int) -> Picture:
    """Decodes ``data`` completely. Its size is read from the header and checked before a pixel is
    decoded. Raises PictureError."""
    try:
        image = Image.open(BytesIO(data), formats=FORMATS)
    except Image.DecompressionBombError as error:
        raise PictureError("too_many_pixels", str(error)) from None
    except Exception as error:  # what a decoder raises for hostile bytes is not documented
        raise PictureError("not_an_image", f"starts with {data[:20]!r}") from error
    width, height = image.size
    if width * height > max_pixels:
        raise PictureError("too_many_pixels", f"{width}x{height}, {max_pixels:,} are allowed")
    if min(width, height) < MIN_SIDE:
        raise PictureError("tiny", f"{width}x{height} pixels")
    try:
        flat = _on_white(image)
    except Exception as error:
        raise PictureError("undecodable", str(error)) from error
    deviation = max(ImageStat.Stat(flat).stddev)
    if deviation < MIN_DEVIATION:
        raise PictureError("uniform", f"one colour (standard deviation {deviation:.2f} of 255)")
    return Picture(width, height, flat.resize(THUMBNAIL, Image.Resampling.BOX).tobytes())


def _on_white(image: Image.Image) -> Image.Image:
    """Decoded, RGB; what is transparent shows white."""
    if not image.has_transparency_data:
        return image.convert("RGB")
    layers = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", layers.size, "white"), layers).convert("RGB")


def near(first: bytes, second: bytes) -> bool:
    """Whether two thumbnails are of the same picture, recompressed or resized."""
    one, other = (np.frombuffer(pixels, np.uint8).astype(np.int16) for pixels in (first, second))
    return bool(np.abs(one - other).max() <= NEAR)


def placeholders(
    captions: Mapping[int, str], sums: Mapping[int, str], thumbnails: Mapping[int, bytes]
) -> list[set[int]]:
    """Groups of rows whose common picture cannot be theirs.

    Rows are in a group if their pictures are the same bytes (``sums``, sha256) or near-duplicates
    (``thumbnails``). A group is a placeholder if two of its captions have no word in common; or,
    for the same bytes, if three of them share less than half of their words with each other, as
    when a shop shows one picture for all that it no longer sells. Template prompts, whose pictures
    differ in a detail, and variants of one caption are neither.
    """
    groups = {row: {row} for row in sums}
    for first, second in combinations(sums, 2):
        same = sums[first] == sums[second] or near(thumbnails[first], thumbnails[second])
        if same and groups[first] is not groups[second]:
            groups[first] |= groups[second]
            for row in groups[second]:
                groups[row] = groups[first]
    words = {row: _words(captions[row]) for row in sums}
    return [
        group
        for group in {id(group): group for group in groups.values()}.values()
        if _unrelated(group, words) or _shown_for_all(group, words, sums)
    ]


def _words(caption: str) -> frozenset[str]:
    return frozenset(re.findall(r"\w+", caption.lower())) - COMMON_WORDS


def _unrelated(group: set[int], words: Mapping[int, frozenset[str]]) -> bool:
    said = [words[row] for row in sorted(group) if words[row]]
    return any(first.isdisjoint(second) for first, second in combinations(said, 2))


def _shown_for_all(
    group: set[int], words: Mapping[int, frozenset[str]], sums: Mapping[int, str]
) -> bool:
    for chosen in {sums[row] for row in group}:
        apart: list[frozenset[str]] = []
        for row in sorted(row for row in group if sums[row] == chosen):
            if all(2 * len(words[row] & other) < len(words[row] | other) for other in apart):
                apart.append(words[row])
        if len(apart) >= 3:
            return True
    return False
