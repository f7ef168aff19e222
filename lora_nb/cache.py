"""Latents and text embeddings: made once, kept on disk by content, or made as training goes by the same functions.

A latent's key is made of the pixels that training sees (decoded, rotated, cropped, resized, flipped) and the VAE's
weights; an embedding's of the caption and the text encoders' weights. So one edited picture means one re-encode, a
rename none, a new VAE all; and what does not fit is never used silently.
"""

import hashlib
import json
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from lora_nb import models
from lora_nb.errors import UserError
from lora_nb.events import Notice, Progress, ignore
from lora_nb.files import full_disk_is_a_sentence, sha256_file
from lora_nb.lora_file import write_safetensors
from lora_nb.manifest import PLAIN, WITH_LATENTS, Manifest, open_sample, read_manifest, write_manifest
from lora_nb.memory import on_device
from lora_nb.weights import fingerprint

LATENTS, EMBEDDINGS = "latents", "text_embeddings"
CURE = "run notebook 02 (or `python -m lora_nb encode`) again"
KEEP_BYTES = 1 << 30  # of latents, and again of embeddings, held in memory while training


class NonFiniteLatent(UserError):
    """The VAE overflowed on a picture."""


@dataclass(frozen=True)
class Weights:
    """Fingerprints of what encodes."""

    vae: str
    text: str


@dataclass(frozen=True)
class Encoded:
    """What `encode` did: entries made and found, by kind, and what they take on the disk."""

    manifest_path: Path
    latents_made: int
    latents_found: int
    embeddings_made: int
    embeddings_found: int
    bytes: int
    seconds: float


def weights_of(base_model: str, vae_model: str | None = None) -> Weights:
    """Fingerprints of the VAE and of both text encoders together."""
    texts = [fingerprint(base_model, part) for part in ("text_encoder", "text_encoder_2")]
    zeros = models.zeros_for_empty_prompt(base_model)
    return Weights(fingerprint(vae_model or base_model, "vae"), _digest(*texts, zeros)[:16])


# --- encoding one thing ------------------------------------------------------------------------------------------


def pixels_of(manifest: Manifest, sample, flip: bool = False) -> np.ndarray:
    """The picture as training sees it, uint8 [H, W, 3]."""
    pixels = np.asarray(open_sample(manifest, sample))
    return np.ascontiguousarray(pixels[:, ::-1]) if flip else pixels


@torch.no_grad()
def encode_image(vae, pixels: np.ndarray, name: str = "a picture") -> torch.Tensor:
    """Mean and log-variance of the VAE's posterior, unscaled.

    pixels: uint8 [H, W, 3], sides multiples of the VAE's scale. Returns float32 [2, C, H/8, W/8] on the CPU.
    Raises NonFiniteLatent, which names the picture.
    """
    like = next(vae.parameters())  # vae.device and vae.dtype go through all of them
    image = torch.from_numpy(pixels.copy()).to(like.device).permute(2, 0, 1)[None].to(like.dtype) / 127.5 - 1
    posterior = vae.encode(image).latent_dist
    latents = torch.stack([posterior.mean[0], posterior.logvar[0]]).float().cpu().contiguous()
    if not torch.isfinite(latents).all():
        raise NonFiniteLatent(f"The VAE gives NaN or infinity for {name}: it overflows in fp16; take it in fp32 or another vae_model.")
    return latents


@torch.no_grad()
def encode_caption(tokenizers, text_encoders, caption: str, zeros_for_empty: bool):
    """prompt_embeds [77, D] and pooled_prompt_embeds [P] on the CPU; zeros for "" where the base was trained so."""
    prompt_embeds, pooled_prompt_embeds = models.encode_prompts(tokenizers, text_encoders, [caption])
    if zeros_for_empty and not caption:
        prompt_embeds, pooled_prompt_embeds = torch.zeros_like(prompt_embeds), torch.zeros_like(pooled_prompt_embeds)
    return prompt_embeds[0].cpu(), pooled_prompt_embeds[0].cpu()


def latent_key(pixels: np.ndarray, weights: Weights) -> str:
    return _digest(pixels.shape, weights.vae, hashlib.sha256(pixels).hexdigest())


def embedding_key(caption: str, weights: Weights) -> str:
    return _digest(caption, weights.text)


def _digest(*parts) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


def _flipped(path: str) -> str:
    """Where the mirrored picture's latents lie."""
    return path.removesuffix(".safetensors") + "_flipped.safetensors"


# --- 02: everything to disk --------------------------------------------------------------------------------------


def encode(
    manifest_path, base_model: str, vae_model: str | None = None, *, captions=(), random_flip=False,
    dtype=torch.float32, device="cpu", on_event=ignore,
) -> Encoded:  # fmt: skip
    """Encode every picture and caption of a manifest, more `captions` and the empty one; what is there already stays.

    The VAE runs in float32 (SDXL's overflows in fp16), text encoders in `dtype`; each is loaded only if something is
    to do, and one at a time. Writes dataset_manifest_with_latents.json beside the manifest.
    """
    began, source = time.monotonic(), _source_of(Path(manifest_path))
    manifest, weights = read_manifest(source), weights_of(base_model, vae_model)
    folder = manifest.folder
    latent_paths, made = _encode_pictures(manifest, base_model, vae_model, weights, random_flip, device, on_event)
    captions = list(dict.fromkeys(["", *(sample.caption for sample in manifest.samples), *captions]))
    embeddings_made = encode_captions(folder, captions, base_model, weights, dtype, device, on_event)

    samples = [
        sample.model_copy(update={"latent_path": path, "embedding_path": f"{EMBEDDINGS}/{embedding_key(sample.caption, weights)}.safetensors"})  # fmt: skip
        for sample, path in zip(manifest.samples, latent_paths, strict=True)
    ]
    record = {"vae": weights.vae, "text": weights.text, "flips": random_flip, "source": source.name, "source_sha256": sha256_file(source)}  # fmt: skip
    metadata = manifest.metadata.model_copy(update={"settings": manifest.metadata.settings | {"cache": record}})
    whole = manifest.with_samples(samples)
    whole = Manifest(whole.content.model_copy(update={"metadata": metadata}), folder)
    paths = [folder / path for path in latent_paths] + [folder / sample.embedding_path for sample in samples]
    return Encoded(
        write_manifest(whole, folder / WITH_LATENTS),
        latents_made=made,
        latents_found=len(samples) * (1 + random_flip) - made,
        embeddings_made=embeddings_made,
        embeddings_found=len(captions) - embeddings_made,
        bytes=sum(path.stat().st_size for path in set(paths)),
        seconds=time.monotonic() - began,
    )


def _source_of(manifest_path: Path) -> Path:
    """The manifest that is to be encoded: for one with latents, which `encode` wrote, the one that it was made from."""
    if manifest_path.name != WITH_LATENTS:
        return manifest_path
    return manifest_path.with_name(_record_of(read_manifest(manifest_path)).get("source", PLAIN))


def _record_of(manifest) -> dict:
    """What `encode` noted in a manifest; {} where that is not there, or not what `encode` writes."""
    record = manifest.metadata.settings.get("cache")
    ours = isinstance(record, dict) and isinstance(record.get("source"), str) and Path(record["source"]).name == record["source"]
    return record if ours else {}


def _encode_pictures(manifest, base_model, vae_model, weights, random_flip, device, on_event):
    """Relative latent paths, one a sample, and how many entries were made."""
    vae, paths, made, total = None, [], set(), len(manifest.samples)
    with _writer(manifest.folder) as write:
        for done, (sample, pixels) in enumerate(_decoded(manifest), start=1):
            path = f"{LATENTS}/{latent_key(pixels, weights)}.safetensors"
            paths.append(path)
            for flip in (False, True)[: 1 + random_flip]:
                file = manifest.folder / (_flipped(path) if flip else path)
                if file in made or _header(file).get("weights") == weights.vae:
                    continue
                vae = vae or models.load_vae(base_model, vae_model, torch.float32, device)
                latents = encode_image(vae, np.ascontiguousarray(pixels[:, ::-1]) if flip else pixels, sample.image_path)
                write(file, {"mean": latents[0], "logvar": latents[1]}, {"weights": weights.vae})
                made.add(file)
            on_event(Progress(LATENTS, done, total, sample.image_path))
    return paths, len(made)


def encode_captions(folder, captions, base_model, weights, dtype=torch.float32, device="cpu", on_event=ignore) -> int:
    """Put the embeddings of `captions` under `folder`; returns how many were not there yet."""
    files = {caption: folder / EMBEDDINGS / f"{embedding_key(caption, weights)}.safetensors" for caption in captions}
    missing = [caption for caption, file in files.items() if _header(file).get("weights") != weights.text]
    if not missing:
        on_event(Progress(EMBEDDINGS, len(captions), len(captions)))
        return 0
    tokenizers, text_encoders = models.load_text_encoders(base_model, dtype, device)
    zeros = models.zeros_for_empty_prompt(base_model)
    with _writer(folder) as write:
        for done, caption in enumerate(missing, start=1):
            if tail := models.truncated(tokenizers[0], caption):
                on_event(Notice(f"Only 75 tokens of a caption are read; this end is not: “…{tail}”."))
            prompt_embeds, pooled_prompt_embeds = encode_caption(tokenizers, text_encoders, caption, zeros)
            tensors = {"prompt_embeds": prompt_embeds, "pooled_prompt_embeds": pooled_prompt_embeds}
            write(files[caption], tensors, {"weights": weights.text})
            on_event(Progress(EMBEDDINGS, len(captions) - len(missing) + done, len(captions), caption))
    return len(missing)


def _decoded(manifest, ahead: int = 4):
    """(sample, pixels) in order, decoded some pictures ahead in threads while the VAE works."""
    with ThreadPoolExecutor(max_workers=2) as pool:
        waiting = deque()
        for sample in manifest.samples:
            waiting.append((sample, pool.submit(pixels_of, manifest, sample)))
            if len(waiting) > ahead:
                first, pixels = waiting.popleft()
                yield first, pixels.result()
        for first, pixels in waiting:
            yield first, pixels.result()


@contextmanager
def _writer(folder, behind: int = 4):
    """Yields write(file, tensors, metadata), which returns at once: a disk takes milliseconds to sync each file.

    At most `behind` files wait; a write that failed raises at a later call, or at the end.
    """
    with full_disk_is_a_sentence(folder), ThreadPoolExecutor(max_workers=1) as pool:
        waiting = deque()

        def write(*what):
            waiting.append(pool.submit(write_safetensors, *what))
            if len(waiting) > behind:
                waiting.popleft().result()

        yield write
        for written in waiting:
            written.result()


def _header(file: Path) -> dict:
    """A cache file's metadata, {} if it is not there or not whole."""
    try:
        with safe_open(file, framework="pt") as content:
            return content.metadata() or {}
    except (OSError, SafetensorError):
        return {}


# --- 03: what training takes -------------------------------------------------------------------------------------


class Samples:
    """Latents and embeddings by sample, from the cache or encoded as training goes; held in memory while they are few.

    `latents(sample, flip)`: float32 [2, C, h, w], mean and log-variance, unscaled, on the CPU.
    `embeddings(caption)`: prompt_embeds [77, D] and pooled_prompt_embeds [P] on the CPU.
    """

    def __init__(self, manifest: Manifest, make_latents, make_embeddings, cached: bool):
        self.manifest, self.cached = manifest, cached
        self._make_latents, self._make_embeddings = make_latents, make_embeddings
        self._latents, self._embeddings, self._seen = _Kept(), _Kept(), set()

    def latents(self, sample, flip: bool = False):
        key = (sample.image_path, flip)
        return self._latents.get(key, lambda: self._checked_latents(sample, flip))

    def embeddings(self, caption: str):
        return self._embeddings.get(caption, lambda: self._make_embeddings(caption))

    def _checked_latents(self, sample, flip):
        if sample.image_path not in self._seen:  # once a training, however often the latents are read
            original = self.manifest.original(sample)
            if original.is_file() and sha256_file(original) != sample.sha256:
                raise UserError(f"{sample.image_path} is not the picture that the manifest describes: run notebooks 01 and 02 again.")
            self._seen.add(sample.image_path)
        return self._make_latents(sample, flip)


class _Kept:
    """Tensors by key, kept up to KEEP_BYTES, made anew beyond."""

    def __init__(self):
        self._values, self._bytes = {}, 0

    def get(self, key, make):
        if key in self._values:
            return self._values[key]
        value = make()
        size = sum(tensor.nbytes for tensor in (value if isinstance(value, tuple) else (value,)))
        if self._bytes + size <= KEEP_BYTES:
            self._values[key] = value
            self._bytes += size
        return value


def cached_samples(manifest: Manifest, weights: Weights, random_flip: bool = False) -> Samples:
    """Samples from the files that `encode` wrote. Raises UserError if they were made of, or with, something else."""
    record = _record_of(manifest)
    source = manifest.folder / record.get("source", "")
    problems = {
        "the VAE is another one": record.get("vae") != weights.vae,
        "the text encoders are others": record.get("text") != weights.text,
        "a picture has no latents": any(not sample.latent_path for sample in manifest.samples),
        "flips were not encoded": random_flip and not record.get("flips"),
        f"{source.name} has changed": source.is_file() and sha256_file(source) != record.get("source_sha256"),
        "a caption has changed": any(
            not sample.embedding_path or Path(sample.embedding_path).stem != embedding_key(sample.caption, weights)
            for sample in manifest.samples
        ),
    }
    if found := [reason for reason, applies in problems.items() if applies]:
        raise UserError(f"The cached latents and embeddings do not fit ({', '.join(found)}): {CURE}.")

    def latents(sample, flip):
        tensors = _read(manifest.path_of(_flipped(sample.latent_path) if flip else sample.latent_path), weights.vae)
        width, height = sample.bucket
        posterior = torch.stack([tensors["mean"], tensors["logvar"]]).float()
        if width * posterior.shape[-2] != height * posterior.shape[-1] or not torch.isfinite(posterior).all():
            raise UserError(f"The latents of {sample.image_path} do not fit its bucket or are not finite: {CURE}.")
        return posterior

    def embeddings(caption):
        tensors = _read(manifest.folder / EMBEDDINGS / f"{embedding_key(caption, weights)}.safetensors", weights.text)
        return tensors["prompt_embeds"], tensors["pooled_prompt_embeds"]

    return Samples(manifest, latents, embeddings, cached=True)


def fresh_samples(manifest, base_model, vae_model=None, *, dtype=torch.float32, device="cpu", stay=True) -> Samples:
    """Samples encoded as training goes. `stay` keeps the encoders on the device between uses."""
    loaded = {}  # parts come when they are first needed

    def latents(sample, flip):
        if "vae" not in loaded:
            loaded["vae"] = models.load_vae(base_model, vae_model)
        with on_device(loaded["vae"], device, stay) as vae:
            return encode_image(vae, pixels_of(manifest, sample, flip), sample.image_path)

    def embeddings(caption):
        if "text" not in loaded:
            loaded["text"] = *models.load_text_encoders(base_model, dtype), models.zeros_for_empty_prompt(base_model)
        tokenizers, text_encoders, zeros = loaded["text"]
        with on_device(text_encoders[0], device, stay), on_device(text_encoders[1], device, stay):
            return encode_caption(tokenizers, text_encoders, caption, zeros)

    return Samples(manifest, latents, embeddings, cached=False)


def _read(file: Path, weights: str) -> dict[str, torch.Tensor]:
    try:
        with safe_open(file, framework="pt") as content:
            if (content.metadata() or {}).get("weights") != weights:
                raise UserError(f"{file} was made by other weights: {CURE}.")
            return {name: content.get_tensor(name) for name in content.keys()}
    except (OSError, SafetensorError):
        raise UserError(f"{file} is missing or damaged: {CURE}.") from None
