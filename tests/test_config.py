"""Settings: layers, refusals, reasons."""

import subprocess
import sys

import pytest
import yaml

from lora_nb import config as settings
from lora_nb.config import PRESETS, Config, build, documented_defaults, load_config, preset_names, read_config
from lora_nb.errors import UserError

FIXED_NAMES = (
    "base_model vae_model scheduler resolution center_crop random_flip batch_size gradient_accumulation_steps learning_rate "
    "lr_scheduler lr_warmup_steps max_steps lora_rank lora_alpha lora_dropout lora_target_modules train_text_encoder precision "
    "mixed_precision gradient_checkpointing enable_xformers use_8bit_adam enable_cpu_offload save_every save_total_limit "
    "log_every use_wandb validate_every num_validation_images validation_prompts validation_seeds"
).split()


def test_documented_file_is_the_defaults():
    text = (PRESETS / "training_config.yaml").read_text(encoding="utf-8")
    assert text == documented_defaults()
    assert build(yaml.safe_load(text)).model_dump() == Config().model_dump()
    assert text.count("  # ") == len(Config.model_fields)


def test_a_file_with_just_the_fixed_names_loads(tmp_path):
    values = {name: Config.model_fields[name].default for name in FIXED_NAMES}
    path = tmp_path / "training_config.yaml"
    path.write_text(yaml.safe_dump(values))
    config = load_config("cpu-demo", path)
    assert len(FIXED_NAMES) == 31
    assert {name: getattr(config, name) for name in FIXED_NAMES} == values


@pytest.mark.parametrize("name", preset_names())
def test_presets_give_a_reason_for_every_difference(name):
    lines = [line for line in (PRESETS / f"{name}.yaml").read_text().splitlines() if line and not line.startswith("#")]
    assert lines and all("  # " in line for line in lines)
    assert all(reason for *_, reason in load_config(name).differences())


def test_presets_are_those_of_the_table():
    assert preset_names() == ["cpu-demo", "gpu-8gb", "gpu-12gb", "gpu-16gb", "gpu-24gb", "gpu-80gb"]
    sizes = [(load_config(name).resolution, load_config(name).lora_rank) for name in ("gpu-8gb", "gpu-12gb", "gpu-16gb")]
    assert sizes == [(512, 16), (768, 24), (1024, 32)] and load_config("gpu-8gb").enable_cpu_offload


def test_layers_and_reasons(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("learning_rate: 3e-4  # my own idea\nmax_steps: 70\n")  # YAML reads 3e-4 as a string
    config = load_config("cpu-demo", path, max_steps=80)
    reasons = {name: (value, reason) for name, _, value, reason in config.differences()}
    assert reasons["learning_rate"] == (3e-4, "my own idea")
    assert reasons["max_steps"] == (80, "set here")
    assert reasons["resolution"][1] == "what the tiny SDXL draws"


def test_a_warmup_that_nobody_asked_for_fits_a_short_trial(tmp_path):
    assert load_config("cpu-demo", max_steps=10).lr_warmup_steps == 1
    (tmp_path / "mine.yaml").write_text("lr_warmup_steps: 20")
    with pytest.raises(UserError, match=r"preset cpu-demo; .*mine.yaml; given max_steps.*lr_warmup_steps 20"):
        load_config("cpu-demo", tmp_path / "mine.yaml", max_steps=10)


@pytest.mark.parametrize(("line", "words"), [("run_name: my hero", "without spaces"), ("preset: cpu-demo", "--preset")])
def test_names_that_are_often_given_wrongly(tmp_path, line, words):
    (tmp_path / "mine.yaml").write_text(line)
    with pytest.raises(UserError, match=words):
        load_config("cpu-demo", tmp_path / "mine.yaml")


def test_saved_config_is_read_back_with_its_reasons(tmp_path):
    config = load_config("cpu-demo", run_name="r", validation_negative_prompt="a # in words: 'odd'")
    again = read_config(config.save(tmp_path / "config.yaml"))
    assert again.model_dump() == config.model_dump()
    assert again.differences()[:3] == config.differences()[:3]


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"lerning_rate": 1e-4}, ["'lerning_rate'", "'learning_rate'"]),
        ({"lora_rank": "many"}, ["lora_rank", "integer"]),
        ({"lora_rank": 0}, ["lora_rank", "greater"]),
        ({"lora_rank": 0, "seed": -1, "nonsense": 1}, ["lora_rank", "seed", "nonsense"]),
        ({"lr_scheduler": "cosinus"}, ["lr_scheduler", "'cosine'"]),
        ({"scheduler": "foo"}, ["scheduler", "EulerDiscreteScheduler"]),
        ({"lora_target_modules": []}, ["lora_target_modules", "attention"]),
        ({"run_name": "../x"}, ["run_name"]),
        ({"debiased_estimation": True}, ["snr_gamma: null"]),
        ({"precision": "fp16", "mixed_precision": "bf16"}, ["same"]),
        ({"lr_warmup_steps": 5000}, ["lr_warmup_steps", "max_steps"]),
        ({"lr_warmup_steps": 5000, "lr_scheduler": "cosine"}, ["lr_warmup_steps", "max_steps"]),
        ({"max_steps": True}, ["max_steps", "True"]),
        ({"base_model": ""}, ["base_model", "at least 1"]),
        ({"text_encoder_stop_step": 0}, ["text_encoder_stop_step", "greater"]),
        ({"preservation_weight": 1.0, "train_text_encoder": True}, ["preservation_weight", "train_text_encoder: false"]),
        ({"optimizer": "prodigy", "train_text_encoder": True}, ["prodigy", "text_encoder_learning_rate", "or to 0"]),
    ],
)
def test_refusals_are_one_sentence_with_the_cure(values, words):
    with pytest.raises(UserError) as refusal:
        build(values)
    sentence = str(refusal.value)
    assert "\n" not in sentence and all(word in sentence for word in words), sentence


def test_what_yaml_makes_of_words_and_numbers(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("mixed_precision: no\nprecision: fp32\nlearning_rate: 1e-4\n")  # YAML reads no as false
    config = load_config("gpu-16gb", path)
    assert (config.mixed_precision, config.learning_rate) == ("no", 1e-4)
    path.write_text("1: 2\n")
    with pytest.raises(UserError, match="no setting '1'"):
        load_config("gpu-16gb", path)


def test_captions_about_anybody():
    config = build({"trigger_token": "hero", "class_word": "elf"})
    assert config.about_anybody("Hero, smiling") == "an elf, smiling"
    assert config.about_anybody(" nobody , is  called ") == " nobody , is  called "
    assert build({"trigger_token": ""}).about_anybody("a man") == "a man"


def test_prodigy_has_one_rate_for_all():
    one = {"optimizer": "prodigy", "train_text_encoder": True, "learning_rate": 1.0, "text_encoder_learning_rate": 1.0}
    assert build(one | {"text_encoder_2_learning_rate": 0.0}).text_encoder_learning_rates == (1.0, 0.0)


def test_a_file_is_found_from_the_project(project, tmp_path_factory, monkeypatch):
    (project / "mine.yaml").write_text("max_steps: 77\nlr_warmup_steps: 7\n")
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))  # as JupyterLab, which works in the notebook's folder
    assert load_config("cpu-demo", "mine.yaml").max_steps == 77


def test_unreadable_files_and_presets(tmp_path):
    broken = tmp_path / "broken.yaml"
    broken.write_text("a: [")
    listed = tmp_path / "list.yaml"
    listed.write_text("- 1")
    for path in (broken, listed, tmp_path / "absent.yaml"):
        with pytest.raises(UserError, match=path.name):
            load_config("cpu-demo", path)
    with pytest.raises(UserError, match="gpu-16gb"):
        load_config("gpu-16")


def test_what_a_machine_cannot_do_is_refused_together(monkeypatch):
    monkeypatch.setattr(settings.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError) as refusal:
        build({"precision": "fp16", "use_wandb": True}).check_machine("cpu")
    assert all(word in str(refusal.value) for word in ("fp16", "bitsandbytes", "wandb", "cpu-demo"))
    with pytest.raises(UserError, match="no bf16"):
        build({"precision": "bf16", "mixed_precision": "bf16", "use_8bit_adam": False}).check_machine("cuda", bf16=False)
    build({"use_8bit_adam": False}).check_machine("cuda")


def test_warnings_name_what_was_perhaps_not_meant():
    assert build({}).warnings() == []
    odd = {"random_flip": True, "enable_attention_slicing": True, "enable_cpu_offload": True, "num_validation_images": 9}
    assert len(build(odd).warnings()) == 4
    assert build({"num_validation_images": 6}).image_seeds == [42, 123, 456, 789, 790, 791]


def test_scheduler_names():
    names = {"ddpm": "DDPMScheduler", "DDPMScheduler": "DDPMScheduler", "euler": "EulerDiscreteScheduler", "unipc": "UniPCMultistepScheduler"}
    assert {given: build({"scheduler": given}).scheduler for given in names} == names


def test_config_imports_without_torch():
    code = "import sys; from lora_nb.config import load_config; load_config('gpu-8gb'); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
