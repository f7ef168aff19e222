"""What a LoRA file says about itself: kohya's `ss_*` keys, modelspec 1.0.1, and what `replay` needs. All strings.

Nothing private goes in: absolute paths shrink to their last name, and settings that look like secrets stay out.
"""

import base64
import datetime
import hashlib
import importlib.metadata
import io
import json
import os
import platform
import re
from collections import Counter
from pathlib import PurePosixPath, PureWindowsPath

from PIL import Image

from lora_nb.lora_file import safetensors_bytes

CONFIG_KEY, VERSIONS_KEY, MANIFEST_KEY = "lora_nb.config", "lora_nb.versions", "lora_nb.manifest_sha256"
_SECRET = re.compile(r"(^|_)(token|secret|password|api_key|auth)$")
_NOT_SECRET = {"trigger_token"}
_HERE_ONLY = {"output_dir", "copy_checkpoints_to"}  # say nothing to another machine

# Our setting -> kohya's key, where the value needs no translation.
SS_SETTINGS = {
    "learning_rate": "ss_learning_rate",
    "text_encoder_learning_rate": "ss_text_encoder_lr",
    "lr_scheduler": "ss_lr_scheduler",
    "lr_warmup_steps": "ss_lr_warmup_steps",
    "max_steps": "ss_max_train_steps",
    "mixed_precision": "ss_mixed_precision",
    "seed": "ss_seed",
    "lora_dropout": "ss_network_dropout",
    "gradient_checkpointing": "ss_gradient_checkpointing",
    "gradient_accumulation_steps": "ss_gradient_accumulation_steps",
    "batch_size": "ss_batch_size_per_device",
    "max_grad_norm": "ss_max_grad_norm",
    "snr_gamma": "ss_min_snr_gamma",
    "loss_type": "ss_loss_type",
    "noise_offset": "ss_noise_offset",
    "caption_dropout": "ss_caption_dropout_rate",
    "buckets": "ss_enable_bucket",
}


def lora_metadata(
    run_name: str,
    settings: dict | None = None,
    *,
    steps: int | None = None,
    captions=(),
    buckets=(),
    manifest_sha256: str | None = None,
    prediction_type: str = "epsilon",
    thumbnail: str | None = None,
) -> dict[str, str]:
    """Header of a LoRA file for an SDXL base; export adds rank, alpha and hashes.

    settings: the run's settings by their flat names (`config.model_dump()`), any of which may be missing.
    steps: optimizer steps behind these weights. captions: one a training picture, repeated as the picture is;
    buckets: (width, height) of each. thumbnail: a data URL.
    """
    settings = public_settings(settings or {})
    resolution = int(settings.get("resolution") or 1024)
    trigger = settings.get("trigger_token") or ""
    header = {
        # A1111 hides a file for an SDXL base unless this begins with sdxl_
        "ss_base_model_version": "sdxl_base_v1-0",
        "ss_v2": "False",
        "ss_network_module": "networks.lora",
        "ss_network_args": "{}",
        "ss_output_name": run_name,
        "ss_sd_model_name": settings.get("base_model"),
        "ss_resolution": str((resolution, resolution)),
        "ss_steps": steps or settings.get("max_steps"),
        "ss_optimizer": _optimizer(settings),
        **{ours: settings.get(name) for name, ours in SS_SETTINGS.items() if settings.get(name) is not None},
        **_dataset_keys(settings, captions, buckets),
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": "stable-diffusion-xl-v1-base/lora",
        "modelspec.implementation": "https://github.com/Stability-AI/generative-models",
        "modelspec.title": settings.get("title") or run_name,
        "modelspec.resolution": f"{resolution}x{resolution}",
        "modelspec.prediction_type": "v" if prediction_type.startswith("v") else "epsilon",
        "modelspec.date": _today(),
        "modelspec.author": settings.get("author"),
        "modelspec.license": settings.get("license"),
        "modelspec.description": settings.get("description"),
        "modelspec.trigger_phrase": trigger,
        "modelspec.usage_hint": f"Write {trigger} in the prompt." if trigger else None,
        "modelspec.thumbnail": thumbnail,
        CONFIG_KEY: json.dumps(settings, sort_keys=True, ensure_ascii=False),
        VERSIONS_KEY: json.dumps(library_versions(), sort_keys=True),
        MANIFEST_KEY: manifest_sha256,
    }
    return {key: str(value) for key, value in header.items() if value not in (None, "")}


def thumbnail(picture, side: int = 256) -> str:
    """A picture (path or PIL image) as the small JPEG data URL that modelspec's thumbnail is."""
    image = picture if isinstance(picture, Image.Image) else Image.open(picture)
    image = image.convert("RGB")
    image.thumbnail((side, side))
    content = io.BytesIO()
    image.save(content, "JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(content.getvalue()).decode("ascii")


def _optimizer(settings) -> str | None:
    name = settings.get("optimizer")
    return f"{name}8bit" if name == "adamw" and settings.get("use_8bit_adam") else name


def _dataset_keys(settings, captions, buckets) -> dict:
    if not captions:
        return {}
    name = str(settings.get("dataset_path") or "dataset").rstrip("/").rpartition("/")[2]
    tags = Counter(tag.strip() for caption in captions for tag in caption.split(",") if tag.strip())
    sizes = Counter(tuple(bucket) for bucket in buckets)
    counted = {str(n): {"resolution": list(size), "count": count} for n, (size, count) in enumerate(sorted(sizes.items()))}
    return {
        "ss_num_train_images": len(captions),
        "ss_num_reg_images": 0,
        "ss_dataset_dirs": json.dumps({name: {"n_repeats": 1, "img_count": len(captions)}}),
        "ss_tag_frequency": json.dumps({name: dict(tags.most_common())}, ensure_ascii=False),
        "ss_bucket_info": json.dumps({"buckets": counted}) if counted else None,
    }


def public_settings(settings) -> dict:
    """Settings fit for other people's eyes: no secrets, no folders of this machine. JSON values only."""
    return {
        name: public_value(value)
        for name, value in settings.items()
        if name not in _HERE_ONLY and (name in _NOT_SECRET or not _SECRET.search(name))
    }


def public_value(value):
    """An absolute or home path -> its last name; everything else as JSON keeps it."""
    if isinstance(value, dict):
        return {str(key): public_value(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        items = [public_value(item) for item in value]
        return sorted(items, key=str) if isinstance(value, (set, frozenset)) else items
    if value is None or isinstance(value, (bool, int, float)):
        return value
    text = str(value)
    if PureWindowsPath(text).is_absolute():
        return PureWindowsPath(text).name
    return PurePosixPath(text).name if text.startswith(("/", "~")) else text


def library_versions() -> dict[str, str]:
    """Versions of what the numbers depend on."""
    versions = {"python": platform.python_version()}
    for package in ("lora_nb", "torch", "diffusers", "transformers", "peft", "accelerate", "safetensors"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def with_hashes(metadata: dict[str, str], tensors) -> dict[str, str]:
    """Add the hashes that tools look files up by, as kohya and modelspec compute them.

    `sshs_model_hash` is the SHA-256 of all bytes after the header; `sshs_legacy_hash` the first eight digits of
    that of 64 KiB at 1 MiB, of the file as it is with its `ss_` keys alone.
    """
    plain = safetensors_bytes(tensors, {key: value for key, value in metadata.items() if key.startswith("ss_")})
    data = hashlib.sha256(memoryview(plain)[8 + int.from_bytes(plain[:8], "little") :]).hexdigest()
    return {
        **metadata,
        "sshs_model_hash": data,
        "sshs_legacy_hash": hashlib.sha256(plain[0x100000:0x110000]).hexdigest()[:8],
        "modelspec.hash_sha256": f"0x{data}",
    }


def _today() -> str:
    """Day of export, UTC; SOURCE_DATE_EPOCH fixes it, so that the same run makes the same bytes on any day."""
    epoch = os.environ.get("SOURCE_DATE_EPOCH")
    now = datetime.datetime.fromtimestamp(int(epoch), datetime.timezone.utc) if epoch else datetime.datetime.now(datetime.timezone.utc)
    return now.date().isoformat()


def network_keys(rank: int, alpha: float) -> dict[str, str]:
    """What programs show as the network's size; the weights themselves are read by their own shapes and alphas."""
    return {"ss_network_dim": _number(rank), "ss_network_alpha": _number(alpha)}


def _number(value) -> str:
    """16.0 -> "16": some programs parse whole numbers only."""
    return str(int(value)) if float(value).is_integer() else str(float(value))
