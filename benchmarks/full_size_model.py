"""Stable Diffusion 1.5's U-Net in its public configuration, with random weights.

The real weights change no cost, and need no download here. Nothing is memorized with random ones:
what a search is to find is planted.
Public: ``TEXT``, ``NARROW``, ``MATRIX``, ``MIX``, ``full_size_unet``, ``full_size_model``,
``random_text``, ``matrix_rate``, ``PassFlops``, ``pass_flops``, ``Plant``, ``plant``,
``PlantedDetector``.
"""

import contextlib
import functools
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import report
from utils.activation_statistics import Statistics
from utils.neuron_sets import NeuronSet
from utils.noise_difference import NoiseSettings, normalized
from utils.replay import Recording, Replay
from utils.scoring import Detector
from utils.stable_diffusion import (
    DTYPES,
    Conditioning,
    Model,
    encode_prompt,
    settle_layout,
    settle_precision,
)
from utils.value_layers import ValueReader, find_value_layers, layer_widths
from utils.versions import VERSIONS, Source

TEXT = (77, 768)  # tokens and width of the text embedding
# runwayml/stable-diffusion-v1-5, unet/config.json; what it does not name is diffusers' default.
UNET = {
    "sample_size": 64,
    "cross_attention_dim": TEXT[1],
    "attention_head_dim": 8,
    "block_out_channels": (320, 640, 1280, 1280),
    "layers_per_block": 2,
}
# For a CPU.
NARROW: dict[str, Any] = {"block_out_channels": (32, 64, 96, 96), "cross_attention_dim": 64}
SCHEDULER = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
    "clip_sample": False,
    "set_alpha_to_one": False,
}
MATRIX = {"cpu": 2048, "cuda": 8192}  # side of the matrix product whose rate counts
MIX = ((112, 100), (388, 700))  # prompts, evaluations each: verbatim and template (issue 6)
ROWS_ALIKE = 0.95  # how much a planted seed row correlates with what all have in common
HIGH_Z = 6.0  # of a planted candidate, others have 0: selection's first theta lies between


def full_size_unet(changes: Mapping[str, Any] | None = None) -> Any:
    """The U-Net on the meta device: shapes without numbers. ``changes`` to its configuration."""
    with torch.device("meta"):
        unet: Any = UNet2DConditionModel(**{**UNET, **(changes or {})})
    return unet.eval().requires_grad_(False)


def full_size_model(device: str, dtype: str, changes: Mapping[str, Any] | None = None) -> Model:
    """A model that is its U-Net and ``random_text`` alone, settled as a loaded one, with small
    random weights so that nothing overflows."""
    settle_precision()
    unet = full_size_unet(changes).to(DTYPES[dtype]).to_empty(device=device)
    generator = torch.Generator(device).manual_seed(0)
    for parameter in unet.parameters():
        parameter.normal_(std=0.02, generator=generator)
    settle_layout(unet)
    layers = find_value_layers(unet)
    text = random_text(unet.config.cross_attention_dim, device)
    return Model(
        pipeline=SimpleNamespace(unet=unet, encode_prompt=text),
        source=Source("v1-5", "random weights", None, None, "random", VERSIONS["v1-5"]),
        device=torch.device(device),
        dtype=DTYPES[dtype],
        scheduler=DDIMScheduler(**SCHEDULER),
        value_layers=layers,
        value_reader=ValueReader(layers, copies=DTYPES[dtype] != torch.float32),
    )


def random_text(width: int, device: str) -> Callable[..., tuple[torch.Tensor, None]]:
    """A pipeline's ``encode_prompt`` without a text encoder: random embeddings, (1, 77, width)
    float32, the same for the same caption."""

    def encode_prompt(caption: str, **_: object) -> tuple[torch.Tensor, None]:
        generator = torch.Generator().manual_seed(int.from_bytes(caption.encode(), "big") % 2**63)
        return torch.randn((1, TEXT[0], width), generator=generator).to(device), None

    return encode_prompt


def matrix_rate(device: str, dtype: str, side: int, repeats: int) -> float:
    """Floating point operations a second of a square matrix product."""
    # As varied as a model's: a device that multiplies ones draws less power and runs faster.
    first, second = (torch.randn(side, side, device=device, dtype=DTYPES[dtype]) for _ in range(2))
    times = 10
    work = [first @ second]

    def products() -> None:
        for _ in range(times):
            torch.matmul(first, second, out=work[0])

    return times * 2 * side**3 / report.median_seconds(products, repeats, device)


@dataclass(frozen=True)
class PassFlops:
    """Floating point operations of a pass over one row, a multiplication and an addition being two:
    whole, and restarted at each value layer, by its dotted name in forward order."""

    whole: int
    from_layer: dict[str, int]


def pass_flops(changes: Mapping[str, Any] | None = None) -> PassFlops:
    """Counted on the meta device, where nothing is computed."""
    unet = full_size_unet(changes)
    config = unet.config
    latent = torch.empty(1, 4, config.sample_size, config.sample_size, device="meta")
    text = torch.empty(1, TEXT[0], config.cross_attention_dim, device="meta")

    def one_pass() -> object:
        return unet(latent, torch.ones((), device="meta"), encoder_hidden_states=text)

    def counted() -> int:
        with FlopCounterMode(display=False) as counter:
            one_pass()
        return counter.get_total_flops()

    layers = find_value_layers(unet)
    replay = Replay(unet, layers, one_pass)
    with replay.recording(rows=1, halves=1) as recording:
        whole = counted()
    from_layer = {}
    for layer, name in enumerate(layers):
        with replay.replaying(recording, layer, [0]):
            from_layer[name] = counted()
    return PassFlops(whole, from_layer)


@dataclass(frozen=True)
class Plant:
    """What a search is to find for a caption: ``carriers``, among the candidates that the
    statistics single out."""

    caption: str
    carriers: NeuronSet
    statistics: Statistics


def plant(model: Model, caption: str, *, candidates: int, carriers: int, seed: int) -> Plant:
    """So many candidates, one drawn with ``seed`` from each of as many equal parts of all neurons
    in forward order; so many of them carriers, at equal distances. So every layer has its width's
    share of both, whatever the seed: in which layers carriers are decides what replay saves."""
    widths = layer_widths(model.value_layers)
    places = [(layer, index) for layer, width in enumerate(widths) for index in range(width)]
    borders = [len(places) * part // candidates for part in range(candidates + 1)]
    generator = torch.Generator().manual_seed(seed)
    chosen = [
        places[int(torch.randint(first, behind, (), generator=generator))]
        for first, behind in pairwise(borders)
    ]
    z = [torch.zeros(width) for width in widths]
    for layer, index in chosen:
        z[layer][index] = HIGH_Z
    carrying: NeuronSet = [[] for _ in widths]
    for part in range(carriers):
        layer, index = chosen[(2 * part + 1) * candidates // (2 * carriers)]
        carrying[layer].append(index)
    activations = model.value_reader.activations(encode_prompt(model, caption).embedding[0])
    means = [a - high for a, high in zip(activations, z, strict=True)]
    return Plant(caption, carrying, Statistics(means, [torch.ones_like(mean) for mean in means]))


class PlantedDetector(Detector):
    """A detector that makes every U-Net pass and then scores noise differences made up for the set:
    about ``scores[0]`` like the unblocked ones where at least one of ``carriers`` is not
    deactivated, about ``scores[1]`` where all are. Seed rows are alike.

    ``rows_from`` counts the batch rows passed since ``expect``, by the value layer that the pass
    restarted at (None: a whole pass).
    """

    def __init__(
        self,
        model: Model,
        *,
        rows: int,
        batch_size: int | None = None,
        scores: tuple[float, float],
    ) -> None:
        super().__init__(model, NoiseSettings(), rows=rows, seed=1, batch_size=batch_size)
        self._carriers: NeuronSet = []
        self._begins: int | None = None
        self.rows_from: Counter[int | None] = Counter()
        generator = torch.Generator().manual_seed(0)

        def like(picture: torch.Tensor, score: float) -> torch.Tensor:
            """Two pictures of noise that correlate so much have about this SSIM at all scales."""
            noise = torch.randn((rows, *model.latent_shape), generator=generator)
            return score * picture + math.sqrt(1 - score**2) * noise

        on, off = scores
        unblocked = like(torch.randn(model.latent_shape, generator=generator), ROWS_ALIKE)
        pictures = (unblocked, like(unblocked, on), like(unblocked, off))
        self._all_on, self._some_on, self._none_on = (
            normalized(picture).to(model.device) for picture in pictures
        )

    def expect(self, carriers: NeuronSet) -> None:
        """Plants these from now on, and counts anew."""
        self._carriers = carriers
        self.rows_from.clear()

    @functools.cached_property
    def _replay(self) -> Replay:
        """Passes made in its ``replaying`` are counted where they begin."""
        replay = super()._replay
        replaying = replay.replaying

        @contextlib.contextmanager
        def noted(recording: Recording, layer: int, chosen: Sequence[int]) -> Iterator[None]:
            self._begins = layer
            try:
                with replaying(recording, layer, chosen):
                    yield
            finally:
                self._begins = None

        replay.replaying = noted  # type: ignore[method-assign]
        return replay

    def _differences(
        self, conditioning: Conditioning, sets: Sequence[NeuronSet], rows: Sequence[int]
    ) -> torch.Tensor:
        real = super()._differences(conditioning, sets, rows)
        self.rows_from[self._begins] += len(sets) * len(rows)
        # Rows one by one: a list as index would be copied to a GPU, which waits for all its work.
        # Whoever reads what is planted waits for the real pass as well, the one queued before it.
        planted = torch.stack(
            [torch.stack([picture[row] for row in rows]) for picture in map(self._picture, sets)]
        )
        assert planted.shape == real.shape
        return planted

    def _picture(self, neurons: NeuronSet) -> torch.Tensor:
        """The noise differences of a set, (n, C, H, W)."""
        if not any(neurons):
            return self._all_on
        both = zip(self._carriers, neurons, strict=True)
        return self._some_on if any(set(c) - set(off) for c, off in both) else self._none_on
