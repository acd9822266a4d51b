"""An attack on an edited model (DoRI, Kowalczuk et al., ICML 2026, arXiv 2507.16880): is a picture
still in there? An embedding y in the place of the prompt's is optimised to bring it back.

With z the picture's latent, the edited model frozen and its edit active, Adam minimises

    mean over 8 draws of (t, eps) of  || eps - e(sqrt(abar_t) z + sqrt(1 - abar_t) eps, t, y) ||^2

with fresh draws at every step. Sampling with y then shows what it brings back.
torch is imported where a tensor is made, so that scripts have the settings before they pay for it.
Public: ``STARTS``, ``BUDGETS``, ``Attack``, ``Edit``, ``unedited``, ``Sampling``, ``generator_of``,
``start_of``, ``draw``, ``diffusion_loss``, ``attacked``, ``sampled``.
"""

import contextlib
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from utils.neuron_sets import NeuronSet

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image

    from utils.mitigations import Mitigation
    from utils.stable_diffusion import Conditioning, Model

STARTS = ("prompt", "gaussian", "unrelated")
BUDGETS = (0, 5, 10, 20, 50, 100, 200, 500)  # optimisation steps; 0 is plain generation


@dataclass(frozen=True)
class Attack:
    """Settings of the optimisation; the defaults are the published ones."""

    draws: int = 8
    learning_rate: float = 0.1


@dataclass(frozen=True)
class Edit:
    """What is done to a model against memorization: to each prompt row its ``blocked`` neurons
    (multiplied by ``factor``), and a mitigation. Both may be nothing."""

    model: "Model"
    blocked: Mapping[int, NeuronSet]
    factor: float
    mitigation: "Mitigation"

    @contextlib.contextmanager
    def active(self, rows: Sequence[int]) -> Iterator[None]:
        """While the block runs, the edit is on for batches whose rows belong to these prompts."""
        from utils.value_layers import deactivated

        sets = [self.blocked[row] for row in rows]
        with (
            deactivated(self.model.value_layers, sets, factor=self.factor),
            self.mitigation.around(rows),
        ):
            yield


def unedited(model: "Model", rows: Iterable[int]) -> Edit:
    """Nothing is done."""
    from utils.mitigations import Mitigation

    def no_prompts(row: int) -> "Conditioning":
        raise LookupError(f"row {row} was given without its prompt")

    none: NeuronSet = [[] for _ in model.value_layers]
    return Edit(model, dict.fromkeys(rows, none), 0.0, Mitigation(no_prompts))


@dataclass(frozen=True)
class Sampling:
    """How pictures are made with a found embedding: as script 4 makes them, from ``noise``
    (n, C, H, W)."""

    unconditional: "Conditioning"
    noise: "torch.Tensor"
    steps: int
    guidance_scale: float


def generator_of(seed: str) -> "torch.Generator":
    """A generator on the CPU, for the same numbers on every machine, that belongs to one prompt."""
    import torch

    return torch.Generator("cpu").manual_seed(random.Random(seed).getrandbits(63))


def start_of(model: "Model", kind: str, caption: str, unrelated: str, seed: str) -> "Conditioning":
    """Where an attack (one of ``STARTS``) begins, B = 1: at the prompt's own embedding, at a
    standard normal one, or at that of another prompt. SDXL's pooled embeddings, which stay as they
    are, belong to the text that was encoded: the prompt, where the embedding is a normal one."""
    import torch

    from utils.stable_diffusion import encode_prompt

    conditioning = encode_prompt(model, unrelated if kind == "unrelated" else caption)
    if kind == "gaussian":
        shape = conditioning.embedding.shape
        noise = torch.randn(shape, generator=generator_of(f"{seed}/start"))
        return replace(conditioning, embedding=noise.to(conditioning.embedding.device))
    return conditioning


def diffusion_loss(
    model: "Model",
    conditioning: "Conditioning",
    latents: "torch.Tensor",
    noise: "torch.Tensor",
    timesteps: "torch.Tensor",
) -> "torch.Tensor":
    """|| eps - e(x_t, t, y) ||^2 of each row, (B,) float32: ``latents`` z and ``noise`` eps
    (B, C, H, W), ``timesteps`` (B,), and as many rows of conditioning."""
    from utils.stable_diffusion import to_noise_prediction, unet_output

    noised = model.scheduler.add_noise(latents.float(), noise, timesteps).to(model.dtype)
    output = unet_output(model, noised, timesteps, conditioning)
    predicted = to_noise_prediction(model, output, noised, timesteps)
    return (noise - predicted).square().flatten(1).sum(dim=1)


def draw(
    model: "Model", generators: Sequence["torch.Generator"], draws: int
) -> tuple["torch.Tensor", "torch.Tensor"]:
    """Fresh noise (B draws, C, H, W) and timesteps (B draws,), uniform over all of training's; each
    prompt's ``draws`` rows come from its own generator."""
    import torch

    count = model.scheduler.config.num_train_timesteps
    noises, timesteps = [], []
    for generator in generators:
        timesteps.append(torch.randint(count, (draws,), generator=generator))
        noises.append(torch.randn((draws, *model.latent_shape), generator=generator))
    return torch.cat(noises).to(model.device), torch.cat(timesteps).to(model.device)


def attacked(
    edit: Edit,
    rows: Sequence[int],
    starts: Sequence["Conditioning"],
    targets: "torch.Tensor",
    generators: Sequence["torch.Generator"],
    settings: Attack,
    budgets: Sequence[int],
) -> Iterator[tuple[int, "Conditioning"]]:
    """Attacks the prompts of B ``rows`` at once, in one optimisation: yields (budget, conditionings
    of B rows) at each of ``budgets``, which rise. The edit is active while it optimises.

    ``starts``: B conditionings of one row each; ``targets``: their pictures' latents (B, C, H, W);
    ``generators``: one for each, so that a prompt's result does not depend on the others beyond
    rounding. The model's weights neither change nor ask for a gradient.
    """
    import torch

    from utils.stable_diffusion import Conditioning, reproducible_gradient

    start = Conditioning.cat(starts)
    embedding = start.embedding.detach().float().clone().requires_grad_()
    added = {k: v.repeat_interleave(settings.draws, dim=0) for k, v in start.added.items()}
    latents = targets.repeat_interleave(settings.draws, dim=0)
    batch_rows = [row for row in rows for _ in range(settings.draws)]
    optimizer = torch.optim.Adam([embedding], lr=settings.learning_rate)
    step = 0
    for budget in budgets:
        with edit.active(batch_rows):
            while step < budget:
                noise, timesteps = draw(edit.model, generators, settings.draws)
                optimizer.zero_grad()
                with reproducible_gradient():
                    repeated = embedding.repeat_interleave(settings.draws, dim=0)
                    losses = diffusion_loss(
                        edit.model, Conditioning(repeated, added), latents, noise, timesteps
                    )
                    (losses.sum() / settings.draws).backward()
                optimizer.step()
                step += 1
        yield budget, replace(start, embedding=embedding.detach().clone())


def sampled(
    edit: Edit, row: int, conditioning: "Conditioning", sampling: Sampling
) -> list["Image | None"]:
    """n pictures of one prompt row with this conditioning (B = 1), the edit active; None for one
    that is not finite. A mitigation of the embedding is applied to the one that was found."""
    from utils.stable_diffusion import decode, sample_latents

    count = len(sampling.noise)
    with edit.active([row] * count):
        latents = sample_latents(
            edit.model,
            edit.mitigation.change(row, conditioning).repeat(count),
            sampling.unconditional,
            sampling.noise,
            steps=sampling.steps,
            guidance_scale=sampling.guidance_scale,
            schedule=edit.mitigation.schedule(),
        )
    return decode(edit.model, latents)
