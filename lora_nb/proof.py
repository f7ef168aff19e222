"""Roads back from a LoRA file that run other people's code: diffusers' loader, PEFT's, and a picture.

The models are rebuilt hollow from their configurations: every weight is one number seen from all sides, so a
full-size SDXL takes no memory and only the adapter is real.
"""

from pathlib import Path

import torch

from lora_nb.export import PEFT_FOLDERS, Road
from lora_nb.lora_file import LoraModule, lora_of
from lora_nb.lora_names import PARTS


def library_roads(unet, text_encoders=(None, None)) -> tuple[Road, ...]:
    """Readers for `export_lora`: `StableDiffusionXLPipeline.load_lora_weights` and `PeftModel.from_pretrained`.

    Only the classes and configurations of the models are used.
    """
    models = {part: model for part, model in zip(PARTS, (unet, *text_encoders)) if model is not None}
    return (
        Road("diffusers", ("diffusers", "kohya"), lambda path: _through_diffusers(Path(path), models)),
        Road("PEFT", ("peft",), lambda folder: _through_peft(Path(folder), models)),
    )


def hollow(model: torch.nn.Module) -> torch.nn.Module:
    """A model of the same class, configuration and shapes whose base weights are all one shared zero, on the CPU."""
    with torch.device("meta"):
        from_config = getattr(type(model), "from_config", None)  # diffusers' classes; transformers' take it directly
        copy = from_config(model.config) if from_config else type(model)(model.config)
    for module in copy.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            zero = torch.zeros(1).expand(parameter.shape)
            setattr(module, name, torch.nn.Parameter(zero, requires_grad=False))
        for name, buffer in list(module.named_buffers(recurse=False)):
            module.register_buffer(name, torch.zeros(buffer.shape, dtype=buffer.dtype), persistent=False)
    return copy.requires_grad_(False)


def _through_diffusers(path: Path, models: dict) -> list[LoraModule]:
    from diffusers import StableDiffusionXLPipeline

    parts = {part: hollow(models[part]) if part in models else None for part in PARTS}
    unused = dict.fromkeys(("vae", "tokenizer", "tokenizer_2", "scheduler"))
    pipeline = StableDiffusionXLPipeline(**parts, **unused)
    pipeline.load_lora_weights(str(path.parent), weight_name=path.name, adapter_name="proof", use_safetensors=True)
    return [module for part in models for module in lora_of(parts[part], part, "proof")]


def _through_peft(folder: Path, models: dict) -> list[LoraModule]:
    from peft import PeftModel

    part = next(part for part in models if PEFT_FOLDERS[part] == folder.name)
    adapted = PeftModel.from_pretrained(hollow(models[part]), str(folder))
    return lora_of(adapted.base_model.model, part)
