"""Runs whose pictures are drawn, not generated: what a LoRA of each kind would make, so that the answer is known.

The data set is the shipped character; a "checkpoint" is the name of a behaviour, and pictures come from the renderer.
"""

import random
import sys
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageFilter, ImageOps

from lora_nb.dataset import scan, validate
from lora_nb.embedders import ClipEmbedder
from lora_nb.evaluate import TINY_CLIP, Evaluation
from lora_nb.manifest import open_sample
from lora_nb.plan import make_plan

ROOT = Path(__file__).resolve().parent.parent  # the shipped data, whatever root a test is given
sys.path.insert(0, str(ROOT / "tools"))
from drawn_world import CHARACTERS, EXPRESSIONS, FRAMINGS, PLACES, draw, random_scene, random_setting  # noqa: E402

TRIGGER = "aldar_kose_man"
HERO = CHARACTERS[TRIGGER]


def asked(prompt: str, rng) -> dict:
    """The setting that a prompt asks for, the rest at random."""
    setting = random_setting(rng)
    for name, words in (("background", PLACES), ("framing", dict.fromkeys(FRAMINGS)), ("expression", dict.fromkeys(EXPRESSIONS))):
        found = [key for key, value in words.items() if (value or key) in prompt]
        setting |= {name: found[0]} if found else {}
    return setting


class DrawnPainter:
    """Draws as a run of some kind would. `behaviours`: step -> function(prompt, rng) -> scene or picture."""

    recipe = {"base": []}

    def __init__(self, folder, behaviours, manifest):
        self.folder, self.behaviours, self.manifest = folder, behaviours, manifest

    def draw(self, prompts, seeds, lora=None, strength=1.0, on_event=None):
        return [[self._picture(prompt, seed, lora) for seed in seeds] for prompt in prompts]

    def _picture(self, prompt, seed, lora):
        path = self.folder / f"{self.behaviours[lora].__name__}-{abs(hash((prompt, seed)))}.png"
        if not path.is_file():
            rng = random.Random(f"{prompt} {seed}")
            drawn = self.behaviours[lora](self, prompt, rng)
            as_a_model_draws(drawn if isinstance(drawn, Image.Image) else draw(drawn, 128, 128), seed).save(path)
        return path


def as_a_model_draws(image, seed):
    """Softer and a little noisy."""
    pixels = np.asarray(image.filter(ImageFilter.GaussianBlur(0.6)), float)
    return Image.fromarray((pixels + np.random.default_rng(seed).normal(0, 5, pixels.shape)).clip(0, 255).astype(np.uint8))


# ---- what checkpoints draw


def anybody(painter, prompt, rng):
    """The base: it follows the prompt and does not know the trigger."""
    return replace(random_scene(rng), **asked(prompt, rng))


def hero_where_called(painter, prompt, rng):
    """The perfect LoRA."""
    other = anybody(painter, prompt, rng)  # first, so that prompts without the trigger get the base's picture
    return replace(HERO, **asked(prompt, rng)) if TRIGGER in prompt else other


def half_learned(painter, prompt, rng):
    """Hat and robe only now and then."""
    other = anybody(painter, prompt, rng)
    if TRIGGER not in prompt:
        return other
    traits = [name for name in ("hat", "hat_colour", "robe_colour", "pattern", "pattern_colour", "beard") if rng.random() < 0.5]
    return replace(other, person="man", **{name: getattr(HERO, name) for name in traits})


def hero_everywhere(painter, prompt, rng):
    """The LoRA that leaks: everybody becomes the character."""
    return replace(HERO, **asked(prompt, rng))


def hero_who_does_not_listen(painter, prompt, rng):
    """Overtrained: the character, wherever he likes."""
    other = anybody(painter, prompt, rng)
    return replace(HERO, **random_setting(rng)) if TRIGGER in prompt else other


def a_training_picture(painter, prompt, rng):
    """The LoRA that copies."""
    other = anybody(painter, prompt, rng)
    if TRIGGER not in prompt:
        return other
    return ImageOps.fit(open_sample(painter.manifest, rng.choice(painter.manifest.train())), (128, 128))


@lru_cache
def shipped():
    """The shipped character's manifest and the shipped CLIP, read once."""
    return validate(scan(ROOT / "data" / "aldar_kose"), 128, TRIGGER, workers=1).manifest(ROOT), ClipEmbedder(str(ROOT / TINY_CLIP))


def bench(folder, behaviours, number=6, seeds=(1, 2, 3)):
    """An Evaluation over a run whose checkpoint of each step behaves as said."""
    manifest, embedder = shipped()
    steps = {0: anybody, **behaviours}
    painter = DrawnPainter(folder, {(f"step{step}" if step else None): kind for step, kind in steps.items()}, manifest)
    captions = [[sample.caption for sample in part] for part in (manifest.train(), manifest.held_out())]
    plan = make_plan(TRIGGER, *captions, number=number, seeds=seeds)
    return Evaluation(folder, plan, {step: f"step{step}" for step in behaviours}, manifest, painter, embedder, embedder, None)
