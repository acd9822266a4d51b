"""How a U-Net pass is changed: neurons switched off, module outputs given instead of computed,
module outputs kept. ``Hooks`` does so at once; ``Graphs`` plays small passes as CUDA graphs.

A pass over few rows keeps a GPU waiting: launching its thousand kernels from Python takes longer
than running them. A CUDA graph launches them all at once. What changes from pass to pass (latents,
text, masks, given outputs) is copied into the tensors that the graph reads, and what is wanted is
copied out of those it writes. Everything keeps its layout, so that the kernels are the same, and
with them the bits.
Public: ``Changes``, ``Hooks``, ``Graphs``, ``changes_of``, ``mapped``, ``channels_last``.
"""

import contextlib
import logging
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from utils.neuron_sets import NeuronSet
from utils.value_layers import deactivated, for_rows, masks, multiplied

# A pass over more rows gains little as a graph (Stable Diffusion 1.5, H200, bfloat16, ms of a pass
# without and with one: 1 row 31 and 5, 10 rows 35 and 22, 20 rows 42 and 40).
MOST_ROWS = 10
# Capturing costs about as much as so many passes save.
USES = 4
MEMORY_SHARE = 0.1  # of a GPU's memory, for what graphs read and write

Named = dict[str, Any]  # dotted names of modules, and what belongs to each
# Runs work that reads and writes fixed tensors, and returns what runs it again.
Capture = Callable[[Callable[[], None]], Callable[[], None]]


class Changes(Protocol):
    """Changes of the passes made in a block."""

    slow: int  # passes of a kind that take longer than those after them

    def in_use(self) -> contextlib.AbstractContextManager[None]:
        """A block in which passes may be made in the fastest way there is."""

    def deactivated(
        self, neuron_sets: Sequence[NeuronSet], *, each: int, factor: float
    ) -> contextlib.AbstractContextManager[None]:
        """As ``value_layers.deactivated``."""

    def giving(self, outputs: Named) -> contextlib.AbstractContextManager[None]:
        """These modules are not run: their outputs are these."""

    def keeping(self, names: Iterable[str], into: Named) -> contextlib.AbstractContextManager[None]:
        """The outputs of these modules, where they run, are put ``into`` a dictionary."""


class Hooks:
    """Changes a U-Net's modules for the time of a block."""

    slow = 1  # a device prepares itself for a shape

    def __init__(self, unet: nn.Module, value_layers: dict[str, nn.Module]) -> None:
        self._modules = dict(unet.named_modules())
        self._value_layers = value_layers

    @contextlib.contextmanager
    def in_use(self) -> Iterator[None]:
        """Nothing needs to be made ready."""
        yield

    @contextlib.contextmanager
    def deactivated(
        self, neuron_sets: Sequence[NeuronSet], *, each: int, factor: float
    ) -> Iterator[None]:
        """As ``value_layers.deactivated``."""
        with deactivated(self._value_layers, neuron_sets, each=each, factor=factor):
            yield

    @contextlib.contextmanager
    def giving(self, outputs: Named) -> Iterator[None]:
        """These modules are not run: their outputs are these."""

        def answer(output: Any) -> Callable[..., Any]:
            return lambda *_, **__: output

        patched = []
        try:
            for name, output in outputs.items():
                module: Any = self._modules[name]
                module.forward = answer(output)
                patched.append(module)
            yield
        finally:
            for module in patched:
                del module.forward

    @contextlib.contextmanager
    def keeping(self, names: Iterable[str], into: Named) -> Iterator[None]:
        """The outputs of these modules, where they run, are put ``into`` a dictionary."""

        def keep(name: str) -> Callable[..., None]:
            def hook(module: object, inputs: object, output: object) -> None:
                into[name] = output

            return hook

        handles = []
        try:
            for name in names:
                handles.append(self._modules[name].register_forward_hook(keep(name)))
            yield
        finally:
            for handle in handles:
                handle.remove()


class Graphs:
    """Notes the changes of a block, and makes each pass with them when the U-Net is called.

    The pass of a kind (rows, modules given, outputs kept) over ``most_rows`` at the most is
    captured when it is made for the ``USES``-th time, and played from then on; others are made with
    hooks. All kinds share the tensors that they read and write, which have room for ``most_rows``
    and take ``most_bytes`` at the most, and one memory pool. Nothing else may be on the U-Net while
    graphs are in use: hooks, attention processors and weights are captured as they are.
    """

    slow = USES

    def __init__(
        self,
        unet: Any,
        value_layers: dict[str, nn.Module],
        *,
        most_rows: int = MOST_ROWS,
        most_bytes: float = math.inf,
        needed_rows: int = 0,
        capture: Capture | None = None,
    ) -> None:
        """``needed_rows``: of passes that cannot be made smaller; graphs give way to them."""
        self._unet, self._value_layers = unet, value_layers
        self._hooks = Hooks(unet, value_layers)
        self._forward: Callable[..., Any] = unet.forward
        self._most_rows = most_rows
        self._needed_rows = max(most_rows, needed_rows)
        self._capture = capture or _captured_on(unet.device)
        self._used = False
        self._masks: dict[str, Tensor] = {}
        self._given: Named = {}
        self._keep: list[tuple[list[str], Named]] = []
        self._uses: Counter[Any] = Counter()
        self._plays: dict[Any, _Play] = {}
        self._fixed = _Fixed(most_rows, most_bytes)

    @contextlib.contextmanager
    def in_use(self) -> Iterator[None]:
        """Calls of the U-Net come here. May be nested."""
        if self._used:
            yield
            return
        self._used = True
        self._unet.forward = self._pass
        try:
            yield
        finally:
            del self._unet.forward
            self._used = False

    @contextlib.contextmanager
    def deactivated(
        self, neuron_sets: Sequence[NeuronSet], *, each: int, factor: float
    ) -> Iterator[None]:
        """As ``value_layers.deactivated``, but not nested."""
        if not self._used:
            with self._hooks.deactivated(neuron_sets, each=each, factor=factor):
                yield
            return
        self._masks = masks(self._value_layers, neuron_sets, each=each, factor=factor)
        try:
            yield
        finally:
            self._masks = {}

    @contextlib.contextmanager
    def giving(self, outputs: Named) -> Iterator[None]:
        """These modules are not run: their outputs are these. Not nested."""
        if not self._used:
            with self._hooks.giving(outputs):
                yield
            return
        self._given = outputs
        try:
            yield
        finally:
            self._given = {}

    @contextlib.contextmanager
    def keeping(self, names: Iterable[str], into: Named) -> Iterator[None]:
        """The outputs of these modules, where they run, are put ``into`` a dictionary."""
        if not self._used:
            with self._hooks.keeping(names, into):
                yield
            return
        self._keep.append((list(names), into))
        try:
            yield
        finally:
            self._keep.pop()

    def _pass(
        self,
        sample: Tensor,
        timestep: Tensor,
        *,
        encoder_hidden_states: Tensor,
        added_cond_kwargs: dict[str, Tensor] | None = None,
        return_dict: bool = False,
    ) -> tuple[Tensor]:
        """Stands in for the U-Net's forward pass, as ``stable_diffusion.unet_output`` calls it."""
        inputs = {"sample": sample, "timestep": timestep, "text": encoder_hidden_states}
        inputs |= added_cond_kwargs or {}
        wanted = {name for names, _ in self._keep for name in names}
        kept = {name: self._given[name] for name in wanted & self._given.keys()}
        names = tuple(sorted(wanted - self._given.keys()))
        output: Tensor | None = None
        try:
            output = self._made(inputs, names, kept)
        except torch.OutOfMemoryError:
            # A larger batch than needs to be is made smaller by who asked for it.
            if not self._most_rows or len(sample) > self._needed_rows:
                raise
        if output is None:  # here nothing of the failed pass is held any more
            self._give_up("too little memory")
            output = self._made(inputs, names, kept)
        for names_of, into in self._keep:
            into.update({name: kept[name] for name in names_of if name in kept})
        return (output,)

    def _made(self, inputs: dict[str, Tensor], names: tuple[str, ...], kept: Named) -> Tensor:
        """A pass, played if it can be; the outputs of modules that run go into ``kept``."""
        rows = len(inputs["sample"])
        kind = rows, tuple(self._given), names
        self._uses[kind] += 1
        if self._uses[kind] == USES and rows <= self._most_rows:
            try:
                self._prepare(kind, inputs)
            except _TooLargeError:  # large outputs take long to compute: there is little to gain
                pass
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:  # what CUDA does not capture
                self._give_up(str(error).partition("\n")[0])
        if kind in self._plays:
            return self._played(kind, inputs, kept)
        with (
            self._hooks.giving(self._given),
            self._hooks.keeping(names, kept),
            multiplied(self._value_layers, self._masks),
        ):
            return self._run(inputs)

    def _give_up(self, reason: str) -> None:
        logging.warning("no CUDA graphs from here on: %s", reason)
        self._most_rows = 0
        self._plays.clear()
        self._fixed = _Fixed(0, 0)

    def _run(self, inputs: dict[str, Tensor]) -> Tensor:
        named = dict(inputs)
        sample, timestep, text = (named.pop(name) for name in ("sample", "timestep", "text"))
        output: Tensor = self._forward(
            sample,
            timestep,
            encoder_hidden_states=text,
            added_cond_kwargs=named or None,
            return_dict=False,
        )[0]
        return output

    def _prepare(self, kind: Any, inputs: dict[str, Tensor]) -> None:
        """Captures a pass. Raises _TooLargeError."""
        rows, _, names = kind
        fixed = self._fixed
        read = {name: fixed.place("input", name, value, rows) for name, value in inputs.items()}
        given = {
            name: fixed.place("given", name, value, rows) for name, value in self._given.items()
        }
        layers = self._value_layers.items()
        factors = {name: self._factors(name, layer, rows) for name, layer in layers}

        def work(kept: Named) -> Tensor:
            with (
                self._hooks.giving(given),
                self._hooks.keeping(names, kept),
                multiplied(self._value_layers, factors),
            ):
                return self._run(read)

        # Once before, for the shapes of what it writes and for what kernels prepare on first use.
        shapes: Named = {}
        output = fixed.place("output", "", work(shapes), rows)
        to = {name: fixed.place("kept", name, value, rows) for name, value in shapes.items()}
        shapes.clear()

        def captured() -> None:
            kept: Named = {}
            output.copy_(work(kept))
            _copy(kept, to)

        self._plays[kind] = _Play(read, given, factors, output, to, self._capture(captured))

    def _factors(self, name: str, layer: Any, rows: int) -> Tensor:
        """What a value layer's output is multiplied by in a graph, (rows, 1, neurons)."""
        one = next(layer.parameters()).new_ones(1, 1, layer.out_features)
        place: Tensor = self._fixed.place("factors", name, one.expand(rows, -1, -1), rows)
        return place

    def _played(self, kind: Any, inputs: dict[str, Tensor], kept: Named) -> Tensor:
        play = self._plays[kind]
        for name, value in inputs.items():
            play.inputs[name].copy_(value)
        for name, factors in play.factors.items():
            if name in self._masks:
                factors.copy_(for_rows(self._masks[name], len(factors)))
            else:
                factors.fill_(1)
        _copy(self._given, play.given)
        play.again()
        kept.update({name: mapped(value, torch.empty_like) for name, value in play.kept.items()})
        _copy(play.kept, kept)
        return play.output.clone()


@dataclass(frozen=True)
class _Play:
    """A captured pass: the tensors it reads and writes, and what runs it again."""

    inputs: dict[str, Tensor]
    given: Named
    factors: dict[str, Tensor]
    output: Tensor
    kept: Named
    again: Callable[[], None]


class _TooLargeError(Exception):
    """What a graph reads and writes takes more memory than it may."""


class _Fixed:
    """The tensors that all graphs read and write: the first rows of some with room for the most."""

    def __init__(self, most_rows: int, most_bytes: float) -> None:
        self._most_rows, self._left = most_rows, most_bytes
        self._tensors: dict[Any, Tensor] = {}

    def place(self, use: str, name: str, value: Any, rows: int) -> Any:
        """Where something like ``value``, a module's output for so many rows, is kept. Raises
        _TooLargeError."""
        parts = iter(range(10**9))

        def placed(part: Tensor) -> Tensor:
            last = channels_last(part)
            key = use, name, next(parts), last
            if key not in self._tensors:
                # The timestep is one for all rows.
                room = (len(part) // rows * self._most_rows, *part.shape[1:]) if part.ndim else ()
                needed = math.prod(room) * part.element_size()
                if needed > self._left:
                    raise _TooLargeError
                self._left -= needed
                layout = torch.channels_last if last else torch.contiguous_format
                self._tensors[key] = part.new_empty(room).contiguous(memory_format=layout)
            place = self._tensors[key]
            if part.ndim:
                place = place[: len(part)]
            place.copy_(part)
            return place

        return mapped(value, placed)


def _captured_on(device: torch.device) -> Capture:
    pool: list[Any] = []  # made when there is a first graph

    def capture(work: Callable[[], None]) -> Callable[[], None]:
        with torch.cuda.device(device):
            if not pool:
                pool.append(torch.cuda.graph_pool_handle())
            graph = torch.cuda.CUDAGraph()
            # The outer one goes back to the stream even where a capture fails at its end.
            with (
                torch.cuda.stream(torch.cuda.current_stream()),
                torch.cuda.graph(graph, pool=pool[0], capture_error_mode="thread_local"),
            ):
                work()
        return graph.replay

    return capture


def mapped(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """A module's output with its tensors changed."""
    if isinstance(value, tuple):
        return tuple(mapped(part, change) for part in value)
    return change(value) if isinstance(value, Tensor) else value


def _tensors(value: Any) -> Iterator[Tensor]:
    """Those of an output."""
    if isinstance(value, tuple):
        for part in value:
            yield from _tensors(part)
    elif isinstance(value, Tensor):
        yield value


def _copy(outputs: Named, to: Named) -> None:
    """All at once: on a GPU one launch instead of one for each tensor."""
    pairs = [
        pair
        for name, output in outputs.items()
        for pair in zip(_tensors(to[name]), _tensors(output), strict=True)
    ]
    if pairs:
        torch._foreach_copy_([place for place, _ in pairs], [tensor for _, tensor in pairs])


def channels_last(output: Tensor) -> bool:
    """Whether channels come last in memory, and not first."""
    last = output.ndim == 4 and output.is_contiguous(memory_format=torch.channels_last)
    return last and not output.is_contiguous()


def changes_of(unet: Any, value_layers: dict[str, nn.Module], *, needed_rows: int = 0) -> Changes:
    """Graphs on a GPU, hooks on a CPU. ``needed_rows``: as ``Graphs`` has it."""
    if unet.device.type != "cuda":
        return Hooks(unet, value_layers)
    memory = torch.cuda.get_device_properties(unet.device).total_memory
    return Graphs(unet, value_layers, most_bytes=MEMORY_SHARE * memory, needed_rows=needed_rows)
