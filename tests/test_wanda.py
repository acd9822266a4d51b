"""Wanda's norms and masks against plain loops; the weights come back to the bit."""

import math
from collections.abc import Callable

import pytest
import torch
from diffusers import DDIMScheduler

from utils.errors import InputError
from utils.files import Prompt
from utils.mitigations import Wanda
from utils.stable_diffusion import (
    Conditioning,
    Model,
    encode_prompt,
    encode_unconditional,
    initial_noise,
    unet_output,
)
from utils.wanda import activation_norms, feed_forwards, locate, pruned, weights_to_mask

SETTINGS = Wanda(share=0.02, steps=2)
MEMORIZED = [Prompt(0, "Sleepy fox beneath a maple"), Prompt(7, "Copper kettle, enamel sign")]


def norms(model: Model, conditionings: list[Conditioning]) -> tuple[list[torch.Tensor], list[int]]:
    return activation_norms(
        model,
        conditionings,
        encode_unconditional(model),
        initial_noise(model, 1, 2),
        SETTINGS,
        steps=5,
        guidance_scale=7.0,
    )


@torch.no_grad()
def norms_by_hand(model: Model, captions: list[str]) -> dict[str, torch.Tensor]:
    """Guided sampling with diffusers' parts; what leaves each GEGLU is added up token by token."""
    unet = model.pipeline.unet
    seen: dict[str, list[torch.Tensor]] = {}
    handles = [
        module.register_forward_hook(
            lambda _m, _i, out, name=name: seen.setdefault(name, []).append(out)
        )
        for name, module in unet.named_modules()
        if type(module).__name__ == "GEGLU"
    ]
    sums: dict[str, torch.Tensor] = {}
    for caption in captions:
        scheduler = DDIMScheduler.from_config(model.pipeline.scheduler.config)
        scheduler.set_timesteps(5)
        latents = torch.randn((1, 4, 16, 16), generator=torch.Generator().manual_seed(2))
        embeddings = [encode_prompt(model, caption), encode_unconditional(model)]
        for step, timestep in enumerate(scheduler.timesteps[: SETTINGS.steps]):
            e_u = unet(latents, timestep, encoder_hidden_states=embeddings[1].embedding).sample
            seen.clear()
            e_c = unet(latents, timestep, encoder_hidden_states=embeddings[0].embedding).sample
            for name, (z,) in seen.items():
                total = sums.setdefault(name, torch.zeros(SETTINGS.steps, z.shape[-1]).double())
                for token in z[0]:
                    total[step] += (token.double() / token.double().norm()) ** 2
            latents = scheduler.step(e_u + 7 * (e_c - e_u), timestep, latents).prev_sample
    for handle in handles:
        handle.remove()
    return {name: (total / len(captions)).sqrt() for name, total in sums.items()}


def test_norms_are_those_of_a_plain_loop(small_model: Callable[..., Model]) -> None:
    model = small_model("sd1")
    captions = [prompt.caption for prompt in MEMORIZED]
    found, left_out = norms(model, [encode_prompt(model, caption) for caption in captions])
    expected = norms_by_hand(model, captions)
    names = [name.replace(".net.2", ".net.0") for name in feed_forwards(model.unet)]
    assert len(names) == len(expected) == 16, "every transformer, those of the up blocks too"
    assert left_out == []
    for name, layer in zip(names, found, strict=True):
        assert layer.shape == expected[name].shape
        torch.testing.assert_close(layer, expected[name], rtol=1e-4, atol=1e-6, msg=name)


def test_the_number_of_prompts_and_what_is_not_finite_do_not_matter(
    small_model: Callable[..., Model],
) -> None:
    model = small_model("sd1")
    fox = encode_prompt(model, "fox")
    broken = Conditioning(torch.full_like(fox.embedding, torch.nan), {})
    once, _ = norms(model, [fox])
    often, left_out = norms(model, [fox, broken, fox, fox])
    assert left_out == [1]
    for a, b in zip(once, often, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=0)
    with pytest.raises(InputError, match="no prompt has finite activations"):
        norms(model, [broken])


@pytest.mark.parametrize("share", [0.001, 0.05, 0.3, 1.0])
def test_the_mask_is_that_of_a_plain_loop(share: float) -> None:
    rows, width, steps = 7, 40, 3
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn((rows, width), generator=generator)
    memorized, base = torch.rand((2, steps, width), generator=generator).double()
    weight[2] = 0
    expected = torch.zeros(rows, width, dtype=torch.bool)
    for step in range(steps):
        for i in range(rows):
            scores = [abs(float(weight[i, j])) * float(memorized[step, j]) for j in range(width)]
            best = sorted(range(width), key=lambda j: -scores[j])[: int(share * width)]
            for j in best:
                if scores[j] > abs(float(weight[i, j])) * float(base[step, j]):
                    expected[i, j] = True
    assert torch.equal(weights_to_mask(weight, memorized, base, share), expected)
    assert expected.any() == (share > 0.01) and not expected[2].any()


def test_masked_weights_are_zero_in_the_block_and_untouched_after_it(
    small_model: Callable[..., Model],
) -> None:
    model = small_model("sd1")
    masks, found = locate(
        model,
        SETTINGS,
        MEMORIZED,
        [],
        encode_unconditional(model),
        initial_noise(model, 1, 2),
        steps=5,
        guidance_scale=7.0,
    )
    own = norms_by_hand(model, [prompt.caption for prompt in MEMORIZED])
    empty = norms_by_hand(model, [""])
    assert [layer for layer, _ in masks] == list(feed_forwards(model.unet).values())
    agreed = 0.0
    for (layer, mask), name in zip(masks, feed_forwards(model.unet), strict=True):
        a, b = (norms[name.replace(".net.2", ".net.0")] for norms in (own, empty))
        expected = weights_to_mask(layer.weight, a, b, SETTINGS.share)
        agreed += float((mask == expected).double().mean()) / len(masks)
        assert mask.sum() <= SETTINGS.steps * math.floor(0.02 * mask.shape[1]) * mask.shape[0]
    assert agreed > 0.9999
    assert found == {
        "masked_weights": sum(int(mask.sum()) for _, mask in masks),
        "of_weights": sum(layer.weight.numel() for layer, _ in masks),
        "memorized_prompts": 2,
        "left_out_rows": [],
        "left_out_base_rows": [],
    }

    before = [layer.weight.clone() for layer, _ in masks]
    noise, text = initial_noise(model, 1, 3), encode_prompt(model, MEMORIZED[0].caption)
    with torch.no_grad():
        plain = unet_output(model, noise, torch.tensor(981), text)
        with pytest.raises(RuntimeError, match="inside"), pruned(masks):
            for (layer, mask), weight in zip(masks, before, strict=True):
                assert torch.equal(layer.weight, torch.where(mask, 0.0, weight))
            assert not torch.equal(unet_output(model, noise, torch.tensor(981), text), plain)
            raise RuntimeError("inside")
        assert torch.equal(unet_output(model, noise, torch.tensor(981), text), plain)
    for (layer, _), weight in zip(masks, before, strict=True):
        assert torch.equal(layer.weight, weight)


def test_a_share_that_leaves_nothing_is_refused(small_model: Callable[..., Model]) -> None:
    model = small_model("sd1")
    with pytest.raises(InputError, match="share 1e-05 of a row leaves no weight"):
        locate(
            model,
            Wanda(share=1e-5, steps=1),
            MEMORIZED[:1],
            [],
            encode_unconditional(model),
            initial_noise(model, 1, 2),
            steps=5,
            guidance_scale=1.0,
        )


def test_ties_at_the_border_all_count() -> None:
    ones, nothing = torch.ones(1, 4), torch.zeros(1, 4)
    assert weights_to_mask(ones, ones, nothing, 0.25).sum() == 4


def test_a_share_is_not_rounded_down_by_floating_point() -> None:
    """0.29 * 100 is a little less than 29."""
    weight, norms = torch.arange(1.0, 101)[None], torch.ones(1, 100)
    assert weights_to_mask(weight, norms, torch.zeros(1, 100), 0.29).sum() == 29
