"""Value layers: found, read and deactivated here and nowhere else.

A value layer is the ``to_v`` projection of a cross-attention block (``attn2``) of the U-Net; a
neuron is one of its output columns. torch is imported where a tensor is made, so that scripts can
use the names below before they pay for it.
Public: ``STAGES``, ``SEARCHED_STAGES``, ``is_value_layer``, ``forward_order``,
``find_value_layers``, ``layer_widths``, ``ValueReader``, ``masks``, ``multiplied``, ``for_rows``,
``deactivated``.
"""

import contextlib
import copy
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from utils.errors import InputError
from utils.neuron_sets import NeuronSet

if TYPE_CHECKING:
    import torch

STAGES = ("down", "mid", "up")  # in forward order
SEARCHED_STAGES = ("down", "mid")  # paper C.8: up blocks hardly matter
_STAGE = re.compile(r"^(down|mid|up)_block")


def _stage(name: str) -> str:
    match = _STAGE.match(name)
    return match.group(1) if match else ""


def is_value_layer(name: str) -> bool:
    """Whether a dotted module name is the value projection of a U-Net's cross-attention."""
    return name.endswith(".attn2.to_v") and _stage(name) != ""


def forward_order(names: Iterable[str], stages: Sequence[str] = SEARCHED_STAGES) -> list[str]:
    """Value layer names of the given stages in the order in which a forward pass reaches them.

    diffusers registers the up blocks before the mid block, so the order of ``named_modules`` would
    be wrong; within a stage the numbers in the name are the order.
    """

    def position(name: str) -> tuple[int, list[int]]:
        return STAGES.index(_stage(name)), [int(part) for part in re.findall(r"\d+", name)]

    kept = [name for name in names if is_value_layer(name) and _stage(name) in stages]
    return sorted(kept, key=position)


def find_value_layers(
    unet: "torch.nn.Module", stages: Sequence[str] = SEARCHED_STAGES
) -> dict[str, "torch.nn.Module"]:
    """Dotted name -> value layer, in forward order: l = 0 .. L-1.

    A layer with a LoRA loaded on top is its wrapper, whose output is what attention sees (no script
    loads one). InputError if the model has none.
    """
    modules = {name: module for name, module in unet.named_modules() if is_value_layer(name)}
    layers = {name: modules[name] for name in forward_order(modules, stages)}
    if not layers:
        raise InputError(f"{type(unet).__name__} has no cross-attention value layers to search")
    return layers


def layer_widths(layers: dict[str, "torch.nn.Module"]) -> list[int]:
    """Number of neurons of each layer."""
    return [int(layer.out_features) for layer in layers.values()]  # type: ignore[arg-type]


class ValueReader:
    """Reads the activations of all value layers from a text embedding, in float32 whatever
    precision the U-Net runs in. Values depend on the text alone, so no U-Net pass is needed."""

    def __init__(self, layers: dict[str, "torch.nn.Module"], *, copies: bool = False) -> None:
        """``copies``: the layers will be cast to another precision after this, so that the reader
        needs float32 copies of its own."""
        self._layers = [
            copy.deepcopy(layer).float() if copies else layer for layer in layers.values()
        ]

    def to(self, device: str) -> None:
        """Moves the layers to where the embeddings are."""
        for layer in self._layers:
            layer.to(device)

    def activations(self, embedding: "torch.Tensor") -> list["torch.Tensor"]:
        """(tokens, width) float32 embedding of one prompt -> L vectors, float32 on the CPU.

        a = mean over all tokens, padding included, of |value[token, i]|.
        """
        import torch

        with torch.no_grad():
            return [layer(embedding).abs().mean(dim=0).cpu() for layer in self._layers]


def masks(
    layers: dict[str, "torch.nn.Module"],
    neuron_sets: Sequence[NeuronSet],
    *,
    each: int = 1,
    factor: float = 0.0,
) -> dict[str, "torch.Tensor"]:
    """What the outputs of the layers with chosen neurons are multiplied by, (S, 1, neurons) on the
    layer's device: ``factor`` at the neurons of a set, else 1; ``each`` rows for each set, S in
    all."""
    import torch

    made = {}
    for position, (name, layer) in enumerate(layers.items()):
        columns = [neurons[position] for neurons in neuron_sets]
        if not any(columns):
            continue
        mask = torch.ones(len(neuron_sets), 1, int(layer.out_features))  # type: ignore[arg-type]
        rows = [row for row, indices in enumerate(columns) for _ in indices]
        mask[rows, 0, [index for indices in columns for index in indices]] = factor
        weight = next(layer.parameters())
        made[name] = mask.repeat_interleave(each, dim=0).to(weight.device, weight.dtype)
    return made


@contextlib.contextmanager
def multiplied(
    layers: dict[str, "torch.nn.Module"], masks: dict[str, "torch.Tensor"]
) -> Iterator[None]:
    """Multiplies the outputs of layers, by name, by (S, 1, neurons) each while the block runs: row
    r by that of row r mod S. ValueError at the pass if the batch is no multiple of S."""

    def multiply(mask: "torch.Tensor") -> Any:
        def hook(module: object, inputs: object, output: "torch.Tensor") -> "torch.Tensor":
            # Out of place: the layer's own output may be kept by others.
            return output * for_rows(mask, len(output))

        return hook

    handles = []
    try:
        for name, mask in masks.items():
            handles.append(layers[name].register_forward_hook(multiply(mask)))
        yield
    finally:
        for handle in handles:
            handle.remove()


def for_rows(mask: "torch.Tensor", rows: int) -> "torch.Tensor":
    """A mask of S rows repeated to so many. ValueError if they are no multiple of S."""
    repetitions, rest = divmod(rows, len(mask))
    if rest:
        raise ValueError(f"{rows} batch rows for {len(mask)} neuron sets")
    return mask.repeat(repetitions, 1, 1)


@contextlib.contextmanager
def deactivated(
    layers: dict[str, "torch.nn.Module"],
    neuron_sets: Sequence[NeuronSet],
    *,
    each: int = 1,
    factor: float = 0.0,
) -> Iterator[None]:
    """Multiplies neurons by ``factor`` (0: off) for every token while the block runs.

    One set applies to every batch row. With several, each stands for ``each`` consecutive rows, S
    in all, and the batch must be a whole number of repetitions of S rows: row r gets that of row r
    mod S, so the two halves of classifier-free guidance ([unconditional; conditional]) are both
    masked. Contexts nest; no hook outlives its block. ValueError at the pass if the batch is no
    multiple of S.
    """
    with multiplied(layers, masks(layers, neuron_sets, each=each, factor=factor)):
        yield
