"""What is this LoRA file, who can load it, and how was it made? For any program's file.

Only safetensors are opened: a pickled `.pt` or `.ckpt` can run code.
"""

import hashlib
import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from lora_nb.dialects import RawModule, raw_modules
from lora_nb.errors import UserError
from lora_nb.lora_file import read_safetensors
from lora_nb.metadata import MANIFEST_KEY
from lora_nb.readers import spelled_for

PROGRAMS = ("kohya", "ComfyUI", "A1111/Forge", "diffusers", "PEFT")
_BASES = {2048: "SDXL", 768: "Stable Diffusion 1", 1024: "Stable Diffusion 2"}  # by the width of the text it attends to
_KINDS = {
    "kohya, SGM blocks": ("lora_unet_input_blocks", "lora_unet_middle_block", "lora_unet_output_blocks"),
    "kohya, diffusers blocks": ("lora_unet_down_blocks", "lora_unet_mid_block", "lora_unet_up_blocks", "lora_te"),
    "PEFT": ("base_model.model.",),
    "diffusers": ("unet.", "text_encoder", "down_blocks.", "mid_block.", "up_blocks."),
    "ComfyUI, dotted SGM names": ("diffusion_model.",),
}
_PARTS = {
    "text encoder 1": ("lora_te1_", "lora_te_", "text_encoder."),
    "text encoder 2": ("lora_te2_", "text_encoder_2."),
    "UNet": ("",),
}
_SHOWN = {
    "ss_sd_model_name": "base model",
    "ss_num_train_images": "training pictures",
    "ss_resolution": "resolution",
    "ss_steps": "steps",
    "ss_learning_rate": "learning rate",
    "ss_optimizer": "optimizer",
    "ss_lr_scheduler": "schedule",
    "ss_batch_size_per_device": "batch size",
    "ss_mixed_precision": "mixed precision",
    "ss_seed": "seed",
    "modelspec.author": "author",
    "modelspec.license": "licence",
    "modelspec.date": "date",
    MANIFEST_KEY: "data manifest",
}


@dataclass(frozen=True, repr=False)
class Inspection:
    """Facts about a file as (name, value) rows, and sentences about what may go wrong with it."""

    path: Path
    rows: tuple[tuple[str, str], ...]
    warnings: tuple[str, ...]

    def __str__(self) -> str:
        width = max(len(name) for name, _ in self.rows)
        lines = [f"{name.ljust(width)}  {value}" for name, value in self.rows]
        return "\n".join([str(self.path), *lines, *(f"! {sentence}" for sentence in self.warnings)])

    __repr__ = __str__


def inspect_lora(path) -> Inspection:
    """Look into a .safetensors LoRA, or a PEFT folder. Raises UserError for what is none, saying what it is instead."""
    path = Path(path)
    file = path / "adapter_model.safetensors" if path.is_dir() else path
    if file.suffix in (".pt", ".pth", ".ckpt", ".bin"):
        raise UserError(f"{path} is pickled and could run code when opened; convert it to safetensors first.")
    _refuse_other_models(file)
    tensors, metadata = read_safetensors(file)
    modules = raw_modules(tensors, file)
    kind = _kind(modules)
    readers = {program: sum(program in spelled_for(m.name) for m in modules) for program in PROGRAMS}
    rows = [
        ("format", f"{kind}, {_dtypes(modules)}, {file.stat().st_size / 2**20:.1f} MiB"),
        ("base", _base(modules, metadata)),
        ("modules", ", ".join(f"{count} {part}" for part, count in _parts(modules).items())),
        ("rank", _spread(module.down.shape[0] for module in modules)),
        ("alpha", _alphas(modules, metadata, path)),
        ("trigger", _trigger(metadata)),
        ("read by", ", ".join(f"{program} {_share(n, len(modules))}" for program, n in readers.items())),
        *((label, metadata[key]) for key, label in _SHOWN.items() if metadata.get(key) not in (None, "", "None")),
    ]
    return Inspection(path, tuple(rows), tuple(_warnings(modules, metadata, tensors, kind, file)))


def _refuse_other_models(path: Path) -> None:
    """Name other kinds of safetensors from their keys alone, before gigabytes are read."""
    if not path.is_file():
        raise UserError(f"{path} does not exist; give the path of a .safetensors LoRA.")
    try:
        with safe_open(path, framework="pt") as file:
            keys = set(file.keys())
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{path} is not a whole safetensors file ({error}); download it again.") from error
    others = {
        "a full Stable Diffusion checkpoint": "model.diffusion_model.",
        "a textual inversion": "emb_params",
        "a textual inversion for SDXL": "clip_g",
        "a diffusers UNet": "conv_in.weight",
        "a VAE": "encoder.conv_in.weight",
    }
    for what, mark in others.items():
        if any(key.startswith(mark) for key in keys):
            raise UserError(f"{path} is {what}, not a LoRA.")


def _kind(modules: list[RawModule]) -> str:
    counts = Counter(next((kind for kind, marks in _KINDS.items() if m.name.startswith(marks)), "of unknown spelling") for m in modules)
    return counts.most_common(1)[0][0]


def _dtypes(modules: list[RawModule]) -> str:
    short = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}
    return " and ".join(sorted({short.get(m.up.dtype, str(m.up.dtype)) for m in modules}))


def _base(modules: list[RawModule], metadata) -> str:
    """From the shapes, where there is cross-attention; else from what the header claims."""
    widths = {m.down.shape[1] for m in modules if "attn2" in m.name and m.name.replace(".", "_").endswith(("to_k", "to_v"))}
    claimed = metadata.get("modelspec.architecture") or metadata.get("ss_base_model_version")
    if len(widths) != 1:
        return claimed or "neither shapes nor header say"
    seen = _BASES.get(min(widths), f"a model of text width {min(widths)}")
    return f"{seen}; the header says {claimed}" if claimed else seen


def _parts(modules: list[RawModule]) -> Counter:
    return Counter(next(part for part, marks in _PARTS.items() if m.name.startswith(marks)) for m in modules)


def _spread(values) -> str:
    counts = Counter(values)
    if len(counts) == 1:
        return f"{next(iter(counts)):g}"
    return ", ".join(f"{value:g} ({count} modules)" for value, count in counts.most_common(4)) + (", …" if len(counts) > 4 else "")


def _alphas(modules: list[RawModule], metadata, path: Path) -> str:
    if any(m.alpha is not None for m in modules):
        scales = _spread((m.down.shape[0] if m.alpha is None else m.alpha) / m.down.shape[0] for m in modules)
        return f"{_spread(m.down.shape[0] if m.alpha is None else m.alpha for m in modules)}, so strength 1 applies it times {scales}"
    settings = json.loads(metadata.get("lora_adapter_metadata") or "{}")
    if path.is_dir() and (path / "adapter_config.json").is_file():
        settings = json.loads((path / "adapter_config.json").read_text(encoding="utf-8"))
    alpha = next((value for key, value in settings.items() if key.endswith("lora_alpha")), None)
    return f"{alpha:g}, in the adapter's settings" if alpha is not None else "none in the file: every program takes the rank"


def _trigger(metadata) -> str:
    if metadata.get("modelspec.trigger_phrase"):
        return metadata["modelspec.trigger_phrase"]
    try:
        folders = json.loads(metadata.get("ss_tag_frequency") or "{}")
    except ValueError:
        return "the header does not say"
    tags = Counter()
    for counts in folders.values():
        tags.update(counts)
    common = ", ".join(f"{tag.strip()} ({count})" for tag, count in tags.most_common(3))
    return f"not said; the commonest tags are {common}" if common else "the header does not say"


def _share(count: int, total: int) -> str:
    return "all" if count == total else f"{count} of {total}" if count else "none"


def _warnings(modules, metadata, tensors, kind, path) -> list[str]:
    bad = sum(not torch.isfinite(t).all() for t in tensors.values())
    zero = sum(not m.up.any() for m in modules)
    alphas = {m.alpha for m in modules}
    told = (metadata.get("sshs_model_hash") or "").removeprefix("0x")
    found = {
        f"{bad} tensors hold NaN or infinity: pictures will be black.": bad,
        f"{zero} of {len(modules)} modules do nothing: their up matrices are zero.": zero,
        "The data is not what its hash in the header says: the file was changed or damaged.": told and told != _data_hash(path),
        "A1111 hides this file for SDXL: ss_base_model_version does not begin with sdxl_.":
            kind.startswith("kohya") and not metadata.get("ss_base_model_version", "").startswith("sdxl_"),
        "diffusers applies files whose modules have different alphas wrongly.": kind.startswith("kohya") and len(alphas) > 1,
        "ComfyUI, A1111 and kohya do not read today's diffusers spelling; use the kohya file.": kind == "diffusers",
    }  # fmt: skip
    return [sentence for sentence, applies in found.items() if applies]


def _data_hash(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        file.seek(8 + int.from_bytes(file.read(8), "little"))
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
