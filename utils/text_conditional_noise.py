"""Detection and token attribution by the text-conditional noise (Wen et al., ICLR 2024).

d = e_c - e_u: what the prompt adds to the predicted noise. It is large, and stays so, where a
prompt brings back a training image; and its gradient says which tokens do.
Public: ``noise_norms``, ``conditional_noise_norms``, ``token_gradients``.
"""

import torch

from utils.stable_diffusion import (
    Conditioning,
    Model,
    Step,
    reproducible_gradient,
    sample_latents,
    to_noise_prediction,
    unet_output,
)


def noise_norms(
    model: Model,
    with_text: torch.Tensor,
    without: torch.Tensor,
    latents: torch.Tensor,
    timestep: torch.Tensor,
) -> torch.Tensor:
    """||d|| of each of n images, (n,) float32: L2, not divided by the image's size."""
    both = [
        to_noise_prediction(model, output, latents, timestep) for output in (with_text, without)
    ]
    return torch.linalg.vector_norm((both[0] - both[1]).flatten(1), dim=1)


def conditional_noise_norms(
    model: Model,
    conditioning: Conditioning,
    unconditional: Conditioning,
    noise: torch.Tensor,
    *,
    steps: int,
    guidance_scale: float,
) -> torch.Tensor:
    """||d_i(x_t, t)|| along ordinary guided sampling from n noises (n, C, H, W): (steps, n) float64
    on the CPU. A prompt's score is the mean over the images, and over all steps or of the first."""
    norms: list[torch.Tensor] = []

    def observe(step: Step) -> None:
        norms.append(noise_norms(model, step.with_text, step.without, step.latents, step.timestep))

    sample_latents(
        model,
        conditioning.repeat(len(noise)),
        unconditional,
        noise,
        steps=steps,
        guidance_scale=guidance_scale,
        observe=observe,
    )
    return torch.stack(norms).double().cpu()


def token_gradients(
    model: Model,
    conditioning: Conditioning,
    unconditional: Conditioning,
    noise: torch.Tensor,
    *,
    steps: int,
    guidance_scale: float,
    batch_size: int | None = None,
) -> torch.Tensor:
    """How much each token moves the text-conditional noise: ||g_t[token]||, the mean over steps t,
    with g_t the gradient of mean_i ||d_i(x_t, t)|| by the prompt embedding. (tokens,) float64 on
    the CPU, for n noises (n, C, H, W).

    The latents advance by ordinary guidance, and no gradient passes from step to step.
    ``batch_size``: images per gradient pass, for a device with little memory (default: all n).
    """
    per_step: list[torch.Tensor] = []
    # The gradient passes through the model in its precision. Scaled by this, it begins with numbers
    # around 1 instead of some that half precision rounds to zero.
    scale = float(noise[0].numel()) ** 0.5

    def observe(step: Step) -> None:
        gradient = torch.zeros_like(conditioning.embedding)
        # d / ||d||, by which e_c's gradient becomes that of ||d||. From the pass of both halves:
        # the one below has other kernels, whose rounding would count as part of a small d.
        e_c, e_u = (
            to_noise_prediction(model, output, step.latents, step.timestep)
            for output in (step.with_text, step.without)
        )
        directions = torch.nn.functional.normalize((e_c - e_u).flatten(1)).view_as(e_c)
        for rows in torch.arange(len(noise)).split(batch_size or len(noise)):
            part = slice(int(rows[0]), int(rows[-1]) + 1)
            embedding = conditioning.embedding.detach().requires_grad_()
            latents = step.latents[part]
            with reproducible_gradient():
                repeated = Conditioning(embedding, conditioning.added).repeat(len(rows))
                with_text = unet_output(model, latents, step.timestep, repeated)
                e_c = to_noise_prediction(model, with_text, latents, step.timestep)
                (own,) = torch.autograd.grad(e_c, embedding, scale * directions[part])
            gradient += own
        gradient = gradient[0].double() / (scale * len(noise))  # (tokens, width)
        per_step.append(torch.linalg.vector_norm(gradient, dim=1))

    sample_latents(
        model,
        conditioning.repeat(len(noise)),
        unconditional,
        noise,
        steps=steps,
        guidance_scale=guidance_scale,
        observe=observe,
    )
    return torch.stack(per_step).mean(dim=0).cpu()
