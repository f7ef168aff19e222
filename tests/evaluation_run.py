"""A trained run without the training: tiny SDXL, drawn pictures, LoRAs of growing size, a CLIP that knows nothing."""

import json
import sys
from pathlib import Path

import torch
from PIL import Image

from lora_nb import models
from lora_nb.checkpoint import save_checkpoint
from lora_nb.config import load_config
from lora_nb.export import diffusers_tensors
from lora_nb.files import project_root, sha256_file
from lora_nb.lora_file import lora_of
from lora_nb.manifest import Manifest, ManifestFile, write_manifest

sys.path.insert(0, str(project_root() / "tools"))
TRIGGER, SIDE = "zed_man", 64


def make_run(folder, steps=(10, 20), train=4, held_out=3) -> Path:
    """`folder`/outputs/zed with config, manifest and a checkpoint a step; the pictures are plain colours."""
    data, run = Path(folder) / "data", Path(folder) / "outputs" / "zed"
    data.mkdir()
    config = load_config(
        "cpu-demo", run_name="zed", dataset_path=str(data), output_dir=str(run.parent), trigger_token=TRIGGER, resolution=SIDE,
        validation_steps=2, validation_prompts=[], lora_rank=2, lora_alpha=2, lora_target_modules="attention",
    )  # fmt: skip
    config.save(run / "config.yaml")
    samples = [_sample(data, n, "train" if n < train else "held_out") for n in range(train + held_out)]
    metadata = {"dataset_root": "../../data", "trigger_token": TRIGGER, "resolution": SIDE, "total_samples": len(samples)}
    content = ManifestFile.model_validate_json(json.dumps({"schema_version": 1, "metadata": metadata, "samples": samples}))
    write_manifest(Manifest(content, run), run / "dataset_manifest.json")
    for step in steps:
        save_checkpoint(run / "checkpoints", step, random_lora(step), {"state": torch.zeros(1)}, {"step": step})
    return run


def random_lora(step: int):
    """Tensors and metadata of a LoRA whose change grows with the step."""
    unet = models.load_part("data/tiny_sdxl", "unet")
    models.add_lora(unet, 2, 2, "attention", seed=step)
    with torch.no_grad():
        for name, parameter in unet.named_parameters():
            if "lora_B" in name:
                generator = torch.Generator().manual_seed(step)
                parameter.copy_(step / 100 * torch.randn(parameter.shape, generator=generator))
    tensors, settings = diffusers_tensors(lora_of(unet, "unet"), torch.float32)
    return tensors, {"format": "pt", "lora_adapter_metadata": json.dumps(settings)}


def untrained_clip(folder) -> Path:
    """A CLIP in transformers' layout with the tiny SDXL's words."""
    from tiny_sdxl_parts import build_clip, build_image_processor

    tokenizer = models.load_part("data/tiny_sdxl", "tokenizer")
    torch.manual_seed(0)
    for part in (build_clip(tokenizer), tokenizer, build_image_processor()):
        part.save_pretrained(folder)
    return Path(folder)


def _sample(data, n, split) -> dict:
    path = data / f"{n}.png"
    Image.effect_noise((SIDE, SIDE), 40 + n).convert("RGB").save(path)
    words = ("in the snow", "by the sea", "in a forest", "at night under the moon")
    return {
        "image_path": path.name, "caption": f"{TRIGGER}, {words[n % 4]}, picture {n}", "width": SIDE, "height": SIDE, "format": "PNG",
        "sha256": sha256_file(path), "split": split, "bucket": [SIDE, SIDE],
        "crop": {"resized": [SIDE, SIDE], "left": 0, "top": 0}, "original_size": [SIDE, SIDE], "crop_top_left": [0, 0],
        "target_size": [SIDE, SIDE], "findings": ["blurry"] if n == 0 else [],
    }  # fmt: skip
