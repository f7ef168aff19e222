"""What step N sees: order, noise, timesteps, flips and dropout as pure functions of (seed, step, sample).

No sampler and no generator state is saved anywhere: a run that was killed goes on to the same bits, two processes with
batch 2 see what one process with batch 4 sees, and a smaller micro-batch moves nothing.
"""

import hashlib
from dataclasses import dataclass
from functools import lru_cache, partial

import torch


@dataclass(frozen=True)
class Draw:
    """One picture's part in a step. `noise` and `posterior_noise`: float32 [C, h, w] on the CPU."""

    index: int
    flip: bool
    drop_caption: bool
    timestep: int
    noise: torch.Tensor
    posterior_noise: torch.Tensor


def generator_of(*key) -> torch.Generator:
    """A CPU generator whose state follows from `key` alone, on every machine."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


def epoch_order(buckets: tuple, batch: int, seed: int, epoch: int) -> tuple[int, ...]:
    """A permutation of the samples in which batches keep to one bucket wherever the numbers allow.

    buckets: each sample's bucket. Batches are cut every `batch` samples from a stream of epochs, so an epoch may begin
    within one: those places, and the end, take what does not fill a batch of its own bucket.
    """
    shuffled = torch.randperm(len(buckets), generator=generator_of(seed, "order", epoch)).tolist()
    members: dict = {}
    for index in shuffled:
        members.setdefault(buckets[index], []).append(index)
    open_places = min(-epoch * len(buckets) % batch, len(buckets))
    whole = {bucket: len(own) // batch * batch for bucket, own in members.items()}
    loose = [index for bucket, own in members.items() for index in own[whole[bucket] :]]
    chunks = [own[at : at + batch] for bucket, own in members.items() for at in range(0, whole[bucket], batch)]
    chunks = [chunks[at] for at in torch.randperm(len(chunks), generator=generator_of(seed, "chunks", epoch)).tolist()]
    while len(loose) < open_places:
        loose += chunks.pop()
    return tuple(loose[:open_places] + [index for chunk in chunks for index in chunk] + loose[open_places:])


class Order:
    """Which samples each step takes. It is worked out once an epoch: a step's time does not grow with the data set.

    buckets: each sample's bucket.
    """

    def __init__(self, buckets, batch: int, seed: int):
        self.count, self.batch = len(buckets), batch
        self._of_epoch = lru_cache(maxsize=2)(partial(epoch_order, tuple(buckets), batch, seed))

    def at(self, step: int) -> list[int]:
        """The samples of a step (from 0), `batch` of them."""
        places = (divmod(position, self.count) for position in range(step * self.batch, (step + 1) * self.batch))
        return [self._of_epoch(epoch)[at] for epoch, at in places]


def draw(index, position, latent_shape, seed, *, flips=False, caption_dropout=0.0, noise_offset=0.0, timesteps=1000):
    """Everything random about the sample at `position` of the stream. latent_shape: (C, h, w).

    The scalars are always drawn, so that one setting does not move what another one sees.
    """
    generator = generator_of(seed, "draw", position)
    flip, drop = torch.rand(2, generator=generator).tolist()
    timestep = torch.randint(timesteps, (), generator=generator).item()
    posterior_noise, noise = torch.randn(2, *latent_shape, generator=generator)
    offset = torch.randn(latent_shape[0], 1, 1, generator=generator)
    noise = noise + noise_offset * offset if noise_offset else noise
    return Draw(index, flips and flip < 0.5, drop < caption_dropout, timestep, noise, posterior_noise)
