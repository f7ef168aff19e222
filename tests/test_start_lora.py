"""Other people's LoRAs as the start of a training: every dialect, any alpha, and what does not fit."""

import lora_models
import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from diffusers.utils import convert_state_dict_to_kohya
from peft import get_peft_model_state_dict
from safetensors.torch import save_file

from lora_nb.dialects import read_lora
from lora_nb.errors import UserError
from lora_nb.export import export_lora
from lora_nb.lora_file import lora_of, relative_difference
from lora_nb.models import empty_part
from lora_nb.start_lora import start_from_lora
from lora_nb.train import train


@pytest.fixture(scope="module")
def source():
    """A UNet and text encoders that were trained elsewhere, alpha unlike rank."""
    return lora_models.adapt(lora_models.unet(), lora_models.ATTENTION, rank=4, alpha=6), [
        lora_models.adapt(model, lora_models.TEXT, rank=4, alpha=6) for model in lora_models.text_encoders()
    ]


def _ours(folder, unet, text):
    return export_lora(folder / "final", unet, text, run_name="hero", dtype="fp32").folder / "hero.safetensors"


def _peft(folder, unet, text):
    return export_lora(folder / "final", unet, run_name="hero", formats=("peft",)).folder / "unet_lora"


def _diffusers(folder, unet, text):
    """As diffusers itself saves it, with its metadata."""
    states = [get_peft_model_state_dict(model) for model in (unet, *text)]
    names = ("unet", "text_encoder", "text_encoder_2")
    layers = {f"{name}_lora_layers": state for name, state in zip(names, states, strict=True)}
    metadata = {f"{name}_lora_adapter_metadata": m.peft_config["default"].to_dict() for name, m in zip(names, (unet, *text), strict=True)}
    for settings in metadata.values():
        settings["target_modules"] = sorted(settings["target_modules"])
    StableDiffusionXLPipeline.save_lora_weights(folder, **layers, **metadata)
    return folder / "pytorch_lora_weights.safetensors"


def _other_block_names(folder, unet, text):
    """kohya's endings with diffusers' block names, as diffusers' converter writes them, but with the real alpha."""
    state = {f"unet.{name}": value for name, value in get_peft_model_state_dict(unet).items()}
    tensors = {name: torch.tensor(6.0) if name.endswith(".alpha") else value for name, value in convert_state_dict_to_kohya(state).items()}
    save_file({name: value.contiguous() for name, value in tensors.items()}, folder / "x.safetensors")
    return folder / "x.safetensors"


def _old_diffusers(folder, unet, text):
    """Attention processors, as in files of 2023; these have no alpha, so the scale is in `up`."""
    tensors = {}
    for module in lora_of(unet, "unet"):
        stem = "unet." + module.path.replace(".to_", ".processor.to_").removesuffix(".0")
        tensors |= {f"{stem}_lora.down.weight": module.down, f"{stem}_lora.up.weight": module.up * module.scale}
    save_file(tensors, folder / "x.safetensors")
    return folder / "x.safetensors"


@pytest.mark.parametrize(
    ("write", "rank"), [(_ours, 7), (_ours, 4), (_peft, 7), (_diffusers, 7), (_other_block_names, 4), (_old_diffusers, 4)]
)
def test_every_dialect_starts_at_its_strength(source, tmp_path, write, rank):
    unet, text = source
    path = write(tmp_path, unet, text)
    fresh = lora_models.adapt(lora_models.unet(), lora_models.FEED_FORWARD, rank=rank, alpha=1, seed=5)
    before = {m.path: m for m in lora_of(fresh, "unet")}
    notes = []
    filled = start_from_lora(path, {"unet": fresh}, dict(zip(("text_encoder", "text_encoder_2"), text, strict=True)), on_event=notes.append)
    wanted = {m.path: m for m in lora_of(unet, "unet")}
    got = {m.path: m for m in lora_of(fresh, "unet")}
    assert filled == len(wanted) == 8 * 11
    assert max(relative_difference(module, got[path]) for path, module in wanted.items()) < 1e-6
    assert all(torch.equal(before[path].up, got[path].up) for path in got.keys() - wanted.keys())
    assert any("rescaled" in note.message for note in notes)
    assert any("text_encoder" in note.message for note in notes) == (write in (_ours, _diffusers))


def test_what_does_not_fit_is_named(source, tmp_path):
    unet, text = source
    path = _ours(tmp_path, unet, (None, None))
    with pytest.raises(UserError, match="set lora_rank: 4"):
        start_from_lora(path, {"unet": lora_models.adapt(lora_models.unet(), lora_models.ATTENTION, rank=2)})
    with pytest.raises(UserError, match="lora_target_modules leaves out"):
        start_from_lora(path, {"unet": lora_models.adapt(lora_models.unet(), ["to_q"])})
    wider = lora_models.unet(**(lora_models.SMALL | {"block_out_channels": (8, 16, 32)}))
    with pytest.raises(UserError, match="made for another model"):
        start_from_lora(path, {"unet": lora_models.adapt(wider, lora_models.ATTENTION)})


def test_training_goes_on_from_a_file(make_run):
    first = make_run(run_name="first", max_steps=2, export_dtype="fp32")
    train(first)
    file = first.run_dir / "final" / "first.safetensors"
    second = make_run(run_name="second", start_from_lora=str(file), lora_rank=6, lora_alpha=3, max_steps=1, learning_rate=1e-9, export_dtype="fp32")
    run = train(second)
    unet = empty_part(first.base_model, "unet")
    before, after = ({m.path: m for m in read_lora(path, unet)} for path in (file, run.run_dir / "final" / "second.safetensors"))
    assert run.export.ok and before.keys() == after.keys() and len(before) > 0
    changed = max(relative_difference(module, after[path]) for path, module in before.items())
    assert 0 < changed < 1e-4  # a step of 1e-9 from where the first run ended
