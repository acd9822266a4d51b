"""Value layers: found in forward order, read from text alone, switched off without a trace."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from small_models import ARCHITECTURES, small_pipeline

from utils.errors import InputError
from utils.stable_diffusion import Model, encode_prompt, unet_output
from utils.value_layers import (
    ValueReader,
    deactivated,
    find_value_layers,
    forward_order,
    is_value_layer,
    layer_widths,
)
from utils.versions import stored_layer_widths

WIDTHS = {
    "sd1": [32, 32, 64, 64, 96, 96, 96],
    "sd2": [32, 32, 64, 64, 96, 96, 96],
    "xl": [64] * 4 + [96] * 9,
}
TIMESTEP = torch.tensor(961)


def hooks(model: Model) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.unet.modules())


def some_neurons(model: Model) -> list[list[int]]:
    """A different set of columns in every other layer."""
    widths = layer_widths(model.value_layers)
    return [list(range(l % 3, width, 5)) if l % 2 == 0 else [] for l, width in enumerate(widths)]


def output(model: Model, rows: int = 2, *captions: str) -> torch.Tensor:
    """One U-Net pass on fixed noise; one caption for all rows, or one for each."""
    noise = torch.randn((rows, 4, 16, 16), generator=torch.Generator().manual_seed(5))
    conditioning = encode_prompt(model, "A small house by the sea").repeat(rows)
    return unet_output(model, noise.to(model.dtype), TIMESTEP, conditioning)


class zeroed_rows:  # noqa: N801
    """The model whose rows of `to_v.weight` are multiplied by a factor, as a pruned checkpoint."""

    def __init__(self, model: Model, neurons: list[list[int]], factor: float = 0.0) -> None:
        self.weights = [layer.weight for layer in model.value_layers.values()]
        self.neurons, self.factor = neurons, factor

    def __enter__(self) -> None:
        self.before = [weight.detach().clone() for weight in self.weights]
        with torch.no_grad():
            for weight, columns in zip(self.weights, self.neurons, strict=True):
                weight[columns] *= self.factor

    def __exit__(self, *_: object) -> None:
        with torch.no_grad():
            for weight, before in zip(self.weights, self.before, strict=True):
                weight.copy_(before)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_names_from_the_file_are_those_of_the_walk(
    small_model: Callable[..., Model], small_folder: Callable[[str], Path], architecture: str
) -> None:
    layers = small_model(architecture).value_layers
    walked = list(zip(layers, layer_widths(layers), strict=True))
    assert stored_layer_widths(small_folder(architecture)) == walked
    assert [width for _, width in walked] == WIDTHS[architecture]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_order_is_that_of_the_forward_pass(
    small_model: Callable[..., Model], architecture: str
) -> None:
    """diffusers registers up blocks before the mid block: registration order would be wrong."""
    model = small_model(architecture)
    everything = find_value_layers(model.unet, ("down", "mid", "up"))
    called: list[str] = []
    handles = [
        module.register_forward_hook(lambda *_, name=name: called.append(name))
        for name, module in model.unet.named_modules()
        if name.endswith("attn2.to_v")
    ]
    try:
        output(model)
    finally:
        for handle in handles:
            handle.remove()
    assert list(everything) == called
    registered = [name for name, _ in model.unet.named_modules() if is_value_layer(name)]
    assert registered != called
    searched = [name for name in called if not name.startswith("up")]
    assert list(model.value_layers) == searched
    assert searched[-1].startswith("mid_block") and len(searched) < len(called)


def test_order_is_by_number_not_by_text() -> None:
    names = [
        "up_blocks.1.attentions.0.transformer_blocks.0.attn2.to_v",
        "mid_block.attentions.0.transformer_blocks.10.attn2.to_v",
        "mid_block.attentions.0.transformer_blocks.9.attn2.to_v",
        "down_blocks.2.attentions.0.transformer_blocks.0.attn2.to_v",
        "down_blocks.10.attentions.0.transformer_blocks.0.attn2.to_v",
        "down_blocks.2.attentions.0.transformer_blocks.0.attn1.to_v",
        "down_blocks.2.attentions.0.transformer_blocks.0.attn2.to_k",
        "encoder.attn2.to_v",
    ]
    assert forward_order(names) == [names[3], names[4], names[2], names[1]]
    assert forward_order(names, ("up",)) == [names[0]]


def test_no_value_layers_is_an_error_naming_the_class() -> None:
    with pytest.raises(InputError, match="Sequential has no cross-attention"):
        find_value_layers(torch.nn.Sequential(torch.nn.Linear(2, 2)))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_switching_off_equals_a_pruned_checkpoint(
    small_model: Callable[..., Model], architecture: str
) -> None:
    model = small_model(architecture)
    neurons = some_neurons(model)
    with deactivated(model.value_layers, [neurons]):
        hooked = output(model)
    with zeroed_rows(model, neurons):
        pruned = output(model)
    assert torch.equal(hooked, pruned)
    assert not torch.equal(hooked, output(model))


@pytest.mark.parametrize("factor", [-0.5, 0.75, 2.0, -1.0])
def test_factor_scales_columns(small_model: Callable[..., Model], factor: float) -> None:
    model = small_model("sd1")
    neurons = some_neurons(model)
    with deactivated(model.value_layers, [neurons], factor=factor):
        hooked = output(model)
    with zeroed_rows(model, neurons, factor):
        scaled = output(model)
    torch.testing.assert_close(hooked, scaled, atol=1e-5, rtol=1e-4)
    with deactivated(model.value_layers, [neurons]):
        assert not torch.allclose(hooked, output(model), atol=1e-4)


def test_every_token_of_a_neuron_and_nothing_else_changes(
    small_model: Callable[..., Model],
) -> None:
    model = small_model("sd1")
    name, layer = next(iter(model.value_layers.items()))
    text = torch.randn(3, 77, layer.in_features)
    before = layer(text)
    with deactivated(model.value_layers, [[[1, 30], *[[]] * 6]], factor=-0.5):
        after = layer(text)
    expected = before.clone()
    expected[:, :, [1, 30]] *= -0.5
    assert torch.equal(after, expected), name


def test_hooks_are_there_inside_and_gone_outside(small_model: Callable[..., Model]) -> None:
    model = small_model("sd1")
    layers, neurons = model.value_layers, some_neurons(model)
    touched = sum(bool(columns) for columns in neurons)
    assert 0 < touched < len(neurons)
    before = output(model)
    assert hooks(model) == 0
    for _ in range(3):
        with deactivated(layers, [neurons]):
            assert hooks(model) == touched
        assert hooks(model) == 0
    assert torch.equal(output(model), before)
    with deactivated(layers, [[[] for _ in layers]]):
        assert hooks(model) == 0
        assert torch.equal(output(model), before)


def test_hooks_are_gone_after_an_exception(small_model: Callable[..., Model]) -> None:
    model = small_model("sd1")
    with pytest.raises(KeyError), deactivated(model.value_layers, [some_neurons(model)]):
        raise KeyError
    assert hooks(model) == 0


def test_hooks_are_gone_after_a_set_that_does_not_fit(small_model: Callable[..., Model]) -> None:
    """The first layers have their hooks when the last one's column turns out not to exist."""
    model = small_model("sd1")
    neurons = [[0], [], [], [], [], [], [10_000]]
    with pytest.raises(IndexError), deactivated(model.value_layers, [neurons]):
        pass
    assert hooks(model) == 0


def test_contexts_nest(small_model: Callable[..., Model]) -> None:
    """The inner one adds to the outer one, and takes only its own away."""
    model = small_model("sd1")
    layers = model.value_layers
    one, other, union = ([[] for _ in layers] for _ in range(3))
    one[0], other[0], other[6], union[0], union[6] = [1, 2], [2, 3], [4], [1, 2, 3], [4]
    with deactivated(layers, [union]):
        expected = output(model)
    with deactivated(layers, [one]):
        alone = output(model)
        with deactivated(layers, [other]):
            assert torch.equal(output(model), expected)
        assert torch.equal(output(model), alone)
    with deactivated(layers, [one], factor=0.5), deactivated(layers, [one], factor=0.5):
        twice = output(model)
    with deactivated(layers, [one], factor=0.25):
        assert torch.equal(output(model), twice)


@pytest.mark.parametrize("halves", [1, 2])
def test_a_set_for_each_row_in_both_halves_of_guidance(
    small_model: Callable[..., Model], halves: int
) -> None:
    """Batch row r has set r mod S. Rows that share one must not see another's."""
    model = small_model("sd1")
    nothing: list[list[int]] = [[] for _ in model.value_layers]
    sets = [some_neurons(model), nothing, [[0, 7], *nothing[1:]]]
    with deactivated(model.value_layers, sets):
        together = output(model, 3 * halves)
    noise = torch.randn((3 * halves, 4, 16, 16), generator=torch.Generator().manual_seed(5))
    conditioning = encode_prompt(model, "A small house by the sea")
    for row in range(3 * halves):
        with deactivated(model.value_layers, [sets[row % 3]]):
            alone = unet_output(model, noise[row : row + 1], TIMESTEP, conditioning)
        torch.testing.assert_close(together[row : row + 1], alone, atol=1e-5, rtol=0)
    assert (together - output(model, 3 * halves)).abs().amax(dim=(1, 2, 3))[0] > 1e-4


@pytest.mark.parametrize("halves", [1, 2])
def test_a_set_for_several_rows_is_that_set_for_each(
    small_model: Callable[..., Model], halves: int
) -> None:
    model = small_model("sd1")
    first, second = some_neurons(model), [[0, 7], *([] for _ in list(model.value_layers)[1:])]
    with deactivated(model.value_layers, [first, first, second, second], factor=0.5):
        expected = output(model, 4 * halves)
    with deactivated(model.value_layers, [first, second], each=2, factor=0.5):
        assert torch.equal(output(model, 4 * halves), expected)


def test_batch_that_is_no_multiple_of_the_sets_is_refused(
    small_model: Callable[..., Model],
) -> None:
    model = small_model("sd1")
    sets = [some_neurons(model)] * 3
    with (
        pytest.raises(ValueError, match="4 batch rows for 3 neuron sets"),
        deactivated(model.value_layers, sets),
    ):
        output(model, 4)
    assert hooks(model) == 0


def test_half_precision_masks_do_not_change_the_dtype(small_model: Callable[..., Model]) -> None:
    model = small_model("sd1", "bfloat16")
    neurons = some_neurons(model)
    layer = next(iter(model.value_layers.values()))
    with deactivated(model.value_layers, [neurons]):
        values = layer(torch.ones(1, 2, 32, dtype=torch.bfloat16))
    assert values.dtype == torch.bfloat16
    assert (values[..., neurons[0]] == 0).all() and (values != 0).any()


class LowRank(torch.nn.Module):
    """A wrapper of one's own around a linear layer, as LoRA libraries put there."""

    def __init__(self, base: torch.nn.Linear) -> None:
        super().__init__()
        self.base_layer = base
        self.out_features = base.out_features
        generator = torch.Generator().manual_seed(0)
        self.down = torch.nn.Parameter(torch.randn(2, base.in_features, generator=generator))
        self.up = torch.nn.Parameter(torch.randn(base.out_features, 2, generator=generator))

    def forward(self, text: torch.Tensor) -> torch.Tensor:
        return self.base_layer(text) + text @ self.down.T @ self.up.T


@pytest.fixture
def unet_with_wrappers() -> Iterator[torch.nn.Module]:
    unet = small_pipeline("sd1", seed=3).unet.eval().requires_grad_(False)
    for name, layer in find_value_layers(unet, ("down", "mid", "up")).items():
        parent = unet.get_submodule(name.rpartition(".")[0])
        parent.to_v = LowRank(layer)
    yield unet


def test_a_wrapper_on_top_is_the_layer(unet_with_wrappers: torch.nn.Module) -> None:
    """What attention sees is the wrapper's output: that is read, and that is switched off."""
    layers = find_value_layers(unet_with_wrappers)
    assert all(isinstance(layer, LowRank) for layer in layers.values())
    assert layer_widths(layers) == WIDTHS["sd1"]
    text = torch.randn(77, 32)
    read = ValueReader(layers).activations(text)
    for layer, activation in zip(layers.values(), read, strict=True):
        torch.testing.assert_close(activation, layer(text).abs().mean(dim=0))
        assert not torch.allclose(activation, layer.base_layer(text).abs().mean(dim=0))
    neurons = [[0, 5], [], [], [], [], [], [95]]
    with deactivated(layers, [neurons]):
        for layer, columns in zip(layers.values(), neurons, strict=True):
            values = layer(text[None])
            assert (values[..., columns] == 0).all() and (values != 0).any()


def test_lora_of_peft_on_top() -> None:
    """The LoRA library of diffusers: the adapter's share of a column is switched off too."""
    peft = pytest.importorskip("peft", reason="peft is not installed: no LoRA to put on top")
    unet = small_pipeline("sd1", seed=3).unet.eval()
    plain = find_value_layers(unet)
    unet.add_adapter(peft.LoraConfig(r=2, target_modules=["to_v"], init_lora_weights=False))
    unet.requires_grad_(False)
    layers = find_value_layers(unet)
    assert list(layers) == list(plain) and layer_widths(layers) == WIDTHS["sd1"]
    text = torch.randn(1, 77, 32)
    wrapper = layers["mid_block.attentions.0.transformer_blocks.0.attn2.to_v"]
    assert not torch.allclose(wrapper(text), wrapper.base_layer(text))
    read = ValueReader(layers).activations(text[0])
    torch.testing.assert_close(read[6], wrapper(text[0]).abs().mean(dim=0))
    with deactivated(layers, [[[], [], [], [], [], [], [3, 50]]]):
        values = wrapper(text)
    assert (values[..., [3, 50]] == 0).all()
    assert torch.equal(values[..., :3], wrapper(text)[..., :3])


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_activations_are_those_of_a_pass(
    small_model: Callable[..., Model], architecture: str
) -> None:
    """Read from the embedding alone, they equal what the layers put out within a U-Net pass."""
    model = small_model(architecture)
    conditioning = encode_prompt(model, "A small house by the sea")
    seen: list[torch.Tensor] = []
    handles = [
        layer.register_forward_hook(lambda module, args, out: seen.append(out))
        for layer in model.value_layers.values()
    ]
    try:
        output(model, 1)
    finally:
        for handle in handles:
            handle.remove()
    read = ValueReader(model.value_layers).activations(conditioning.embedding[0])
    assert len(read) == len(seen)
    for activation, values in zip(read, seen, strict=True):
        assert values.shape[1] == 77  # padding tokens count
        expected = values[0].double().abs().mean(dim=0)
        torch.testing.assert_close(activation.double(), expected, atol=1e-6, rtol=1e-5)


def test_activations_are_float32_whatever_the_unet(small_model: Callable[..., Model]) -> None:
    """The values are read in the weights' full precision, not in the U-Net's."""
    half, full = small_model("sd1", "bfloat16"), small_model("sd1")
    text = encode_prompt(half, "caption").embedding[0]
    assert text.dtype == torch.float32
    assert torch.equal(text, encode_prompt(full, "caption").embedding[0])
    assert all(layer.weight.dtype == torch.bfloat16 for layer in half.value_layers.values())
    for read, expected in zip(
        half.value_reader.activations(text), full.value_reader.activations(text), strict=True
    ):
        assert torch.equal(read, expected)
