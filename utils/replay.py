"""Replay: a U-Net pass that starts where the first changed value layer acts.

What a pass computes before it reaches a value layer's attention does not depend on the neurons
switched off in that layer and behind it, and the keys and values of cross-attention, before any of
them is switched off, depend on the text alone. A recorded pass keeps the outputs of the largest
modules that end before each value layer, and of the key and value layers; a replayed pass returns
those instead of running them. The U-Net's own code runs unchanged, so this holds for every
architecture that diffusers builds.
Public: ``Replay``, ``Recording``.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from utils.passes import Changes, Hooks, channels_last, mapped
from utils.value_layers import is_value_layer


@dataclass(frozen=True)
class Recording:
    """Module outputs of one pass over ``halves`` (of guidance) x ``rows`` batch rows."""

    outputs: dict[str, Any]
    halves: int
    rows: int

    def of(self, names: Iterable[str], chosen: Sequence[int]) -> dict[str, Any]:
        """The modules' outputs for a batch of ``halves`` x the ``chosen`` recorded rows."""
        if list(chosen) == list(range(self.rows)):
            return {name: self.outputs[name] for name in names}
        batch = [half * self.rows + row for half in range(self.halves) for row in chosen]
        first, last = batch[0], batch[-1] + 1
        together = batch == list(range(first, last))
        rows: dict[torch.device, torch.Tensor] = {}  # of the batch, made once on each device

        def selected(output: torch.Tensor) -> torch.Tensor:
            # A row of the batch may be several rows of an output (SDXL embeds six numbers a row).
            each, rest = divmod(output.shape[0], self.halves * self.rows)
            if rest or not each:
                raise ValueError(f"{output.shape[0]} rows of a module for {self.rows} of the batch")
            if together:
                return output[first * each : last * each]
            if output.device not in rows:
                rows[output.device] = torch.tensor(batch, device=output.device)
            if each == 1:
                picked = output.index_select(0, rows[output.device])
                # In the layout it had, since what reads it may take another kernel for another one.
                if channels_last(output):
                    return picked.contiguous(memory_format=torch.channels_last)
                return picked
            return (
                output.unflatten(0, (-1, each)).index_select(0, rows[output.device]).flatten(0, 1)
            )

        return {name: mapped(self.outputs[name], selected) for name in names}

    def complete(self, base: "Recording", chosen: Sequence[int]) -> None:
        """Adds what a pass replayed from ``base`` did not run: it is as it was there."""
        self.outputs.update(base.of(base.outputs.keys() - self.outputs.keys(), chosen))


class Replay:
    """Knows which modules of a U-Net end before each of its value layers starts."""

    def __init__(
        self,
        unet: torch.nn.Module,
        value_layers: dict[str, torch.nn.Module],
        one_pass: Callable[[], object],
        changes: Changes | None = None,
    ) -> None:
        """``one_pass`` runs the U-Net once, on anything; the order of its modules is read from
        it. ``changes``: how passes are changed (default: by hooks)."""
        self._changes = changes or Hooks(unet, value_layers)
        self._modules = dict(unet.named_modules())
        starts, ends = self._trace(one_pass)
        values = [name for name in ends if is_value_layer(name)]
        keys = [name.removesuffix("to_v") + "to_k" for name in values]
        of_text = [name for name in (*values, *keys) if name in ends]
        # For each value layer, the modules that a pass restarted there does not run.
        self._skipped: list[list[str]] = []
        for name in value_layers:
            # The attention, not `to_v`: its processor calls `to_q` and `to_k` on the way.
            start = starts[name.rpartition(".")[0]]
            done = {module for module, end in ends.items() if end < start}
            before = [module for module in done if not _parents(module) & done]
            self._skipped.append(before + [module for module in of_text if starts[module] > start])
        self._recorded = sorted({module for modules in self._skipped for module in modules})

    @property
    def layers(self) -> int:
        """Number of value layers that a pass can start at."""
        return len(self._skipped)

    def _trace(self, one_pass: Callable[[], object]) -> tuple[dict[str, int], dict[str, int]]:
        """When each module starts and ends, counted in events. A module that runs twice in a pass
        has no single output and is left out."""
        starts: dict[str, int] = {}
        ends: dict[str, int] = {}
        twice: set[str] = set()
        clock = iter(range(10**9))

        def starting(name: str) -> Callable[..., None]:
            def hook(*_: object) -> None:
                if name in starts:
                    twice.add(name)
                starts[name] = next(clock)

            return hook

        def ending(name: str) -> Callable[..., None]:
            def hook(*_: object) -> None:
                ends[name] = next(clock)

            return hook

        handles = []
        try:
            for name, module in self._modules.items():
                handles.append(module.register_forward_pre_hook(starting(name)))
                handles.append(module.register_forward_hook(ending(name)))
            one_pass()
        finally:
            for handle in handles:
                handle.remove()
        for name in twice:
            del ends[name]
        return starts, ends

    @contextlib.contextmanager
    def recording(self, *, rows: int, halves: int) -> Iterator[Recording]:
        """Keeps what replays need of the pass made in the block, itself replayed or not."""
        recording = Recording({}, halves, rows)
        with self._changes.keeping(self._recorded, recording.outputs):
            yield recording

    @contextlib.contextmanager
    def replaying(self, recording: Recording, layer: int, chosen: Sequence[int]) -> Iterator[None]:
        """Starts the passes made in the block at value layer ``layer``. Their batch must be the
        recording's halves x the ``chosen`` recorded rows, each as often as it is named."""

        with self._changes.giving(recording.of(self._skipped[layer], chosen)):
            yield


def _parents(name: str) -> set[str]:
    parts = name.split(".")
    return {".".join(parts[:end]) for end in range(1, len(parts))}
