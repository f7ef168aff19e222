"""Loading, prompts, time ids, LoRA and pictures against diffusers itself."""

import json
import shutil

import numpy as np
import pytest
import sgm_checkpoint
import torch
from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file

from lora_nb import memory, models, weights
from lora_nb.errors import UserError
from lora_nb.weights import fingerprint

PROMPTS = ["hero in the mountains", "", "a very long story " * 30]


@pytest.fixture(scope="module")
def oracle(tiny_base):
    pipeline = StableDiffusionXLPipeline.from_pretrained(tiny_base)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def test_prompt_embeddings_are_the_pipelines(oracle, tiny_base):
    ours = models.encode_prompts(*models.load_text_encoders(str(tiny_base)), PROMPTS)
    theirs = oracle.encode_prompt(PROMPTS, do_classifier_free_guidance=False)
    assert torch.equal(ours[0], theirs[0]) and torch.equal(ours[1], theirs[2])
    assert ours[0].shape == (3, 77, 40) and ours[1].shape == (3, 24)


def test_truncation_is_told(oracle):
    assert models.truncated(oracle.tokenizer, PROMPTS[0]) == ""
    assert models.truncated(oracle.tokenizer, PROMPTS[2]).endswith("a very long story")


def test_time_ids_are_the_pipelines(oracle):
    theirs = oracle._get_add_time_ids((900, 600), (12, 0), (64, 48), torch.float32, text_encoder_projection_dim=24)
    assert models.time_ids((900, 600), (12, 0), (64, 48)) == theirs[0].tolist()


def test_pictures_are_the_pipelines_and_do_not_depend_on_neighbours(oracle, tiny_base):
    pipeline = models.load_pipeline(str(tiny_base))
    ours = models.generate(pipeline, ["a", "b"], [1, 2], 64, 64, steps=2)
    theirs = oracle("b", generator=torch.Generator().manual_seed(1), height=64, width=64, num_inference_steps=2).images[0]
    assert len(ours) == 4 and np.array_equal(ours[2], theirs)
    alone = models.generate(pipeline, ["b"], [1], 64, 64, steps=2)
    assert np.array_equal(alone[0], ours[2]) and not np.array_equal(ours[2], ours[3])


def test_pictures_from_embeddings_need_no_text_encoder(oracle, tiny_base):
    pairs = [models.encode_prompts(*models.load_text_encoders(str(tiny_base)), ["b"])]
    blind = models.assemble(str(tiny_base), oracle.unet, oracle.vae)
    assert blind.text_encoder is None and blind.text_encoder_2 is None
    ours = models.generate(blind, ["b"], [1], 64, 64, steps=2, embeddings=pairs)
    theirs = oracle("b", generator=torch.Generator().manual_seed(1), height=64, width=64, num_inference_steps=2).images[0]
    assert np.array_equal(ours[0], theirs)


def full_size_unet():
    config = json.loads((models.SDXL / "unet" / "config.json").read_text())
    with torch.device("meta"):
        return UNet2DConditionModel.from_config(config)


@pytest.mark.parametrize(("targets", "modules", "millions"), [(["to_q", "to_v"], 280, 11.6), ("attention", 560, 23.2), ("attention+feed_forward", 722, 42.6)])
def test_lora_on_full_size_sdxl(targets, modules, millions):
    unet = full_size_unet()
    parameters = models.add_lora(unet, 16, 16, targets)
    assert len(parameters) == 2 * modules
    assert sum(parameter.numel() for parameter in parameters) / 1e6 == pytest.approx(millions, abs=0.05)
    assert sum(p.numel() for p in unet.parameters() if not p.requires_grad) / 1e6 == pytest.approx(2567.5, abs=0.1)


@pytest.mark.parametrize(("part", "modules"), [("text_encoder", 72), ("text_encoder_2", 192)])
def test_lora_on_full_size_text_encoders(part, modules):
    model_class = models.PARTS[part]
    with torch.device("meta"):
        model = model_class(model_class.config_class.from_pretrained(models.SDXL / part))
    assert len(models.add_lora(model, 8, 8, models.TEXT_TARGETS)) == 2 * modules


def test_lora_is_seeded_fp32_and_changes_nothing_at_first(tiny_base):
    states = []
    for seed, dtype in ((1, torch.float32), (1, torch.bfloat16), (2, torch.float32)):
        unet = models.load_part(str(tiny_base), "unet", dtype)
        models.add_lora(unet, 4, 8, "attention", seed=seed)
        states.append(models.lora_state_dict(unet))
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert any(not torch.equal(states[0][name], states[2][name]) for name in states[0])
    assert {value.dtype for state in states for value in state.values()} == {torch.float32}
    assert all(not value.any() for name, value in states[0].items() if "lora_B" in name)


def test_rslora_scales_by_the_square_root(tiny_base):
    scales = []
    for rslora in (False, True):
        unet = models.load_part(str(tiny_base), "unet")
        models.add_lora(unet, 4, 8, ["to_q"], rslora=rslora)
        scales.append({module.scaling["default"] for module in unet.modules() if hasattr(module, "lora_A")})
    assert scales == [{2.0}, {4.0}]


def test_targets_that_match_nothing(tiny_base):
    with pytest.raises(UserError, match="lora_target_modules"):
        models.add_lora(models.load_part(str(tiny_base), "unet"), 4, 4, ["to_nowhere"])
    with pytest.raises(UserError, match="to_vv match nothing"):  # not silently to_q alone
        models.add_lora(models.load_part(str(tiny_base), "unet"), 4, 4, ["to_q", "to_vv"])


def test_lora_state_of_another_rank_is_refused(tiny_base):
    unet = models.load_part(str(tiny_base), "unet")
    models.add_lora(unet, 4, 4, "attention")
    state = models.lora_state_dict(unet)
    with pytest.raises(UserError, match="run_name"):
        models.load_lora_state_dict(unet, {name: value[:2] for name, value in state.items()})


def gradients(unet, inputs):
    unet(**inputs).sample.square().mean().backward()
    grads = [p.grad.clone() for p in unet.parameters() if p.requires_grad]
    assert grads and all(torch.isfinite(grad).all() for grad in grads)
    return grads


def unet_inputs():
    generator = torch.Generator().manual_seed(0)
    return {
        "sample": torch.randn(2, 4, 8, 8, generator=generator), "timestep": torch.tensor([3, 700]),
        "encoder_hidden_states": torch.randn(2, 77, 40, generator=generator),
        "added_cond_kwargs": {"text_embeds": torch.randn(2, 24, generator=generator), "time_ids": torch.full((2, 6), 64.0)},
    }  # fmt: skip


def test_checkpointing_loses_no_gradient(tiny_base):
    """A frozen base has no input that requires a gradient: the re-entrant kind would train nothing, silently."""
    results = []
    for checkpointing in (False, True):
        unet = models.load_part(str(tiny_base), "unet").train()
        models.add_lora(unet, 4, 4, "attention+feed_forward")
        memory.save_memory(unet, checkpointing)
        results.append(gradients(unet, unet_inputs()))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert any(grad.any() for grad in results[0])


def test_nf4_learns_after_a_picture_was_drawn():
    """In evaluation bitsandbytes packs weights for processors that multiply bf16, and then has no way back."""
    model = torch.nn.Sequential(torch.nn.Linear(128, 128))
    memory.quantize_nf4(model, torch.bfloat16)
    model.to("cpu").eval()
    picture = torch.randn(4, 128, dtype=torch.bfloat16)
    with torch.no_grad():
        drawn = model(picture)
    learning = picture.clone().requires_grad_()
    answer = model.train()(learning)
    torch.testing.assert_close(answer, drawn, atol=0.05, rtol=0.05)
    answer.sum().backward()
    assert learning.grad.abs().sum() > 0


def test_nf4_runs_and_learns_on_the_cpu(tiny_base):
    plain = models.load_part(str(tiny_base), "unet")
    full = plain(**unet_inputs()).sample
    linears = sum(type(m) is torch.nn.Linear for m in plain.modules())
    unet = models.load_part(str(tiny_base), "unet")
    swapped = memory.quantize_nf4(unet, torch.float32)
    unet.to("cpu")
    assert swapped == linears - 4  # the two of time_embedding and add_embedding each stay
    weight = unet.down_blocks[1].attentions[0].transformer_blocks[0].attn1.to_q.weight
    assert weight.dtype == torch.uint8 and weight.numel() == 32 * 32 // 2
    error = (unet(**unet_inputs()).sample - full).norm() / full.norm()
    assert 0 < error < 0.3
    models.add_lora(unet, 4, 4, "attention+feed_forward")
    assert any(grad.any() for grad in gradients(unet, unet_inputs()))


# --- finding models ----------------------------------------------------------------------------------------------


def test_missing_models_are_sentences(tmp_path):
    for name in ("no/such-model", "./nowhere", str(tmp_path / "nothing")):
        with pytest.raises(UserError) as refusal:
            models.load_part(name, "unet")
        assert name in str(refusal.value) and "base_model" in str(refusal.value)


def test_gated_and_absent_repositories_are_sentences(monkeypatch):
    import httpx
    from huggingface_hub import errors

    monkeypatch.setattr(weights, "snapshot_download", raiser(errors.LocalEntryNotFoundError("not here")))
    response = httpx.Response(403, request=httpx.Request("GET", "https://huggingface.co"))
    for error, words in [(errors.GatedRepoError, "licence"), (errors.RepositoryNotFoundError, "no model of that name")]:
        monkeypatch.setattr(weights.HfApi, "list_repo_files", raiser(error("no", response=response)))
        with pytest.raises(UserError, match=words):
            weights.locate("some/model", "unet")


def raiser(error):
    def fail(*args, **kwargs):
        raise error

    return fail


def test_half_downloaded_and_damaged_files(tiny_base, tmp_path):
    base = shutil.copytree(tiny_base, tmp_path / "base")
    file = base / "unet" / "diffusion_pytorch_model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match="half downloaded"):
        models.load_part(str(base), "unet")
    file.write_bytes(b"<html>not found</html>")
    with pytest.raises(UserError, match="damaged or half downloaded"):
        models.load_part(str(base), "unet")
    shutil.rmtree(base / "vae")
    with pytest.raises(UserError, match="vae"):
        models.load_part(str(base), "vae")
    pickled = tmp_path / "model.ckpt"
    pickled.write_bytes(b"x")
    with pytest.raises(UserError, match="safetensors"):
        models.load_part(str(pickled), "unet")


@pytest.mark.parametrize(("part", "name"), [
    ("tokenizer", "tokenizer.json"), ("tokenizer_2", "tokenizer_config.json"), ("noise_scheduler", "scheduler_config.json"),
    ("unet", "config.json"), ("text_encoder", "config.json"),
])  # fmt: skip
def test_a_lacking_file_is_named(tiny_base, tmp_path, part, name):
    """A tokenizer without its words would load, and read every caption as the same."""
    base = shutil.copytree(tiny_base, tmp_path / "base")
    (base / part.removeprefix("noise_") / name).unlink()
    with pytest.raises(UserError, match=f"no (vocab.json|{name}).*download it again"):
        models.load_part(str(base), part)
    (base / "model_index.json").unlink()
    with pytest.raises(UserError, match="model_index.json|scheduler_config.json"):
        models.zeros_for_empty_prompt(str(base))


@pytest.mark.parametrize("part", models.PARTS)
def test_lacking_weights_are_not_drawn_at_random(tiny_base, tmp_path, part):
    base = shutil.copytree(tiny_base, tmp_path / "base")
    file = next((base / part).glob("*.safetensors"))
    content = load_file(file)
    del content[max(content)]
    save_file(content, file, {"format": "pt"})
    with pytest.raises(UserError, match="1 of its weights are missing"):
        models.load_part(str(base), part)


def test_fingerprint_follows_the_weights(tiny_base, tmp_path):
    before = fingerprint(str(tiny_base), "unet")
    copy = shutil.copytree(tiny_base, tmp_path / "renamed")
    assert fingerprint(str(copy), "unet") == before != fingerprint(str(copy), "vae")
    unet = models.load_part(str(copy), "unet")
    with torch.no_grad():
        unet.conv_out.bias[0] += 1
    unet.save_pretrained(copy / "unet")
    assert fingerprint(str(copy), "unet") != before


def test_vae_override(tiny_base, tmp_path):
    vae = models.load_part(str(tiny_base), "vae")
    vae.register_to_config(scaling_factor=0.9)
    vae.save_pretrained(tmp_path / "vae")
    assert models.vae_config(str(tiny_base), str(tmp_path / "vae"))["scaling_factor"] == 0.9
    assert models.load_vae(str(tiny_base), str(tmp_path / "vae")).config.scaling_factor == 0.9


def test_a_vae_in_a_file_of_its_own(tiny_base, single_file, tmp_path, monkeypatch):
    """As VAEs are shared: without the prefix that they have inside a checkpoint."""
    monkeypatch.setattr(models, "SDXL", tiny_base)
    inside = {name.removeprefix("first_stage_model."): value for name, value in load_file(single_file).items() if name.startswith("first_stage_model.")}
    files = [tmp_path / name for name in ("one.safetensors", "other.safetensors")]
    for number, file in enumerate(files):
        save_file({name: value + number for name, value in inside.items()}, file)
    ours, theirs = models.load_vae(str(tiny_base), str(files[0])).state_dict(), models.load_part(str(tiny_base), "vae").state_dict()
    assert len(inside) > 10 and all(torch.equal(value, theirs[name]) for name, value in ours.items())
    assert fingerprint(str(files[0]), "vae") == fingerprint(str(single_file), "vae") != fingerprint(str(files[1]), "vae")


def test_half_precision_parts_and_fp16_variant(tiny_base, tmp_path):
    copy = shutil.copytree(tiny_base, tmp_path / "half")
    file = copy / "unet" / "diffusion_pytorch_model.safetensors"
    file.rename(file.with_name("diffusion_pytorch_model.fp16.safetensors"))
    unet = models.load_part(str(copy), "unet", torch.float16)
    assert {p.dtype for p in unet.parameters()} == {torch.float16} and not any(p.requires_grad for p in unet.parameters())
    assert models.load_part(str(copy), "text_encoder", torch.bfloat16).dtype == torch.bfloat16


def test_noise_scheduler_keeps_the_bases_settings(tiny_base, tmp_path):
    copy = shutil.copytree(tiny_base, tmp_path / "v")
    EulerDiscreteScheduler(prediction_type="v_prediction", rescale_betas_zero_snr=True, beta_end=0.013).save_pretrained(copy / "scheduler")
    scheduler = models.load_part(str(copy), "noise_scheduler")
    assert (scheduler.config.prediction_type, scheduler.config.beta_end) == ("v_prediction", 0.013)
    assert scheduler.alphas_cumprod[-1] < 1e-6


@pytest.fixture(scope="module")
def single_file(tiny_base, tmp_path_factory):
    return sgm_checkpoint.write(str(tiny_base), tmp_path_factory.mktemp("single") / "model.safetensors")


def test_one_checkpoint_file_gives_every_part(tiny_base, single_file, monkeypatch):
    """The bundled configs are SDXL's; the tiny model's stand in for them here. No network is asked."""
    monkeypatch.setattr(models, "SDXL", tiny_base)
    for part in models.PARTS:
        ours, theirs = models.load_part(str(single_file), part), models.load_part(str(tiny_base), part)
        state = theirs.state_dict()
        assert ours.state_dict().keys() == state.keys() and len(state) > 10
        assert all(torch.equal(value, state[name]) for name, value in ours.state_dict().items()), part
    assert models.load_part(str(single_file), "unet", torch.float16).dtype == torch.float16
    ours = models.encode_prompts(*models.load_text_encoders(str(single_file)), PROMPTS)
    theirs = models.encode_prompts(*models.load_text_encoders(str(tiny_base)), PROMPTS)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    pictures = [models.generate(models.load_pipeline(str(base)), ["b"], [1], 64, 64, steps=2) for base in (single_file, tiny_base)]
    assert pictures[0][0] == pictures[1][0]
    assert models.vae_config(str(single_file))["scaling_factor"] == 0.5
    assert models.load_vae(str(tiny_base), str(single_file)).config.scaling_factor == 0.5


@pytest.mark.parametrize(("part", "prefix"), weights.SINGLE_FILE_PREFIXES.items())
def test_lacking_weights_of_one_file_are_told(tiny_base, single_file, tmp_path, monkeypatch, part, prefix):
    monkeypatch.setattr(models, "SDXL", tiny_base)
    content = load_file(single_file)
    del content[max(name for name in content if name.startswith(prefix) and name.endswith("weight"))]
    save_file(content, tmp_path / "cut.safetensors")
    with pytest.raises(UserError, match="of its weights are missing"):
        models.load_part(str(tmp_path / "cut.safetensors"), part)


def test_fingerprints_of_one_file_are_by_part(single_file):
    assert len({fingerprint(str(single_file), part) for part in models.PARTS}) == 4


def test_bundled_configs_are_sdxl():
    counts = {}
    for part, model_class in models.PARTS.items():
        with torch.device("meta"):
            if part in ("unet", "vae"):
                model = model_class.from_config(json.loads((models.SDXL / part / "config.json").read_text()))
            else:
                model = model_class(model_class.config_class.from_pretrained(models.SDXL / part))
        counts[part] = round(sum(parameter.numel() for parameter in model.parameters()) / 1e6, 1)
    assert counts == {"unet": 2567.5, "vae": 83.7, "text_encoder": 123.1, "text_encoder_2": 694.7}
