"""Copies of checkpoints on a second folder: whole or not there, never twice the same name, found on a fresh machine."""

import errno
import shutil

import pytest
import torch

from lora_nb.checkpoint import damage, save_checkpoint
from lora_nb.copies import bring_back, copies, copy_checkpoint, newest_copy
from lora_nb.errors import UserError
from lora_nb.export_run import export_checkpoint
from lora_nb.train import train


@pytest.fixture
def checkpoint(tmp_path):
    """A function that makes the checkpoint of a step."""

    def make(step):
        lora = {"unet.a.lora_A.weight": torch.full((2, 3), float(step))}
        return save_checkpoint(tmp_path / "checkpoints", step, (lora, {}), {"state": torch.ones(4)}, {"step": step})

    return make


def test_copies_are_whole_unique_and_few(checkpoint, tmp_path):
    drive = tmp_path / "drive" / "run"
    made = [copy_checkpoint(checkpoint(step), drive, keep=2) for step in (2, 4, 4, 6)]
    assert len({path.name for path in made}) == 4
    assert [step for step, _ in copies(drive)] == [4, 6] and sorted(path.name for path in drive.iterdir()) == [p.name for _, p in copies(drive)]
    assert newest_copy(drive) == made[-1] and damage(made[-1]) is None


def test_a_damaged_copy_is_named_and_the_one_before_used(checkpoint, tmp_path):
    drive = tmp_path / "drive"
    copy_checkpoint(checkpoint(2), drive)
    newest = copy_checkpoint(checkpoint(4), drive)
    (newest / "optimizer.safetensors").write_bytes(b"half")
    (drive / "checkpoint-9").mkdir()  # not one of ours
    notes = []
    shutil.rmtree(tmp_path / "checkpoints")
    brought = bring_back(drive, tmp_path / "checkpoints", notes.append)
    assert brought == tmp_path / "checkpoints" / "checkpoint-2" and damage(brought) is None
    assert newest.name in notes[0].message and "checkpoint-2" in notes[-1].message


def test_a_damaged_later_copy_costs_no_whole_one(checkpoint, tmp_path):
    damaged = copy_checkpoint(checkpoint(9), tmp_path / "drive", keep=1)
    (damaged / "state.json").write_text("?")
    whole = copy_checkpoint(checkpoint(4), tmp_path / "drive", keep=1)
    assert newest_copy(tmp_path / "drive") == whole


def test_what_is_here_is_not_brought_again(checkpoint, tmp_path):
    assert bring_back(tmp_path / "drive", tmp_path / "checkpoints") is None  # no Drive yet
    copy_checkpoint(checkpoint(2), tmp_path / "drive")
    assert bring_back(tmp_path / "drive", tmp_path / "checkpoints") is None
    here = checkpoint(4)
    copy_checkpoint(here, tmp_path / "drive")
    (here / "state.json").write_text("{}")  # damaged here, whole there
    assert bring_back(tmp_path / "drive", tmp_path / "checkpoints") == here and damage(here) is None


def test_a_copy_that_reads_back_otherwise_is_refused(checkpoint, tmp_path, monkeypatch):
    path, copyfile = checkpoint(2), shutil.copyfile

    def lossy(source, target):
        copyfile(source, target)
        if target.name == "state.json":
            target.write_text("?")

    monkeypatch.setattr(shutil, "copyfile", lossy)
    with pytest.raises(UserError, match="is damaged"):
        copy_checkpoint(path, tmp_path / "drive")
    assert list((tmp_path / "drive").iterdir()) == []


def test_a_full_drive_is_told_as_such(checkpoint, tmp_path, monkeypatch):
    def full(source, target):
        raise OSError(errno.ENOSPC, "No space left on device")

    path = checkpoint(2)
    monkeypatch.setattr(shutil, "copyfile", full)
    with pytest.raises(UserError, match="make room there"):
        copy_checkpoint(path, tmp_path / "drive")
    assert list((tmp_path / "drive").iterdir()) == []


def test_a_fresh_machine_goes_on_from_the_drive(make_run, tmp_path):
    config = make_run(copy_checkpoints_to=str(tmp_path / "drive"), max_steps=4, export_dtype="fp32")
    train(config.model_copy(update={"max_steps": 2}))
    manifest = (config.run_dir / "dataset_manifest.json").read_bytes()
    shutil.rmtree(config.run_dir)
    config.run_dir.mkdir(parents=True)
    (config.run_dir / "dataset_manifest.json").write_bytes(manifest)
    events = []
    train(config, events.append)
    assert [event.step for event in events if type(event).__name__ == "Stepped"] == [3, 4]
    went_on = export_checkpoint(config.run_dir, 4).files[-1].read_bytes()
    shutil.rmtree(config.run_dir)
    shutil.rmtree(tmp_path / "drive")
    config.run_dir.mkdir(parents=True)
    (config.run_dir / "dataset_manifest.json").write_bytes(manifest)
    train(config)
    assert export_checkpoint(config.run_dir, 4).files[-1].read_bytes() == went_on


def test_a_drive_that_is_gone_does_not_stop_training(make_run, tmp_path):
    (tmp_path / "drive").write_text("a file where the folder should be")
    events = []
    run = train(make_run(copy_checkpoints_to=str(tmp_path / "drive"), max_steps=2), events.append)
    assert run.status == "finished"
    assert any("mount the Drive" in getattr(event, "message", "") for event in events)
