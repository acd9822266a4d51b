"""Prompts changed by chance (Somepalli et al., NeurIPS 2023): inserted words, or noise on the
embedding. Public: ``ordinary_ids``, ``with_random_words``, ``with_noise``.
"""

import random
import re
from dataclasses import replace
from typing import Any

import torch

from utils.embedding_attack import generator_of
from utils.mitigations import RandomWords
from utils.stable_diffusion import Conditioning

NUMBERS = 100_000  # 0 .. 99999


def ordinary_ids(tokenizer: Any) -> list[int]:
    """All ids of the vocabulary, rising, without begin, end, padding and the like."""
    return sorted(set(tokenizer.get_vocab().values()) - set(tokenizer.all_special_ids))


def _inserted(caption: str, word: str, generator: random.Random) -> str:
    """A word in one of the gaps between the caption's words, before the first and behind the last
    included; the rest of the caption as it stands."""
    spans = [match.span() for match in re.finditer(r"\S+", caption)]
    gap = generator.randrange(len(spans) + 1)
    if gap < len(spans):
        start = spans[gap][0]
        return f"{caption[:start]}{word} {caption[start:]}"
    end = spans[-1][1] if spans else 0
    return f"{caption[:end]} {word}{caption[end:]}"


def with_random_words(caption: str, settings: RandomWords, tokenizer: Any, seed: str) -> str:
    """The caption with ``settings.count`` words more, one after another, each in a gap drawn
    uniformly. A token is drawn from the ordinary ids, anew where it is nothing but a blank, and
    inserted as its text, which the tokenizer may cut into other tokens. ``seed`` is this prompt's
    own."""
    generator = random.Random(seed)
    own_words = caption.split()
    ids = ordinary_ids(tokenizer) if settings.kind == "tokens" else []
    changed = caption
    for _ in range(settings.count):
        if settings.kind == "tokens":
            word = ""
            while not word:
                word = tokenizer.decode([generator.choice(ids)]).strip()
        elif settings.kind == "numbers":
            word = str(generator.randrange(NUMBERS))
        else:
            word = generator.choice(own_words)
        changed = _inserted(changed, word, generator)
    return changed


def with_noise(conditioning: Conditioning, std: float, seed: str) -> Conditioning:
    """One prompt (B = 1) with Gaussian noise of this deviation on every value of its embedding, the
    same for all its pictures; SDXL's pooled embeddings stay as they are."""
    noise = torch.randn(conditioning.embedding.shape, generator=generator_of(seed))
    embedding = conditioning.embedding + std * noise.to(conditioning.embedding.device)
    return replace(conditioning, embedding=embedding)
