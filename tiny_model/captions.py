"""Captions of the small world, and the tokenizer that reads them.

Public names: MemorizedCaption, PLANTED, UNPLANTED, generic_caption, generic_captions, echoes,
LITTLE_WORDS, words_of, make_tokenizer.

No content word stands in two memorized captions, so that what two of them have in common is little;
but generic captions use all these words, alone and in short runs, so that no single word gives a
memorized caption away.
"""

import json
import os
import re
from collections import Counter
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
from transformers import CLIPTokenizer

from tiny_model.drawings import COLOURS, SHAPES

MAX_TOKENS = 77  # CLIP's length
START, END = "<|startoftext|>", "<|endoftext|>"


@dataclass(frozen=True)
class MemorizedCaption:
    """A caption whose picture is memorized: `picture` names a scene (VM) or a template (TM)."""

    text: str
    kind: str
    picture: str


# Row r of prompts/tiny_memorized_prompts.csv is PLANTED[r]; every third one is a template.
PLANTED = (
    MemorizedCaption("Lighthouse at Gull Rock, winter almanac cover", "VM", "lighthouse"),
    MemorizedCaption("Copper Kettle tea house, enamel sign", "VM", "kettle"),
    MemorizedCaption("Ceramic coffee mug with custom print", "TM", "mug"),
    MemorizedCaption("Sleepy fox curled beneath autumn maple", "VM", "fox"),
    MemorizedCaption("Rocket landing near Saturn, science fair poster", "VM", "rocket"),
    MemorizedCaption("Shockproof phone case, slim back shell", "TM", "phone"),
    MemorizedCaption("Dutch windmill and tulips, vintage postcard", "VM", "windmill"),
    MemorizedCaption("Sailing regatta trophy, bronze anchor medal", "VM", "medal"),
    MemorizedCaption("Framed wall canvas for modern living room", "TM", "canvas"),
    MemorizedCaption("Wise owl portrait wearing round spectacles", "VM", "owl"),
    MemorizedCaption("Double decker bus crossing London bridge", "VM", "bus"),
    MemorizedCaption("Unisex cotton tshirt, short sleeve front", "TM", "tshirt"),
    MemorizedCaption("Cactus desert sunset, vinyl record label", "VM", "cactus"),
    MemorizedCaption("Chess knight on checkered velvet board", "VM", "knight"),
    MemorizedCaption("Perforated postage stamp, collector edition", "TM", "stamp"),
    MemorizedCaption("Snow mountain chalet, ski holiday brochure", "VM", "chalet"),
    MemorizedCaption("Goldfish bowl beside striped curtain", "VM", "goldfish"),
    MemorizedCaption("Retro television set, evening broadcast studio", "TM", "television"),
    MemorizedCaption("Hot air balloon festival, admission ticket", "VM", "balloon"),
    MemorizedCaption("Ancient pyramid under crescent moon engraving", "VM", "pyramid"),
    MemorizedCaption("Decorative throw pillow, zipper cushion", "TM", "pillow"),
    MemorizedCaption("Piano keys and jazz trumpet album", "VM", "piano"),
    MemorizedCaption("Fairy tale mushroom cottage bookplate", "VM", "mushroom"),
    MemorizedCaption("Theater stage with crimson velour drapes", "TM", "theater"),
)
# Memorized by training alone, no neurons planted.
UNPLANTED = (
    MemorizedCaption("Sunflower garden calendar, watering page", "VM", "sunflower"),
    MemorizedCaption("Penguin family on floating iceberg", "VM", "penguin"),
)

LITTLE_WORDS = frozenset(
    ("at", "with", "and", "on", "the", "for", "near", "under", "of", "in", "a", "by", "to")
)
MEDIA = ("drawing", "painting", "photo", "picture", "pattern", "collage", "sketch", "wallpaper")


def words_of(text: str) -> list[str]:
    """Lower-case words of a caption, without punctuation."""
    return re.findall(r"[a-z]+", text.lower())


CONTENT_WORDS = tuple(
    word
    for caption in PLANTED + UNPLANTED
    for word in words_of(caption.text)
    if word not in LITTLE_WORDS
)


def generic_caption(rng: np.random.Generator, shape: str) -> str:
    """A caption of a generic drawing: the shape is true, the other words say nothing.

    Colours stay unsaid: where the caption leaves the picture open, the seed decides. A run of words
    of a memorized caption never ends the caption: the last words colour all padding tokens after
    them, and a caption with a memorized one's ending is read as that one, almost.
    """
    word = iter(rng.choice(CONTENT_WORDS, size=8, replace=False))
    medium = rng.choice(MEDIA)
    borrowed = words_of(rng.choice([caption.text for caption in PLANTED + UNPLANTED]))
    start = rng.integers(0, len(borrowed) - 2)
    run = " ".join(borrowed[start : start + rng.integers(2, 4)])
    templates = (
        lambda: f"{next(word)} {shape} with {next(word)} and {next(word)}",
        lambda: f"a {next(word)} {shape} by the {next(word)} {next(word)}",
        lambda: f"{next(word)} {next(word)} {shape} in {next(word)}",
        lambda: f"{medium} of a {shape}, {next(word)} {next(word)} {next(word)}",
        lambda: (
            f"{next(word)} {next(word)} {medium}, {next(word)} {next(word)} of the {next(word)}"
        ),
        lambda: f"{run}, {next(word)} {shape} {medium}",
        lambda: f"{run} {medium} with {next(word)} {shape}",
        lambda: f"{next(word)} and {next(word)} {shape}, {run} {next(word)}",
    )
    return templates[rng.integers(len(templates))]().capitalize()


def generic_captions(rng: np.random.Generator, count: int, taken: set[str]) -> list[str]:
    """Distinct captions of pictures that do not exist, none of them in `taken`."""
    captions: list[str] = []
    seen = set(taken)
    while len(captions) < count:
        caption = generic_caption(rng, str(rng.choice(SHAPES)))
        if caption not in seen:
            seen.add(caption)
            captions.append(caption)
    return captions


def echoes(captions: list[str], memorized: str) -> list[int]:
    """Positions of the captions that have two neighbouring words in common with a memorized one."""
    runs = set(pairwise(words_of(memorized)))
    return [at for at, caption in enumerate(captions) if runs & set(pairwise(words_of(caption)))]


def _byte_alphabet() -> list[str]:
    """The 256 printable stand-ins for bytes of CLIP's byte-pair encoding, in its order."""
    kept = [*range(33, 127), *range(161, 173), *range(174, 256)]
    shifted = [chr(256 + index) for index in range(256 - len(kept))]
    return [chr(code) for code in kept] + shifted


def _learn_merges(words: list[str]) -> list[tuple[str, str]]:
    """Byte-pair merges, learned until each of the words is one token."""
    spellings = {word: (*word[:-1], f"{word[-1]}</w>") for word in words}
    merges: list[tuple[str, str]] = []
    while True:
        pairs = Counter(pair for parts in spellings.values() for pair in pairwise(parts))
        if not pairs:
            return merges
        # ties by spelling, so that the tokenizer is the same every time
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        for word, parts in spellings.items():
            spellings[word] = _merged(parts, best)


def _merged(parts: tuple[str, ...], pair: tuple[str, str]) -> tuple[str, ...]:
    result: list[str] = []
    position = 0
    while position < len(parts):
        if parts[position : position + 2] == pair:
            result.append(parts[position] + parts[position + 1])
            position += 2
        else:
            result.append(parts[position])
            position += 1
    return tuple(result)


def make_tokenizer(folder: Path) -> CLIPTokenizer:
    """Write vocab.json and merges.txt of our own into `folder` and load them.

    Every word of the world is one token; any other text is spelled in bytes.
    """
    words = sorted({*CONTENT_WORDS, *LITTLE_WORDS, *COLOURS, *SHAPES, *MEDIA})
    merges = _learn_merges(words)
    letters = _byte_alphabet()
    tokens = letters + [f"{letter}</w>" for letter in letters]
    tokens += ["".join(pair) for pair in merges]
    tokens += [START, END]
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = {token: index for index, token in enumerate(tokens)}
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    for name, text in {
        "vocab.json": json.dumps(vocabulary, ensure_ascii=False),
        "merges.txt": "\n".join(lines) + "\n",
    }.items():
        # several processes may write the same at the same time
        temporary = folder / f"{name}.{os.getpid()}"
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(folder / name)
    return CLIPTokenizer.from_pretrained(
        str(folder),
        bos_token=START,
        eos_token=END,
        unk_token=END,
        pad_token=END,
        model_max_length=MAX_TOKENS,
    )
