"""Denoising losses on a fixed grid of (picture, noise, timestep): what a checkpoint predicts better than the base.

One timestep or a plain mean misleads, since losses differ tenfold between timesteps; ratios to the base on the very same
noise do not.
"""

import numpy as np
import torch

from lora_nb.events import Progress, ignore
from lora_nb.losses import diffusion_loss, scale_latents

TIMESTEPS = (125, 375, 625, 875)  # the middles of four bands of 1000: detail, texture, shapes, layout


@torch.no_grad()
def loss_grid(
    unet, noise_scheduler, pictures, latents_of, embeddings_of, vae_config, *, timesteps=TIMESTEPS, seed=0, batch_size=16, device="cpu",
    on_event=ignore,
) -> np.ndarray:  # fmt: skip
    """Unweighted losses float64 [N, T] of `pictures` (Samples of a manifest) at `timesteps`.

    latents_of(picture): unscaled [C, h, w]; embeddings_of(caption): prompt_embeds [1, 77, D] and pooled_prompt_embeds
    [1, P]. The noise of each cell depends only on the seed, the picture's place and the timestep.
    """
    losses = np.empty((len(pictures), len(timesteps)))
    embeddings = {caption: embeddings_of(caption) for caption in {picture.caption for picture in pictures}}
    cells = sorted(np.ndindex(*losses.shape), key=lambda cell: (pictures[cell[0]].bucket, cell))
    done = 0
    for batch in _batches(cells, lambda cell: pictures[cell[0]].bucket, batch_size):
        own = [pictures[n] for n, _ in batch]
        latents = scale_latents(torch.stack([latents_of(picture) for picture in own]).to(device), vae_config)
        noise = torch.stack([_noise(latents.shape[1:], seed, n, timesteps[t]) for n, t in batch]).to(device)
        text = zip(*(embeddings[picture.caption] for picture in own), strict=True)
        prompt_embeds, pooled_prompt_embeds = (torch.cat(rows).to(device) for rows in text)
        time_ids = torch.tensor([_time_ids(picture) for picture in own], device=device, dtype=unet.dtype)
        steps = torch.tensor([timesteps[t] for _, t in batch], device=device)
        loss = diffusion_loss(
            unet, noise_scheduler, latents, noise, steps, prompt_embeds, pooled_prompt_embeds, time_ids, snr_gamma=None
        )
        losses[tuple(zip(*batch, strict=True))] = loss.double().cpu().numpy()
        done += len(batch)
        on_event(Progress("losses", done, len(cells)))
    return losses


def _noise(shape, seed: int, picture: int, timestep: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(((seed * 100_003) + picture) * 1009 + timestep))


def _time_ids(picture) -> list[int]:
    return [*picture.original_size, *picture.crop_top_left, *picture.target_size]


def _batches(items, key, size):
    """Runs of at most `size` neighbours with the same key."""
    batch = []
    for item in items:
        if batch and (len(batch) == size or key(item) != key(batch[0])):
            yield batch
            batch = []
        batch.append(item)
    if batch:
        yield batch
