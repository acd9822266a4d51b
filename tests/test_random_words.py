"""Random words and noise: what is drawn, where it goes, and that nothing else changes."""

from collections import Counter
from collections.abc import Callable
from typing import ClassVar

import pytest
import torch
from small_models import small_tokenizer

from utils.mitigations import RandomWords
from utils.random_words import ordinary_ids, with_noise, with_random_words
from utils.stable_diffusion import Model, encode_prompt

CAPTION = " Copper kettle,  enamel sign "
WORDS = CAPTION.split()
DRAWS = 3000


def insertions(kind: str) -> list[tuple[int, str]]:
    """(gap, word) of one insertion, for many seeds; the caption around it must be untouched."""
    tokenizer, found = small_tokenizer(), []
    for seed in range(DRAWS):
        changed = with_random_words(CAPTION, RandomWords(kind, 1), tokenizer, f"0/{seed}")
        words = changed.split()
        gap = next(g for g in range(5) if words[:g] + words[g + 1 :] == WORDS)
        rest = words[gap] + " " if gap < 4 else " " + words[gap]
        starts = [i for i in range(len(changed)) if changed[i:].startswith(rest)]
        assert CAPTION in {changed[:i] + changed[i + len(rest) :] for i in starts}
        found.append((gap, words[gap]))
    return found


def assert_uniform(counts: Counter, kinds: int) -> None:
    """No count further than five deviations from an equal share."""
    share = DRAWS / kinds
    assert len(counts) == kinds
    assert all(abs(count - share) < 5 * share**0.5 for count in counts.values()), counts


def test_a_token_is_an_ordinary_id_in_a_gap_drawn_uniformly() -> None:
    tokenizer = small_tokenizer()
    special = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}
    ids = ordinary_ids(tokenizer)
    assert ids == [i for i in range(len(tokenizer)) if i not in special]
    drawn = insertions("tokens")
    texts = Counter(word for _, word in drawn)
    # printable characters, each at an id of its own and at another for the end of a word
    assert set(texts) == {chr(code) for code in range(33, 127)}
    for text in texts:
        assert tokenizer(text)["input_ids"][1] in ids
    assert_uniform(texts, 94)
    assert_uniform(Counter(gap for gap, _ in drawn), 5)


def test_a_token_that_is_a_blank_is_drawn_anew() -> None:
    """A vocabulary has the bytes of blanks, too: inserted, such a token would change nothing."""

    class Blanks:
        all_special_ids: ClassVar[list[int]] = []
        texts = ("\t", " ", "word")

        def get_vocab(self) -> dict[str, int]:
            return {text: number for number, text in enumerate(self.texts)}

        def decode(self, ids: list[int]) -> str:
            return self.texts[ids[0]]

    for seed in range(20):
        changed = with_random_words("one", RandomWords("tokens", 2), Blanks(), f"0/{seed}")
        assert sorted(changed.split()) == ["one", "word", "word"]


def test_a_number_is_one_of_a_hundred_thousand() -> None:
    numbers = [int(word) for _, word in insertions("numbers")]
    assert min(numbers) >= 0 and max(numbers) <= 99_999
    assert_uniform(Counter(number // 10_000 for number in numbers), 10)


def test_a_repeated_word_is_one_of_the_prompts_own() -> None:
    assert_uniform(Counter(word for _, word in insertions("words")), 4)


@pytest.mark.parametrize("kind", ["tokens", "numbers", "words"])
def test_as_many_as_asked_for_and_the_same_for_the_same_seed(kind: str) -> None:
    tokenizer, settings = small_tokenizer(), RandomWords(kind)
    first, again, other = (
        with_random_words(CAPTION, settings, tokenizer, seed) for seed in ("0/3", "0/3", "0/4")
    )
    assert first == again != other
    assert len(first.split()) == len(WORDS) + 4
    left = iter(first.split())
    assert all(word in left for word in WORDS), "the prompt's words are there, in order"


@pytest.mark.parametrize("architecture", ["sd1", "xl"])
def test_noise_is_gaussian_and_the_prompts_own(
    small_model: Callable[..., Model], architecture: str
) -> None:
    plain = encode_prompt(small_model(architecture), "fox")
    first, again, other = (with_noise(plain, 0.1, seed) for seed in ("0/3", "0/3", "0/4"))
    assert torch.equal(first.embedding, again.embedding)
    assert not torch.equal(first.embedding, other.embedding)
    assert all(torch.equal(first.added[name], plain.added[name]) for name in plain.added)
    noise = (first.embedding - plain.embedding).flatten().double()
    assert abs(noise.mean()) < 5 * 0.1 / len(noise) ** 0.5
    assert abs(noise.std() - 0.1) < 5 * 0.1 / (2 * len(noise)) ** 0.5
    assert torch.equal(plain.embedding, encode_prompt(small_model(architecture), "fox").embedding)
