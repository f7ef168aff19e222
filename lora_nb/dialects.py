"""Read a LoRA that any common program wrote: kohya's, diffusers' of today and of old, PEFT's and ComfyUI's spelling."""

import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch

from lora_nb.errors import UserError
from lora_nb.lora_file import LoraModule, read_safetensors
from lora_nb.lora_names import KOHYA_PREFIX, PARTS, classic_path, module_names

# How the dialects end their keys, longest first, and which half of a module each is.
_ENDINGS = {
    ".lora_linear_layer.down.weight": "down",
    ".lora_linear_layer.up.weight": "up",
    ".lora_A.default.weight": "down",
    ".lora_B.default.weight": "up",
    ".lora_down.weight": "down",
    ".lora_up.weight": "up",
    "_lora.down.weight": "down",
    "_lora.up.weight": "up",
    ".lora.down.weight": "down",
    ".lora.up.weight": "up",
    ".lora_A.weight": "down",
    ".lora_B.weight": "up",
    ".alpha": "alpha",
}
_NOT_PLAIN = {
    "dora_scale": "DoRA",
    "lora_magnitude_vector": "DoRA",
    "hada_w1_a": "LoHa",
    "lokr_w1": "LoKr",
    "oft_blocks": "OFT",
    "oft_diag": "OFT",
    "lora_mid": "LoCon with a Tucker core",
    "on_input": "IA3",
    "a1.weight": "GLoRA",
}
_OLD_ATTENTION = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}


@dataclass(frozen=True)
class RawModule:
    """A module as a file spells it. `alpha` is None where the file has none beside the weights."""

    name: str
    down: torch.Tensor
    up: torch.Tensor
    alpha: float | None


def raw_modules(tensors: dict[str, torch.Tensor], path="the file") -> list[RawModule]:
    """Pair the halves of every module. Raises UserError if the file is no plain LoRA, or has halves without partners."""
    found: dict[str, dict[str, torch.Tensor]] = {}
    strange = []
    for key, tensor in tensors.items():
        ending = next((ending for ending in _ENDINGS if key.endswith(ending)), None)
        if ending is None:
            strange.append(key)
            continue
        found.setdefault(key[: -len(ending)], {})[_ENDINGS[ending]] = tensor
    other = next((kind for mark, kind in _NOT_PLAIN.items() if any(mark in key for key in strange)), None)
    if other:
        raise UserError(f"{path} holds {other} weights, which cannot be read as a plain LoRA.")
    if strange:
        raise UserError(f"{path} is not a LoRA: {len(strange)} of its {len(tensors)} keys are none, for example {strange[0]!r}.")
    halves = [name for name, parts in found.items() if not {"down", "up"} <= parts.keys()]
    if halves or not found:
        raise UserError(f"{path} is no whole LoRA: {halves[0] + ' has only one half' if halves else 'it holds no modules'}.")
    return [
        RawModule(name, parts["down"], parts["up"], parts["alpha"].item() if "alpha" in parts else None)
        for name, parts in found.items()
    ]


def read_lora(path, unet, text_encoder=None, text_encoder_2=None) -> list[LoraModule]:
    """The modules of a kohya, diffusers or PEFT LoRA, by the paths they have in these models (which stay unchanged).

    path: a .safetensors file, or a PEFT folder. The models may be on the meta device.
    Raises UserError for files that are damaged, no LoRA, or made for another model.
    """
    path = Path(path)
    config, part = {}, "unet"
    file = path
    if path.is_dir():
        file = path / "adapter_model.safetensors"
        config = _json(path / "adapter_config.json")
        part = next((p for p in reversed(PARTS) if path.name.startswith(p)), "unet")
    tensors, metadata = read_safetensors(file)
    adapter = config or _adapter_metadata(metadata, file)
    models = {"unet": unet, "text_encoder": text_encoder, "text_encoder_2": text_encoder_2}
    models = {name: model for name, model in models.items() if model is not None}
    table = _name_table(models)

    modules, unknown = [], []
    for raw in raw_modules(tensors, file):
        known = table.get(_canonical(raw.name, part))
        if known is None:
            unknown.append(raw.name)
            continue
        rank = raw.down.shape[0]
        settings = config or {key.removeprefix(f"{known[0]}."): v for key, v in adapter.items() if key.startswith(f"{known[0]}.")}
        alpha = raw.alpha if raw.alpha is not None else _configured_alpha(settings, known[1], rank)
        modules.append(LoraModule(*known, raw.down, raw.up, alpha))
    if unknown:
        raise UserError(
            f"{file} was made for another model: {len(unknown)} of its modules have no place in this one, for example {unknown[0]!r}."
        )
    _check_shapes(modules, models, file)
    return modules


def _json(path: Path) -> dict:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as JSON ({error}); export the adapter again.") from error


def _adapter_metadata(metadata: dict[str, str], path) -> dict:
    """PEFT settings that diffusers keeps in the header, keys like `unet.lora_alpha`."""
    try:
        return json.loads(metadata.get("lora_adapter_metadata", "{}"))
    except ValueError as error:
        raise UserError(f"{path} has damaged adapter settings in its header ({error}).") from error


def _configured_alpha(settings: dict, path: str, rank: int) -> float:
    """Effective alpha under PEFT's settings; alpha = rank where a file says nothing, as every program takes it."""
    patterns = settings.get("alpha_pattern") or {}
    alpha = next((value for key, value in patterns.items() if path.endswith(key.lstrip("^"))), settings.get("lora_alpha", rank))
    return alpha * math.sqrt(rank) if settings.get("use_rslora") else alpha


def _name_table(models: dict) -> dict[str, tuple[str, str]]:
    """Every spelling of every module -> (part, path)."""
    table = {}
    for part, model in models.items():
        for kohya, path in module_names(part, model).items():
            table[kohya] = table[f"{part}.{path}"] = (part, path)
    return table


def _canonical(name: str, part: str) -> str:
    """A file's spelling of a module -> a key of the name table."""
    name = name.removeprefix("base_model.model.")
    if name.startswith("diffusion_model."):  # ComfyUI's own dotted SGM names
        return KOHYA_PREFIX["unet"] + name.removeprefix("diffusion_model.").replace(".", "_")
    if name.startswith("lora_"):
        return name
    given, _, path = _modern_attention(name).partition(".")
    if given not in PARTS:
        given, path = part, _modern_attention(name)
    return f"{given}.{classic_path(given, path)}"


def _weight_shape(module) -> tuple[int, ...]:
    """Also of a quantised layer, which packs its weight."""
    layer = getattr(module, "base_layer", module)
    return (layer.out_features, layer.in_features) if isinstance(layer, torch.nn.Linear) else tuple(layer.weight.shape)


def _modern_attention(name: str) -> str:
    """`attn1.processor.to_out` -> `attn1.to_out.0`, and the text encoders' `self_attn.to_q` -> `self_attn.q_proj`."""
    name = name.replace(".processor.", ".")
    stem, _, last = name.rpartition(".")
    if stem.endswith("self_attn"):
        return f"{stem}.{_OLD_ATTENTION.get(last, last)}"
    return f"{name}.0" if last == "to_out" else name


def _check_shapes(modules: list[LoraModule], models: dict, path) -> None:
    weights = {
        (part, classic_path(part, name)): _weight_shape(module)
        for part, model in models.items()
        for name, module in model.named_modules()
        if ".lora_" not in name and getattr(module, "weight", None) is not None
    }
    for module in modules:
        wanted = weights[module.part, module.path]
        made_for = (module.up.shape[0], *module.down.shape[1:])
        if made_for != wanted or module.up.shape[1] != module.rank:
            raise UserError(f"{path} was made for another model: {module.path} is {made_for} there and {wanted} here.")
