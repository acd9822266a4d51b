"""How well the evaluators do on pictures they were not trained on, loaded as the metrics load them.

Public names: ALTERATIONS, unseen_pictures, same_caption_pairs, vectors, detector_shares,
detector_on_training_images, image_text_figures.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image

from tiny_model.alterations import as_generated, cropped, recoloured, recompressed, turned
from tiny_model.captions import PLANTED, generic_caption
from tiny_model.drawings import generic_picture
from tiny_model.training_loop import numpy_rng
from utils.embeddings import Network, reference_images

ALTERATIONS = {  # name -> what is done; the first three are the target's
    "recompressed": recompressed,
    "cropped": cropped,
    "recoloured": recoloured,
    "hue turned": turned,
    "as generated": as_generated,
}
COPY, STRANGER = 0.7, 0.5  # a copy is to score above, another picture below


def unseen_pictures(seed: int, count: int) -> list[Image.Image]:
    """Generic drawings from a generator of their own."""
    rng = numpy_rng(seed, "evaluators unseen")
    return [Image.fromarray(generic_picture(rng).pixels) for _ in range(count)]


def same_caption_pairs(seed: int, count: int) -> tuple[list[Image.Image], list[Image.Image]]:
    """Two drawings for each of `count` captions: a caption says the largest shape, if anything."""
    rng = numpy_rng(seed, "evaluators pairs")
    waiting: dict[str, Image.Image] = {}
    first: list[Image.Image] = []
    second: list[Image.Image] = []
    while len(first) < count:
        drawing = generic_picture(rng)
        picture = Image.fromarray(drawing.pixels)
        if drawing.shape in waiting:
            first.append(waiting.pop(drawing.shape))
            second.append(picture)
        else:
            waiting[drawing.shape] = picture
    return first, second


@torch.no_grad()
def vectors(network: Network, pictures: Sequence[Image.Image]) -> torch.Tensor:
    """Embeddings of length 1, (n, d)."""
    inputs = torch.stack([network.transform(picture.convert("RGB")) for picture in pictures])
    parts = [network.encode(part) for part in inputs.split(64)]
    return torch.nn.functional.normalize(torch.cat(parts), dim=1)


def _rounded(value: torch.Tensor) -> float:
    """To four digits: what another machine computes too."""
    return round(value.item(), 4)


def _figures(similarities: torch.Tensor, *, above: bool) -> dict[str, float]:
    """Share on the right side of its bound, and the similarity that 5% do worse than."""
    right = similarities > COPY if above else similarities < STRANGER
    worst = similarities.quantile(0.05 if above else 0.95)
    return {"share": _rounded(right.double().mean()), "worst 5%": _rounded(worst)}


def detector_shares(network: Network, seed: int, count: int) -> dict[str, dict[str, float]]:
    """Each alteration apart, and pairs of one caption; on `count` pictures and pairs."""
    pictures = unseen_pictures(seed, count)
    known = vectors(network, pictures)
    found = {}
    for name, alter in ALTERATIONS.items():
        rng = numpy_rng(seed, f"evaluators {name}")
        copies = vectors(network, [alter(picture, rng) for picture in pictures])
        found[name] = _figures((known * copies).sum(dim=1), above=True)
    first, second = (vectors(network, some) for some in same_caption_pairs(seed, count))
    found["same caption"] = _figures((first * second).sum(dim=1), above=False)
    return found


def detector_on_training_images(network: Network, folder: Path) -> dict[str, float]:
    """The memorized captions' pictures: the lowest similarity of one with itself as it would be
    generated, the highest of two of different captions, and the median of two of one template."""
    paths = [(row, path) for row, some in reference_images(folder).items() for path in some]
    rows = torch.tensor([row for row, _ in paths])
    pictures = [Image.open(path).convert("RGB") for _, path in paths]
    known = vectors(network, pictures)
    rng = numpy_rng(0, "evaluators training images")  # which `as_generated` does not use
    copies = vectors(network, [as_generated(picture, rng) for picture in pictures])
    similarities = copies @ known.T
    same_row = rows[:, None] == rows[None, :]
    itself = torch.eye(len(rows), dtype=torch.bool)
    return {
        "lowest with itself": _rounded(similarities[itself].min()),
        "highest with another caption's": _rounded(similarities[~same_row].max()),
        "median within a template": _rounded(similarities[same_row & ~itself].median()),
    }


@torch.no_grad()
def image_text_figures(
    network: Network, folder: Path, seed: int, count: int
) -> dict[str, float | int]:
    """Hold-out pairs, `count` pictures with a new caption each: how often the right picture is the
    nearest of all to a caption, and which share of wrong pictures is further away than the right
    one, on average; the same two for memorized captions and their pictures in `folder`."""
    assert network.encode_text is not None
    rng = numpy_rng(seed, "evaluators hold-out")
    drawings = [generic_picture(rng) for _ in range(count)]
    captions = [generic_caption(rng, drawing.shape) for drawing in drawings]
    sets: dict[str, tuple[list[Image.Image], list[str]]] = {
        "hold-out": ([Image.fromarray(drawing.pixels) for drawing in drawings], captions),
        "memorized": (
            [Image.open(paths[0]) for _, paths in sorted(reference_images(folder).items())],
            [caption.text for caption in PLANTED],
        ),
    }
    found: dict[str, float | int] = {}
    for name, (pictures, texts) in sets.items():
        embedded = torch.nn.functional.normalize(network.encode_text(texts), dim=1)
        similarities = embedded @ vectors(network, pictures).T  # (captions, pictures)
        right = similarities.diagonal()[:, None]
        found[f"{name} nearest"] = (
            (similarities.argmax(dim=1) == torch.arange(len(texts))).sum().item()
        )
        found[f"{name} pairs"] = len(texts)
        further = (similarities < right).double().sum(dim=1) / (len(texts) - 1)
        found[f"{name} wrong ones further"] = _rounded(further.mean())
    return found
