"""CUDA graphs of U-Net passes against hooks: the same bits. Without a GPU a captured pass is played
by running it again on its fixed tensors, which is what a graph does."""

import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from utils import passes, scoring
from utils.activation_statistics import Statistics
from utils.localization import Search, Thresholds
from utils.noise_difference import NoiseSettings, noise_difference
from utils.passes import USES, Changes, Graphs, Hooks, changes_of
from utils.replay import Recording, Replay
from utils.scoring import Detector
from utils.stable_diffusion import (
    Model,
    encode_prompt,
    encode_unconditional,
    initial_noise,
    load_model,
)
from utils.versions import resolve

ROWS = 3
CAPTIONS = ("A small house by the sea", "Two dogs")


class Played:
    """Counts captures and plays."""

    def __init__(self) -> None:
        self.captured = self.played = 0

    def __call__(self, work: Callable[[], None]) -> Callable[[], None]:
        self.captured += 1

        def play() -> None:
            self.played += 1
            work()

        return play


def same(first: Any, second: Any) -> bool:
    """Of module outputs, to the bit."""
    if isinstance(first, tuple):
        return len(first) == len(second) and all(map(same, first, second))
    return torch.equal(first, second) if isinstance(first, Tensor) else first == second


class Passes:
    """Passes of a model with one kind of changes."""

    def __init__(self, model: Model, changes: Changes, guidance_scale: float) -> None:
        self.model, self.changes = model, changes
        self.how = NoiseSettings(guidance_scale=guidance_scale)
        self.halves = 1 if guidance_scale == 1 else 2
        layers = len(model.value_layers)
        self.starts = (0, layers // 2, layers - 1)
        self.empty = encode_unconditional(model)
        self.replay = Replay(
            model.unet, model.value_layers, lambda: self.difference(CAPTIONS[0], [0], []), changes
        )

    def difference(self, caption: str, rows: list[int], sets: list[Any]) -> Tensor:
        noise = initial_noise(self.model, ROWS, 1)[rows]
        with self.changes.deactivated(sets, each=len(rows) // max(1, len(sets)), factor=0.0):
            text = encode_prompt(self.model, caption)
            return noise_difference(self.model, text, self.empty, noise, self.how)

    def recorded(self, caption: str) -> tuple[Tensor, Recording]:
        with self.replay.recording(rows=ROWS, halves=self.halves) as recording:
            return self.difference(caption, [0, 1, 2], []), recording

    def all_kinds(self) -> Iterator[tuple[Tensor, dict[str, Any]]]:
        """What passes of every kind make, and keep, several times with something else each time."""
        layers = self.replay.layers
        with self.changes.in_use():
            for turn, caption in enumerate((passes.USES // 2 + 1) * CAPTIONS):
                difference, recording = self.recorded(caption)
                yield difference, recording.outputs
                for layer in self.starts:
                    first = [[turn, 5] if at >= layer else [] for at in range(layers)]
                    second = [[] if at != layer else [turn + 1] for at in range(layers)]
                    for rows in ([2, 0], [0, 1, 2]):
                        with (
                            self.replay.replaying(recording, layer, rows),
                            self.replay.recording(rows=len(rows), halves=self.halves) as again,
                        ):
                            sets = [first, second] if len(rows) == 2 else [first]
                            difference = self.difference(caption, rows, sets)
                        again.complete(recording, rows)
                        yield difference, again.outputs
                # What was kept before is not what later passes wrote.
                yield self.recorded(caption)[0], recording.outputs


@pytest.mark.parametrize("guidance_scale", [1.0, 7.0])
@pytest.mark.parametrize("architecture", ["sd1", "sd2", "xl"])
def test_graphs_give_the_bits_of_hooks(
    small_model: Callable[..., Model],
    architecture: str,
    guidance_scale: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(passes, "USES", 2)
    model = small_model(architecture)
    played = Played()
    graphs = Graphs(model.unet, model.value_layers, most_rows=2 * ROWS, capture=played)
    plain = Hooks(model.unet, model.value_layers)
    found, wanted = (list(Passes(model, c, guidance_scale).all_kinds()) for c in (graphs, plain))
    for (difference, kept), (own, own_kept) in zip(found, wanted, strict=True):
        assert torch.equal(difference, own)
        assert kept.keys() == own_kept.keys()
        assert all(same(kept[name], own_kept[name]) for name in kept)
    kinds = 1 + 2 * 3
    assert played.captured == kinds and played.played > 2 * kinds
    assert not any("forward" in vars(module) for module in model.unet.modules())
    assert not any(module._forward_hooks for module in model.unet.modules())


def test_rows_picked_from_a_recording_keep_their_layout() -> None:
    """What reads them may take another kernel for another one, and other bits with it."""
    last = torch.rand(3, 2, 4, 4).contiguous(memory_format=torch.channels_last)
    recording = Recording({"last": last, "first": torch.rand(3, 2, 4, 4)}, halves=1, rows=3)
    picked = recording.of(["last", "first"], [2, 0])
    assert torch.equal(picked["last"], last[[2, 0]])
    assert picked["last"].is_contiguous(memory_format=torch.channels_last)
    assert picked["first"].is_contiguous()


def statistics_of(model: Model) -> Statistics:
    """Such that some neurons of every layer stand out."""
    activations = model.value_reader.activations(encode_prompt(model, CAPTIONS[0]).embedding[0])
    means = [a - torch.linspace(0, 6, len(a)) for a in activations]
    return Statistics(means, [torch.ones_like(mean) for mean in means])


@pytest.mark.parametrize("method", ["exact", "bisect"])
def test_a_search_with_graphs_ends_with_the_same(
    small_model: Callable[..., Model], method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(passes, "USES", 2)
    model, played = small_model("sd1"), Played()
    findings = []
    for changes in (
        changes_of,
        lambda *of, **named: Graphs(*of, **named, most_rows=ROWS, capture=played),
    ):
        monkeypatch.setattr(scoring, "changes_of", changes)
        detector = Detector(model, NoiseSettings(), rows=ROWS, seed=1, batch_size=2 * ROWS)
        vars(detector)["_one_row_share"] = 0.4  # else measured
        findings.append(
            detector.find(
                CAPTIONS[0],
                statistics_of(model),
                search=Search(initial_theta=5.9, theta_step=0.1, min_theta=5.6),
                thresholds=Thresholds(-1.0, 0.97, 0.985),
                method=method,
            )
        )
    assert findings[1].outcome == findings[0].outcome
    assert findings[1].evaluations == findings[0].evaluations
    assert torch.equal(findings[1].pairwise, findings[0].pairwise)
    assert played.captured and played.played > played.captured


def test_only_small_passes_made_often_are_captured(small_model: Callable[..., Model]) -> None:
    model, played = small_model("sd1"), Played()
    made = Passes(model, Graphs(model.unet, model.value_layers, most_rows=2, capture=played), 1.0)
    with made.changes.in_use():
        for rows in (*([0], [1, 2]) * (USES - 1), *[[0, 1, 2]] * 2 * USES):
            made.difference(CAPTIONS[0], rows, [])
        assert not played.captured
        for uses in (1, 2, 3):
            made.difference(CAPTIONS[1], [2], [])
            assert (played.captured, played.played) == (1, uses)


def test_what_would_take_too_much_memory_is_not_captured(
    small_model: Callable[..., Model], caplog: pytest.LogCaptureFixture
) -> None:
    model, played = small_model("sd1"), Played()
    latent = 4 * 16 * 16 * 4  # bytes of a row
    graphs = Graphs(
        model.unet, model.value_layers, most_rows=5, most_bytes=4.9 * latent, capture=played
    )
    made = Passes(model, graphs, 1.0)
    with graphs.in_use():
        for _ in range(2 * USES):
            made.difference(CAPTIONS[0], [0], [])
    assert not played.captured and not caplog.records


def test_what_is_too_large_takes_no_room_from_what_is_not() -> None:
    fixed = passes._Fixed(most_rows=2, most_bytes=100.0)
    for value in (torch.zeros(1, 1000), torch.zeros(1, 2000)):
        with pytest.raises(passes._TooLargeError):
            fixed.place("kept", f"large {value.numel()}", value, 1)
    assert len(fixed.place("kept", "small", torch.ones(1, 4), 1)) == 1


@pytest.mark.parametrize(("rows", "most", "needed"), [([0], 1, 0), ([0, 1], 1, 2), ([0, 1], 1, 0)])
def test_where_memory_ends_graphs_do(
    small_model: Callable[..., Model],
    rows: list[int],
    most: int,
    needed: int,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """For a pass that is as small as they are or cannot be made smaller; a larger one is, by who
    asked for it. What the failed pass held is free by then."""
    model, played = small_model("sd1"), Played()
    graphs = Graphs(
        model.unet, model.value_layers, most_rows=most, needed_rows=needed, capture=played
    )
    made = Passes(model, graphs, 1.0)
    held: list[weakref.ref[Tensor]] = []

    def forward(*inputs: Any, own: Any = model.unet.forward, **named: Any) -> Any:
        if not held:
            activation = torch.zeros(1)
            held.append(weakref.ref(activation))
            raise torch.OutOfMemoryError
        assert held[0]() is None or len(rows) > max(most, needed)
        return own(*inputs, **named)

    wanted = made.difference(CAPTIONS[0], rows, [])
    monkeypatch.setattr(graphs, "_forward", forward)
    with graphs.in_use():
        if len(rows) > max(most, needed):
            with pytest.raises(torch.OutOfMemoryError):
                made.difference(CAPTIONS[0], rows, [])
        for _ in range(2 * USES):
            assert torch.equal(made.difference(CAPTIONS[0], rows, []), wanted)
    given_up = len(rows) <= max(most, needed)
    assert len(caplog.records) == given_up and not played.captured


def test_outside_of_use_changes_are_made_at_once(small_model: Callable[..., Model]) -> None:
    model, played = small_model("sd1"), Played()
    graphs = Graphs(model.unet, model.value_layers, capture=played)
    made, own = (Passes(model, c, 1.0) for c in (graphs, Hooks(model.unet, model.value_layers)))
    sets = [[[1, 2]] * len(model.value_layers)]
    for _ in range(USES + 1):
        assert torch.equal(
            made.difference(CAPTIONS[0], [0, 1], sets), own.difference(CAPTIONS[0], [0, 1], sets)
        )
    assert not played.captured


def test_a_mask_must_fit_the_batch(small_model: Callable[..., Model]) -> None:
    model = small_model("sd1")
    made = Passes(model, Graphs(model.unet, model.value_layers, capture=Played()), 1.0)
    neurons = [[0]] * len(model.value_layers)
    with made.changes.in_use():
        for _ in range(USES):
            made.difference(CAPTIONS[0], [0, 1, 2], [neurons])
        with pytest.raises(ValueError, match="3 batch rows for 2 neuron sets"):
            made.difference(CAPTIONS[0], [0, 1, 2], [neurons, neurons])


def test_what_cannot_be_captured_is_run(
    small_model: Callable[..., Model], caplog: pytest.LogCaptureFixture
) -> None:
    def refuses(work: Callable[[], None]) -> Callable[[], None]:
        work()
        raise RuntimeError("operation not permitted when stream is capturing\nand more")

    model = small_model("sd1")
    graphs = Graphs(model.unet, model.value_layers, capture=refuses)
    found, wanted = (
        list(Passes(model, c, 1.0).all_kinds())
        for c in (graphs, Hooks(model.unet, model.value_layers))
    )
    for (difference, _), (own, _) in zip(found, wanted, strict=True):
        assert torch.equal(difference, own)
    assert [record.getMessage() for record in caplog.records] == [
        "no CUDA graphs from here on: operation not permitted when stream is capturing"
    ]


def test_graphs_are_for_gpus(small_model: Callable[..., Model]) -> None:
    model = small_model("sd1")
    expected = Graphs if torch.cuda.is_available() and model.device.type == "cuda" else Hooks
    assert type(changes_of(model.unet, model.value_layers)) is expected


def test_a_gpus_graphs_take_a_share_of_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    unet = nn.Linear(1, 1)
    unet.device = torch.device("cuda")  # type: ignore[assignment]
    gpu = SimpleNamespace(total_memory=1000)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: gpu)
    graphs = changes_of(unet, {})
    assert isinstance(graphs, Graphs)
    assert graphs._fixed._left == passes.MEMORY_SHARE * 1000


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("guidance_scale", [1.0, 7.0])
def test_real_graphs_give_the_bits_of_hooks(
    small_folder: Callable[[str], Path], guidance_scale: float, dtype: str
) -> None:
    model = load_model(resolve(str(small_folder("sd1"))), device="cuda", dtype=dtype)
    both = changes_of(model.unet, model.value_layers), Hooks(model.unet, model.value_layers)
    found, wanted = (list(Passes(model, changes, guidance_scale).all_kinds()) for changes in both)
    for (difference, kept), (own, own_kept) in zip(found, wanted, strict=True):
        assert torch.equal(difference, own)
        assert kept.keys() == own_kept.keys()
        assert all(same(kept[name], own_kept[name]) for name in kept)
    assert isinstance(both[0], Graphs) and both[0]._plays, "hooks were compared with hooks"
