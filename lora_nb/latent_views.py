"""Latents as pictures, to look at: what a posterior decodes to, and what the UNet is given at a timestep."""

import torch

from lora_nb.losses import scale_latents
from lora_nb.models import decode_latents


def decode_posterior(vae, posterior):
    """The PIL picture of a posterior's mean. posterior: float32 [2, C, h, w], unscaled, as the cache keeps it."""
    return decode_latents(vae, _scaled(vae, posterior))[0]


def noised_pictures(vae, noise_scheduler, posterior, timesteps, seed: int = 0) -> list:
    """The picture with the noise of each of `timesteps`, decoded. posterior: as above."""
    latents = _scaled(vae, posterior)
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(seed)).to(latents)
    return decode_latents(vae, torch.cat([noise_scheduler.add_noise(latents, noise, torch.tensor([step])) for step in timesteps]))


def _scaled(vae, posterior):
    return scale_latents(posterior[None, 0].to(vae.device), vae.config)
