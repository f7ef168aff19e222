"""Training exports by itself; any checkpoint exports later to the same weights; a replayed run makes the same bytes."""

import shutil

import pytest

from lora_nb.checks import read_result
from lora_nb.errors import UserError
from lora_nb.export_run import export_checkpoint
from lora_nb.inspect_lora import inspect_lora
from lora_nb.lora_file import read_safetensors
from lora_nb.replay import replay
from lora_nb.train import train

DRAWN = {
    "validate_every": 6, "validation_prompts": ["hero, number 3"], "validation_steps": 2, "lora_target_modules": ["to_q", "proj_in", "ff.net.2"],
}  # fmt: skip


@pytest.fixture
def trained(make_run):
    """A run of six steps with alpha unlike rank, drawn and exported."""
    config = make_run(lora_rank=4, lora_alpha=7, export_dtype="fp32", trigger_token="hero", **DRAWN)
    return config, train(config)


def test_training_ends_in_proved_files_and_any_checkpoint_exports(trained):
    config, run = trained
    assert run.export.ok, str(run.export)
    assert {check.program for check in run.export.checks if check.file == "run.safetensors"} == {
        "kohya", "ComfyUI", "A1111/Forge", "lora_nb", "diffusers", "a picture",
    }  # fmt: skip
    assert all(check.total for check in run.export.checks), str(run.export)
    assert read_result(config.run_dir / "final") == run.export
    assert dict(inspect_lora(config.run_dir / "final" / "run.safetensors").rows)["trigger"] == "hero"
    card = (config.run_dir / "final" / "README.md").read_text(encoding="utf-8")
    assert "![hero, number 3](samples/0.png)" in card and (config.run_dir / "final" / "samples" / "0.png").is_file()
    assert str(config.run_dir.parent) not in card

    last = export_checkpoint(config.run_dir, 6)
    assert last.ok and last.folder == config.run_dir / "exports" / "step-6"
    final, again = config.run_dir / "final" / "run.safetensors", last.folder / "run-000006.safetensors"
    assert final.read_bytes() == again.read_bytes()
    earlier = export_checkpoint("run", 2, formats=("kohya",), dtype="bf16")
    assert [path.name for path in earlier.files] == ["run-000002.safetensors"]
    header = read_safetensors(earlier.files[0])[1]
    assert header["ss_steps"] == "2" and header["sshs_model_hash"] != read_safetensors(final)[1]["sshs_model_hash"]

    # and what is not there, or damaged, is named
    with pytest.raises(UserError, match="no run other; outputs/ holds run"):
        export_checkpoint("other")
    with pytest.raises(UserError, match="no checkpoint of step 5; it has 2, 4, 6"):
        export_checkpoint(config.run_dir, 5)
    file = config.run_dir / "checkpoints" / "checkpoint-4" / "pytorch_lora_weights.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(UserError, match="checkpoint-4 is damaged"):
        export_checkpoint(config.run_dir, 4)


def test_a_replayed_run_makes_the_same_bytes(trained, monkeypatch, tmp_path):
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1790000000")  # over midnight, too
    config, _ = trained
    export_checkpoint(config.run_dir)
    final = config.run_dir / "final"
    first = {path.relative_to(final): path.read_bytes() for path in final.rglob("*.safetensors")}
    again, notes = replay(final / "run.safetensors")
    assert [note.split()[0] for note in notes] == ["base_model", "The"]  # its place, and the data; the versions are the same
    manifests = {path.name: path.read_bytes() for path in config.run_dir.glob("*.json") if path.name.startswith("dataset")}
    shutil.rmtree(config.run_dir)
    config.run_dir.mkdir(parents=True)
    for name, content in manifests.items():
        (config.run_dir / name).write_bytes(content)
    assert train(again.model_copy(update={"base_model": config.base_model})).export.ok  # a folder's path is private
    assert len(first) == 3
    assert first == {path.relative_to(final): path.read_bytes() for path in final.rglob("*.safetensors")}


def test_text_encoders_are_drawn_and_exported_too(make_run):
    config = make_run(train_text_encoder=True, max_steps=2, export_dtype="fp16", **(DRAWN | {"validate_every": 2}))
    run = train(config)
    assert run.export.ok, str(run.export)
    assert all(check.total for check in run.export.checks), str(run.export)
    assert {"unet_lora", "text_encoder_lora", "text_encoder_2_lora"} <= {path.name for path in run.export.files}
    again = export_checkpoint(config.run_dir, 2)
    assert again.ok and (again.folder / "run-000002.safetensors").read_bytes() == (config.run_dir / "final" / "run.safetensors").read_bytes()
