"""Mitigations at inference, as script 4 applies them: what a method is called, what can be set, and
what it changes of plain sampling.

A mitigation is a context around a batch's sampling, and where its definition needs it another
conditioning or a guidance scale that changes on the way. docs/mitigations.md has each with its
paper. torch is imported where a run begins, so that options are checked before it is paid for.
Public: ``METHODS``, ``Settings`` and its kinds, ``parse``, ``check``, ``described``, ``is_random``,
``extra_unet_rows``, ``Mitigation``, ``begin``.
"""

import argparse
import contextlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from utils.cli import number, whole_number
from utils.errors import InputError
from utils.files import Prompt

if TYPE_CHECKING:
    import torch

    from utils.stable_diffusion import Conditioning, Model, Schedule


@dataclass(frozen=True)
class EmbeddingAdjustment:
    """Wen et al.: the prompt embedding is optimised until the prompt adds little to the predicted
    noise. ``target`` is per image: the root mean square over a prompt's images of ||d||."""

    target: float = 1.5
    iterations: int = 10
    learning_rate: float = 0.05
    weight_decay: float = 0.01


@dataclass(frozen=True)
class AttentionScaling:
    """Ren et al.: no attention to padding, and ``factor`` times the logit of the begin token.
    ``drop_eos``: none to the end token either."""

    factor: float = 1.25
    drop_eos: bool = False


@dataclass(frozen=True)
class RandomWords:
    """Somepalli et al.: ``count`` words are inserted, which are random ``tokens``, ``numbers``, or
    ``words`` of the prompt itself."""

    kind: str
    count: int = 4


@dataclass(frozen=True)
class EmbeddingNoise:
    """Somepalli et al.: Gaussian noise on the prompt embedding."""

    std: float = 0.1


@dataclass(frozen=True)
class HeldBackGuidance:
    """Jain et al.: no guidance (``opposite``: guidance away from the prompt) until timestep
    ``until``, or where that is None until an image's ||d|| has had its first local minimum."""

    until: float | None = None
    opposite: bool = False


@dataclass(frozen=True)
class Wanda:
    """Chavhan et al.: the ``share`` of weights that the memorized prompts use most, and more than
    the ``base`` prompts do (a prompt file; None: empty prompts), in any of the first ``steps``
    denoising steps, are set to 0."""

    share: float = 0.01
    steps: int = 10
    base: Path | None = None


Settings = (
    EmbeddingAdjustment | AttentionScaling | RandomWords | EmbeddingNoise | HeldBackGuidance | Wanda
)


def _true_or_false(text: str) -> bool:
    if text not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"'{text}' is neither true nor false")
    return text == "true"


def _prompt_file(text: str) -> Path:
    if not text:
        raise argparse.ArgumentTypeError("no file is named")
    return Path(text)


@dataclass(frozen=True)
class Method:
    """A method's published settings, and how each of those that can be set is read."""

    settings: Settings
    options: Mapping[str, Callable[[str], Any]] = field(default_factory=dict)


_WORDS = {"count": whole_number(1, 100)}
_TIMESTEP = {"until": number(0, 1000)}
METHODS = {
    "embedding_adjustment": Method(
        EmbeddingAdjustment(),
        {
            "target": number(0, 1e6),
            "iterations": whole_number(1, 10_000),
            "learning_rate": number(0, 100, above=True),
            "weight_decay": number(0, 100),
        },
    ),
    "attention_scaling": Method(
        AttentionScaling(), {"factor": number(0, 100), "drop_eos": _true_or_false}
    ),
    "random_tokens": Method(RandomWords("tokens"), _WORDS),
    "random_numbers": Method(RandomWords("numbers"), _WORDS),
    "repeated_words": Method(RandomWords("words"), _WORDS),
    "embedding_noise": Method(EmbeddingNoise(), {"std": number(0, 100, above=True)}),
    "guidance_static": Method(HeldBackGuidance(until=500), _TIMESTEP),
    "guidance_dynamic": Method(HeldBackGuidance()),
    "guidance_opposite": Method(HeldBackGuidance(opposite=True), _TIMESTEP),
    "wanda": Method(
        Wanda(),
        {"share": number(0, 1, above=True), "steps": whole_number(1, 999), "base": _prompt_file},
    ),
}


def parse(name: str | None, options: str | None) -> Settings | None:
    """``--mitigation NAME --mitigation_options key=value,...`` -> settings; None without a name.

    InputError for options without a method, an unknown one, one given twice, or a bad value.
    """
    if name is None:
        if options is not None:
            raise InputError(
                f"--mitigation_options {options} has no effect without --mitigation; leave it out"
            )
        return None
    method = METHODS[name]
    if options is None:
        return method.settings
    where = f"--mitigation_options {options}"
    if not method.options:
        raise InputError(f"{where}: {name} has no options; leave it out")
    known = ", ".join(method.options)
    given: dict[str, Any] = {}
    for part in options.split(","):
        key, equals, value = part.partition("=")
        if key not in method.options:
            raise InputError(f"{where}: {name} has no option '{key}'; it has {known}")
        if not equals or key in given:
            raise InputError(f"{where}: write {key}=VALUE, once")
        try:
            given[key] = method.options[key](value)
        except argparse.ArgumentTypeError as error:
            raise InputError(f"{where}: {key}: {error}; mend the value") from None
    return replace(method.settings, **given)


def check(settings: Settings | None, *, steps: int, guidance_scale: float) -> None:
    """InputError for a method that can do nothing, or not what was asked, in this sampling."""
    if isinstance(settings, HeldBackGuidance) and guidance_scale == 1:
        raise InputError(
            "--guidance_scale 1 is no guidance, so there is none to hold back; use one above 1"
        )
    if isinstance(settings, Wanda) and settings.steps > steps:
        raise InputError(
            f"wanda looks at the first {settings.steps} denoising steps, --steps is {steps}; add "
            f"--mitigation_options steps={steps}, or use more steps"
        )


def described(name: str | None, settings: Settings | None) -> dict[str, Any]:
    """What a run's record says of its mitigation; nothing where there is none."""
    if settings is None:
        return {}
    options = {
        key: str(value) if isinstance(value, Path) else value
        for key, value in asdict(settings).items()
        if name is not None and key in METHODS[name].options
    }
    return {"mitigation": name, "mitigation_options": options}


def is_random(settings: Settings | None) -> bool:
    """Whether the method draws anything: with ``--random_seed``, anew for every prompt row."""
    return isinstance(settings, RandomWords | EmbeddingNoise)


def extra_unet_rows(settings: Settings | None, *, images: int, memorized: int, base: int) -> float:
    """U-Net rows that the method needs on top of the sampling of ``images`` (a backward pass
    counts as two), at the most."""
    match settings:
        case EmbeddingAdjustment():
            return images * (1 + 3 * settings.iterations)
        case Wanda():
            return 2 * settings.steps * (memorized + max(base, 1))
        case _:
            return 0


@dataclass(frozen=True)
class Mitigation:
    """What a method changes of plain sampling; rows are prompt rows.

    ``encode``: the conditioning (B = 1) of a row. ``around``: the context for one batch whose
    pictures have these rows, in order. ``schedule``: what ``sample_latents`` asks for the guidance
    scale, new for every batch, or None. ``found``: what the run's record keeps. ``change``: what
    becomes of an embedding that somebody hands in for a row in place of the prompt's.
    """

    encode: "Callable[[int], Conditioning]"
    around: Callable[[Sequence[int]], AbstractContextManager[None]] = lambda rows: (
        contextlib.nullcontext()
    )
    schedule: "Callable[[], Schedule | None]" = lambda: None
    found: Mapping[str, Any] = field(default_factory=dict)
    change: "Callable[[int, Conditioning], Conditioning]" = lambda row, conditioning: conditioning


def begin(
    settings: Settings | None,
    model: "Model",
    captions: Mapping[int, str],
    unconditional: "Conditioning",
    noise: "torch.Tensor",
    *,
    steps: int,
    guidance_scale: float,
    seed: int = 0,
    memorized: Sequence[Prompt] = (),
    base: Sequence[Prompt] = (),
    progress: Callable[[Iterable[Prompt]], Iterable[Prompt]] = iter,
) -> Mitigation:
    """Readies a method for a run that samples ``captions`` (by row) from ``noise`` (n, C, H, W),
    the same for each; no method (None) is plain sampling.

    Nothing depends on which other rows are generated or how they are batched; what is drawn has a
    generator for each row, of ``seed``. ``memorized`` and ``base`` are what Wanda compares, and
    ``progress`` hears of each prompt while it looks at them. InputError where a method finds
    nothing to work with.
    """
    from utils.stable_diffusion import encode_prompt

    def plain(row: int) -> "Conditioning":
        return encode_prompt(model, captions[row])

    match settings:
        case None:
            return Mitigation(plain)
        case EmbeddingAdjustment():
            from utils.embedding_adjustment import adjusted

            def adjust(row: int, conditioning: "Conditioning") -> "Conditioning":
                return adjusted(model, conditioning, unconditional, noise, settings, steps=steps)

            return Mitigation(lambda row: adjust(row, plain(row)), change=adjust)
        case AttentionScaling():
            from utils.attention_scaling import attention_scaled
            from utils.prompt_tokens import prompt_ids

            lengths = {row: len(prompt_ids(model, caption)) for row, caption in captions.items()}
            return Mitigation(
                plain,
                lambda rows: attention_scaled(model.unet, [lengths[row] for row in rows], settings),
            )
        case RandomWords():
            from utils.random_words import with_random_words

            tokenizer = model.pipeline.tokenizer
            changed = {
                row: with_random_words(caption, settings, tokenizer, f"{seed}/{row}")
                for row, caption in captions.items()
            }
            return Mitigation(
                lambda row: encode_prompt(model, changed[row]),
                found={"captions": {str(row): caption for row, caption in changed.items()}},
            )
        case EmbeddingNoise():
            from utils.random_words import with_noise

            def add_noise(row: int, conditioning: "Conditioning") -> "Conditioning":
                return with_noise(conditioning, settings.std, f"{seed}/{row}")

            return Mitigation(lambda row: add_noise(row, plain(row)), change=add_noise)
        case HeldBackGuidance():
            from utils.held_back_guidance import schedule

            return Mitigation(plain, schedule=lambda: schedule(model, settings, guidance_scale))
        case Wanda():
            from utils.wanda import locate, pruned

            masks, found = locate(
                model,
                settings,
                memorized,
                base,
                unconditional,
                noise[:1],
                steps=steps,
                guidance_scale=guidance_scale,
                progress=progress,
            )
            return Mitigation(plain, lambda rows: pruned(masks), found={"wanda": found})
