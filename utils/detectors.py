"""Detectors: prompts -> scores, the higher the more memorized.

All are called alike and give one number for each of their readings, so that whatever compares
scores compares detectors. Nothing here imports torch before a detector is made.
Public: ``Kind``, ``DETECTORS``, ``Detector``, ``checked_options``, ``unet_rows``,
``make_detector``.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from utils.errors import InputError
from utils.localization import UndecidedError

if TYPE_CHECKING:
    import torch

    from utils.stable_diffusion import Conditioning, Model

# Caption -> one score for each of the detector's readings. Raises UndecidedError where one is not
# finite.
Detector = Callable[[str], list[float]]


@dataclass(frozen=True)
class Kind:
    """A detector's readings (columns of its table; the first is the usual one) and defaults."""

    readings: tuple[str, ...]
    samples: int  # images per prompt
    guidance_scale: float


DETECTORS = {
    # Wen et al.: the mean over all steps, and the first step alone
    "text_conditional_noise": Kind(("Score", "Score First Step"), 4, 7.5),
    # Ren et al.: score D, and score E
    "attention_entropy": Kind(("Score", "Score E"), 1, 7.5),
    # ours: the largest pairwise SSIM of noise differences (paper Sec. 3.1)
    "pairwise_ssim": Kind(("Score",), 10, 1.0),
}


def checked_options(name: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """The detector's settings: what was given of ``samples_per_prompt``, ``guidance_scale`` and
    ``protocol``, its own defaults where that is None. InputError for what it cannot use."""
    kind = DETECTORS[name]
    samples = given["samples_per_prompt"] or kind.samples
    guidance = given["guidance_scale"] or kind.guidance_scale
    protocol = given["protocol"]
    if name == "pairwise_ssim":
        if samples < 2:
            raise InputError(
                f"--samples_per_prompt {samples}: pairwise_ssim compares at least two images"
            )
        protocol = protocol or "published"
    else:
        if protocol is not None:
            raise InputError(
                f"--protocol {protocol} has no effect with --detector={name}, which looks at "
                "sampling; leave it out"
            )
        if guidance == 1:
            raise InputError(
                f"--guidance_scale 1: {name} follows guided sampling; give a value above 1"
            )
    return {"protocol": protocol, "samples_per_prompt": samples, "guidance_scale": guidance}


def unet_rows(name: str, settings: Mapping[str, Any]) -> int:
    """U-Net passes of one latent that a prompt costs."""
    if name == "pairwise_ssim":
        return settings["samples_per_prompt"] * (1 if settings["guidance_scale"] == 1 else 2)
    return settings["samples_per_prompt"] * settings["num_inference_steps"] * 2


def make_detector(name: str, model: "Model", settings: Mapping[str, Any]) -> Detector:
    """One of ``DETECTORS`` for a loaded model. ``settings``: those of ``checked_options``,
    ``num_inference_steps``, ``seed`` and ``batch_size`` (images per pass; None: all). InputError
    for a model that it cannot score."""
    if name == "pairwise_ssim":
        return _pairwise_ssim(model, settings)
    return _of_sampling(name, model, settings)


def _pairwise_ssim(model: "Model", settings: Mapping[str, Any]) -> Detector:
    from utils import scoring
    from utils.noise_difference import NoiseSettings

    scorer = scoring.Detector(
        model,
        NoiseSettings.from_options({"exchanged_guidance": False, **settings}),
        rows=settings["samples_per_prompt"],
        seed=settings["seed"],
        batch_size=settings["batch_size"],
    )
    return lambda caption: _finite([scorer.pairwise(caption).max().item()])


def _of_sampling(name: str, model: "Model", settings: Mapping[str, Any]) -> Detector:
    """The detectors that look at guided sampling. Images do not mix, so that each may be sampled in
    another pass; a score is their mean."""
    import torch

    from utils import attention_entropy, text_conditional_noise
    from utils.stable_diffusion import encode_prompt, encode_unconditional, initial_noise

    noise = initial_noise(model, settings["samples_per_prompt"], settings["seed"])
    unconditional = encode_unconditional(model)
    sampling = {
        "steps": settings["num_inference_steps"],
        "guidance_scale": settings["guidance_scale"],
    }

    def norms(caption: str, encoded: "Conditioning", part: "torch.Tensor") -> "torch.Tensor":
        found = text_conditional_noise.conditional_noise_norms(
            model, encoded, unconditional, part, **sampling
        )
        return torch.stack([found.mean(dim=0), found[0]])

    def entropies(caption: str, encoded: "Conditioning", part: "torch.Tensor") -> "torch.Tensor":
        return attention_entropy.attention_entropy(
            model, caption, encoded, unconditional, part, **sampling
        )

    if name == "attention_entropy":
        attention_entropy.check_layers(model)
    of_images = {"text_conditional_noise": norms, "attention_entropy": entropies}[name]

    def detector(caption: str) -> list[float]:
        encoded = encode_prompt(model, caption)
        parts = noise.split(settings["batch_size"] or len(noise))
        scores = torch.cat([of_images(caption, encoded, part) for part in parts], dim=1)
        return _finite(scores.mean(dim=1).tolist())  # (readings, images)

    return detector


def _finite(scores: list[float]) -> list[float]:
    if not all(map(math.isfinite, scores)):
        raise UndecidedError("a score is not finite")
    return scores
