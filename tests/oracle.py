"""A judge of drawn pictures that is no CLIP: which place is behind the person, and does he wear the hero's clothes?"""

import random
from dataclasses import replace
from functools import lru_cache

import numpy as np
from PIL import Image
from planted_world import HERO, PLACES, asked, random_scene

from lora_nb.scores import unit

SIDE = 64


def obedience(path, prompt: str) -> float:
    """1 if the place behind the person is the one that the prompt asks for, else 0."""
    pixels = _borders(Image.open(path))
    distances = {place: np.abs(seen - pixels).mean(axis=(1, 2, 3)).min() for place, seen in _places().items()}
    return float(PLACES[min(distances, key=distances.get)] in prompt)


def likeness(path) -> float:
    """1 for the hero's colours in the person's place, 0 for those of others: histograms against drawn ones."""
    own = _histogram(Image.open(path))
    heroes, others = _people()
    near, far = (own @ heroes.T).max(), (own @ others.T).max()
    return float(np.clip(0.5 + 2 * (near - far), 0, 1))


def _borders(image):
    """Left and right edges above the ground, where nobody stands: float [32, 16, 3]."""
    pixels = np.asarray(image.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BOX), float)
    return np.concatenate([pixels[:44, :8], pixels[:44, -8:]], axis=1)


def _histogram(image):
    """Unit vector of coarse colours in the middle, where the person stands."""
    pixels = np.asarray(image.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BOX), int)[:, 16:48] // 43
    bins = (pixels @ np.array([36, 6, 1])).ravel()
    return unit(np.bincount(bins, minlength=216).astype(float) ** 0.5)


@lru_cache
def _places():
    from drawn_world import draw

    rng = random.Random(0)
    return {
        place: np.stack([_borders(draw(replace(random_scene(rng), background=place, framing="close-up portrait"), SIDE, SIDE, 2)) for _ in range(12)])
        for place in PLACES
    }


@lru_cache
def _people():
    from drawn_world import draw

    rng = random.Random(1)
    heroes = [draw(replace(HERO, **asked("", rng)), SIDE, SIDE, 2) for _ in range(120)]
    others = [draw(random_scene(rng), SIDE, SIDE, 2) for _ in range(400)]
    return tuple(np.stack([_histogram(image) for image in images]) for images in (heroes, others))
