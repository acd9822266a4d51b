"""The VAE: 64 x 64 pictures to latents of shape (4, 16, 16) with unit variance, and back.

Public names: new_autoencoder, autoencoder_loss, normalise_latents, encode, decode, to_tensor,
to_pixels.
"""

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor

LATENT_CHANNELS = 4
KL_WEIGHT = 1e-5
EDGE_WEIGHT = 0.5


def new_autoencoder() -> AutoencoderKL:
    """Two halvings of the side, so that a latent pixel stands for 4 x 4 pixels."""
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(32, 48, 64),
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=16,
        sample_size=64,
        scaling_factor=1.0,  # the scale lives in the weights: see normalise_latents
        mid_block_add_attention=False,
    )


def to_tensor(pixels: np.ndarray) -> Tensor:
    """(n, H, W, 3) uint8 -> (n, 3, H, W) float32 in [-1, 1]."""
    return torch.from_numpy(np.array(pixels)).permute(0, 3, 1, 2).float() / 127.5 - 1


def to_pixels(pictures: Tensor) -> np.ndarray:
    """(n, 3, H, W) in [-1, 1] -> (n, H, W, 3) uint8."""
    levels = ((pictures.clamp(-1, 1) + 1) * 127.5).round()
    return levels.permute(0, 2, 3, 1).to(torch.uint8).numpy()


def _edges(pictures: Tensor) -> tuple[Tensor, Tensor]:
    return pictures.diff(dim=-1), pictures.diff(dim=-2)


def _rim(latents: Tensor) -> Tensor:
    """Mean square of how far each side's outer rows are from the rest, on average of the batch."""
    scaled = latents / latents.std(dim=(0, 2, 3), keepdim=True)
    deviation = (scaled - scaled.mean(dim=(2, 3), keepdim=True)).mean(dim=0)  # (4, 16, 16)
    sides = [deviation[:, at].mean(dim=-1) for at in (0, 1, -2, -1)]
    sides += [deviation[:, :, at].mean(dim=-1) for at in (0, 1, -2, -1)]
    return torch.stack(sides).square().mean()


def autoencoder_loss(
    vae: AutoencoderKL, pictures: Tensor, rng: torch.Generator, *, rim_weight: float = 0.0
) -> dict[str, Tensor]:
    """Absolute error of pixels and of edges (they keep outlines sharp), and a little KL.

    Zero padding lifts the rim of the latents. That rim would be the same in all pictures, and so
    make every pair of noise differences alike: `rim_weight` > 0 trains it away.
    """
    posterior = vae.encode(pictures).latent_dist
    restored = vae.decode(posterior.sample(generator=rng)).sample
    pixel = F.l1_loss(restored, pictures)
    edge = sum(F.l1_loss(a, b) for a, b in zip(_edges(restored), _edges(pictures), strict=True))
    kl = posterior.kl().mean() / posterior.mean[0].numel()
    rim = _rim(posterior.mean)
    loss = pixel + EDGE_WEIGHT * edge + KL_WEIGHT * kl + rim_weight * rim
    return {"loss": loss, "pixel": pixel, "kl": kl, "rim": rim}


@torch.no_grad()
def normalise_latents(vae: AutoencoderKL, pictures: Tensor) -> None:
    """Shift and scale the latents to mean 0, variance 1 per channel, inside 1 x 1 convolutions.

    A diffusers VAE has one scaling factor for all channels; folding mean and scale of each channel
    into `quant_conv` and `post_quant_conv` leaves that factor at 1.
    """
    latents = encode(vae, pictures)
    mean, std = latents.mean(dim=(0, 2, 3)), latents.std(dim=(0, 2, 3))
    vae.quant_conv.weight[:LATENT_CHANNELS] /= std[:, None, None, None]
    vae.quant_conv.bias[:LATENT_CHANNELS] = (vae.quant_conv.bias[:LATENT_CHANNELS] - mean) / std
    # the second half is the log-variance of the posterior
    vae.quant_conv.bias[LATENT_CHANNELS:] -= 2 * std.log()
    vae.post_quant_conv.bias += vae.post_quant_conv.weight[:, :, 0, 0] @ mean
    vae.post_quant_conv.weight *= std[None, :, None, None]


@torch.no_grad()
def encode(vae: AutoencoderKL, pictures: Tensor, *, batch: int = 64) -> Tensor:
    """Mean latents, (n, 4, 16, 16) float32."""
    return torch.cat([vae.encode(part).latent_dist.mean for part in pictures.split(batch)])


@torch.no_grad()
def decode(vae: AutoencoderKL, latents: Tensor, *, batch: int = 64) -> Tensor:
    """Pictures of latents, (n, 3, 64, 64), about [-1, 1]."""
    return torch.cat([vae.decode(part).sample for part in latents.split(batch)])
