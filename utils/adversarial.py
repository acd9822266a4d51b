"""Fine-tuning against the attack on embeddings, DoRI's own answer to it (Kowalczuk et al., ICML
2026): the whole U-Net is trained so that embeddings found to bring a training image back bring
another picture instead.

In every step, for some memorized prompts: an embedding is attacked against the model as it is
(``embedding_attack``), towards the training image; then the U-Net learns, under this embedding, to
predict the noise on a surrogate, a picture that the edited model itself makes of the prompt. On
prompts that are not memorized it learns to predict what the original model predicts (the teacher).
Public: ``Recipe``, ``Memorized``, ``Material``, ``gather``, ``adversarial_errors``,
``utility_errors``, ``fine_tune``, ``harden``.
"""

import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from math import isfinite
from pathlib import Path
from typing import Any

import torch

from utils.embedding_attack import (
    STARTS,
    Attack,
    attacked,
    draw,
    generator_of,
    start_of,
    unedited,
)
from utils.errors import InputError
from utils.files import replacing
from utils.images import open_picture
from utils.stable_diffusion import (
    Conditioning,
    Model,
    encode,
    encode_prompt,
    encode_unconditional,
    initial_noise,
    load_model,
    reproducible_gradient,
    sample_latents,
    unet_output,
)
from utils.versions import Source

LAST_STEPS = 20  # whose mean loss is told
LARGEST_GRADIENT = 1.0  # its norm is clipped there
FIRST_STEPS = 10  # in which the learning rate rises
STEPS, GUIDANCE = 50, 7.0  # with which script 4 samples
SAVE_EVERY = 60.0  # seconds of work that a killed run may lose


@dataclass(frozen=True)
class Recipe:
    """How it is trained. An attack of ``inner_steps`` goes on, at the prompt's next turn, from the
    embedding where it stopped, until it has had ``attack_steps``; then it begins anew, from one of
    the attack's starts drawn by chance: the model meets short and long attacks alike for the price
    of short ones."""

    steps: int = 300
    prompts: int = 4  # memorized ones in a step
    inner_steps: int = 5
    attack_steps: int = 100
    draws: int = 4  # timesteps and noises for each of them, in the attack and in training
    attack_rate: float = 0.1
    learning_rate: float = 1e-4
    utility: float = 1.0  # weight of the teacher's term
    utility_rows: int = 8  # its batch, one of them the empty prompt
    batch_size: int = 4  # rows of a pass with gradient, at least draws: changes rounding alone
    hold_out: int = 64  # prompts, drawn by chance, that are looked at
    surrogates: int = 4  # pictures of each prompt
    seed: int = 0

    def unet_rows(self, memorized: int, hold_out: int) -> float:
        """U-Net rows of it all, a backward pass counting as two: the pictures sampled before
        (with guidance, two rows each), and in every step attack, training and teacher."""
        pictures = self.surrogates * memorized + min(self.hold_out, hold_out)
        under_attack = min(self.prompts, memorized) * self.draws
        step = 3 * under_attack * (self.inner_steps + 1) + (3 + 1) * self.utility_rows
        return 2 * STEPS * pictures + step * self.steps


@dataclass(frozen=True)
class Memorized:
    """A memorized prompt; ``targets`` are the latents (k, C, H, W) of its training images."""

    row: int
    caption: str
    targets: torch.Tensor


@dataclass(frozen=True)
class Material:
    """What is sampled before the training: ``surrogates`` (prompts, m, C, H, W) by the edited
    model, and ``utility`` (hold-out prompts, C, H, W) by the teacher."""

    surrogates: torch.Tensor
    utility: torch.Tensor


def gather(
    model: Model,
    teacher: Model,
    memorized: Sequence[Memorized],
    hold_out: Sequence[str],
    recipe: Recipe,
    *,
    progress: Any = iter,
) -> Material:
    """Samples the surrogates with ``model``, before it is trained, and with the teacher one picture
    of each hold-out caption."""

    def made(by: Model, caption: str, noise: torch.Tensor) -> torch.Tensor:
        conditioning = encode_prompt(by, caption).repeat(len(noise))
        found = sample_latents(
            by, conditioning, encode_unconditional(by), noise, steps=STEPS, guidance_scale=GUIDANCE
        )
        if not bool(torch.isfinite(found).all()):
            raise InputError(f"'{caption[:40]}': its picture is not finite; leave the prompt out")
        return found

    noise = initial_noise(model, recipe.surrogates + len(hold_out), recipe.seed)
    own, others = noise[: recipe.surrogates], noise[recipe.surrogates :]
    surrogates = [made(model, one.caption, own) for one in progress(memorized)]
    utility = [made(teacher, c, others[i : i + 1]) for i, c in enumerate(progress(hold_out))]
    return Material(torch.stack(surrogates), torch.cat(utility))


def adversarial_errors(
    model: Model,
    conditioning: Conditioning,
    latents: torch.Tensor,
    noise: torch.Tensor,
    timesteps: torch.Tensor,
) -> torch.Tensor:
    """(B,) mean squares of what the U-Net predicts against what leads to the clean ``latents``.

    For a model that predicts velocity this is the square of the noise over abar_t, so that steps of
    much noise, in which a picture's layout is decided, count as much as when it was trained.
    """
    noised = model.scheduler.add_noise(latents.float(), noise, timesteps)
    output = unet_output(model, noised, timesteps, conditioning)
    wanted = noise
    if model.scheduler.config.prediction_type == "v_prediction":
        wanted = model.scheduler.get_velocity(latents.float(), noise, timesteps)
    return (output - wanted).square().flatten(1).mean(dim=1)


def utility_errors(
    model: Model,
    teacher: Model,
    conditioning: Conditioning,
    latents: torch.Tensor,
    noise: torch.Tensor,
    timesteps: torch.Tensor,
) -> torch.Tensor:
    """(B,) mean squares of what the U-Net predicts against what the teacher predicts."""
    noised = model.scheduler.add_noise(latents.float(), noise, timesteps)
    output = unet_output(model, noised, timesteps, conditioning)
    with torch.no_grad():
        taught = unet_output(teacher, noised, timesteps, conditioning)
    return (output - taught).square().flatten(1).mean(dim=1)


class _Attacks:
    """The embedding of each memorized prompt, as far as its attack has come."""

    def __init__(
        self, model: Model, memorized: Sequence[Memorized], hold_out: Sequence[str], recipe: Recipe
    ) -> None:
        self._edit = unedited(model, [one.row for one in memorized])
        self._memorized, self._hold_out, self._recipe = memorized, hold_out, recipe
        self.had = [recipe.attack_steps] * len(memorized)  # steps; this many: begin anew
        self._starts = [encode_prompt(model, one.caption) for one in memorized]
        self._target = [0] * len(memorized)

    def go_on(self, numbers: Sequence[int], step: int) -> Conditioning:
        """Attacks these prompts for ``inner_steps`` more: their embeddings, a row each."""
        recipe, model = self._recipe, self._edit.model
        for number in numbers:
            if self.had[number] >= recipe.attack_steps:
                one = self._memorized[number]
                seed = f"{recipe.seed}/{step}/{one.row}"
                chance = random.Random(seed)
                other = chance.choice(self._hold_out)
                kind = chance.choice(STARTS)
                self._starts[number] = start_of(model, kind, one.caption, other, seed)
                self._target[number] = chance.randrange(len(one.targets))
                self.had[number] = 0
        together = max(1, recipe.batch_size // recipe.draws)
        for first in range(0, len(numbers), together):
            group = numbers[first : first + together]
            chosen = [self._memorized[number] for number in group]
            ((_, found),) = attacked(
                self._edit,
                [one.row for one in chosen],
                [self._starts[number] for number in group],
                torch.stack([self._memorized[n].targets[self._target[n]] for n in group]),
                [generator_of(f"{recipe.seed}/{step}/{one.row}/attack") for one in chosen],
                Attack(recipe.draws, recipe.attack_rate),
                [recipe.inner_steps],
            )
            for i, number in enumerate(group):
                self._starts[number] = found.slice(slice(i, i + 1))
                self.had[number] += recipe.inner_steps
        return Conditioning.cat([self._starts[number] for number in numbers])

    def state(self) -> dict[str, Any]:
        """For a checkpoint."""
        starts = [{"embedding": c.embedding, "added": c.added} for c in self._starts]
        return {"had": list(self.had), "target": list(self._target), "starts": starts}

    def load(self, state: dict[str, Any]) -> None:
        self.had, self._target = list(state["had"]), list(state["target"])
        self._starts = [Conditioning(**start) for start in state["starts"]]


def fine_tune(
    model: Model,
    teacher: Model,
    memorized: Sequence[Memorized],
    hold_out: Sequence[str],
    recipe: Recipe,
    *,
    checkpoint: Path,
    progress: Any = iter,
) -> dict[str, list[float]]:
    """Trains the U-Net of ``model`` (float32, the edited one) in place; returns the losses of every
    step, by name.

    Every step draws from generators of its own, and ``checkpoint`` is written every minute: a run
    that was killed goes on from there and ends with the same weights. InputError for a checkpoint
    of other settings, and for a loss that is not finite. The U-Net's weights ask for no gradient
    afterwards; the teacher's never do.
    """
    unet, parameters = model.unet, list(model.unet.parameters())
    optimizer = torch.optim.Adam(parameters, lr=recipe.learning_rate)
    attacks = _Attacks(model, memorized, hold_out, recipe)
    told: dict[str, list[float]] = {"adversarial": [], "utility": []}
    settings = {name: value for name, value in asdict(recipe).items() if name != "batch_size"}
    identity = {"recipe": settings, "prompts": [m.caption for m in memorized]}
    identity["hold_out"] = list(hold_out)
    if checkpoint.exists():
        saved = torch.load(checkpoint, map_location=model.device, weights_only=True)
        if saved["identity"] != identity:
            raise InputError(f"{checkpoint}: of a run with other settings; delete it")
        material = Material(**saved["material"])
        unet.load_state_dict(saved["unet"])
        optimizer.load_state_dict(saved["optimizer"])
        attacks.load(saved["attacks"])
        told = saved["losses"]
        del saved  # as large as three U-Nets
    else:
        material = gather(model, teacher, memorized, hold_out, recipe, progress=progress)

    def save() -> None:
        content = {
            "identity": identity,
            "material": {"surrogates": material.surrogates, "utility": material.utility},
            "unet": unet.state_dict(),
            "optimizer": optimizer.state_dict(),
            "attacks": attacks.state(),
            "losses": told,
        }
        with replacing(checkpoint) as temporary:
            torch.save(content, temporary)

    done = len(told["utility"])
    if not done:
        save()
    saved_at = time.monotonic()
    known = [encode_prompt(model, caption) for caption in hold_out]
    empty = encode_unconditional(model)
    for step in progress(range(done, recipe.steps)):
        chance = random.Random(f"{recipe.seed}/{step}")
        numbers = _turn(len(memorized), min(recipe.prompts, len(memorized)), step, recipe.seed)
        found = attacks.go_on(numbers, step)
        # the same picture for all draws of a prompt
        own = torch.stack(
            [material.surrogates[n][chance.randrange(recipe.surrogates)] for n in numbers]
        )
        others = [chance.randrange(len(hold_out)) for _ in range(recipe.utility_rows)]
        taught = Conditioning.cat([empty, *(known[n] for n in others[1:])])
        generator = generator_of(f"{recipe.seed}/{step}/training")
        noise, timesteps = draw(model, [generator] * len(numbers), recipe.draws)
        more_noise, more_timesteps = draw(model, [generator] * len(others), 1)
        for group in optimizer.param_groups:
            group["lr"] = recipe.learning_rate * min(1.0, (step + 1) / FIRST_STEPS)
        unet.requires_grad_(True)
        try:
            first = _backward(
                partial(adversarial_errors, model),
                _repeated(found, recipe.draws),
                (own.repeat_interleave(recipe.draws, dim=0), noise, timesteps),
                recipe.batch_size,
            )
            second = _backward(
                partial(utility_errors, model, teacher),
                taught,
                (material.utility[others], more_noise, more_timesteps),
                recipe.batch_size,
                weight=recipe.utility,
            )
        finally:
            unet.requires_grad_(False)
        if not isfinite(first + second):
            raise InputError(f"training step {step}: the loss is not finite; lower the rate")
        torch.nn.utils.clip_grad_norm_(parameters, LARGEST_GRADIENT)
        optimizer.step()
        optimizer.zero_grad()  # gradients take as much memory as the U-Net
        told["adversarial"].append(first)
        told["utility"].append(second)
        if time.monotonic() - saved_at > SAVE_EVERY or step + 1 == recipe.steps:
            save()
            saved_at = time.monotonic()
    return told


def _backward(
    errors: Callable[..., torch.Tensor],
    conditioning: Conditioning,
    inputs: Sequence[torch.Tensor],
    batch_size: int,
    *,
    weight: float = 1.0,
) -> float:
    """Adds ``weight`` times the gradient of the rows' mean error to the parameters' gradients, no
    more than ``batch_size`` rows at a time; returns the mean error."""
    rows, total = len(inputs[0]), 0.0
    for first in range(0, rows, batch_size):
        part = slice(first, first + batch_size)
        with reproducible_gradient():
            loss = errors(conditioning.slice(part), *(tensor[part] for tensor in inputs)).sum()
            (weight / rows * loss).backward()
        total += loss.item()
    return total / rows


def _turn(count: int, size: int, step: int, seed: int) -> list[int]:
    """Which of ``count`` prompts have their turn in a step: all once, in an order of its own, in
    each round; ``size`` of them, rising numbers."""
    chosen: list[int] = []
    for place in range(step * size, (step + 1) * size):
        order = list(range(count))
        random.Random(f"{seed}/round {place // count}").shuffle(order)
        chosen.append(order[place % count])
    # where a round ends, one could come twice
    return sorted(set(chosen))


def _repeated(conditioning: Conditioning, times: int) -> Conditioning:
    """Each row ``times`` times, one behind the other."""
    added = {k: v.repeat_interleave(times, dim=0) for k, v in conditioning.added.items()}
    return replace(
        conditioning, embedding=conditioning.embedding.repeat_interleave(times, dim=0), added=added
    )


def harden(
    source: Source,
    edited: Mapping[str, torch.Tensor],
    prompts: Mapping[int, str],
    pictures: Mapping[int, Sequence[Path]],
    hold_out: Sequence[str],
    recipe: Recipe,
    *,
    device: str,
    checkpoint: Path,
    progress: Any = iter,
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The model of ``source`` with the ``edited`` tensors, fine-tuned: (all tensors of its U-Net,
    float32 on the CPU; what was found on the way).

    ``prompts``: row -> caption of the memorized prompts; ``pictures``: row -> training images, for
    some of them at least; ``hold_out``: captions that are not memorized.
    """
    teacher = load_model(source, device=device, dtype="float32")
    model = load_model(source, device=device, dtype="float32")
    model.unet.load_state_dict({k: v.float() for k, v in edited.items()}, strict=False)
    memorized = [
        Memorized(row, caption, encode(model, [open_picture(path) for path in pictures[row]]))
        for row, caption in prompts.items()
        if row in pictures
    ]
    chosen = random.Random(recipe.seed).sample(hold_out, min(recipe.hold_out, len(hold_out)))
    told = fine_tune(
        model, teacher, memorized, chosen, recipe, checkpoint=checkpoint, progress=progress
    )
    last = {name: values[-LAST_STEPS:] for name, values in told.items()}
    return {name: tensor.cpu() for name, tensor in model.unet.state_dict().items()}, {
        "attacked_prompts": len(memorized),
        "training_steps": recipe.steps,
        **{f"first_{name}_loss": values[0] for name, values in told.items()},
        **{f"last_{name}_loss": sum(values) / len(values) for name, values in last.items()},
    }
