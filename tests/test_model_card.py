"""The card says what a reader needs and nothing private; a dry run sends nothing; a push shows no token."""

import lora_models
import pytest
import yaml
from PIL import Image

from lora_nb import model_card as card_module
from lora_nb.errors import UserError
from lora_nb.export import export_lora
from lora_nb.metadata import lora_metadata
from lora_nb.model_card import push_to_hub, write_model_card

SETTINGS = {
    "run_name": "hero", "base_model": "stabilityai/stable-diffusion-xl-base-1.0", "dataset_path": "/home/someone/hero",
    "trigger_token": "hero_man", "author": "A. Painter", "license": "openrail++", "resolution": 128, "learning_rate": 1e-4,
}  # fmt: skip


@pytest.fixture
def final(tmp_path):
    metadata = lora_metadata("hero", SETTINGS, captions=["hero_man walking, red robe", "hero_man | sleeping"], buckets=[(128, 128)] * 2)
    unet = lora_models.adapt(lora_models.unet(), ["to_q"])
    return export_lora(tmp_path / "run" / "final", unet, run_name="hero", metadata=metadata).folder


@pytest.fixture
def hub(monkeypatch):
    """A hub that keeps what is sent; `hub.fail` makes it refuse."""

    class Hub:
        sent, fail = [], None

        def __init__(self, token):
            self.token = token

        def create_repo(self, repo_id, private, exist_ok):
            if Hub.fail:
                raise OSError(f"401 for {self.token}")
            return f"https://hub/{repo_id}"

        def upload_folder(self, **what):
            Hub.sent.append(what)

    Hub.sent = []
    monkeypatch.setattr(card_module, "HfApi", Hub)
    return Hub


def test_the_card(final, tmp_path):
    Image.new("RGB", (8, 8), "red").save(tmp_path / "picture.png")
    text = write_model_card(final, [(tmp_path / "picture.png", "hero_man in the desert")]).read_text(encoding="utf-8")
    head = yaml.safe_load(text.split("---")[1])
    assert head["base_model"] == SETTINGS["base_model"] and head["license"] == "openrail++" and head["instance_prompt"] == "hero_man"
    assert head["widget"] == [{"text": "hero_man in the desert", "output": {"url": "samples/0.png"}}]
    assert (final / "samples" / "0.png").is_file()
    assert "`hero_man`" in text and "A. Painter" in text and "| pictures | 2 |" in text and "walking (1)" in text
    assert "someone" not in text and str(tmp_path) not in text
    assert all(line.count("|") >= 3 for line in text.splitlines() if line.startswith("|"))


def test_a_local_base_is_not_claimed_as_a_hub_model(tmp_path):
    metadata = lora_metadata("hero", {"base_model": "data/tiny_sdxl"})
    final = export_lora(tmp_path / "final", lora_models.adapt(lora_models.unet(), ["to_q"]), run_name="hero", metadata=metadata).folder
    assert "base_model" not in yaml.safe_load(write_model_card(final).read_text().split("---")[1])


def test_a_dry_run_sends_nothing_and_lists_all(final, hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    (final / ".hidden").write_text("x")
    told = push_to_hub(final, "me/hero")
    assert hub.sent == [] and told.startswith("Nothing was sent") and "hf_secret" not in told
    assert "hero.safetensors" in told and "unet_lora/adapter_config.json" in told and ".hidden" not in told and "private" in told


def test_a_push_sends_what_the_dry_run_said(final, hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    (final / ".hidden").write_text("x")
    told = push_to_hub(final, "me/hero", really=True)
    assert "hf_secret" not in told and "https://hub/me/hero" in told
    assert hub.sent[0]["repo_id"] == "me/hero" and ".hidden" not in hub.sent[0]["allow_patterns"]
    assert {"hero.safetensors", "unet_lora/adapter_model.safetensors"} <= set(hub.sent[0]["allow_patterns"])


def test_refusals_are_sentences_without_the_token(final, hub, monkeypatch, tmp_path):
    monkeypatch.setattr(card_module, "hub_token", lambda: None)
    with pytest.raises(UserError, match="HF_TOKEN"):
        push_to_hub(final, "me/hero", really=True)
    hub.fail = True
    with pytest.raises(UserError, match="hub refused me/hero") as refusal:
        push_to_hub(final, "me/hero", really=True, token="hf_secret")
    assert "hf_secret" not in str(refusal.value)
    with pytest.raises(UserError, match="no exported LoRA"):
        push_to_hub(tmp_path, "me/hero")
