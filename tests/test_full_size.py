"""Full-size SDXL with random weights: one step on the CPU, then every file, proved. Minutes, and about 9 GB of memory."""

import json
import resource
import time

import pytest
import torch

from lora_nb import models
from lora_nb.export import export_lora
from lora_nb.inspect_lora import inspect_lora
from lora_nb.lora_file import lora_of
from lora_nb.metadata import lora_metadata
from lora_nb.proof import fill_with_zero, library_roads


def _empty(part):
    settings = json.loads((models.SDXL / part / "config.json").read_text())
    with torch.device("meta"):
        cls = models.PARTS[part]
        return cls.from_config(settings) if part == "unet" else cls(cls.config_class.from_dict(settings))


@pytest.mark.slow
def test_a_step_and_every_file_at_full_size(tmp_path):
    torch.manual_seed(0)
    unet = _empty("unet").to(torch.bfloat16).to_empty(device="cpu")
    for parameter in unet.parameters():
        scale = 1.0 if parameter.dim() == 1 else parameter[0].numel() ** -0.5
        parameter.data.normal_(0, 0.5 * scale)
    trainable = models.add_lora(unet, 16, 8, "attention+feed_forward", seed=0)
    unet.enable_gradient_checkpointing()
    text = [fill_with_zero(_empty(part)) for part in ("text_encoder", "text_encoder_2")]
    for n, model in enumerate(text):
        for parameter in models.add_lora(model, 8, 4, models.TEXT_TARGETS, seed=n):
            parameter.data.normal_(0, 0.02)  # not trained here

    optimizer = torch.optim.AdamW(trainable, lr=1e-3)
    started = time.monotonic()
    with torch.autocast("cpu", torch.bfloat16):
        answer = unet.train()(
            torch.randn(1, 4, 16, 16), torch.tensor([500]), torch.randn(1, 77, 2048),
            added_cond_kwargs={"text_embeds": torch.randn(1, 1280), "time_ids": torch.tensor([[1024.0, 1024, 0, 0, 1024, 1024]])},
        ).sample  # fmt: skip
        loss = (answer.float() - torch.randn(1, 4, 16, 16)).square().mean()
    loss.backward()
    assert all(parameter.grad is not None and torch.isfinite(parameter.grad).all() for parameter in trainable)
    optimizer.step()
    print(f"\none step {time.monotonic() - started:.0f} s, loss {loss.item():.3f}")

    started = time.monotonic()
    metadata = lora_metadata("full", {"base_model": "stabilityai/stable-diffusion-xl-base-1.0", "trigger_token": "hero"})
    result = export_lora(tmp_path / "final", unet, text, run_name="full", metadata=metadata, roads=library_roads(unet, text))
    print(f"export and proof {time.monotonic() - started:.0f} s\n{result}")
    print(inspect_lora(tmp_path / "final" / "full.safetensors"))
    print(f"peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.1f} GiB")
    assert result.ok
    assert [len(lora_of(model, part)) for part, model in zip(models.PARTS, (unet, None, *text), strict=False) if model] == [722, 72, 192]
