"""Scorers that turn pictures and texts into unit vectors: CLIP for both, DINOv2 for pictures. Loaded when needed, freed after."""

import gc

import imagehash
import numpy as np
import torch
from PIL import Image, ImageOps

from lora_nb import models
from lora_nb.scores import unit

HASH_SIDE = 12  # 144 bits: 64 cannot tell a copy from a new picture of the same framing


class ClipEmbedder:
    """CLIP image and text vectors in one space; `name` is a folder or hub id. Each picture is embedded once."""

    def __init__(self, name: str, device="cpu", batch_size=16):
        self.name, self.device, self.batch_size = name, device, batch_size
        self._parts, self._known = None, {}

    def pictures(self, paths) -> np.ndarray:
        """Unit rows float32 [N, D] of picture files or PIL pictures."""
        return self._embed(paths, self._pictures)

    def texts(self, texts) -> np.ndarray:
        """Unit rows float32 [N, D]."""
        return self._embed(texts, self._texts)

    def close(self) -> None:
        """Give the model's memory back; what was embedded stays known."""
        self._parts = None
        gc.collect()

    def _embed(self, items, embed) -> np.ndarray:
        keys = [_key(item) for item in items]
        missing = list({key: item for key, item in zip(keys, items, strict=True) if key not in self._known}.items())
        for start in range(0, len(missing), self.batch_size):
            batch = missing[start : start + self.batch_size]
            with torch.no_grad():
                rows = embed([item for _, item in batch])
            self._known |= {key: row for (key, _), row in zip(batch, unit(rows.float().cpu().numpy()), strict=True)}
        return np.stack([self._known[key] for key in keys])

    def _load(self):
        self._parts = self._parts or models.load_clip(self.name, self.device)
        return self._parts

    def _pictures(self, items):
        model, _, processor = self._load()
        pixels = processor(images=[_open(item) for item in items], return_tensors="pt").pixel_values
        return _vectors(model.get_image_features(pixel_values=pixels.to(self.device)))

    def _texts(self, items):
        model, tokenizer, _ = self._load()
        tokens = tokenizer(items, padding="max_length", max_length=tokenizer.model_max_length, truncation=True, return_tensors="pt")
        return _vectors(model.get_text_features(tokens.input_ids.to(self.device), tokens.attention_mask.to(self.device)))


class DinoEmbedder(ClipEmbedder):
    """DINOv2 picture vectors (its class token): sees shapes and parts that CLIP has no words for. It reads no text."""

    def _load(self):
        self._parts = self._parts or models.load_dino(self.name, self.device)
        return self._parts

    def _pictures(self, items):
        model, processor = self._load()
        pixels = processor(images=[_open(item) for item in items], return_tensors="pt").pixel_values
        return model(pixel_values=pixels.to(self.device)).last_hidden_state[:, 0]


def picture_hashes(pictures) -> np.ndarray:
    """Perceptual hashes, bool [N, 144], of picture files or PIL pictures: of their middle square, as CLIP sees them."""
    return np.stack([imagehash.phash(_square(_open(picture)), hash_size=HASH_SIDE).hash.ravel() for picture in pictures])


def _square(image) -> Image.Image:
    return ImageOps.fit(image, (min(image.size), min(image.size)))


def _open(item) -> Image.Image:
    return item.convert("RGB") if isinstance(item, Image.Image) else Image.open(item).convert("RGB")


def _key(item):
    return ("pixels", item.size, item.tobytes()) if isinstance(item, Image.Image) else ("", str(item))


def _vectors(output) -> torch.Tensor:
    """transformers 5 returns an output with the projected vectors as pooler_output, 4 the vectors themselves."""
    return output if isinstance(output, torch.Tensor) else output.pooler_output
