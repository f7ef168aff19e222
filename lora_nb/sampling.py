"""Pictures of the base and of LoRA files, each drawn once: its recipe names its file, so a second look costs nothing."""

import gc
import hashlib
import json
from io import BytesIO
from pathlib import Path

import torch

from lora_nb import models
from lora_nb.events import Progress, ignore
from lora_nb.files import sha256_file, write_atomic
from lora_nb.weights import fingerprint

PARTS = ("unet", "text_encoder", "text_encoder_2")


class Painter:
    """Draws prompts × seeds with a LoRA file at a strength, or with the base alone, into `folder`.

    height, width: in pixels, those of training. The pipeline is loaded when the first picture is missing; `offload` keeps
    its parts off a small GPU while they rest.
    """

    def __init__(
        self, base_model, folder, *, height, width, vae_model=None, scheduler=None, dtype=torch.float32, device="cpu",
        steps=25, guidance_scale=5.0, negative_prompt="", batch_size=8, offload=False,
    ):  # fmt: skip
        self.base_model = base_model
        self.folder, self.batch_size, self.offload = Path(folder), batch_size, offload
        self.recipe = {
            "base": [fingerprint(base_model, part) for part in PARTS] + [fingerprint(vae_model or base_model, "vae")],
            "scheduler": scheduler, "dtype": str(dtype), "height": height, "width": width, "steps": steps,
            "guidance_scale": guidance_scale, "negative_prompt": negative_prompt,
        }  # fmt: skip
        self._load = lambda: models.load_pipeline(base_model, dtype, device, vae_model, scheduler)
        self._pipeline, self._device, self._loaded, self._hashes = None, device, None, {}

    def path(self, prompt: str, seed: int, lora=None, strength: float = 1.0) -> Path:
        """Where this picture lies, drawn or not. `lora` is a .safetensors file; its bytes count, not its name."""
        weights = [self._sha256(lora), float(strength)] if lora and strength else None
        recipe = json.dumps([self.recipe, weights, prompt, seed], sort_keys=True)
        return self.folder / f"{hashlib.sha256(recipe.encode()).hexdigest()[:24]}.png"

    def _sha256(self, lora) -> str:
        """A file's hash, computed again only if the file has changed."""
        stat = Path(lora).stat()
        key = (str(lora), stat.st_mtime_ns, stat.st_size)
        if key not in self._hashes:
            self._hashes[key] = sha256_file(lora)
        return self._hashes[key]

    def draw(self, prompts, seeds, lora=None, strength: float = 1.0, on_event=ignore) -> list[list[Path]]:
        """Paths of the pictures, a list a prompt with one a seed. Pictures that lie there already are not drawn again."""
        grid = [[self.path(prompt, seed, lora, strength) for seed in seeds] for prompt in prompts]
        wanted = {self.path(prompt, seed, lora, strength): (prompt, seed) for prompt in prompts for seed in seeds}
        missing = [path for path in wanted if not path.is_file()]
        for start in range(0, len(missing), self.batch_size):
            batch = missing[start : start + self.batch_size]
            on_event(Progress("pictures", len(wanted) - len(missing) + start, len(wanted)))
            pictures = self._generate([wanted[path] for path in batch], lora, strength)
            for path, picture in zip(batch, pictures, strict=True):
                write_png(path, picture)
        on_event(Progress("pictures", len(wanted), len(wanted)))
        return grid

    def pipeline(self, lora=None, strength: float = 1.0):
        """The pipeline with this LoRA in it, or without any."""
        if self._pipeline is None:
            self._pipeline = self._load()
            if self.offload and self._device != "cpu":
                self._pipeline.enable_model_cpu_offload()
        wanted = (str(lora), strength) if lora and strength else None
        if wanted != self._loaded:
            models.load_lora(self._pipeline, lora, strength) if wanted else models.unload_lora(self._pipeline)
            self._loaded = wanted
        return self._pipeline

    def close(self) -> None:
        """Give the memory back; the next picture loads the base again."""
        self._pipeline = self._loaded = None
        gc.collect()
        if self._device != "cpu":
            torch.cuda.empty_cache()

    def _generate(self, shots, lora, strength):
        pipeline = self.pipeline(lora, strength)
        recipe = {name: self.recipe[name] for name in ("height", "width", "steps", "guidance_scale", "negative_prompt")}
        return models.generate_pairs(pipeline, shots, batch_size=len(shots), **recipe)


def write_png(path, picture) -> Path:
    """A picture, whole or absent."""
    buffer = BytesIO()
    picture.save(buffer, "PNG", optimize=True)
    return write_atomic(path, buffer.getvalue())
