"""inspect and replay: our files, other programs' files, and files that are no LoRA at all."""

import base64
import io
import json

import lora_models
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from lora_nb.config import build, read_config
from lora_nb.errors import UserError
from lora_nb.export import export_lora
from lora_nb.inspect_lora import inspect_lora
from lora_nb.lora_file import read_safetensors
from lora_nb.metadata import lora_metadata, thumbnail
from lora_nb.readers import programs, spelled_for
from lora_nb.replay import replay, write_replay

CONFIG = build({"run_name": "hero", "lora_rank": 4, "lora_alpha": 6, "seed": 7, "trigger_token": "hero_man", "learning_rate": 3e-4})


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    final = tmp_path_factory.mktemp("run") / "final"
    unet = lora_models.adapt(lora_models.unet(), lora_models.FEED_FORWARD)
    metadata = lora_metadata(
        "hero", CONFIG.model_dump(), steps=50, captions=["hero_man, red robe", "hero_man, desert"],
        buckets=[(128, 128), (112, 144)], manifest_sha256="ab" * 32,
    )  # fmt: skip
    export_lora(final, unet, run_name="hero", metadata=metadata)
    return final


def test_inspect_says_who_can_load_it(exported):
    inspection = inspect_lora(exported / "hero.safetensors")
    rows, text = dict(inspection.rows), str(inspection)
    assert rows["read by"] == "kohya all, ComfyUI all, A1111/Forge all, diffusers all, PEFT none"
    assert rows["trigger"] == "hero_man" and rows["rank"] == "4" and "6, so strength 1 applies it times 1.5" in text
    assert "!" not in text
    diffusers = str(inspect_lora(exported / "pytorch_lora_weights.safetensors"))
    assert "diffusers all" in diffusers and "ComfyUI 28 of" not in diffusers.splitlines()[0] and "use the kohya file" in diffusers
    assert "PEFT all" in str(inspect_lora(exported / "unet_lora"))


def test_what_programs_read_in_the_header(exported):
    _, metadata = read_safetensors(exported / "hero.safetensors")
    assert metadata["ss_base_model_version"].startswith("sdxl_") and metadata["ss_network_module"] == "networks.lora"
    assert metadata["modelspec.sai_model_spec"] == "1.0.1" and metadata["modelspec.trigger_phrase"] == "hero_man"
    assert metadata["modelspec.architecture"] == "stable-diffusion-xl-v1-base/lora"
    assert json.loads(metadata["ss_tag_frequency"]) == {"aldar_kose": {"hero_man": 2, "red robe": 1, "desert": 1}}
    assert json.loads(metadata["ss_bucket_info"])["buckets"]["1"] == {"resolution": [128, 128], "count": 1}
    assert metadata["sshs_model_hash"] == metadata["modelspec.hash_sha256"].removeprefix("0x")
    assert all(isinstance(value, str) for value in metadata.values())


def test_a_thumbnail_is_a_small_jpeg(tmp_path):
    Image.new("RGBA", (900, 600), "red").save(tmp_path / "big.png")
    header = lora_metadata("hero", thumbnail=thumbnail(tmp_path / "big.png"))
    kind, content = header["modelspec.thumbnail"].split(",", 1)
    picture = Image.open(io.BytesIO(base64.b64decode(content)))
    assert kind == "data:image/jpeg;base64" and picture.size == (256, 171)


def test_the_header_holds_nothing_private(tmp_path):
    settings = {
        "dataset_path": "/home/someone/pictures/hero", "base_model": "C:\\Users\\someone\\models\\base.safetensors",
        "vae_model": "~/someone/vae", "hub_token": "hf_secret", "api_key": "sk-secret", "output_dir": "/srv/someone",
        "trigger_token": "hero_man", "extra": {"nested": ["/home/someone/x"]},
    }  # fmt: skip
    text = json.dumps(lora_metadata("hero", settings, captions=["a"]))
    assert "someone" not in text and "secret" not in text
    assert "hero_man" in text and "base.safetensors" in text


def test_replay_gives_the_settings_back(exported):
    config, notes = replay(exported / "hero.safetensors")
    # "outputs" is this machine's business; everything else comes back
    assert config == CONFIG
    assert any("ab" * 32 in note for note in notes)


def test_replay_as_a_file(exported, tmp_path):
    target = tmp_path / "training_config.yaml"
    assert "step 50 of 2000" in write_replay(exported / "hero.safetensors", target)
    assert read_config(target).model_dump() == CONFIG.model_dump()
    with pytest.raises(UserError, match="exists"):
        write_replay(exported / "hero.safetensors", target)
    save_file({"x": torch.ones(1)}, tmp_path / "x.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match="holds no settings"):
        write_replay(tmp_path / "x.safetensors", tmp_path / "y.yaml")


def test_replay_names_what_has_changed_since(tmp_path):
    metadata = lora_metadata("hero", CONFIG.model_dump() | {"setting_of_tomorrow": 3, "base_model": "/home/someone/base"})
    metadata["lora_nb.versions"] = json.dumps({"torch": "9.9"})
    save_file({"x": torch.ones(1)}, tmp_path / "x.safetensors", metadata)
    config, notes = replay(tmp_path / "x.safetensors")
    assert config == CONFIG.model_copy(update={"base_model": "base"})
    for word in ("setting_of_tomorrow", "torch was 9.9", "base_model was a place of another machine"):
        assert any(word in note for note in notes), word


def _kohya_file(path, metadata=None, alpha=1.0, width=2048, dtype=torch.float16):
    tensors = {}
    for block in ("input_blocks_4_1", "output_blocks_0_1"):
        name = f"lora_unet_{block}_transformer_blocks_0_attn2_to_k"
        tensors |= {f"{name}.lora_down.weight": torch.ones(8, width, dtype=dtype), f"{name}.lora_up.weight": torch.ones(640, 8, dtype=dtype)}
        if alpha:
            tensors[f"{name}.alpha"] = torch.tensor(alpha, dtype=dtype)
    save_file(tensors, path, metadata)
    return path


def test_other_programs_files(tmp_path):
    told = {
        "ss_base_model_version": "sdxl_base_v1-0", "ss_network_dim": "8", "ss_network_alpha": "1.0", "ss_seed": "5",
        "ss_learning_rate": "0.0004", "ss_max_train_steps": "1500", "ss_resolution": "(768, 768)", "ss_optimizer": "bitsandbytes.AdamW8bit",
        "ss_lr_scheduler": "cosine", "ss_tag_frequency": json.dumps({"10_elf": {"elf girl": 20, "solo": 3}}), "ss_min_snr_gamma": "None",
    }  # fmt: skip
    path = _kohya_file(tmp_path / "kohya.safetensors", told)
    text = str(inspect_lora(path))
    assert "SDXL" in text and "elf girl (20)" in text and "times 0.125" in text and "!" not in text
    config, notes = replay(path)
    assert (config.lora_rank, config.lora_alpha, config.seed, config.max_steps, config.resolution) == (8, 1, 5, 1500, 768)
    assert config.lr_scheduler == "cosine" and any("AdamW8bit" in note for note in notes)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"metadata": {"ss_v2": "False"}}, "A1111 hides"),
        ({"width": 768}, "Stable Diffusion 1"),
        ({"alpha": None}, "every program takes the rank"),
        ({"metadata": {"sshs_model_hash": "0" * 64}}, "not what its hash"),
    ],
)
def test_what_is_wrong_with_a_file(tmp_path, options, sentence):
    assert sentence in str(inspect_lora(_kohya_file(tmp_path / "x.safetensors", **options)))


@pytest.mark.parametrize(
    ("keys", "sentence"),
    [
        (["model.diffusion_model.out.0.weight"], "full Stable Diffusion checkpoint"),
        (["clip_g", "clip_l"], "textual inversion"),
        (["lora_unet_x.lora_down.weight"], "only one half"),
        (["lora_unet_x.hada_w1_a", "lora_unet_x.hada_w1_b"], "LoHa"),
        (["lora_unet_x.lora_down.weight", "lora_unet_x.lora_up.weight", "lora_unet_x.dora_scale"], "DoRA"),
        (["weights"], "not a LoRA"),
    ],
)
def test_files_that_are_no_plain_lora_are_named(tmp_path, keys, sentence):
    save_file({key: torch.ones(2, 2) for key in keys}, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match=sentence):
        inspect_lora(tmp_path / "x.safetensors")


def test_damaged_and_missing_files_are_named(exported, tmp_path):
    whole = (exported / "hero.safetensors").read_bytes()
    for name, content in {"cut": whole[: len(whole) // 2], "empty": b"", "text": b"<html>not found</html>"}.items():
        (tmp_path / f"{name}.safetensors").write_bytes(content)
        with pytest.raises(UserError, match=f"{name}.safetensors is not a whole"):
            inspect_lora(tmp_path / f"{name}.safetensors")
    with pytest.raises(UserError, match="does not exist"):
        inspect_lora(tmp_path / "missing.safetensors")
    (tmp_path / "old.ckpt").write_bytes(b"\x80\x02")
    with pytest.raises(UserError, match="pickled"):
        inspect_lora(tmp_path / "old.ckpt")
    flipped = bytearray(whole)
    flipped[-1] ^= 1
    (tmp_path / "flipped.safetensors").write_bytes(flipped)
    assert "not what its hash" in str(inspect_lora(tmp_path / "flipped.safetensors"))


@pytest.mark.parametrize("shape", [lora_models.SMALL, lora_models.FULL_SDXL], ids=["small", "full"])
def test_spelling_rules_know_every_name_that_a_program_reads(shape):
    with torch.device("meta"):
        config = lora_models.unet(**shape).config
    outside = ("time_embed", "label_emb", "conv_in", "conv_out", "out_2", "add_embedding")
    for program, names in programs(config, (2, 3)).items():
        inside = [name for name in names if not any(mark in name for mark in outside) and "input_blocks_0" not in name]
        unknown = [name for name in inside if program not in spelled_for(name)]
        assert len(inside) > 100 and not unknown, (program, unknown[:3])
