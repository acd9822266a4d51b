"""The tokens of a caption, as the text encoder sees them, and the words they make up.

Public: ``prompt_ids``, ``token_scores``, ``joined_words``.
"""

import math
from collections.abc import Sequence

import torch

from utils.localization import UndecidedError
from utils.stable_diffusion import Conditioning, Model, encode_prompt
from utils.text_conditional_noise import token_gradients

END_OF_WORD = "</w>"  # how CLIP's tokenizers mark the last token of a word


def prompt_ids(model: Model, caption: str) -> list[int]:
    """Token ids with begin and end of text, cut off at the tokenizer's length, without padding:
    position i of the embedding is that of id i."""
    tokenizer = model.pipeline.tokenizer
    encoded = tokenizer(caption, truncation=True, max_length=tokenizer.model_max_length)
    return list(encoded["input_ids"])


def token_scores(
    model: Model,
    caption: str,
    unconditional: Conditioning,
    noise: torch.Tensor,
    *,
    steps: int,
    guidance_scale: float,
    batch_size: int | None = None,
) -> list[tuple[str, float]]:
    """Wen's attribution of one prompt (see ``text_conditional_noise.token_gradients``): each token
    as the vocabulary writes it, and its score, without begin and end of text and padding. Raises
    UndecidedError for a score that is not finite."""
    scores = token_gradients(
        model,
        encode_prompt(model, caption),
        unconditional,
        noise,
        steps=steps,
        guidance_scale=guidance_scale,
        batch_size=batch_size,
    ).tolist()
    shown = prompt_ids(model, caption)[1:-1]
    tokens = model.pipeline.tokenizer.convert_ids_to_tokens(shown)
    found = list(zip(tokens, scores[1 : 1 + len(shown)], strict=True))
    if not all(math.isfinite(score) for _, score in found):
        raise UndecidedError("a score is not finite")
    return found


def joined_words(
    model: Model, tokens: Sequence[str], scores: Sequence[float]
) -> list[tuple[str, float]]:
    """Tokens with their scores -> the words they make up, in order, each with the largest score of
    its tokens (a sum would make long words important)."""
    tokenizer = model.pipeline.tokenizer
    words: list[tuple[str, float]] = []
    start = 0
    for end, token in enumerate(tokens, start=1):
        if token.endswith(END_OF_WORD) or end == len(tokens):
            ids = tokenizer.convert_tokens_to_ids(list(tokens[start:end]))
            text = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
            words.append((text.strip(), max(scores[start:end])))
            start = end
    return words
