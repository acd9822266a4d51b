"""Attention scaling against a softmax written out, in every cross-attention of the U-Net."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from utils.attention_scaling import attention_scaled
from utils.mitigations import AttentionScaling
from utils.prompt_tokens import prompt_ids
from utils.stable_diffusion import (
    Conditioning,
    Model,
    encode_prompt,
    encode_unconditional,
    unet_output,
)

CAPTIONS = ("fox", "A small house by the sea", "x" * 100)  # the last one is cut off at 77
TIMESTEP = torch.tensor(961)


class Written:
    """Attention from its definition, head by head: logits of hidden tokens -inf, the begin token's
    multiplied in conditional rows."""

    def __init__(self, lengths: list[int], conditional: list[bool], factor: float) -> None:
        self.lengths, self.conditional, self.factor = lengths, conditional, factor

    def __call__(
        self, attention: Any, pixels: torch.Tensor, encoder_hidden_states: torch.Tensor, **_: Any
    ) -> torch.Tensor:
        query = attention.to_q(pixels)
        key, value = attention.to_k(encoder_hidden_states), attention.to_v(encoder_hidden_states)
        width = query.shape[-1] // attention.heads
        rows = []
        for row in range(len(pixels)):
            heads = []
            for head in range(attention.heads):
                part = slice(head * width, (head + 1) * width)
                logits = query[row, :, part] @ key[row, :, part].T / width**0.5
                if self.conditional[row]:
                    logits[:, 0] *= self.factor
                logits[:, self.lengths[row] :] = -torch.inf
                weights = logits.exp()
                weights = weights / weights.sum(dim=1, keepdim=True)
                heads.append(weights @ value[row, :, part])
            rows.append(torch.cat(heads, dim=1))
        return attention.to_out[0](torch.stack(rows))


def processors(model: Model) -> dict[str, Any]:
    return dict(model.unet.attn_processors)


def hooks(model: Model) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.unet.modules())


def batch(model: Model, guided: bool) -> tuple[torch.Tensor, Conditioning]:
    """Latents and conditioning of one pass over all captions."""
    noise = torch.randn((len(CAPTIONS), 4, 16, 16), generator=torch.Generator().manual_seed(5))
    prompts = Conditioning.cat([encode_prompt(model, caption) for caption in CAPTIONS])
    if not guided:
        return noise, prompts
    unconditional = encode_unconditional(model).repeat(len(CAPTIONS))
    return torch.cat([noise, noise]), Conditioning.cat([unconditional, prompts])


@torch.no_grad()
def written_out(model: Model, settings: AttentionScaling, guided: bool) -> torch.Tensor:
    lengths = [len(caption.replace(" ", "")) + 2 for caption in CAPTIONS]  # a token a character
    lengths = [min(length, 77) - settings.drop_eos for length in lengths]
    halves = 2 if guided else 1
    conditional = [False] * (3 if guided else 0) + [True] * 3
    own = processors(model)
    written = Written(lengths * halves, conditional, settings.factor)
    model.unet.set_attn_processor(
        {name: written if ".attn2." in name else kept for name, kept in own.items()}
    )
    try:
        latents, conditioning = batch(model, guided)
        return unet_output(model, latents, TIMESTEP, conditioning)
    finally:
        model.unet.set_attn_processor(own)


@pytest.mark.parametrize("architecture", ["sd1", "xl"])
@pytest.mark.parametrize(
    ("settings", "guided"),
    [
        (AttentionScaling(), True),
        (AttentionScaling(factor=3.0, drop_eos=True), True),
        (AttentionScaling(factor=3.0), False),
    ],
)
def test_it_is_the_softmax_of_the_definition(
    small_model: Callable[..., Model], architecture: str, settings: AttentionScaling, guided: bool
) -> None:
    model = small_model(architecture)
    latents, conditioning = batch(model, guided)
    lengths = [len(prompt_ids(model, caption)) for caption in CAPTIONS]
    before = hooks(model), processors(model)
    with torch.no_grad():
        plain = unet_output(model, latents, TIMESTEP, conditioning)
        with attention_scaled(model.unet, lengths, settings):
            inside = hooks(model)
            scaled = unet_output(model, latents, TIMESTEP, conditioning)
        after = unet_output(model, latents, TIMESTEP, conditioning)
    reference = written_out(model, settings, guided)
    torch.testing.assert_close(scaled, reference, rtol=0, atol=2e-5)
    assert (scaled - plain).abs().amax() > 10 * (scaled - reference).abs().amax()
    assert torch.equal(after, plain) and (hooks(model), processors(model)) == before
    cross = sum(name.endswith(".attn2") for name, _ in model.unet.named_modules())
    assert inside - before[0] == 2 * cross, "every cross-attention, those of the up blocks too"


def test_a_row_does_not_depend_on_its_neighbours(small_model: Callable[..., Model]) -> None:
    model, settings = small_model("sd1"), AttentionScaling(factor=2.0)
    lengths = [len(prompt_ids(model, caption)) for caption in CAPTIONS]
    latents, conditioning = batch(model, guided=True)
    with torch.no_grad():
        with attention_scaled(model.unet, lengths, settings):
            together = unet_output(model, latents, TIMESTEP, conditioning)
        for row in range(3):
            both = [row, row + 3]
            alone = Conditioning(conditioning.embedding[both], {})
            with attention_scaled(model.unet, lengths[row : row + 1], settings):
                own = unet_output(model, latents[both], TIMESTEP, alone)
            torch.testing.assert_close(own, together[both], rtol=0, atol=1e-5)


def test_nothing_remains_after_an_exception(small_model: Callable[..., Model]) -> None:
    model = small_model("sd1")
    before = hooks(model)
    latents, conditioning = batch(model, guided=True)
    with (
        pytest.raises(ValueError, match="6 batch rows for 4 prompts"),
        attention_scaled(model.unet, [5, 5, 5, 5], AttentionScaling()),
    ):
        unet_output(model, latents, TIMESTEP, conditioning)
    assert hooks(model) == before
