"""Buckets, crop and resize: from any picture to exactly the pixels that training sees."""

import hashlib
import math
from dataclasses import dataclass

from PIL import Image

# The (short, long) sides that SDXL was trained on (report, appendix I): about 1024 x 1024 pixels, 64 px steps.
SDXL_SIDES = (
    (512, 2048), (512, 1984), (512, 1920), (512, 1856), (576, 1792), (576, 1728), (576, 1664),
    (640, 1600), (640, 1536), (704, 1472), (704, 1408), (704, 1344), (768, 1344), (768, 1280),
    (832, 1216), (832, 1152), (896, 1152), (896, 1088), (960, 1088), (960, 1024), (1024, 1024),
)  # fmt: skip


def buckets(resolution: int, square: bool = False) -> list[tuple[int, int]]:
    """The (width, height) sizes in pixels that training may use at `resolution`, narrowest first.

    SDXL's own list scaled to the resolution, in steps of 64 px at 1024 (never below 16 px, which the VAE and the
    UNet's two halvings need). square: only (resolution, resolution).
    """
    step = max(16, round(64 * resolution / 1024 / 16) * 16)
    if square:
        side = max(step, round(resolution / step) * step)
        return [(side, side)]
    sizes = set()
    for sides in SDXL_SIDES:
        short, long = (max(step, round(side * resolution / 1024 / step) * step) for side in sides)
        sizes |= {(short, long), (long, short)}
    return sorted(sizes, key=lambda size: (size[0] / size[1], size))


def nearest_bucket(width: int, height: int, sizes) -> tuple[int, int]:
    """The (width, height) of `sizes` whose aspect ratio is nearest, by the logarithm so that 2:1 and 1:2 are equals."""
    aspect = math.log(width / height)
    return min(sizes, key=lambda size: (abs(math.log(size[0] / size[1]) - aspect), -size[0] * size[1], size))


@dataclass(frozen=True)
class Crop:
    """How a picture becomes its bucket: resize to `resized`, then cut the bucket out at (`left`, `top`), in pixels."""

    resized: tuple[int, int]
    left: int
    top: int


def plan_crop(width: int, height: int, bucket: tuple[int, int], at=(0.5, 0.5)) -> Crop:
    """The crop that covers `bucket` (width, height) with the least loss.

    at: where the window lies within what is left over across and down: (0.5, 0.5) the middle, (0, 0) top left.
    """
    scale = enlargement(width, height, bucket)
    resized = (max(bucket[0], round(width * scale)), max(bucket[1], round(height * scale)))
    return Crop(resized, int((resized[0] - bucket[0]) * at[0]), int((resized[1] - bucket[1]) * at[1]))


def drawn_place(seed: int, key: str) -> tuple[float, float]:
    """A place for `plan_crop`, drawn once for the picture `key` (its SHA-256) from the seed."""
    drawn = hashlib.sha256(f"{seed} {key}".encode()).digest()
    return int.from_bytes(drawn[:4], "big") / 2**32, int.from_bytes(drawn[4:8], "big") / 2**32


def enlargement(width: int, height: int, bucket) -> float:
    """How many times larger the picture must become to cover its bucket; below 1 it is reduced."""
    return max(bucket[0] / width, bucket[1] / height)


def cut_off(width: int, height: int, bucket) -> float:
    """The share of the picture's area that the crop to `bucket` loses."""
    scale = enlargement(width, height, bucket)
    return max(0.0, 1 - bucket[0] * bucket[1] / (width * height * scale * scale))


def fit(image: Image.Image, bucket: tuple[int, int], crop: Crop) -> Image.Image:
    """RGB picture at exactly `bucket` (width, height), resampled with LANCZOS.

    Only the pixels that are kept are made, so an extreme aspect ratio costs no memory.
    """
    across, down = image.width / crop.resized[0], image.height / crop.resized[1]
    right, bottom = crop.left + bucket[0], crop.top + bucket[1]
    box = (crop.left * across, crop.top * down, min(right * across, image.width), min(bottom * down, image.height))
    return image.resize(bucket, Image.Resampling.LANCZOS, box=box)
