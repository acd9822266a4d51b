"""The exact search finds what the plain one finds, to the last bit, on every architecture and
option."""

import contextlib
import itertools
import json
import weakref
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import event, given, settings
from hypothesis import strategies as st

from utils.activation_statistics import RunningStatistics, Statistics, z_scores
from utils.exact_search import FastScore, Question, localize_exactly, select
from utils.localization import (
    Search,
    Thresholds,
    UndecidedError,
    candidates,
    kept_rows,
    localize,
)
from utils.neuron_sets import NeuronSet, size
from utils.noise_difference import NoiseSettings, noise_difference
from utils.replay import Recording, Replay
from utils.scoring import Detector, Finding, MemorizationScore, gainful_batch, margin
from utils.ssim import dynamic_ranges, ssim, ssim_floor
from utils.stable_diffusion import (
    Model,
    encode_prompt,
    encode_unconditional,
    initial_noise,
    load_model,
)
from utils.value_layers import deactivated, layer_widths
from utils.versions import resolve

ROOT = Path(__file__).resolve().parent.parent
ROWS = 3
CAPTION = "A small house by the sea"


def statistics_of(model: Model) -> Statistics:
    running = RunningStatistics(layer_widths(model.value_layers))
    for number in range(12):
        conditioning = encode_prompt(model, f"Ordinary caption number {number * 7919}")
        running.add(model.value_reader.activations(conditioning.embedding[0]))
    return running.result()


# What differs, architecture, noise settings, search, factor, sets per batch, share of the score's
# way from its lowest to 1 that the threshold lies at: below 0 the search falls back.
SHORT = {"initial_theta": 13.0, "theta_step": 0.5, "min_theta": 12.0}
CASES: list[tuple[str, str, dict[str, Any], dict[str, Any], float, int, float]] = [
    ("several sets in one batch", "sd1", {}, SHORT, 0.0, 4, 0.6),
    ("velocity prediction, falls back", "sd2", {}, SHORT, 0.0, 1, -0.1),
    ("SDXL with guidance", "xl", {"guidance_scale": 7.0}, SHORT, 0.0, 2, 0.6),
    ("relative refinement", "sd1", {}, {**SHORT, "relative": 0.002}, -1.0, 1, 0.6),
]


def both(
    model: Model,
    noise: dict[str, Any],
    search: Search,
    factor: float,
    sets: int,
    quantile: float,
    *,
    seed: int = 1,
    share: float | None = None,
) -> tuple[Finding, Finding]:
    """(plain, exact), with a threshold between the scores that occur. ``share``: what is taken for
    the time of a pass over one row, not measured."""
    detector = Detector(model, NoiseSettings(**noise), rows=ROWS, seed=seed, factor=factor)
    detector.sets_per_pass = sets
    if share is not None:
        detector._one_row_share = share
    pairwise = detector.pairwise(CAPTION)
    tau = float(pairwise.sort().values[-2]) - 1e-6  # keeps some rows, seldom all
    statistics = statistics_of(model)
    last = next(j for j in itertools.count() if search.is_last(j, 96))
    conditioning = encode_prompt(model, CAPTION)
    activations = model.value_reader.activations(conditioning.embedding[0])
    z = z_scores(activations, statistics)
    widest = candidates(activations, z, search.theta(last), search.k(last))
    unblocked = detector._unblocked(conditioning)
    kept = kept_rows(pairwise, ROWS, tau)
    score = MemorizationScore(lambda s: detector._difference(conditioning, s), unblocked, kept)
    lowest = score(widest)
    reachable = lowest + quantile * (1 - lowest)
    found = [
        detector.find(
            CAPTION,
            statistics,
            search=search,
            thresholds=Thresholds(tau, reachable, reachable),
            method=method,
        )
        for method in ("plain", "exact")
    ]
    return found[0], found[1]


@pytest.mark.parametrize("case", CASES, ids=[case[0] for case in CASES])
def test_exact_is_plain(small_model: Callable[..., Model], case: tuple[Any, ...]) -> None:
    _, architecture, noise, search, factor, sets, quantile = case
    plain, exact = both(small_model(architecture), noise, Search(**search), factor, sets, quantile)
    assert plain.outcome is not None and exact.outcome is not None
    assert plain.outcome == exact.outcome  # sets and both scores, to the bit
    assert plain.rows == exact.rows
    assert size(plain.outcome.initial) > 0
    assert plain.outcome.fell_back == (quantile < 0)


@contextlib.contextmanager
def planted(model: Model, seed: int) -> Iterator[None]:
    """Some neurons of the caption write loudly: their scores fall far when they are off."""
    rng = torch.Generator().manual_seed(seed)
    layers = list(model.value_layers.values())
    chosen = [torch.randint(layer.out_features, (2,), generator=rng) for layer in layers]
    kept = [layer.weight.clone() for layer in layers]
    try:
        for layer, rows in zip(layers[seed % 3 :: 3], chosen[seed % 3 :: 3], strict=True):
            layer.weight[rows] *= 30
        yield
    finally:
        for layer, weight in zip(layers, kept, strict=True):
            layer.weight.copy_(weight)


@given(
    seed=st.integers(0, 1000),
    loud=st.booleans(),
    noise=st.fixed_dictionaries(
        {"protocol": st.sampled_from(["published", "paper"])},
        optional={"guidance_scale": st.just(7.0), "exchanged_guidance": st.booleans()},
    ),
    chosen_by=st.sampled_from([{}, {"use_top_k": False}]),  # k alone would take all neurons
    relative=st.sampled_from([None, 0.002, 0.05]),
    factor=st.sampled_from([0.0, 0.5, -1.0]),
    sets=st.integers(1, 4),
    share=st.sampled_from([0.1, 0.4, 1.0]),
    quantile=st.sampled_from([-0.1, 0.2, 0.5, 0.8]),
)
@settings(max_examples=6, deadline=None)
def test_exact_is_plain_with_every_option(
    small_model: Callable[..., Model],
    seed: int,
    loud: bool,
    noise: dict[str, Any],
    chosen_by: dict[str, Any],
    relative: float | None,
    factor: float,
    sets: int,
    share: float,
    quantile: float,
) -> None:
    """On a U-Net, so that what is recorded and replayed is drawn too."""
    model = small_model("sd1")
    search = Search(**{**SHORT, **chosen_by}, relative=relative)
    with planted(model, seed) if loud else contextlib.nullcontext():
        plain, exact = both(model, noise, search, factor, sets, quantile, seed=seed, share=share)
    assert plain.outcome == exact.outcome is not None
    event(f"fell back: {plain.outcome.fell_back}")
    event(f"kept {size(plain.outcome.refined)} of {size(plain.outcome.initial)}")


def test_exact_is_plain_where_channels_come_last(small_folder: Callable[[str], Path]) -> None:
    """The U-Net's memory layout in half precision on a GPU: what is recorded has it too."""
    model = load_model(resolve(str(small_folder("sd1"))), device="cpu", dtype="float32")
    model.unet.to(memory_format=torch.channels_last)
    plain, exact = both(model, {}, Search(**SHORT), 0.0, 2, 0.6)
    assert plain.outcome == exact.outcome is not None


def test_passes_restart_where_sets_differ(
    small_model: Callable[..., Model], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Refinement goes from the last layer to the first, so most of its passes begin late."""
    restarts: list[int] = []
    replaying = Replay.replaying

    def noted(self: Replay, recording: Any, layer: int, chosen: Sequence[int]) -> Any:
        restarts.append(layer)
        return replaying(self, recording, layer, chosen)

    monkeypatch.setattr(Replay, "replaying", noted)
    model = small_model("sd1")
    plain, exact = both(model, {}, Search(**SHORT), 0.0, 1, 0.6, share=0.1)
    assert plain.outcome == exact.outcome is not None
    layers = [layer for layer, columns in enumerate(exact.outcome.initial) if columns]
    assert max(restarts) == layers[-1] and min(restarts) >= layers[0]
    assert len([layer for layer in restarts if layer > layers[0]]) > len(restarts) / 2


def test_how_many_sets_share_a_pass_changes_nothing(small_model: Callable[..., Model]) -> None:
    model = small_model("sd1")
    found = [both(model, {}, Search(**SHORT), 0.0, sets, 0.6)[1] for sets in (1, 8)]
    assert found[0].outcome == found[1].outcome is not None
    assert len({finding.evaluations for finding in found}) > 1, "what is asked ahead differs"


def test_a_share_of_the_score_has_two_borders() -> None:
    """Near either of them a fast evaluation leaves the decision to the reference."""
    made_up = MadeUp(3, 4)
    _, fast = made_up.scores([0, 1], max_sets=1, one_row_share=0.5)
    start = select(
        made_up.activations,
        made_up.z,
        fast,
        search=Search(min_theta=3.0, relative=0.1),
        thresholds=Thresholds(0.5, 0.5, 0.5),
        report=lambda *_: None,
    )
    scale = abs(start.score) + 1e-9
    for border in (start.score - 0.1 * scale, start.score + 0.1 * scale):
        assert not start.droppable.clear(border, 1e-5)
        assert start.droppable.clear(border - 1e-3, 1e-5)
        assert start.droppable.clear(border + 1e-3, 1e-5)


def test_the_time_of_one_row_is_measured_as_searches_make_it(
    small_model: Callable[..., Model], monkeypatch: pytest.MonkeyPatch
) -> None:
    detector = Detector(small_model("sd1"), NoiseSettings(), rows=ROWS, seed=1)

    def seconds(sets: int, rows: int | None = None, *, record: bool = False) -> float:
        assert sets == 1 and not record
        return {1: 2.0, ROWS: 5.0}[rows or ROWS]

    monkeypatch.setattr(detector, "_seconds", seconds)
    assert detector._one_row_share == 0.4


def test_what_was_chosen_for_the_device_is_said(small_model: Callable[..., Model]) -> None:
    model = small_model("sd1")

    def pace(batch_size: int | None, sets: int | None = None) -> str:
        detector = Detector(model, NoiseSettings(), rows=ROWS, seed=1, batch_size=batch_size)
        if sets is not None:
            detector.sets_per_pass = sets
        detector._one_row_share = 0.4
        return detector.pace()

    share = "a pass over one seed row takes 40% of the time of one over 3"
    assert pace(None, 5) == f"Neuron sets in a pass: 5 at the most (measured here); {share}"
    assert pace(7) == f"Neuron sets in a pass: 2 at the most (batch size 7); {share}"
    assert pace(2) == "Plain search: a batch of 2 does not hold all 3 seed rows"


@pytest.mark.parametrize("architecture", ["sd1", "sd2", "xl"])
@pytest.mark.parametrize("guidance_scale", [1.0, 7.0])
def test_a_replayed_pass_equals_a_whole_one(
    small_model: Callable[..., Model], architecture: str, guidance_scale: float
) -> None:
    """From every value layer on, for some of the rows, each several times; nothing stays
    patched."""
    model = small_model(architecture)
    guided = guidance_scale != 1
    how = NoiseSettings(guidance_scale=guidance_scale)
    text, empty = encode_prompt(model, CAPTION), encode_unconditional(model)
    noise = initial_noise(model, ROWS, 1)
    replay = Replay(
        model.unet, model.value_layers, lambda: noise_difference(model, text, empty, noise[:1], how)
    )
    with replay.recording(rows=ROWS, halves=2 if guided else 1) as recording:
        noise_difference(model, text, empty, noise, how)
    chosen = [0, 2, 0, 2]
    for layer in range(len(model.value_layers)):
        neurons = [[] for _ in model.value_layers]
        neurons[layer] = [0, 5]
        with deactivated(model.value_layers, [neurons]):
            whole = noise_difference(model, text, empty, noise[chosen], how)
            with replay.replaying(recording, layer, chosen):
                replayed = noise_difference(model, text, empty, noise[chosen], how)
        torch.testing.assert_close(replayed, whole, atol=2e-5, rtol=0)
    assert not any("forward" in vars(module) for module in model.unet.modules())


@pytest.mark.parametrize("architecture", ["sd1", "sd2", "xl"])
def test_a_replayed_pass_reads_the_text_no_more(
    small_model: Callable[..., Model], architecture: str
) -> None:
    """Its keys and values are those recorded, in the up blocks too; values are masked anew."""
    model = small_model(architecture)
    text, noise = encode_prompt(model, CAPTION), initial_noise(model, ROWS, 1)

    def difference(rows: list[int]) -> torch.Tensor:
        return noise_difference(model, text, None, noise[rows], NoiseSettings())

    replay = Replay(model.unet, model.value_layers, lambda: difference([0]))
    everything = list(range(ROWS))
    with replay.recording(rows=ROWS, halves=1) as recording:
        unblocked = difference(everything)
    of_text = [
        module
        for name, module in model.unet.named_modules()
        if name.endswith(("attn2.to_k", "attn2.to_v"))
    ]
    calls: list[int] = []
    kept = [module.forward for module in of_text]
    for module, forward in zip(of_text, kept, strict=True):
        module.forward = lambda *inputs, forward=forward: calls.append(1) or forward(*inputs)
    try:
        with replay.replaying(recording, 0, everything):
            assert torch.equal(difference(everything), unblocked) and not calls
            neurons = [[1, 3]] + [[] for _ in range(replay.layers - 1)]
            with deactivated(model.value_layers, [neurons]):
                assert not torch.equal(difference(everything), unblocked)
    finally:
        for module in of_text:
            vars(module).pop("forward", None)


def test_margins_are_wide_on_gpus_and_in_half_precision(small_model: Callable[..., Model]) -> None:
    cuda = torch.device("cuda")
    for name, here, wide in (
        ("float32", 1e-5, 1e-3),
        ("float16", 1e-2, 1e-2),
        ("bfloat16", 1e-1, 1e-1),
    ):
        dtype = getattr(torch, name)
        assert margin(cuda, dtype) == wide
        detector = Detector(small_model("sd1", name), NoiseSettings(), rows=2, seed=1)
        assert detector._margin == here
    record = json.loads((ROOT / "benchmarks/results/precision_gpu.json").read_text())
    for row in record["rows"]:
        measured = dict(zip(record["columns"], row, strict=True))
        moved = max(float(measured[way]) for way in ("batching", "replay", "single_rows"))
        assert 10 * moved <= margin(cuda, getattr(torch, measured["dtype"]))


@pytest.mark.parametrize("architecture", ["sd1", "sd2", "xl"])
def test_margin_is_ten_times_what_fast_evaluations_change(
    small_model: Callable[..., Model], architecture: str
) -> None:
    """Fewer rows, several sets, restarted: a row's score against that of the reference's pass."""
    model = small_model(architecture)
    text, noise = encode_prompt(model, CAPTION), initial_noise(model, ROWS, 1)

    def differences(sets: list[list[list[int]]], rows: list[int]) -> torch.Tensor:
        of_rows = [neurons for neurons in sets for _ in rows]
        with deactivated(model.value_layers, of_rows):
            repeated = noise[rows].repeat(len(sets), 1, 1, 1)
            found = noise_difference(model, text, None, repeated, NoiseSettings())
        return found.unflatten(0, (len(sets), len(rows)))

    nothing: list[list[int]] = [[] for _ in model.value_layers]
    replay = Replay(model.unet, model.value_layers, lambda: differences([nothing], [0]))
    everything = list(range(ROWS))
    with replay.recording(rows=ROWS, halves=1) as recording:
        unblocked = differences([nothing], everything)[0]
    largest = 0.0
    for layer in range(replay.layers):
        neurons = [list(range(8)) if other >= layer else [] for other in range(replay.layers)]
        expected = ssim(unblocked, differences([neurons], everything)[0])
        for rows, sets in itertools.product(([0, 1, 2], [2], [1, 0]), (1, 3)):
            batch = [neurons, nothing, neurons][:sets]
            with replay.replaying(recording, layer, rows * sets):
                found = differences(batch, rows)
            scores = ssim(unblocked[rows].expand_as(found), found)[0]
            largest = max(largest, (scores - expected[rows]).abs().max().item())
    assert 10 * largest <= margin(torch.device("cpu"), torch.float32), f"largest change {largest}"


@pytest.mark.parametrize("architecture", ["sd1", "sd2", "xl"])
@pytest.mark.parametrize("guidance", [1.0, 7.0])
def test_the_same_batch_replayed_is_the_same_to_the_bit(
    small_model: Callable[..., Model], architecture: str, guidance: float
) -> None:
    """Reference evaluations rest on it: also where each restarts from the one before."""
    model = small_model(architecture)
    detector = Detector(model, NoiseSettings(guidance_scale=guidance), rows=ROWS, seed=1)
    text = encode_prompt(model, CAPTION)
    replay, halves = detector._replay, 1 if guidance == 1 else 2
    before: NeuronSet = [[] for _ in model.value_layers]
    with replay.recording(rows=ROWS, halves=halves) as recording:
        detector._difference(text, before)
    unblocked = recording
    for layer in reversed(range(replay.layers)):
        neurons = [list(range(8)) if other >= layer else [] for other in range(replay.layers)]
        with (
            replay.replaying(recording, layer, range(ROWS)),
            replay.recording(rows=ROWS, halves=halves) as latest,
        ):
            found = detector._difference(text, neurons)
        latest.complete(recording, range(ROWS))
        recording = latest
        assert torch.equal(found, detector._difference(text, neurons))
        alone = [columns if other == layer else [] for other, columns in enumerate(neurons)]
        with replay.replaying(unblocked, layer, range(ROWS)):
            found = detector._difference(text, alone)
        assert torch.equal(found, detector._difference(text, alone))


@pytest.mark.parametrize("method", ["exact", "bisect"])
def test_no_row_of_a_set_is_computed_twice_but_for_a_reference(
    small_model: Callable[..., Model], method: str
) -> None:
    """Small passes first, and one set is never looked at again in the same way."""
    model = small_model("sd1")
    detector = Detector(model, NoiseSettings(), rows=4, seed=1)
    asked: list[tuple[str, tuple[int, ...]]] = []
    differences = detector._differences

    def counted(conditioning: Any, sets: Any, rows: Any) -> torch.Tensor:
        asked.extend((str([sorted(x) for x in neurons]), tuple(rows)) for neurons in sets)
        return differences(conditioning, sets, rows)

    detector.sets_per_pass, detector._one_row_share = 1, 0.1
    assert detector._replay.layers == 7  # its trace is a pass that answers nothing
    detector._differences = counted  # type: ignore[method-assign]
    finding = detector.find(
        CAPTION,
        statistics_of(model),
        search=Search(**SHORT),
        thresholds=Thresholds(-1.0, 0.9, 0.95),
        method=method,
    )
    assert finding.evaluations == len(asked)
    partial = [order for order in asked if len(order[1]) < 4]
    assert partial and len(partial) == len(set(partial))
    assert max(asked.count(order) for order in asked) <= 2  # fast, and as a reference


@pytest.mark.parametrize(
    ("what", "seconds", "size"),
    [
        ("time grows with the batch: as on a CPU", {1: 1.0, 2: 2.0, 4: 4.0, 8: 8.0}, 1),
        ("hardly slower when larger: as on a GPU", {1: 1.0, 2: 1.1, 4: 1.3, 8: 1.8}, 8),
        ("full at two", {1: 1.0, 2: 1.2, 4: 2.3, 8: 4.6}, 2),
        ("no memory for four", {1: 1.0, 2: 1.1}, 2),
    ],
)
def test_sets_per_pass_are_those_that_pay(what: str, seconds: dict[int, float], size: int) -> None:
    def run(batch: int) -> float:
        if batch not in seconds:
            raise torch.OutOfMemoryError
        return seconds[batch]

    assert gainful_batch(run, 8) == size
    assert gainful_batch(run, 1) == 1


@pytest.mark.parametrize(("memory", "share"), [(4, 0.1), (9, 0.1), (4, 2.0)])
@pytest.mark.parametrize("method", ["exact", "bisect"])
def test_a_batch_that_does_not_fit_is_halved(
    small_model: Callable[..., Model], memory: int, share: float, method: str
) -> None:
    """What was measured at the start holds for bare passes of that moment."""
    model = small_model("sd1")
    detector = Detector(model, NoiseSettings(), rows=ROWS, seed=1)
    detector.sets_per_pass, detector._one_row_share = 8, share
    assert detector._replay.layers == 7
    differences, sizes = detector._differences, []

    held: list[weakref.ref[torch.Tensor]] = []

    def with_little_memory(conditioning: Any, sets: Any, rows: Any) -> torch.Tensor:
        sizes.append(len(sets) * len(rows))
        assert not any(tensor() is not None for tensor in held), "a failed pass is still held"
        found = differences(conditioning, sets, rows)
        if sizes[-1] > memory:
            raise torch.OutOfMemoryError
        return found

    def keep(module: object, inputs: object, output: Any) -> None:
        """Of a pass that is about to fail, an output that recordings keep."""
        if sizes and sizes[-1] > memory:
            held.append(weakref.ref(output))

    def found() -> Any:
        levels = Thresholds(-1.0, 0.9, 0.95)
        statistics, search = statistics_of(model), Search(**SHORT)
        return detector.find(
            CAPTION, statistics, search=search, thresholds=levels, method=method
        ).outcome

    expected = found()
    detector._differences = with_little_memory  # type: ignore[method-assign]
    handle = model.unet.conv_in.register_forward_hook(keep)
    try:
        assert found() == expected is not None
    finally:
        handle.remove()
    assert detector.sets_per_pass < 8, "the next prompt begins with what fits"
    assert any(size > memory for size in sizes), "nothing was too large: the test tests nothing"
    assert not any("forward" in vars(module) for module in model.unet.modules())


@given(
    seed=st.integers(0, 10_000),
    side=st.sampled_from([16, 24, 44]),
    likeness=st.floats(0, 1),
    chosen=st.integers(0, 2),
)
@settings(max_examples=40, deadline=None)
def test_one_rows_floor_never_exceeds_its_score(
    seed: int, side: int, likeness: float, chosen: int
) -> None:
    """Whatever the other rows do to the dynamic range."""
    generator = torch.Generator().manual_seed(seed)
    first = torch.rand((3, 2, side, side), generator=generator)
    other = torch.rand((3, 2, side, side), generator=generator)
    first[0] *= 0.2  # quiet rows: the range is the others' doing
    second = likeness * first + (1 - likeness) * other
    second[1] = (second[1] - 0.5).clamp(-0.5, 0.5) + 0.5
    row = slice(chosen, chosen + 1)
    floor = ssim_floor(first[row], second[row], dynamic_ranges(first))
    assert floor.item() <= ssim(first, second)[chosen].item() + 1e-6


class NothingToReplay:
    """Stands in for ``Replay`` where noise differences are made up."""

    layers = 3

    @contextlib.contextmanager
    def recording(self, *, rows: int, halves: int) -> Iterator[Recording]:
        yield Recording({}, halves, rows)

    @contextlib.contextmanager
    def replaying(self, recording: Any, layer: int, chosen: Sequence[int]) -> Iterator[None]:
        yield


class MadeUp:
    """Noise differences of a prompt that needs some of its neurons, each row in its own way."""

    def __init__(self, seed: int, width: int) -> None:
        rng = torch.Generator().manual_seed(seed)
        self.unblocked = torch.rand(4, 1, 8, 8, generator=rng)
        self.other = torch.rand(4, 1, 8, 8, generator=rng)
        self.weight = torch.rand(4, 3, width, generator=rng) ** 6  # row, layer, neuron
        self.activations = list(torch.rand(3, width, generator=rng))
        self.z = [10 * a - 4 for a in self.activations]
        self.broken: set[int] = set()
        self.made = 0

    def passes(self, sets: Sequence[NeuronSet], rows: Sequence[int]) -> torch.Tensor:
        self.made += 1
        chosen, off = list(rows), torch.zeros(len(sets), *self.weight.shape[1:])
        for number, neurons in enumerate(sets):
            for layer, columns in enumerate(neurons):
                off[number, layer, columns] = 1
        loud = torch.exp(-torch.einsum("sli,rli->sr", off, self.weight[chosen]))
        kept = loud[..., None, None, None]
        differences = kept * self.unblocked[chosen] + (1 - kept) * self.other[chosen]
        differences[:, [row in self.broken for row in chosen]] = float("nan")
        return differences

    def scores(self, rows: Sequence[int], **options: Any) -> tuple[MemorizationScore, FastScore]:
        plain, inner = (
            MemorizationScore(lambda s: self.passes([s], range(4))[0], self.unblocked, rows)
            for _ in range(2)
        )
        replay: Any = NothingToReplay()
        made = Recording({}, halves=1, rows=4)
        fast = FastScore(
            self.passes, inner, self.unblocked, rows, replay, made, margin=1e-5, **options
        )
        return plain, fast


@given(
    seed=st.integers(0, 10_000),
    width=st.integers(1, 8),
    rows=st.sets(st.integers(0, 3), min_size=2),
    max_sets=st.integers(1, 8),
    share=st.floats(0.02, 2.0),
    tau=st.floats(0.05, 0.95),
    chosen_by=st.sampled_from([{}, {"use_theta": False}, {"use_top_k": False}]),
    relative=st.sampled_from([None, 0.05, 0.5]),
)
@settings(max_examples=60, deadline=None)
def test_exact_is_plain_whatever_is_asked_ahead(
    seed: int,
    width: int,
    rows: set[int],
    max_sets: int,
    share: float,
    tau: float,
    chosen_by: dict[str, Any],
    relative: float | None,
) -> None:
    made_up = MadeUp(seed, width)
    plain, fast = made_up.scores(sorted(rows), max_sets=max_sets, one_row_share=share)
    search = Search(min_theta=3.0, relative=relative, **chosen_by)
    options: Any = {"search": search, "thresholds": Thresholds(tau, tau, tau)}
    assert localize_exactly(made_up.activations, made_up.z, fast, **options) == localize(
        made_up.activations, made_up.z, plain, **options
    )


def test_what_is_not_finite_in_a_row_looked_at_is_undecided() -> None:
    """Also where another row is far above the threshold."""
    made_up = MadeUp(3, 4)
    made_up.broken = {2}
    question = Question(lambda score: score < 0.3, (0.3,))
    neurons = [[0], [1], []]
    for first in ([2], [0, 2], [2, 0]):
        _, fast = made_up.scores([0, 1, 2, 3], max_sets=1, one_row_share=0.25)
        for row in first:
            fast._look_at_rows([neurons], [row])
        with pytest.raises(UndecidedError):
            fast.leading([neurons], question)
        with pytest.raises(UndecidedError):
            fast.guess(neurons, question)
