"""One prompt from caption to neurons: noise differences, hooks, SSIM and the search put together.

Public: ``margin``, ``Detector``, ``Finding``, ``MemorizationScore``, ``gainful_batch``.
"""

import contextlib
import functools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from utils.activation_statistics import Statistics, z_scores
from utils.bisect_search import localize_by_bisection
from utils.exact_search import FastScore, localize_exactly
from utils.localization import Outcome, Search, Thresholds, UndecidedError, kept_rows, localize
from utils.neuron_sets import NeuronSet, SetKey, set_key
from utils.noise_difference import NoiseSettings, noise_difference
from utils.passes import changes_of
from utils.replay import Replay
from utils.ssim import number_of_scales, pairwise_ssim, ssim
from utils.stable_diffusion import (
    Conditioning,
    Model,
    encode_prompt,
    encode_unconditional,
    initial_noise,
)

# How near to a threshold a fast evaluation leaves the decision to the reference. In float32 on a
# CPU batching and replay move a score by 1e-6 at the most. On a GPU, whose convolutions may take
# another algorithm for another number of rows, they moved it by 5e-7 in float32, 2e-4 in float16
# and 3e-4 in bfloat16 (H200, small models: benchmarks/RESULTS.md). A full-size model's numbers are
# not known, so the margins there are wide.
MARGINS = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 1e-1}
LEAST_MARGIN_ON_GPU = 1e-3


def margin(device: torch.device, dtype: torch.dtype) -> float:
    """Of a model on ``device`` in ``dtype``."""
    return MARGINS[dtype] if device.type == "cpu" else max(MARGINS[dtype], LEAST_MARGIN_ON_GPU)


MOST_SETS = 8
SMALLEST_GAIN = 1.1  # by how much a batch twice as large has to be faster per set


class MemorizationScore:
    """Maps neuron sets to the memorization score of one prompt (paper Sec. 3.1): the largest SSIM,
    over the kept seed rows, of the unblocked and the blocked noise difference of the same row.

    Each set is evaluated at most once, since refinement comes back to sets it has seen. ``loudest``
    is the position among ``rows`` of the largest score of the set that was evaluated last.
    """

    def __init__(
        self,
        difference: Callable[[NeuronSet], torch.Tensor],
        unblocked: torch.Tensor,
        rows: Sequence[int],
    ) -> None:
        self._difference = difference
        self._unblocked = unblocked
        self._rows = list(rows)
        self.loudest = 0
        self._known: dict[SetKey, float] = {}

    def __call__(self, neurons: NeuronSet) -> float:
        """The score with ``neurons`` deactivated. Raises UndecidedError if it is not finite."""
        key = set_key(neurons)
        if key not in self._known:
            blocked = self._difference(neurons) if any(neurons) else self._unblocked
            scores = ssim(self._unblocked[self._rows], blocked[self._rows])
            score, self.loudest = scores.max().item(), int(scores.argmax())
            if not math.isfinite(score):
                raise UndecidedError("a memorization score is not finite")
            self._known[key] = score
        return self._known[key]


@dataclass(frozen=True)
class Finding:
    """What is known of one prompt. ``outcome`` is None where it is not memorized, and where the
    search was not asked for."""

    pairwise: torch.Tensor  # one score for each of thresholds.pairs(n), float32 on the CPU
    rows: list[int]  # seed rows that count; empty: not memorized
    outcome: Outcome | None
    evaluations: int  # neuron sets evaluated, also those over some of the seed rows only


def gainful_batch(seconds: Callable[[int], float], largest: int, slow: int = 1) -> int:
    """The batch size to stop at, doubling from 1: the next one is not faster per item, does not fit
    into memory or is above ``largest``. ``seconds`` runs a batch; the first ``slow`` runs of each
    size do not count."""

    def per_item(size: int) -> float:
        return [seconds(size) for _ in range(slow + 1)][-1] / size

    size, reached = 1, per_item(1)
    while 2 * size <= largest:
        try:
            doubled = per_item(2 * size)
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            break
        if doubled * SMALLEST_GAIN > reached:
            break
        size, reached = 2 * size, doubled
    return size


class Detector:
    """Scores captions against one model with one set of noises; what all prompts share is made
    once."""

    def __init__(
        self,
        model: Model,
        settings: NoiseSettings,
        *,
        rows: int,
        seed: int,
        factor: float = 0.0,
        batch_size: int | None = None,
    ) -> None:
        self._model = model
        self._settings = settings
        self._factor = factor
        self._batch_size = batch_size
        number_of_scales(*model.latent_shape[1:])  # InputError for too small a latent
        self._noise = initial_noise(model, rows, seed)
        guided = settings.guidance_scale != 1.0
        self._unconditional: Conditioning | None = encode_unconditional(model) if guided else None
        self._margin = margin(model.device, model.dtype)
        # A pass in parts has no single recording to replay from.
        self._split = batch_size is not None and batch_size < rows
        self._halves = 2 if guided else 1
        self._changes = changes_of(
            model.unet, model.value_layers, needed_rows=self._halves * min(rows, batch_size or rows)
        )

    @functools.cached_property
    def _replay(self) -> Replay:
        conditioning = encode_prompt(self._model, "")
        return Replay(
            self._model.unet,
            self._model.value_layers,
            lambda: self._difference(conditioning, [[] for _ in self._model.value_layers]),
            self._changes,
        )

    @contextlib.contextmanager
    def _ready(self) -> Iterator[None]:
        """For the passes of the exact and the bisect search."""
        _ = self._replay  # reads the order of modules from a pass that nothing changes
        with self._changes.in_use():
            yield

    @functools.cached_property
    def sets_per_pass(self) -> int:
        """The neuron sets that a pass over all seed rows holds at the most: as many as
        ``batch_size`` has room for, or as pay on this device, which is measured once."""
        if self._batch_size is not None:
            return max(1, self._batch_size // len(self._noise))
        # What a search keeps of a pass has to fit into memory as well.
        seconds = functools.partial(self._seconds, record=True)
        return gainful_batch(seconds, MOST_SETS, self._changes.slow)

    def pace(self) -> str:
        """What the exact and the bisect search go by on this device, in words; measured unless
        ``batch_size`` says it. It decides what is evaluated together, not what is found (for the
        bisect search see ``FastScore.guess``)."""
        rows = len(self._noise)
        if self._split:
            return f"Plain search: a batch of {self._batch_size} does not hold all {rows} seed rows"
        how = "measured here" if self._batch_size is None else f"batch size {self._batch_size}"
        return (
            f"Neuron sets in a pass: {self.sets_per_pass} at the most ({how}); a pass over one "
            f"seed row takes {self._one_row_share:.0%} of the time of one over {rows}"
        )

    @functools.cached_property
    def _one_row_share(self) -> float:
        """The time of a pass over one seed row by that of one over all, measured once."""
        rows = len(self._noise)
        runs = range(self._changes.slow + 2)
        one, every = (min(self._seconds(1, n) for _ in runs) for n in (1, rows))
        return min(1.0, one / every)

    def _seconds(self, sets: int, rows: int | None = None, *, record: bool = False) -> float:
        """Time of a pass over so many neuron sets and seed rows (default: all), recorded or not."""
        conditioning = encode_prompt(self._model, "")
        nothing: NeuronSet = [[] for _ in self._model.value_layers]
        started = time.perf_counter()
        chosen = range(len(self._noise) if rows is None else rows)
        with contextlib.ExitStack() as contexts:
            contexts.enter_context(self._ready())
            if record:
                contexts.enter_context(
                    self._replay.recording(rows=sets * len(chosen), halves=self._halves)
                )
            self._differences(conditioning, [nothing] * sets, chosen).sum().item()  # waits for it
        return time.perf_counter() - started

    def _differences(
        self, conditioning: Conditioning, sets: Sequence[NeuronSet], rows: Sequence[int]
    ) -> torch.Tensor:
        """Several sets, some seed rows, one pass (unless ``batch_size`` is smaller than that):
        (sets, rows, C, H, W)."""
        # One set is masked as one, so that a pass can be made in parts of any size.
        each = 1 if len(sets) == 1 else len(rows)
        with self._changes.deactivated(sets, each=each, factor=self._factor):
            differences = noise_difference(
                self._model,
                conditioning,
                self._unconditional,
                self._noise[list(rows)].repeat(len(sets), 1, 1, 1),
                self._settings,
                batch_size=self._batch_size,
            )
        return differences.unflatten(0, (len(sets), len(rows)))

    def _difference(self, conditioning: Conditioning, neurons: NeuronSet) -> torch.Tensor:
        """One set, all n seed rows: what a reference evaluation looks at, (n, C, H, W)."""
        return self._differences(conditioning, [neurons], range(len(self._noise)))[0]

    def _unblocked(self, conditioning: Conditioning) -> torch.Tensor:
        """The n noise differences with all neurons on. Raises UndecidedError if not finite."""
        difference = self._difference(conditioning, [[] for _ in self._model.value_layers])
        if not bool(torch.isfinite(difference).all()):
            raise UndecidedError("a noise difference is not finite")
        return difference

    def pairwise(self, caption: str) -> torch.Tensor:
        """The caption's pairwise scores, (n (n - 1) / 2,) float32 on the CPU. Raises
        UndecidedError."""
        with self._changes.in_use():
            return pairwise_ssim(self._unblocked(encode_prompt(self._model, caption))).cpu()

    def find(
        self,
        caption: str,
        statistics: Statistics,
        *,
        search: Search,
        thresholds: Thresholds,
        method: str = "exact",
        report: Callable[[str, int, int], None] = lambda stage, left, evaluations: None,
    ) -> Finding:
        """Localizes the caption's memorization neurons, if it is memorized. Raises UndecidedError.

        ``method`` is "plain", "exact" or "bisect"; the latter two are "plain" where ``batch_size``
        does not hold all rows. ``report`` hears (stage, candidates left, evaluations so far) before
        evaluations.
        """
        if self._split:
            method = "plain"
        with contextlib.nullcontext() if method == "plain" else self._ready():
            return self._find(caption, statistics, search, thresholds, method, report)

    def _find(
        self,
        caption: str,
        statistics: Statistics,
        search: Search,
        thresholds: Thresholds,
        method: str,
        report: Callable[[str, int, int], None],
    ) -> Finding:
        evaluations = 0
        conditioning = encode_prompt(self._model, caption)
        plain = method == "plain"

        def difference(neurons: NeuronSet) -> torch.Tensor:
            nonlocal evaluations
            evaluations += 1
            return self._difference(conditioning, neurons)

        report("scoring", 0, evaluations)
        with contextlib.ExitStack() as recorded:
            if not plain:
                recording = recorded.enter_context(
                    self._replay.recording(rows=len(self._noise), halves=self._halves)
                )
            unblocked = self._unblocked(conditioning)
        evaluations += 1
        pairwise = pairwise_ssim(unblocked).cpu()
        rows = kept_rows(pairwise, len(unblocked), thresholds.pairwise)
        if not rows:
            return Finding(pairwise, rows, None, evaluations)
        activations = self._model.value_reader.activations(conditioning.embedding[0])
        z = z_scores(activations, statistics)
        score = MemorizationScore(difference, unblocked, rows)

        def reporting(stage: str, left: int) -> None:
            report(stage, left, evaluations)

        if plain:
            outcome = localize(
                activations, z, score, search=search, thresholds=thresholds, report=reporting
            )
            return Finding(pairwise, rows, outcome, evaluations)

        def passes(sets: Sequence[NeuronSet], chosen: Sequence[int]) -> torch.Tensor:
            nonlocal evaluations
            evaluations += len(sets)
            return self._differences(conditioning, sets, chosen)

        fast = FastScore(
            passes,
            score,
            unblocked,
            rows,
            self._replay,
            recording,
            margin=self._margin,
            max_sets=self.sets_per_pass,
            one_row_share=self._one_row_share,
        )
        localize_fast = localize_by_bisection if method == "bisect" else localize_exactly
        outcome = localize_fast(
            activations, z, fast, search=search, thresholds=thresholds, report=reporting
        )
        self.sets_per_pass = fast.max_sets  # fewer, if that many did not fit into memory
        return Finding(pairwise, rows, outcome, evaluations)
