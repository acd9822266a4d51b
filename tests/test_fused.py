"""Fused kernels against torch's and diffusers' own layers: interpreted on a CPU, real on a GPU."""

import copy
import importlib
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import UNETS
from torch import Tensor, nn

from utils import passes
from utils.passes import Graphs, Hooks
from utils.replay import Replay
from utils.stable_diffusion import settle_layout
from utils.value_layers import deactivated, find_value_layers

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Interpreting a kernel takes a millisecond a program: as narrow and short as the structure allows.
NARROW: dict[str, Any] = {
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "cross_attention_dim": 8,
    "sample_size": 4,
}
SHORT = {
    "sd1": {
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    },
    "xl": {
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2),
        "attention_head_dim": (1, 2),
        "projection_class_embeddings_input_dim": 16 + 6 * 8,
    },
}


@pytest.fixture(scope="module")
def fused() -> ModuleType:
    pytest.importorskip("triton", reason="Triton comes with torch's CUDA build")
    return importlib.import_module("utils.fused")


def drawn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(DEVICE, dtype)


def with_drawn_weights(norm: Any) -> Any:
    norm.weight.data, norm.bias.data = (drawn(len(norm.bias), seed=seed).cpu() for seed in (1, 2))
    return norm.to(DEVICE).requires_grad_(False)


def close(found: Tensor, wanted: Tensor, tolerance: float = 1e-5) -> bool:
    return bool((found - wanted).abs().max() <= tolerance * wanted.abs().max())


@settings(max_examples=12, deadline=None)
@given(
    rows=st.integers(1, 3),
    groups=st.integers(1, 3),
    each=st.sampled_from([1, 5, 24]),
    size=st.sampled_from([(1, 2), (3, 5), (16, 8), (12, 11)]),  # below, at and above one tile
    extra=st.tuples(st.booleans(), st.booleans(), st.booleans()),
)
def test_group_norm_is_that_of_torch(
    fused: ModuleType,
    rows: int,
    groups: int,
    each: int,
    size: tuple[int, int],
    extra: tuple[bool, bool, bool],
) -> None:
    channels = groups * each
    norm = with_drawn_weights(nn.GroupNorm(groups, channels, eps=1e-3))
    x = drawn(rows, channels, *size)
    of_row, of_channel = drawn(rows, channels, seed=3), drawn(channels, seed=4)
    wanted = x
    if extra[0]:
        wanted = wanted + of_row[:, :, None, None]
    if extra[1]:
        wanted = wanted + of_channel[:, None, None]
    wanted = norm(wanted)
    if extra[2]:
        wanted = F.silu(wanted)
    found = fused.group_norm(
        x,
        norm,
        silu=extra[2],
        of_row=of_row if extra[0] else None,
        of_channel=of_channel if extra[1] else None,
    )
    assert close(found, wanted, 1e-4) and found.is_contiguous(memory_format=torch.channels_last)


def test_a_large_mean_costs_no_digits(fused: ModuleType) -> None:
    norm, x = with_drawn_weights(nn.GroupNorm(2, 8)), drawn(2, 8, 24, 22) - 300
    assert close(fused.group_norm(x, norm), norm(x), 5e-4)


@pytest.mark.parametrize("width", [5, 40, 300])
def test_layer_norm_is_that_of_torch(fused: ModuleType, width: int) -> None:
    norm, x = with_drawn_weights(nn.LayerNorm(width)), drawn(2, 19, width) + 7
    assert close(fused.layer_norm(x, norm), norm(x))


@pytest.mark.parametrize("width", [3, 256, 300])
def test_geglu_is_that_of_torch(fused: ModuleType, width: int) -> None:
    x = drawn(2, 19, 2 * width)
    values, gate = x.chunk(2, dim=-1)
    assert close(fused.geglu(x), values * F.gelu(gate))


def test_add_adds_all_three(fused: ModuleType) -> None:
    a, b, bias = drawn(2, 70, 12, 11), drawn(2, 70, 12, 11, seed=1), drawn(70, seed=2)
    assert close(fused.add(a, b, bias), a + b + bias[:, None, None])


def test_half_precision_is_rounded_once(fused: ModuleType) -> None:
    norm, x = with_drawn_weights(nn.GroupNorm(2, 8)), drawn(2, 8, 12, 11, dtype=torch.float16)
    exact = F.silu(norm(x.float()))
    found = fused.group_norm(x, copy.deepcopy(norm).half(), silu=True).float()
    spacing = 2.0 ** (exact.abs().clamp(min=2**-14).log2().floor() - 10)
    weights = 2**-11 * (exact.abs() + 1) * 2  # weight and bias are rounded too
    assert bool(((found - exact).abs() <= spacing / 2 + weights).all())


def test_rows_do_not_depend_on_each_other(fused: ModuleType) -> None:
    norm, x = with_drawn_weights(nn.GroupNorm(2, 8)), drawn(3, 8, 12, 11)
    layer, tokens = with_drawn_weights(nn.LayerNorm(8)), drawn(3, 19, 8)
    assert torch.equal(fused.group_norm(x, norm)[1], fused.group_norm(x[1:2], norm)[0])
    assert torch.equal(fused.layer_norm(tokens, layer)[1], fused.layer_norm(tokens[1:2], layer)[0])
    assert torch.equal(fused.geglu(tokens)[1], fused.geglu(tokens[1:2])[0])


# A whole U-Net.


@pytest.fixture(scope="module", params=SHORT)
def pair(request: pytest.FixtureRequest, fused: ModuleType) -> tuple[Any, Any]:
    """A U-Net and its fused copy."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        settings = {**UNETS[request.param], **NARROW, **SHORT[request.param]}
        plain: Any = UNet2DConditionModel(**settings)
    for name, parameter in plain.named_parameters():
        if "norm" in name or name.endswith("bias"):  # else they are ones and zeros
            parameter.data += 0.3 * torch.randn(
                parameter.shape, generator=torch.Generator().manual_seed(len(name))
            )
    plain.eval().requires_grad_(False).to(DEVICE)
    fast = copy.deepcopy(plain)
    fused.fuse(fast)
    return plain, fast


def passed(unet: Any, text: Tensor | None = None, rows: int = 2) -> Tensor:
    added = {"text_embeds": drawn(rows, 16, seed=8), "time_ids": drawn(rows, 6, seed=9).abs()}
    output: Tensor = unet(
        drawn(rows, 4, 4, 4),
        torch.tensor(961),
        encoder_hidden_states=drawn(rows, 5, 8, seed=1) if text is None else text,
        added_cond_kwargs=added,
        return_dict=False,
    )[0]
    return output


def test_a_fused_unet_predicts_the_same(pair: tuple[Any, Any]) -> None:
    plain, fast = pair
    assert close(passed(fast), passed(plain))


def test_what_can_be_fused_is_fused(pair: tuple[Any, Any], fused: ModuleType) -> None:
    kinds = {type(module).__name__ for module in pair[1].modules()}
    assert kinds >= {"_GroupNorm", "_LayerNorm", "_GEGLU", "_Resnet", "_Transformer"}
    assert not kinds & {"GroupNorm", "LayerNorm", "GEGLU", "ResnetBlock2D", "Transformer2DModel"}
    assert {type(p).__name__ for p in pair[1].attn_processors.values()} == {"_Attention"}
    assert pair[0].state_dict().keys() == pair[1].state_dict().keys()


def test_masks_and_replay_work_on_a_fused_unet(pair: tuple[Any, Any]) -> None:
    plain, fast = pair
    layers, own = find_value_layers(fast), find_value_layers(plain)
    neurons: list[list[int]] = [[] for _ in layers]
    neurons[-1] = [0, 3]
    replay = Replay(fast, layers, lambda: passed(fast))
    with replay.recording(rows=2, halves=1) as recording:
        unblocked = passed(fast)
    with deactivated(layers, [neurons]), deactivated(own, [neurons]):
        blocked, wanted = passed(fast), passed(plain)
        with replay.replaying(recording, len(layers) - 1, [0, 1]):
            replayed = passed(fast)
    assert close(blocked, wanted) and not torch.equal(blocked, unblocked)
    assert torch.equal(replayed, blocked)


def test_gradients_are_those_of_diffusers(pair: tuple[Any, Any]) -> None:
    gradients = []
    for unet in pair:
        text = drawn(2, 5, 8, seed=1).requires_grad_()
        passed(unet, text).square().sum().backward()
        gradients.append(text.grad)
    assert close(gradients[1], gradients[0])


def test_unusual_modules_keep_their_code(fused: ModuleType) -> None:
    unusual = nn.Sequential(
        nn.GroupNorm(2, 4, affine=False),
        nn.LayerNorm((4, 4)),
        nn.LayerNorm(4, bias=False),
        nn.Conv2d(4, 4, 3),
        nn.Conv2d(4, 4, 1, stride=2),
    )
    before = [type(module) for module in unusual]
    fused.fuse(unusual)
    assert [type(module) for module in unusual] == before


@pytest.mark.parametrize(
    ("device", "dtype"), [("cpu", torch.float16), ("cuda", torch.float32), ("cuda", torch.float16)]
)
def test_only_half_precision_on_a_gpu_is_fused(
    device: str, dtype: torch.dtype, fused: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[object] = []
    monkeypatch.setattr(fused, "fuse", seen.append)
    unet = SimpleNamespace(device=torch.device(device), dtype=dtype)
    is_fused = settle_layout(unet)
    assert seen == ([unet] if (device, dtype) == ("cuda", torch.float16) else [])
    assert is_fused == bool(seen)


def test_without_kernels_a_unet_keeps_its_code(
    fused: ModuleType, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """No C compiler for Triton, say: passes take longer, and it is said."""

    def refuse(*_: object) -> None:
        raise RuntimeError("Failed to find C compiler.\nPlease specify one")

    monkeypatch.setattr(fused, "geglu", refuse)
    unet = nn.Sequential(nn.LayerNorm(4)).half()
    unet.device, unet.dtype = torch.device("cuda"), torch.float16  # type: ignore[assignment]
    assert not settle_layout(unet)
    assert type(unet[0]) is nn.LayerNorm
    assert caplog.messages == [
        "no fused kernels here, passes of the U-Net take longer: Failed to find C compiler."
    ]


@pytest.mark.parametrize("pair", ["sd1"], indirect=True)
def test_graphs_of_a_fused_unet_give_the_bits_of_hooks(
    pair: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows are picked out of a recording first, so that a layout that was lost would stay lost."""
    monkeypatch.setattr(passes, "USES", 1)
    fast = pair[1]
    layers = find_value_layers(fast)
    made: list[list[Tensor]] = []
    for changes in (
        Hooks(fast, layers),
        Graphs(fast, layers, most_rows=3, capture=lambda work: work),
    ):
        replay = Replay(fast, layers, lambda: passed(fast), changes)
        made.append([])
        with changes.in_use():
            with replay.recording(rows=3, halves=1) as recording:
                passed(fast, rows=3)
            for rows in ([2, 0], [0, 1, 2]):
                with replay.replaying(recording, len(layers) - 1, rows):
                    made[-1].append(passed(fast, rows=len(rows)))
    assert all(torch.equal(first, second) for first, second in zip(*made, strict=True))
