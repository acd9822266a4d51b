"""The tokens of a caption, as the text encoder sees them, and the words they make up.

Public: ``prompt_ids``, ``token_texts``, ``joined_words``.
"""

from collections.abc import Sequence

from utils.stable_diffusion import Model

END_OF_WORD = "</w>"  # how CLIP's tokenizers mark the last token of a word


def prompt_ids(model: Model, caption: str) -> list[int]:
    """Token ids with begin and end of text, cut off at the tokenizer's length, without padding:
    position i of the embedding is that of id i."""
    tokenizer = model.pipeline.tokenizer
    encoded = tokenizer(caption, truncation=True, max_length=tokenizer.model_max_length)
    return list(encoded["input_ids"])


def token_texts(model: Model, ids: Sequence[int]) -> list[str]:
    """Each token as the tokenizer's vocabulary writes it."""
    return list(model.pipeline.tokenizer.convert_ids_to_tokens(list(ids)))


def joined_words(
    model: Model, tokens: Sequence[str], scores: Sequence[float]
) -> list[tuple[str, float]]:
    """Tokens with their scores -> the words they make up, in order, each with the largest score of
    its tokens (a sum would make long words important)."""
    words: list[tuple[str, float]] = []
    start = 0
    for end, token in enumerate(tokens, start=1):
        if token.endswith(END_OF_WORD) or end == len(tokens):
            text = model.pipeline.tokenizer.convert_tokens_to_string(list(tokens[start:end]))
            words.append((text.strip(), max(scores[start:end])))
            start = end
    return words
