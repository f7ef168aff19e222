"""Begin training where another LoRA ended: put any program's file into fresh adapters, at the strength it has."""

from collections import Counter

import torch

from lora_nb.dialects import read_lora
from lora_nb.errors import UserError
from lora_nb.events import Notice, OnEvent, ignore
from lora_nb.lora_file import LoraModule
from lora_nb.lora_names import PARTS, classic_path


@torch.no_grad()
def start_from_lora(path, adapted: dict, others: dict | None = None, adapter: str = "default", on_event: OnEvent = ignore) -> int:
    """Load a kohya, diffusers or PEFT LoRA into adapters that exist; returns how many modules it filled.

    adapted: part -> model with the adapter. others: part -> model without one, which only name what the file has.
    Each module then changes its weight exactly as the file does, whatever the file's alpha: the difference to the
    adapter's own scale goes into `up`. A smaller rank is filled up with rows that do nothing yet; modules that the file
    has not stay untouched. Raises UserError for a larger rank, and for modules without an adapter.
    """
    modules = read_lora(path, **{part: model for part, model in {**(others or {}), **adapted}.items() if part in PARTS})
    fitting = [module for module in modules if module.part in adapted]
    if left := Counter(module.part for module in modules if module.part not in adapted):
        what = ", ".join(f"{count} modules of {part}" for part, count in left.items())
        on_event(Notice(f"{path} also has {what}, which this run does not train; they are left out (train_text_encoder: true takes them)."))
    layers = {(part, name): layer for part, model in adapted.items() for name, layer in _layers(model, part, adapter).items()}
    _check(path, fitting, layers, adapter)
    for module in fitting:
        layer = layers[module.part, module.path]
        down, up = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
        down[: module.rank] = module.down.to(down)
        up.zero_()
        up[:, : module.rank] = (module.up.float() * (module.scale / layer.scaling[adapter])).to(up)
    scales = {round(module.scale / layers[module.part, module.path].scaling[adapter], 6) for module in fitting}
    if scales != {1.0}:
        on_event(Notice(f"{path} has another alpha / rank than the settings; its weights are rescaled, so that it starts at the strength it has."))
    return len(fitting)


def _layers(model, part: str, adapter: str) -> dict:
    return {classic_path(part, name): m for name, m in model.named_modules() if adapter in getattr(m, "lora_A", {})}


def _check(path, modules: list[LoraModule], layers: dict, adapter: str) -> None:
    if not modules:
        raise UserError(f"{path} has no modules of the models that this run trains.")
    without = [m.path for m in modules if (m.part, m.path) not in layers]
    if without:
        raise UserError(
            f"{path} adapts {len(without)} modules that lora_target_modules leaves out, {without[0]} first; "
            "set lora_target_modules: attention+feed_forward, or name them."
        )
    rank, room = max(m.rank for m in modules), min(layers[m.part, m.path].r[adapter] for m in modules)
    if rank > room:
        raise UserError(f"{path} has rank {rank} and the settings {room}; set lora_rank: {rank}.")
