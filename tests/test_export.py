"""Every file of an export is loaded by the libraries themselves and compared with what was trained."""

import json

import lora_models
import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from PIL import Image

from lora_nb import export
from lora_nb.checks import read_result
from lora_nb.dialects import read_lora
from lora_nb.errors import UserError
from lora_nb.export import export_lora
from lora_nb.lora_file import LoraModule, lora_of, read_safetensors, relative_difference, safetensors_bytes
from lora_nb.lora_names import classic_path, kohya_name, sgm_blocks
from lora_nb.memory import quantize_nf4
from lora_nb.proof import PictureRoad, library_roads, picture_difference
from lora_nb.readers import programs, sgm_to_diffusers

CASES = {
    "attention": {"targets": lora_models.ATTENTION},
    "feed-forward": {"targets": lora_models.FEED_FORWARD},
    "rank-stabilised": {"targets": lora_models.FEED_FORWARD, "use_rslora": True},
    "mixed ranks": {"targets": lora_models.FEED_FORWARD, "rank_pattern": {"ff.net.2": 7, "to_k": 2}},
    "mixed alphas": {"targets": lora_models.ATTENTION, "alpha_pattern": {"to_q": 3.0}},
    "mixed ranks, rank-stabilised": {"targets": lora_models.ATTENTION, "rank_pattern": {"to_q": 9}, "use_rslora": True},
    "convolutions": {"targets": [*lora_models.FEED_FORWARD, "conv1", "conv2", "time_emb_proj", "conv_shortcut", "conv"]},
}


@pytest.fixture
def adapted():
    return lora_models.adapt(lora_models.unet(), lora_models.FEED_FORWARD)


WITH_TEXT = ["feed-forward", "rank-stabilised", "mixed ranks"]


@pytest.mark.parametrize(("case", "with_text"), [*((case, False) for case in CASES), *((case, True) for case in WITH_TEXT)])
def test_every_file_loads_everywhere_as_trained(case, with_text, tmp_path):
    unet = lora_models.adapt(lora_models.unet(), **CASES[case])
    text = lora_models.text_encoders() if with_text else (None, None)
    for model in filter(None, text):
        lora_models.adapt(model, lora_models.TEXT, rank=3, alpha=5)
    result = export_lora(tmp_path / "final", unet, text, run_name="hero", dtype="fp32", roads=library_roads(unet, text))
    assert result.ok, str(result)
    assert [path.name for path in result.files] == [
        "unet_lora", *(["text_encoder_lora", "text_encoder_2_lora"] if with_text else []),
        "pytorch_lora_weights.safetensors", "hero.safetensors",
    ]  # fmt: skip
    seen = {(check.file, check.program): check for check in result.checks}
    assert {program for file, program in seen if file == "hero.safetensors"} == {"kohya", "ComfyUI", "A1111/Forge", "lora_nb", "diffusers"}
    modules = len(lora_of(unet, "unet")) + (6 * (2 + 3) if with_text else 0)
    assert seen["hero.safetensors", "diffusers"].total == seen["pytorch_lora_weights.safetensors", "diffusers"].found == modules > 0
    assert all(path.exists() for path in result.files) and not list(tmp_path.glob(".*"))


def test_whole_pipeline_draws_the_same_after_reload(adapted, tmp_path):
    """Not the weights but the UNet's answer, through the pipeline that users load files with."""
    export_lora(tmp_path / "final", adapted, run_name="hero", dtype="fp32", formats=("kohya",))
    fresh = lora_models.unet()
    fresh.load_state_dict({k.replace(".base_layer", ""): v for k, v in adapted.state_dict().items() if ".lora_" not in k})
    inputs = {
        "sample": torch.randn(1, 4, 8, 8), "timestep": 7, "encoder_hidden_states": torch.randn(1, 5, 24),
        "added_cond_kwargs": {"text_embeds": torch.randn(1, 16), "time_ids": torch.randn(1, 6)},
    }  # fmt: skip
    with torch.no_grad():
        base, trained = fresh(**inputs).sample, adapted(**inputs).sample
        pipeline = StableDiffusionXLPipeline(
            vae=None, text_encoder=None, text_encoder_2=None, tokenizer=None, tokenizer_2=None, unet=fresh, scheduler=None
        )
        pipeline.load_lora_weights(tmp_path / "final", weight_name="hero.safetensors", use_safetensors=True)
        loaded = fresh(**inputs).sample
    assert (trained - base).abs().max() > 1e-3
    torch.testing.assert_close(loaded, trained, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("dtype", "stored"), [("fp16", torch.float16), ("bf16", torch.bfloat16), ("fp32", torch.float32)])
def test_dtypes(adapted, tmp_path, dtype, stored):
    result = export_lora(tmp_path / "final", adapted, run_name="hero", dtype=dtype, roads=library_roads(adapted))
    assert result.ok, str(result)
    for file in ("hero.safetensors", "pytorch_lora_weights.safetensors"):
        tensors, _ = read_safetensors(tmp_path / "final" / file)
        assert {t.dtype for key, t in tensors.items() if not key.endswith(".alpha")} == {stored}


def test_a_base_in_four_bits(tmp_path):
    """The base's weights are packed then; shapes are still known, and the adapter is as any other."""
    pytest.importorskip("bitsandbytes")
    unet = lora_models.unet(**(lora_models.SMALL | {"block_out_channels": (64, 64, 64), "attention_head_dim": 16, "norm_num_groups": 8}))
    assert quantize_nf4(unet) > 80
    lora_models.adapt(unet.to("cpu"), lora_models.FEED_FORWARD)
    result = export_lora(tmp_path / "final", unet, run_name="hero", roads=library_roads(unet))
    assert result.ok, str(result)


@pytest.mark.parametrize("size", [1e-2, 1e-5, 1e-7, 1e-9])
def test_what_few_steps_have_learned_survives_fp16(adapted, tmp_path, size):
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.data *= size
    result = export_lora(tmp_path / "final", adapted, run_name="hero", dtype="fp16", roads=library_roads(adapted), formats=("kohya",))
    assert result.ok, str(result)


def test_what_fp16_cannot_hold_is_not_kept(adapted, tmp_path):
    next(parameter for name, parameter in adapted.named_parameters() if "lora_B" in name).data *= 1e7
    result = export_lora(tmp_path / "final", adapted, run_name="hero", formats=("kohya",), roads=library_roads(adapted))
    assert result.rejected == ("hero.safetensors",) and [check.ok for check in result.checks].count(False) == 2
    assert export_lora(tmp_path / "final", adapted, run_name="hero", formats=("kohya",), dtype="fp32").ok


def test_a_module_that_does_next_to_nothing_fails_no_file(adapted, tmp_path):
    weight = next(parameter for name, parameter in adapted.named_parameters() if "lora_B" in name)
    weight.data *= 1e-12
    assert export_lora(tmp_path / "final", adapted, run_name="hero", dtype="fp16", formats=("kohya",)).ok
    weight.data *= 0
    assert export_lora(tmp_path / "final", adapted, run_name="hero", dtype="fp16", formats=("kohya",)).ok


def test_counts_on_the_full_sdxl_config():
    with torch.device("meta"):
        unet = lora_models.unet(**lora_models.FULL_SDXL)
        one, two = lora_models.text_encoders((12, 32), (768, 1280), heads=4)
    blocks = sgm_blocks(unet)
    linear = [name for name, module in unet.named_modules() if ".attentions." in name and isinstance(module, torch.nn.Linear)]
    names = {kohya_name("unet", name, blocks) for name in linear}
    assert len(names) == 722
    assert sum(".attn" in name for name in linear) == 560
    for n, model, count in (("text_encoder", one, 72), ("text_encoder_2", two, 192)):
        own = {kohya_name(n, classic_path(n, name), {}) for name, _ in model.named_modules() if name.endswith(tuple(lora_models.TEXT))}
        assert len(own) == count
        names |= own
    for program, readable in programs(unet.config, (12, 32)).items():
        assert names <= readable, program
    # spelled as in any SDXL LoRA
    assert {
        "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q", "lora_unet_middle_block_1_proj_in",
        "lora_unet_input_blocks_8_1_transformer_blocks_9_ff_net_0_proj",
        "lora_unet_output_blocks_5_1_transformer_blocks_1_attn2_to_out_0",
        "lora_te1_text_model_encoder_layers_11_mlp_fc1", "lora_te2_text_model_encoder_layers_31_self_attn_out_proj",
    } <= names  # fmt: skip


@pytest.mark.parametrize("shape", [lora_models.SMALL, lora_models.FULL_SDXL], ids=["small", "full"])
def test_names_from_the_module_tree_agree_with_names_counted_from_the_config(shape):
    with torch.device("meta"):
        unet = lora_models.unet(**shape)
    blocks, counted = sgm_blocks(unet), sgm_to_diffusers(unet.config)
    layers = [name for name, module in unet.named_modules() if isinstance(module, (torch.nn.Linear, torch.nn.Conv2d))]
    by_path = {path: sgm for sgm, path in counted.items()}
    assert len(layers) > 90
    for name in layers:
        assert kohya_name("unet", name, blocks) == "lora_unet_" + by_path[name].replace(".", "_")


def test_alpha_in_the_file_is_the_trained_one(tmp_path):
    unet = lora_models.adapt(lora_models.unet(), lora_models.ATTENTION, rank=4, alpha=6)
    export_lora(tmp_path / "final", unet, run_name="hero")
    tensors, metadata = read_safetensors(tmp_path / "final" / "hero.safetensors")
    alphas = [tensor for key, tensor in tensors.items() if key.endswith(".alpha")]
    assert {alpha.item() for alpha in alphas} == {6.0} and {alpha.dim() for alpha in alphas} == {0}
    assert (metadata["ss_network_dim"], metadata["ss_network_alpha"]) == ("4", "6")


def _lose_alpha(modules, blocks, dtype):
    tensors = dict(_kohya(modules, blocks, dtype))
    return {key: torch.tensor(4.0) if key.endswith(".alpha") else t for key, t in tensors.items()}


def _diffusers_blocks(modules, blocks, dtype):
    return _kohya([LoraModule("text_encoder", m.path, m.down, m.up, m.alpha) for m in modules], blocks, dtype)


def _one_module_short(modules, blocks, dtype):
    return _kohya(modules[1:], blocks, dtype)


_kohya = export.kohya_tensors


@pytest.mark.parametrize("damage", [_lose_alpha, _diffusers_blocks, _one_module_short])
def test_a_file_that_fails_is_not_left(adapted, tmp_path, monkeypatch, damage):
    monkeypatch.setattr(export, "kohya_tensors", damage)
    notes = []
    result = export_lora(tmp_path / "final", adapted, run_name="hero", on_event=notes.append)
    assert not result.ok and result.rejected == ("hero.safetensors",)
    assert not (tmp_path / "final" / "hero.safetensors").exists()
    assert (tmp_path / "final" / "pytorch_lora_weights.safetensors").exists()
    assert "FAILED" in str(result) and "FAILED" in result._repr_html_()
    assert any("hero.safetensors" in getattr(note, "message", "") for note in notes)


def test_a_second_export_replaces_the_first_and_keeps_what_is_not_ours(adapted, tmp_path):
    final = tmp_path / "final"
    export_lora(final, adapted, run_name="old")
    (final / "README.md").write_text("card")
    export_lora(final, adapted, run_name="new", formats=("kohya",))
    assert sorted(path.name for path in final.iterdir()) == ["README.md", "new.safetensors", "proof.json"]


def test_an_export_that_dies_leaves_what_was_there(adapted, tmp_path, monkeypatch):
    final = tmp_path / "final"
    export_lora(final, adapted, run_name="hero")
    before = {path: path.read_bytes() for path in final.rglob("*") if path.is_file()}

    def full_disk(*args):
        raise OSError("No space left on device")

    monkeypatch.setattr(export, "write_safetensors", full_disk)
    with pytest.raises(OSError):
        export_lora(final, adapted, run_name="hero")
    assert before == {path: path.read_bytes() for path in final.rglob("*") if path.is_file()}
    assert [path.name for path in tmp_path.iterdir()] == ["final"]


def test_the_same_adapter_makes_the_same_bytes(adapted, tmp_path):
    metadata = {f"ss_key_{n}": str(n) for n in range(20)}
    for name in ("a", "b"):
        export_lora(tmp_path / name, adapted, run_name="hero", metadata=metadata)
    files = [path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*") if path.is_file()]
    assert len(files) == 5
    for file in files:
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_what_cannot_be_exported_is_refused(tmp_path):
    with pytest.raises(UserError, match="no LoRA adapter"):
        export_lora(tmp_path / "final", lora_models.unet(), run_name="hero")
    with pytest.raises(UserError, match="DoRA"):
        export_lora(tmp_path / "final", lora_models.adapt(lora_models.unet(), ["to_q"], use_dora=True), run_name="hero")
    broken = lora_models.adapt(lora_models.unet(), ["to_q"])
    next(p for n, p in broken.named_parameters() if "lora_B" in n).data[0, 0] = float("nan")
    with pytest.raises(UserError, match="NaN"):
        export_lora(tmp_path / "final", broken, run_name="hero")
    with pytest.raises(UserError, match="fp8"):
        export_lora(tmp_path / "final", broken, run_name="hero", dtype="fp8")
    assert not (tmp_path / "final").exists()


def test_relative_difference_is_that_of_the_whole_matrices():
    def module(seed, rank=3, alpha=5.0):
        g = torch.Generator().manual_seed(seed)
        return LoraModule("unet", "x", torch.randn(rank, 11, generator=g), torch.randn(7, rank, generator=g), alpha)

    a, b = module(0), module(1, rank=4)
    expected = (a.delta() - b.delta()).norm() / a.delta().norm()
    assert relative_difference(a, b) == pytest.approx(expected.item(), rel=1e-6)
    assert relative_difference(a, a) < 1e-7


def test_a_peft_folder_names_no_path(adapted, tmp_path):
    adapted.peft_config["default"].base_model_name_or_path = "/home/someone/secret/model"
    export_lora(tmp_path / "final", adapted, run_name="hero", formats=("peft",))
    text = (tmp_path / "final" / "unet_lora" / "adapter_config.json").read_text()
    assert "someone" not in text and json.loads(text)["lora_alpha"] == 6
    assert len(read_lora(tmp_path / "final" / "unet_lora", adapted)) == len(lora_of(adapted, "unet")) > 0


def test_safetensors_bytes_reads_back(tmp_path):
    tensors = {"b": torch.arange(5, dtype=torch.bfloat16), "a": torch.ones(2, 3), "scalar": torch.tensor(2.5)}
    (tmp_path / "x.safetensors").write_bytes(safetensors_bytes(tensors, {"ключ": "значение", "a": "1"}))
    back, metadata = read_safetensors(tmp_path / "x.safetensors")
    assert metadata == {"ключ": "значение", "a": "1"}
    assert back.keys() == tensors.keys() and all(torch.equal(back[key], tensors[key]) for key in tensors)


class TestPicture:
    """The proof that looks: a fixed picture from the live adapter, and from the file."""

    @pytest.fixture
    def pipeline(self, adapted):
        return StableDiffusionXLPipeline(
            vae=None, text_encoder=None, text_encoder_2=None, tokenizer=None, tokenizer_2=None, unet=adapted, scheduler=None
        )

    @staticmethod
    def draw(pipeline):
        generator = torch.Generator().manual_seed(3)
        size = {"encoder_hidden_states": (1, 5, 24), "sample": (1, 4, 8, 8)}
        inputs = {name: torch.randn(shape, generator=generator) for name, shape in size.items()}
        extra = {name: torch.randn(1, n, generator=generator) for name, n in {"text_embeds": 16, "time_ids": 6}.items()}
        with torch.no_grad():
            answer = pipeline.unet(**inputs, timestep=5, added_cond_kwargs=extra).sample[0, :3]
        return Image.fromarray(((answer * 400 + 128).clamp(0, 255)).byte().permute(1, 2, 0).numpy())

    def test_same_picture_and_the_model_is_left_as_it_was(self, pipeline, adapted, tmp_path):
        trainable = [name for name, p in adapted.named_parameters() if p.requires_grad]
        road = PictureRoad(pipeline, self.draw)
        result = export_lora(tmp_path / "final", adapted, run_name="hero", roads=(road,))
        assert result.ok, str(result)
        assert picture_difference(road.live, road.without) > 0.003
        assert [check.program for check in result.checks].count("a picture") == 2
        assert pipeline.get_list_adapters() == {"unet": ["default"]} and adapted.active_adapters() == ["default"]
        assert trainable == [name for name, p in adapted.named_parameters() if p.requires_grad]
        assert read_result(tmp_path / "final") == result

    def test_another_picture_fails(self, pipeline, adapted, tmp_path, monkeypatch):
        monkeypatch.setattr(export, "kohya_tensors", _lose_alpha)
        result = export_lora(tmp_path / "final", adapted, run_name="hero", roads=(PictureRoad(pipeline, self.draw),))
        assert not next(check for check in result.checks if check.file == "hero.safetensors" and check.program == "a picture").ok
