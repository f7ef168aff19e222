"""Meters for sampled pictures: identity, adherence, diversity, leak and memorisation, each with its uncertainty.

Pure numpy. Embeddings are unit rows, so that a product is a cosine; samples lie in a grid [prompts, seeds, D].
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np


class Estimate(NamedTuple):
    """A mean and its 95 % bootstrap interval."""

    mean: float
    low: float
    high: float

    def __str__(self):
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"


def unit(rows) -> np.ndarray:
    """Rows scaled to length 1, float32 [..., D]."""
    rows = np.asarray(rows, np.float32)
    return rows / np.maximum(np.linalg.norm(rows, axis=-1, keepdims=True), 1e-12)


def resample(prompts: int, seeds: int, draws: int = 1000, seed: int = 0):
    """Indices [draws, prompts, 1] and [draws, 1, seeds] of a bootstrap over both: prompts and seeds are each a sample.

    The same numbers for the same shape, so that candidates are compared on the same draws.
    """
    rng = np.random.default_rng(seed)
    rows = rng.integers(prompts, size=(draws, prompts, 1))
    return rows, rng.integers(seeds, size=(draws, 1, seeds))


def bootstrap_means(values: np.ndarray, draws: int = 1000) -> np.ndarray:
    """[draws] means of `values` [prompts, seeds] over resampled prompts and seeds."""
    return values[resample(*values.shape, draws)].mean(axis=(1, 2))


def estimate(values) -> Estimate:
    """Mean and interval of `values` [prompts, seeds] or [prompts]; NaN entries make NaN."""
    values = np.asarray(values, np.float64)
    values = values[:, None] if values.ndim == 1 else values
    low, high = np.percentile(bootstrap_means(values), [2.5, 97.5])
    return Estimate(float(values.mean()), float(low), float(high))


def identity(samples: np.ndarray, references: np.ndarray) -> np.ndarray:
    """Mean cosine of each sample [P, S, D] to the held-out references [R, D]: [P, S]."""
    return samples @ references.mean(axis=0)


def identity_ceiling(references: np.ndarray) -> float:
    """How alike the references [R, D] are among themselves: what a perfect LoRA would reach. NaN for a single one."""
    number = len(references)
    return float((references @ references.T).sum() - number) / (number * (number - 1)) if number > 1 else float("nan")


def adherence(samples: np.ndarray, texts: np.ndarray) -> np.ndarray:
    """Cosine of each sample [P, S, D] to the text [P, D] it was asked for: [P, S]."""
    return np.einsum("psd,pd->ps", samples, texts)


def adherence_by_chance(samples: np.ndarray, texts: np.ndarray) -> float:
    """Mean cosine to the texts of the *other* prompts: what a picture scores that ignores its prompt."""
    to_all, number = np.einsum("psd,qd->psq", samples, texts), len(texts)
    own = np.einsum("psp->ps", to_all)
    return float((to_all.sum(-1) - own).mean() / (number - 1)) if number > 1 else 0.0


def diversity(samples: np.ndarray) -> np.ndarray:
    """Mean distance (1 - cosine) between the seeds of a prompt, [P]; NaN with a single seed."""
    prompts, seeds, _ = samples.shape
    if seeds < 2:
        return np.full(prompts, np.nan)
    alike = np.einsum("psd,ptd->pst", samples, samples)
    return 1 - (alike.sum((1, 2)) - np.trace(alike, axis1=1, axis2=2)) / (seeds * (seeds - 1))


def drift(samples: np.ndarray, base: np.ndarray) -> np.ndarray:
    """How far each sample moved from the base's picture of the same prompt and seed, [P, S].

    0 is the same picture, 1 as far as the base's own pictures of two seeds are apart (two prompts, with one seed).
    """
    moved = 1 - np.einsum("psd,psd->ps", samples, base)
    spread = np.nanmean(diversity(base)) if base.shape[1] > 1 else np.nanmean(diversity(base.swapaxes(0, 1)))
    return moved / max(spread, 1e-6)


def leak(samples: np.ndarray, base: np.ndarray, references: np.ndarray, way: float) -> np.ndarray:
    """How much of the character shows where nobody called it, [P, S]: 0 none, 1 all of it.

    `way` is how far the references are above the base in identity: the same for all candidates, so that they compare.
    """
    return (identity(samples, references) - identity(base, references)) / way


# ---- memorisation


class CopyLimits(NamedTuple):
    """A near copy of a training picture is more similar (cosine) than this, and fewer of its hash bits differ (share)."""

    similarity: float
    hash_distance: float


@dataclass(frozen=True)
class Copies:
    """For each of N samples its nearest training picture, and whether it is a near copy of it."""

    nearest: np.ndarray  # [N] index of the training picture
    similarity: np.ndarray  # [N] cosine to it
    hash_distance: np.ndarray  # [N] share of the perceptual hash's bits that differ
    copied: np.ndarray  # [N] bool

    @property
    def share(self) -> float:
        return float(self.copied.mean())


def copy_limits(references, training, reference_hashes, training_hashes) -> CopyLimits:
    """What new pictures of the character may be: the held-out references are new, so none of them is a copy.

    Embeddings [R, D] and [T, D], hashes bool [R, B] and [T, B]. Without references the training pictures stand in, each
    against the others.
    """
    if len(references):
        similarity, bits = references @ training.T, hash_distances(reference_hashes, training_hashes)
    else:
        same = np.eye(len(training), dtype=bool)
        similarity = np.where(same, -1, training @ training.T)
        bits = np.where(same, 1, hash_distances(training_hashes, training_hashes))
    return CopyLimits(float(similarity.max()), float(min(bits.min(), 0.15)))


def find_copies(samples, training, sample_hashes, training_hashes, limits: CopyLimits) -> Copies:
    """Near copies among samples [N, D]: beyond both limits at once, since embeddings forget layout and hashes content."""
    similarity, bits = samples @ training.T, hash_distances(sample_hashes, training_hashes)
    copies = (similarity > limits.similarity) & (bits < limits.hash_distance)
    nearest = (similarity + 2 * copies).argmax(axis=1)  # a copy before what is merely similar
    rows = np.arange(len(samples))
    return Copies(nearest, similarity[rows, nearest], bits[rows, nearest], copies.any(axis=1))


def hash_distances(a, b) -> np.ndarray:
    """Share of differing bits [N, M] between boolean hashes [N, B] and [M, B]."""
    a, b = np.asarray(a, np.int32), np.asarray(b, np.int32)
    return (a.sum(1)[:, None] + b.sum(1)[None] - 2 * a @ b.T) / a.shape[1]


# ---- losses


def loss_ratios(losses, base_losses) -> np.ndarray:
    """Loss against the base's on the same grid of (picture, noise, timestep) [N, T]: mean ratio a timestep band, [T]."""
    return np.asarray(losses).mean(0) / np.asarray(base_losses).mean(0)


def learned(losses, base_losses) -> np.ndarray:
    """Each picture's ratio to the base, [N]: the geometric mean over the timestep bands of [N, T]."""
    return np.exp(np.log(np.asarray(losses) / np.asarray(base_losses)).mean(axis=1))
