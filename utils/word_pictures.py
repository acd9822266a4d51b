"""A prompt's words coloured by score, as a picture.

Public: ``draw_words``.
"""

from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from utils.files import replacing

LIGHT, DARK = (255, 252, 245), (127, 39, 4)  # one hue that only gets darker: the same order in grey
INK, FAINT = (20, 20, 20), (90, 90, 90)
WIDTH = 900  # pixels; wider only for a word that does not fit
MARGIN, PADDING, GAP = 20, 8, 8
WORD_SIZE, NUMBER_SIZE = 28, 15
LEGEND = (260, 16)


def _fonts() -> tuple[ImageFont.FreeTypeFont, ImageFont.FreeTypeFont]:
    # matplotlib brings a font that has most of the world's letters; Pillow's own has Latin ones.
    from matplotlib import font_manager

    file = font_manager.findfont("DejaVu Sans")
    return ImageFont.truetype(file, WORD_SIZE), ImageFont.truetype(file, NUMBER_SIZE)


def _colour(share: float) -> tuple[int, int, int]:
    """From ``LIGHT`` at 0 to ``DARK`` at 1."""
    red, green, blue = (
        round(light + share * (dark - light)) for light, dark in zip(LIGHT, DARK, strict=True)
    )
    return red, green, blue


def _readable_on(colour: tuple[int, int, int]) -> tuple[int, int, int]:
    brightness = sum(w * c for w, c in zip((0.299, 0.587, 0.114), colour, strict=True))
    return INK if brightness > 115 else (255, 255, 255)


def draw_words(words: Sequence[tuple[str, float]], path: Path, *, scale: str) -> None:
    """Writes a PNG of the words in order, each on a colour from light (0) to dark (the largest
    score of these words) with its score below, and a bar that explains the colours, labelled
    ``scale``. Scores are at least 0."""
    font, small = _fonts()
    largest = max((score for _, score in words), default=0.0)
    shares = [score / largest if largest else 0.0 for _, score in words]
    numbers = [f"{score:.3g}" for _, score in words]
    widths = [
        round(max(font.getlength(word), small.getlength(number))) + 2 * PADDING
        for (word, _), number in zip(words, numbers, strict=True)
    ]
    width = max(WIDTH, max(widths, default=0) + 2 * MARGIN)
    word_height, line_height = WORD_SIZE + 2 * PADDING, WORD_SIZE + 2 * PADDING + NUMBER_SIZE + 14

    # Place the words.
    places, x, y = [], MARGIN, MARGIN
    for own in widths:
        if x > MARGIN and x + own > width - MARGIN:
            x, y = MARGIN, y + line_height
        places.append((x, y))
        x += own + GAP
    legend_top = y + line_height + PADDING
    picture = Image.new("RGB", (width, legend_top + LEGEND[1] + NUMBER_SIZE + 14), "white")
    draw = ImageDraw.Draw(picture)
    for (word, _), number, share, own, (x, y) in zip(
        words, numbers, shares, widths, places, strict=True
    ):
        colour = _colour(share)
        box = (x, y, x + own, y + word_height)
        draw.rounded_rectangle(box, radius=5, fill=colour, outline=(200, 190, 180))
        middle = x + own / 2
        draw.text(
            (middle, y + word_height / 2), word, font=font, anchor="mm", fill=_readable_on(colour)
        )
        draw.text((middle, y + word_height + 4), number, font=small, anchor="mt", fill=FAINT)

    # Explain the colours.
    for column in range(LEGEND[0]):
        line = (MARGIN + column, legend_top, MARGIN + column, legend_top + LEGEND[1])
        draw.line(line, fill=_colour(column / (LEGEND[0] - 1)))
    below = legend_top + LEGEND[1] + 4
    draw.text((MARGIN, below), "0", font=small, anchor="lt", fill=INK)
    right = MARGIN + LEGEND[0]
    draw.text((right, below), f"{largest:.3g}", font=small, anchor="rt", fill=INK)
    beside = (right + 2 * GAP, legend_top + LEGEND[1] / 2)
    draw.text(beside, scale, font=small, anchor="lm", fill=INK)
    with replacing(path) as temporary:
        picture.save(temporary, format="PNG")
