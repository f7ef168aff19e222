"""Roads back from a LoRA file that run other people's code: diffusers' loader, PEFT's, and a picture.

The models are rebuilt hollow from their configurations: every weight is one number seen from all sides, so a
full-size SDXL takes no memory and only the adapter is real.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from lora_nb.checks import Check, Road
from lora_nb.export import PEFT_FOLDERS
from lora_nb.lora_file import LoraModule, lora_of
from lora_nb.lora_names import PARTS
from lora_nb.models import PeftModel, StableDiffusionXLPipeline, diffusers

_PICTURE_ROUNDING = 1e-4  # of the full range: some pixels fall to the next of 256 levels


def library_roads(unet, text_encoders=(None, None)) -> tuple[Road, ...]:
    """Readers for `export_lora`: `StableDiffusionXLPipeline.load_lora_weights` and `PeftModel.from_pretrained`.

    Only the classes and configurations of the models are used.
    """
    models = {part: model for part, model in zip(PARTS, (unet, *text_encoders), strict=False) if model is not None}
    return (
        Road("diffusers", ("diffusers", "kohya"), lambda path: _through_diffusers(Path(path), models)),
        Road("PEFT", ("peft",), lambda folder: _through_peft(Path(folder), models)),
    )


@dataclass
class PictureRoad:
    """Draw once with the live adapter and once with the file's, all else alike, and compare the pictures.

    pipeline: one whose UNet carries the trained adapter. draw: the pipeline -> one PIL picture, from a fixed seed.
    share: how much of the change that the LoRA makes to the picture rounding the file may undo. In bf16 a full-size model was seen to
    come to 0.1; a wrong scale or lost modules undo half and more.
    The pictures stay in `live`, `reloaded` and `without` (no LoRA at all).
    """

    pipeline: object
    draw: Callable[[object], Image.Image]
    adapter: str = "default"
    share: float = 0.25
    formats: tuple[str, ...] = ("kohya", "diffusers")
    live: Image.Image | None = field(default=None, init=False)
    reloaded: Image.Image | None = field(default=None, init=False)
    without: Image.Image | None = field(default=None, init=False)

    def check(self, path: Path, expected: list[LoraModule], limit: float) -> Check:
        try:
            self.live = self.live or self._drawn([self.adapter])
            self.without = self.without or self._drawn([])
            self.reloaded = self._drawn_from(path)
        except Exception as error:  # out of memory says nothing about the file, and must not end a training
            return Check(path.name, "a picture", 0, 0, note=f"{type(error).__name__}: {error}"[:200])
        moved = picture_difference(self.live, self.without)
        error, allowed = picture_difference(self.live, self.reloaded), self.share * moved + _PICTURE_ROUNDING
        return Check(path.name, "a picture", 1, 1, error, allowed, f"the LoRA moves it {moved:.1e}")

    def _drawn_from(self, path: Path) -> Image.Image:
        _load(self.pipeline, path, "reloaded")
        try:
            return self._drawn(["reloaded"])
        finally:
            self.pipeline.set_adapters([self.adapter])
            self.pipeline.delete_adapters(["reloaded"])

    def _drawn(self, adapters: list[str]) -> Image.Image:
        if not adapters:
            self.pipeline.disable_lora()
            try:
                return self.draw(self.pipeline)
            finally:
                self.pipeline.enable_lora()
        self.pipeline.set_adapters(adapters)
        return self.draw(self.pipeline)


def picture_difference(a: Image.Image, b: Image.Image) -> float:
    """Mean absolute difference of two pictures of one size, 0 (alike) to 1 (black against white)."""
    return float(np.abs(np.asarray(a, np.float32) - np.asarray(b, np.float32)).mean() / 255)


def hollow(model: torch.nn.Module) -> torch.nn.Module:
    """A model of the same class, configuration and shapes whose base weights are all one shared zero, on the CPU."""
    with torch.device("meta"):
        diffusers_model = isinstance(model, diffusers.ModelMixin)  # transformers' classes take their configuration directly
        copy = type(model).from_config(model.config) if diffusers_model else type(model)(model.config)
    return fill_with_zero(copy)


def fill_with_zero(copy: torch.nn.Module) -> torch.nn.Module:
    """Give a model on the meta device weights that take no memory; returns it, frozen."""
    for module in copy.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            zero = torch.zeros(1).expand(parameter.shape)
            setattr(module, name, torch.nn.Parameter(zero, requires_grad=False))
        for name, buffer in list(module.named_buffers(recurse=False)):
            module.register_buffer(name, torch.zeros(buffer.shape, dtype=buffer.dtype), persistent=False)
    return copy.requires_grad_(False)


def _through_diffusers(path: Path, models: dict) -> list[LoraModule]:
    parts = {part: hollow(models[part]) if part in models else None for part in PARTS}
    unused = dict.fromkeys(("vae", "tokenizer", "tokenizer_2", "scheduler"))
    pipeline = StableDiffusionXLPipeline(**parts, **unused)
    _load(pipeline, path, "proof")
    return [module for part in models for module in lora_of(parts[part], part, "proof")]


def _load(pipeline, path: Path, adapter: str) -> None:
    """Through diffusers' loader, without its remarks on parts that the file has not, and PEFT's on a second adapter."""
    verbosity = diffusers.utils.logging.get_verbosity()
    diffusers.utils.logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            pipeline.load_lora_weights(str(path.parent), weight_name=path.name, adapter_name=adapter, use_safetensors=True)
    finally:
        diffusers.utils.logging.set_verbosity(verbosity)


def _through_peft(folder: Path, models: dict) -> list[LoraModule]:
    part = next(part for part in models if PEFT_FOLDERS[part] == folder.name)
    adapted = PeftModel.from_pretrained(hollow(models[part]), str(folder))
    return lora_of(adapted.base_model.model, part)
