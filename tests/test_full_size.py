"""Full-size SDXL with random weights, trained through the product's own verbs on the CPU: what size alone brings out.

`pytest -m slow -s tests/test_full_size.py`: a quarter of an hour on two cores, 12 GB of memory, 9 GB of disk.
"""

import resource
import shutil

import pytest
import torch
import yaml
from planted_world import ROOT

from lora_nb import models
from lora_nb.__main__ import main
from lora_nb.inspect_lora import inspect_lora
from lora_nb.runlog import read_metrics

pytestmark = pytest.mark.slow
PICTURES = 2


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory):
    """A diffusers folder of SDXL's size in fp16; norms are ones, so that what comes out stays finite."""
    folder = tmp_path_factory.mktemp("full") / "sdxl"
    shutil.copytree(models.SDXL, folder)
    tokenizer_2 = shutil.copytree(folder / "tokenizer", folder / "tokenizer_2")
    settings = tokenizer_2 / "tokenizer_config.json"
    settings.write_text(settings.read_text().replace('"pad_token": "<|endoftext|>"', '"pad_token": "!"'))
    torch.manual_seed(0)
    for part in ("vae", "text_encoder", "text_encoder_2", "unet"):
        model = models.empty_part(str(models.SDXL), part).to(torch.float16).to_empty(device="cpu")
        for name, value in [*model.named_parameters(), *model.named_buffers()]:
            if not value.is_floating_point():
                value.data.copy_(torch.arange(value.numel()).view_as(value))  # position_ids
            elif value.dim() > 1:
                value.data.normal_(0, 0.7 * value[0].numel() ** -0.5)
            else:
                value.data.fill_(float(name.endswith("weight")))
        model.save_pretrained(folder / part, max_shard_size="10GB")
    yield folder
    shutil.rmtree(folder)


@pytest.mark.parametrize(
    ("settings", "modules"),
    [
        ({"precision": "bf16"}, 722),
        ({"precision": "nf4", "train_text_encoder": True, "validate_every": 2, "validation_steps": 2, "num_validation_images": 1}, 722 + 72 + 192),
    ],
    ids=["bf16", "nf4 and encoders"],
)
def test_a_run_at_full_size_stops_goes_on_and_is_proved(sdxl, tmp_path, monkeypatch, capsys, settings, modules):
    monkeypatch.chdir(tmp_path)
    for path in sorted((ROOT / "data" / "aldar_kose" / "images").iterdir())[:PICTURES]:
        shutil.copy(path, tmp_path)
        shutil.copy(path.parent.parent / "captions" / f"{path.stem}.txt", tmp_path)
    file = tmp_path / "mine.yaml"
    file.write_text(yaml.safe_dump({
        "base_model": str(sdxl), "resolution": 512, "mixed_precision": "bf16", "lora_target_modules": "attention+feed_forward",
        "lr_scheduler": "constant", "save_every": 1, "log_every": 1, "validate_every": None,
    } | settings))  # fmt: skip

    def verb(name, run, steps):
        assert main([name, "--preset", "gpu-8gb", "--config", str(file), "--dataset", str(tmp_path), "--run-name", run, "--max-steps", str(steps)]) == 0

    for run in ("whole", "parts"):
        assert main(["validate", str(tmp_path), "--resolution", "512", "--output", str(tmp_path / "outputs" / run)]) == 0
        verb("encode", run, 2)
    for run, steps in (("whole", 2), ("parts", 1), ("parts", 2)):
        verb("train", run, steps)
    whole, parts = (tmp_path / "outputs" / run for run in ("whole", "parts"))
    for name in ("pytorch_lora_weights.safetensors", "optimizer.safetensors"):
        assert (whole / "checkpoints/checkpoint-2" / name).read_bytes() == (parts / "checkpoints/checkpoint-2" / name).read_bytes()
    assert read_metrics(whole) == read_metrics(parts) and len(read_metrics(whole)) == 2
    assert f"{modules} of {modules}" in capsys.readouterr().out
    print(inspect_lora(whole / "final" / "whole.safetensors"))
    print(f"peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.1f} GiB")
