"""What a U-Net does between its matrix products, in fewer passes over a GPU's memory.

In half precision half of a pass is spent on group norms, activations, biases and copies between
layouts, each of which reads and writes all there is. Here they are Triton kernels on channels-last
tensors that compute in float32 and round once. Module names, weights, hooks and replay stay as they
are: modules change their class only, and go back to diffusers' own code where an input asks for a
gradient.
Public: ``fuse``, ``group_norm``, ``layer_norm``, ``geglu``, ``add``.
"""

import contextlib
from typing import Any, cast

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from diffusers.models.activations import GEGLU
from diffusers.models.attention_processor import AttnProcessor2_0
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import Tensor, nn

TILE_PIXELS, TILE_CHANNELS = 128, 64
TILE_TOKENS, TILE_WIDTH = 16, 256
TILE = 4096  # values of a layer norm's tile


def fuse(unet: nn.Module) -> None:
    """Makes the U-Net's modules work on channels-last tensors with fused kernels, in place.

    Modules that are set up in an unusual way keep their code. Raises what Triton raises where it
    cannot compile for the U-Net's device; nothing is changed then.
    """
    geglu(next(unet.parameters()).new_ones(1, 32))
    unet.to(memory_format=torch.channels_last)
    for module in unet.modules():
        fused = _FUSED.get(type(module))
        if fused and fused.fits(module):
            module.__class__ = fused
        if type(getattr(module, "processor", None)) is AttnProcessor2_0 and _plain(module):
            module.set_processor(_Attention())  # type: ignore[operator]


@triton.jit
def _tile(pixels, channels, tile_p: tl.constexpr, tile_c: tl.constexpr):
    """This program's tile of a (rows, pixels, channels) tensor: offsets, mask, pixels, channels."""
    row = tl.program_id(0).to(tl.int64)
    p = tl.program_id(1) * tile_p + tl.arange(0, tile_p)
    c = tl.program_id(2) * tile_c + tl.arange(0, tile_c)
    inside = (p < pixels)[:, None] & (c < channels)[None, :]
    return row * pixels * channels + p[:, None] * channels + c[None, :], inside, c


@triton.jit
def _moments_kernel(x, mean, spread, pixels, channels, tile_p: tl.constexpr, tile_c: tl.constexpr):
    """Per tile and channel, the mean and the sum of squared distances from it."""
    at, inside, c = _tile(pixels, channels, tile_p, tile_c)
    values = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    count = tl.minimum(tile_p, pixels - tl.program_id(1) * tile_p)
    center = tl.sum(values, axis=0) / count
    distance = tl.where(inside, values - center[None, :], 0.0)
    to = (tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)) * channels + c
    tl.store(mean + to, center, mask=c < channels)
    tl.store(spread + to, tl.sum(distance * distance, axis=0), mask=c < channels)


@triton.jit
def _factors_kernel(
    mean,
    spread,
    weight,
    bias,
    of_row,
    of_channel,
    scale,
    shift,
    tiles,
    pixels,
    channels,
    each,
    eps,
    tile_p: tl.constexpr,
    tiles_there: tl.constexpr,
    place_there: tl.constexpr,
    has_row: tl.constexpr,
    has_channel: tl.constexpr,
):
    """Of one row and group: what to multiply each channel by and what to add, so that it is
    normalized, from the tiles' moments. ``of_row`` and ``of_channel`` come on top of the values."""
    row = tl.program_id(0)
    tile = tl.arange(0, tiles_there)
    place = tl.arange(0, place_there)
    c = tl.program_id(1) * each + place
    there = place < each
    inside = (tile < tiles)[:, None] & there[None, :]
    at = (row * tiles + tile)[:, None] * channels + c[None, :]
    added = tl.zeros([place_there], dtype=tl.float32)
    if has_row:
        added += tl.load(of_row + row * channels + c, mask=there, other=0.0).to(tl.float32)
    if has_channel:
        added += tl.load(of_channel + c, mask=there, other=0.0).to(tl.float32)
    means = tl.load(mean + at, mask=inside, other=0.0) + added[None, :]
    counts = tl.minimum(tile_p, pixels - tile * tile_p).to(tl.float32)[:, None]
    counts = tl.where(inside, counts, 0.0)
    number = pixels * each
    center = tl.sum(tl.sum(counts * means, axis=0), axis=0) / number
    within = tl.load(spread + at, mask=inside, other=0.0)
    between = counts * (means - center) * (means - center)
    variance = tl.sum(tl.sum(within + between, axis=0), axis=0) / number
    factor = tl.load(weight + c, mask=there, other=0.0).to(tl.float32) / tl.sqrt(variance + eps)
    offset = tl.load(bias + c, mask=there, other=0.0).to(tl.float32) + (added - center) * factor
    tl.store(scale + row * channels + c, factor, mask=there)
    tl.store(shift + row * channels + c, offset, mask=there)


@triton.jit
def _scale_kernel(
    x,
    scale,
    shift,
    out,
    pixels,
    channels,
    tile_p: tl.constexpr,
    tile_c: tl.constexpr,
    silu: tl.constexpr,
):
    at, inside, c = _tile(pixels, channels, tile_p, tile_c)
    of_row = tl.program_id(0) * channels + c
    factor = tl.load(scale + of_row, mask=c < channels, other=0.0)
    offset = tl.load(shift + of_row, mask=c < channels, other=0.0)
    values = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    values = values * factor[None, :] + offset[None, :]
    if silu:
        values = values / (1.0 + tl.exp(-values))
    tl.store(out + at, values.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _add_kernel(a, b, bias, out, pixels, channels, tile_p: tl.constexpr, tile_c: tl.constexpr):
    at, inside, c = _tile(pixels, channels, tile_p, tile_c)
    total = tl.load(a + at, mask=inside, other=0.0).to(tl.float32)
    total += tl.load(b + at, mask=inside, other=0.0).to(tl.float32)
    total += tl.load(bias + c, mask=c < channels, other=0.0).to(tl.float32)[None, :]
    tl.store(out + at, total.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _layer_norm_kernel(
    x, weight, bias, out, tokens, width, eps, tile_t: tl.constexpr, tile_w: tl.constexpr
):
    token = tl.program_id(0).to(tl.int64) * tile_t + tl.arange(0, tile_t)
    w = tl.arange(0, tile_w)
    inside = (token < tokens)[:, None] & (w < width)[None, :]
    at = token[:, None] * width + w[None, :]
    values = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    distance = tl.where(inside, values - (tl.sum(values, axis=1) / width)[:, None], 0.0)
    variance = tl.sum(distance * distance, axis=1) / width
    factor = tl.load(weight + w, mask=w < width, other=0.0).to(tl.float32)
    offset = tl.load(bias + w, mask=w < width, other=0.0).to(tl.float32)
    values = distance / tl.sqrt(variance + eps)[:, None] * factor[None, :] + offset[None, :]
    tl.store(out + at, values.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _geglu_kernel(x, out, tokens, width, tile_t: tl.constexpr, tile_w: tl.constexpr):
    token = tl.program_id(0).to(tl.int64) * tile_t + tl.arange(0, tile_t)
    w = tl.program_id(1) * tile_w + tl.arange(0, tile_w)
    inside = (token < tokens)[:, None] & (w < width)[None, :]
    at = token[:, None] * (2 * width) + w[None, :]
    values = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(x + at + width, mask=inside, other=0.0).to(tl.float32)
    values *= 0.5 * gate * (1.0 + tl.erf(gate * 0.7071067811865476))
    tl.store(
        out + token[:, None] * width + w[None, :], values.to(out.dtype.element_ty), mask=inside
    )


def _on_device_of(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Triton launches on torch's current device, which need not be the one in use."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


def _grid(x: Tensor) -> tuple[int, int, int]:
    rows, channels, height, width = x.shape
    tiles = triton.cdiv(height * width, TILE_PIXELS)
    return rows, tiles, triton.cdiv(channels, TILE_CHANNELS)


def group_norm(
    x: Tensor,
    norm: nn.GroupNorm,
    *,
    silu: bool = False,
    of_row: Tensor | None = None,
    of_channel: Tensor | None = None,
) -> Tensor:
    """``norm`` of x + of_row + of_channel, (B, C, H, W) + (B, C) + (C,), and SiLU of it if asked
    for; channels last. Means and variances are float32's, of tiles first."""
    x = x.contiguous(memory_format=torch.channels_last)
    rows, channels, height, width = x.shape
    grid, pixels = _grid(x), height * width
    mean, spread = x.new_empty((2, rows, grid[1], channels), dtype=torch.float32)
    scale, shift = x.new_empty((2, rows, channels), dtype=torch.float32)
    each, out = channels // norm.num_groups, torch.empty_like(x)
    with _on_device_of(x):
        _moments_kernel[grid](x, mean, spread, pixels, channels, TILE_PIXELS, TILE_CHANNELS)
        _factors_kernel[(rows, norm.num_groups)](
            mean,
            spread,
            norm.weight,
            norm.bias,
            of_row,
            of_channel,
            scale,
            shift,
            grid[1],
            pixels,
            channels,
            each,
            norm.eps,
            TILE_PIXELS,
            triton.next_power_of_2(grid[1]),
            triton.next_power_of_2(each),
            of_row is not None,
            of_channel is not None,
        )
        _scale_kernel[grid](
            x, scale, shift, out, pixels, channels, TILE_PIXELS, TILE_CHANNELS, silu
        )
    return out


def add(a: Tensor, b: Tensor, bias: Tensor) -> Tensor:
    """a + b + bias: (B, C, H, W) twice and (C,); channels last."""
    a, b = (part.contiguous(memory_format=torch.channels_last) for part in (a, b))
    out, pixels, channels = torch.empty_like(a), a.shape[2] * a.shape[3], a.shape[1]
    with _on_device_of(a):
        _add_kernel[_grid(a)](a, b, bias, out, pixels, channels, TILE_PIXELS, TILE_CHANNELS)
    return out


def layer_norm(x: Tensor, norm: nn.LayerNorm) -> Tensor:
    """``norm`` over the last axis, (..., C)."""
    x, width = x.contiguous(), x.shape[-1]
    tokens, block = x.numel() // width, triton.next_power_of_2(width)
    each, out = max(1, TILE // block), torch.empty_like(x)
    with _on_device_of(x):
        _layer_norm_kernel[(triton.cdiv(tokens, each),)](
            x, norm.weight, norm.bias, out, tokens, width, norm.eps, each, block
        )
    return out


def geglu(x: Tensor) -> Tensor:
    """(..., 2 D) -> (..., D): the first half times the GELU of the second."""
    x, width = x.contiguous(), x.shape[-1] // 2
    tokens, out = x.numel() // (2 * width), x.new_empty((*x.shape[:-1], width))
    grid = triton.cdiv(tokens, TILE_TOKENS), triton.cdiv(width, TILE_WIDTH)
    with _on_device_of(x):
        _geglu_kernel[grid](x, out, tokens, width, TILE_TOKENS, TILE_WIDTH)
    return out


def _convolution(x: Tensor, convolution: nn.Conv2d) -> Tensor:
    """Without its bias, which what follows adds on its way."""
    return F.conv2d(x, convolution.weight, None, convolution.stride, convolution.padding)


class _GroupNorm(nn.GroupNorm):
    @staticmethod
    def fits(module: Any) -> bool:
        return bool(module.affine)

    def forward(self, input: Tensor) -> Tensor:
        if input.requires_grad or input.ndim != 4:
            return super().forward(input)
        return group_norm(input, self)


class _LayerNorm(nn.LayerNorm):
    @staticmethod
    def fits(module: Any) -> bool:
        return len(module.normalized_shape) == 1 and module.bias is not None

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) if input.requires_grad else layer_norm(input, self)


class _GEGLU(GEGLU):
    @staticmethod
    def fits(module: Any) -> bool:
        return True

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if hidden_states.requires_grad:
            return super().forward(hidden_states, *args, **kwargs)
        return geglu(self.proj(hidden_states))


class _Pointwise(nn.Conv2d):
    """A convolution of single pixels; with channels last a linear layer, whose bias is free."""

    @staticmethod
    def fits(module: Any) -> bool:
        return module.kernel_size == (1, 1) and module.stride == (1, 1) and module.groups == 1

    def forward(self, input: Tensor) -> Tensor:
        last = input.contiguous(memory_format=torch.channels_last)
        pixels = F.linear(last.permute(0, 2, 3, 1), self.weight.flatten(1), self.bias)
        return pixels.permute(0, 3, 1, 2)


class _Resnet(ResnetBlock2D):
    @staticmethod
    def fits(module: Any) -> bool:
        return (
            module.time_embedding_norm == "default"
            and module.time_emb_proj is not None
            and not module.skip_time_act
            and module.upsample is None
            and module.downsample is None
            and module.output_scale_factor == 1
            and isinstance(module.nonlinearity, nn.SiLU)
            and type(module.conv1) is type(module.conv2) is nn.Conv2d
            and module.conv2.bias is not None
        )

    def forward(self, input_tensor: Tensor, temb: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        usual = type(self.conv1) is type(self.conv2) is nn.Conv2d  # no LoRA came since
        if not usual or input_tensor.requires_grad or temb.requires_grad:
            return super().forward(input_tensor, temb, *args, **kwargs)
        x = group_norm(input_tensor, self.norm1, silu=True)
        time = self.time_emb_proj(self.nonlinearity(temb))
        x = _convolution(x, self.conv1)
        x = group_norm(x, self.norm2, silu=True, of_row=time, of_channel=self.conv1.bias)
        x = _convolution(x, self.conv2)
        shortcut = self.conv_shortcut(input_tensor) if self.conv_shortcut else input_tensor
        return add(x, shortcut, cast(Tensor, self.conv2.bias))


class _Transformer(Transformer2DModel):
    @staticmethod
    def fits(module: Any) -> bool:
        return bool(module.is_input_continuous)

    def _get_output_for_continuous_inputs(
        self,
        hidden_states: Tensor,
        residual: Tensor,
        batch_size: int,
        height: int,
        width: int,
        inner_dim: int,
    ) -> Tensor:
        # diffusers would copy it to channels first.
        if self.use_linear_projection:
            hidden_states = self.proj_out(hidden_states)
        pixels = hidden_states.unflatten(1, (height, width)).permute(0, 3, 1, 2)
        return residual + (pixels if self.use_linear_projection else self.proj_out(pixels))


def _plain(attention: Any) -> bool:
    return (
        attention.spatial_norm is None
        and attention.group_norm is None
        and not attention.norm_cross
        and attention.norm_q is None
        and attention.norm_k is None
        and not attention.residual_connection
        and attention.rescale_output_factor == 1
    )


class _Attention(AttnProcessor2_0):
    """Without the division by 1 with which diffusers' own ends."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        if attention_mask is not None or hidden_states.ndim != 3:
            return super().__call__(
                attn, hidden_states, encoder_hidden_states, attention_mask, *args, **kwargs
            )
        text = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        query, key, value = (
            part.unflatten(-1, (attn.heads, -1)).transpose(1, 2)
            for part in (attn.to_q(hidden_states), attn.to_k(text), attn.to_v(text))
        )
        heads = F.scaled_dot_product_attention(query, key, value)
        return attn.to_out[1](attn.to_out[0](heads.transpose(1, 2).flatten(2)))


_FUSED: dict[type[nn.Module], Any] = {
    nn.GroupNorm: _GroupNorm,
    nn.LayerNorm: _LayerNorm,
    nn.Conv2d: _Pointwise,
    GEGLU: _GEGLU,
    ResnetBlock2D: _Resnet,
    Transformer2DModel: _Transformer,
}
