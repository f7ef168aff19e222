"""The loop: exact resume, agreement of all the ways to the same step, refusals, and what a run leaves behind."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import threading

import pytest
import torch
from accelerate import Accelerator
from conftest import build_tiny_sdxl
from safetensors.torch import load_file

from lora_nb import cache, models, runlog, validation
from lora_nb import step as step_module
from lora_nb import train as train_module
from lora_nb.checkpoint import LORA, OPTIMIZER, latest_checkpoint
from lora_nb.errors import UserError
from lora_nb.events import Notice, Saved, Stepped, Validated, ignore
from lora_nb.job import prepare
from lora_nb.losses import preservation_loss
from lora_nb.manifest import PLAIN, read_manifest
from lora_nb.runlog import read_metrics, read_status
from lora_nb.train import resume, train


@pytest.fixture(autouse=True)
def quick_end(request, monkeypatch):
    """The export and its proofs have tests of their own; here only tests marked `exports` wait for them."""
    if "exports" not in request.keywords:
        monkeypatch.setattr(train_module, "export_trained", lambda *_, **__: None)


class Killed(BaseException):
    """Stands for SIGKILL: nothing is saved because of it."""


def kill_at(step):
    def on_event(event):
        if isinstance(event, Stepped) and event.step == step:
            raise Killed

    return on_event


def result_of(config, step):
    """LoRA, optimizer and CSV of a run, as bytes."""
    folder = config.run_dir / "checkpoints" / f"checkpoint-{step}"
    return [(folder / name).read_bytes() for name in (LORA, OPTIMIZER)] + [(config.run_dir / "training_metrics.csv").read_bytes()]


def lora_of(run, step):
    return load_file(run.run_dir / "checkpoints" / f"checkpoint-{step}" / LORA)


def farthest(a, b):
    """Largest difference, as a share of the largest weight."""
    assert a.keys() == b.keys() and len(a) > 0
    largest = max(value.abs().max() for value in a.values())
    return max((a[name] - b[name]).abs().max() for name in a).item() / largest.item()


def encode(config):
    captions = config.captions_beside(sample.caption for sample in read_manifest(config.run_dir / PLAIN).samples)
    cache.encode(config.run_dir / PLAIN, config.base_model, captions=captions, random_flip=config.random_flip)


# --- exact resume ------------------------------------------------------------------------------------------------

TWELVE = {"max_steps": 12, "save_every": 1, "save_total_limit": 2, "log_every": 5, "batch_size": 1, "gradient_accumulation_steps": 2,
          "pictures": 5, "random_flip": True, "lora_dropout": 0.1, "noise_offset": 0.05, "lr_scheduler": "cosine", "lr_warmup_steps": 2}  # fmt: skip


def test_resume_is_exact_at_every_step(make_run):
    """12 steps of two accumulated batches over 5 pictures: epochs end within steps. Killed after every step once,
    with a checkpoint each step; and killed with one only every fifth, so that steps are repeated."""
    whole = make_run(run_name="whole", **TWELVE)
    encode(whole)
    train(whole)
    split = make_run(run_name="split", **TWELVE)
    encode(split)
    for step in range(1, 12):
        with pytest.raises(Killed):
            train(split, kill_at(step))
    train(split)
    assert result_of(split, 12) == result_of(whole, 12)

    seldom = make_run(run_name="seldom", **TWELVE | {"save_every": 5})
    encode(seldom)
    for step in (4, 7, 11):
        with pytest.raises(Killed):
            train(seldom, kill_at(step))
    train(seldom)
    assert result_of(seldom, 12) == result_of(whole, 12)
    assert [row["step"] for row in read_metrics(whole.run_dir)] == [5, 10, 12]


@pytest.mark.parametrize("settings", [{"optimizer": "adafactor"}, {"use_8bit_adam": True}, {"train_text_encoder": True, "text_encoder_stop_step": 5}, {"precision": "nf4"}, {"preservation_weight": 1.0, "trigger_token": "hero"}])
def test_resume_is_exact_with(make_run, settings):
    runs = []
    for name in ("whole", "split"):
        config = make_run(run_name=name, save_every=3, **settings)
        encode(config)
        if name == "split":
            with pytest.raises(Killed):
                train(config, kill_at(4))
        train(config)
        runs.append(result_of(config, 6))
    assert runs[0] == runs[1]


def test_a_finished_run_goes_on_when_asked_for_more(make_run):
    short = make_run(run_name="more")
    train(short)
    events = []
    run = train(short.model_copy(update={"max_steps": 8}), events.append)
    assert [event.step for event in events if isinstance(event, Stepped)] == [7, 8] and run.status == "finished"
    train(long := make_run(run_name="long", max_steps=8))
    assert result_of(short, 8)[:2] == result_of(long, 8)[:2]


def test_a_damaged_checkpoint_is_named_and_the_one_before_used(make_run):
    config = make_run()
    train(config)
    expected = result_of(config, 6)
    file = config.run_dir / "checkpoints" / "checkpoint-6" / OPTIMIZER
    file.write_bytes(file.read_bytes()[:-1] + b"\x01")
    events = []
    train(config, events.append)
    told = [event.message for event in events if isinstance(event, Notice)]
    assert any("checkpoint-6 is damaged" in sentence for sentence in told) and any("after step 4" in sentence for sentence in told)
    assert result_of(config, 6) == expected


def test_checkpoints_that_are_made_again_drop_no_whole_one(make_run):
    """Damaged at 4 and 6, and saved more seldom from then on: what is kept is whole."""
    config = make_run()
    train(config)
    for step in (4, 6):
        (config.run_dir / "checkpoints" / f"checkpoint-{step}" / OPTIMIZER).write_bytes(b"")
    seldom = config.model_copy(update={"save_every": 3, "save_total_limit": 1})
    with pytest.raises(Killed):
        train(seldom, kill_at(4))
    assert latest_checkpoint(config.run_dir / "checkpoints").name == "checkpoint-3"
    for path in (config.run_dir / "checkpoints").glob("checkpoint-*"):
        (path / OPTIMIZER).write_bytes(b"")
    events = []
    assert train(seldom, events.append).status == "finished"
    assert any("begins anew" in event.message for event in events if isinstance(event, Notice))


def test_what_breaks_continuity_is_named(make_run, project):
    config = make_run(max_steps=2)
    train(config)
    changed = config.model_copy(update={"learning_rate": 0.5, "lora_rank": 8, "batch_size": 1, "log_every": 1})
    with pytest.raises(UserError) as refusal:
        train(make_run(**{"lora_rank": 4, "learning_rate": 0.5, "seed": 7, "max_steps": 4}))
    sentence = str(refusal.value)
    assert all(word in sentence for word in ("learning_rate (0.01 -> 0.5)", "seed (42 -> 7)", "run_name")) and "max_steps" not in sentence
    with pytest.raises(UserError, match=r"lora_rank.*pictures a step \(2 -> 1\)"):
        train(changed)
    same_step = make_run(max_steps=4, batch_size=1, gradient_accumulation_steps=2, log_every=1, save_total_limit=1)
    assert train(same_step).step == 4
    moved = shutil.copytree(config.base_model, project / "moved")
    assert train(same_step.model_copy(update={"base_model": str(moved)})).step == 4
    with pytest.raises(UserError, match="the data set changed"):
        train(make_run(max_steps=6, pictures=6))


def test_a_schedule_that_ends_minds_max_steps(make_run):
    train(make_run(max_steps=2, lr_scheduler="cosine", lr_warmup_steps=0))
    with pytest.raises(UserError, match="max_steps"):
        train(make_run(max_steps=4, lr_scheduler="cosine", lr_warmup_steps=0))


# --- the same step by other ways ---------------------------------------------------------------------------------


def test_cached_is_uncached_bit_for_bit(make_run):
    fresh, cached = make_run(run_name="fresh", random_flip=True), make_run(run_name="cached", random_flip=True)
    encode(cached)
    train(fresh)
    train(cached)
    assert result_of(fresh, 6) == result_of(cached, 6)


def test_cached_training_loads_no_encoder(make_run, monkeypatch):
    config = make_run(validate_every=3)
    encode(config)
    loaded = []
    load_part = models.load_part
    monkeypatch.setattr(models, "load_part", lambda base, part, *rest: loaded.append(part) or load_part(base, part, *rest))
    train(config)
    assert "unet" in loaded and not {"text_encoder", "text_encoder_2", "tokenizer"} & set(loaded)
    assert loaded.count("vae") == 1  # for the validation pictures
    loaded.clear()
    train(config.model_copy(update={"run_name": "run", "validate_every": None, "max_steps": 7}))
    assert "vae" not in loaded


def test_four_is_two_by_two(make_run):
    big = train(make_run(run_name="big", batch_size=4))
    small = train(make_run(run_name="small", batch_size=2, gradient_accumulation_steps=2))
    assert farthest(lora_of(big, 6), lora_of(small, 6)) < 1e-3
    assert [row["loss"] for row in read_metrics(big.run_dir)] == pytest.approx([row["loss"] for row in read_metrics(small.run_dir)], rel=1e-5)


def test_checkpointing_changes_no_bit(make_run):
    runs = [make_run(run_name=f"c{on}", gradient_checkpointing=on) for on in (False, True)]
    for config in runs:
        train(config)
    assert result_of(runs[0], 6) == result_of(runs[1], 6)


def test_auto_fit_moves_no_data(make_run, monkeypatch):
    config = make_run(run_name="tight", batch_size=4, auto_fit=True)
    losses_of, sizes = step_module.losses_of, []

    def full(job, group, *rest):
        sizes.append(len(group))
        if len(group) > 1 and len(sizes) > 5:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
        return losses_of(job, group, *rest)

    monkeypatch.setattr(step_module, "losses_of", full)
    events = []
    tight = train(config, events.append)
    assert any("micro-batches of 1" in event.message for event in events if isinstance(event, Notice))
    monkeypatch.undo()
    os.environ["LORA_NB_ROOT"] = str(tight.run_dir.parent.parent)
    roomy = train(make_run(run_name="roomy", batch_size=4))
    assert farthest(lora_of(tight, 6), lora_of(roomy, 6)) < 1e-3


def test_out_of_memory_is_a_sentence(make_run, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has")

    monkeypatch.setattr(step_module, "losses_of", full)
    config = make_run()
    with pytest.raises(UserError, match=r"Tried to allocate 20\.00 MiB.*gradient_checkpointing: true; batch_size: 1.*nf4.*resolution"):
        train(config)
    assert read_status(config.run_dir)["status"] == "failed"


# --- what is trained ---------------------------------------------------------------------------------------------


@pytest.mark.exports
def test_text_encoders_train_at_their_own_rates_until_they_rest(make_run):
    config = make_run(train_text_encoder=True, text_encoder_learning_rate=1e-3, text_encoder_2_learning_rate=0.0, text_encoder_stop_step=3, save_every=1)
    run = train(config)
    states = [lora_of(run, step) for step in (2, 3, 4)]
    names = [name for name in states[0] if name.startswith("text_encoder.")]
    assert len(names) == 2 * 2 * 6 and not any(name.startswith("text_encoder_2") for name in states[0])
    moved = [sum(not torch.equal(a[name], b[name]) for name in names) for a, b in zip(states, states[1:], strict=False)]
    assert moved[0] == 12 and moved[1] == 0  # the last layer of encoder 1 is never read; after step 3 all rest
    assert (run.run_dir / "final" / "text_encoder_lora").is_dir() and run.export.ok


def test_learning_is_looked_at(make_run, monkeypatch):
    """A base that is detached from its input trains nothing: said after the first step, naming the weights."""
    losses_of = step_module.losses_of

    def detached(job, *rest):
        loss = losses_of(job, *rest)
        return loss.detach() + 0 * job.trainable[next(iter(job.trainable))].sum()

    monkeypatch.setattr(step_module, "losses_of", detached)
    with pytest.raises(UserError, match=r"83 of 84|167 of 168"):
        train(make_run())


def test_frozen_weights_stay(make_run):
    config = make_run()
    before = cache.weights_of(config.base_model), cache.fingerprint(config.base_model, "unet")
    run = train(config)
    assert (cache.weights_of(config.base_model), cache.fingerprint(config.base_model, "unet")) == before
    assert all(name.startswith("unet.") and ".lora_" in name for name in lora_of(run, 6))


def test_loss_that_is_not_finite_stops_before_the_update(make_run, monkeypatch):
    config = make_run(save_every=1)
    losses_of, calls = step_module.losses_of, []

    def breaking(job, group, *rest):
        calls.append(group)
        loss = losses_of(job, group, *rest)
        return loss * torch.tensor([float("nan")] + [1.0] * (len(group) - 1)) if len(calls) > 3 else loss

    monkeypatch.setattr(step_module, "losses_of", breaking)
    with pytest.raises(UserError) as stopped:
        train(config)
    first = calls[-1][0]
    assert f"timestep {first.timestep}" in str(stopped.value) and "images/p" in str(stopped.value)
    assert read_status(config.run_dir)["status"] == "failed"


@pytest.mark.parametrize("settings", [
    {"loss_type": "huber"}, {"snr_gamma": None, "debiased_estimation": True}, {"use_rslora": True}, {"buckets": False},
    {"mixed_precision": "bf16", "precision": "bf16"}, {"lora_target_modules": ["to_q", "to_v"]}, {"enable_cpu_offload": True, "validate_every": 1},
])  # fmt: skip
def test_settings_that_train(make_run, settings):
    run = train(make_run(max_steps=2, **settings))
    state = lora_of(run, 2)
    assert run.status == "finished" and run.loss > 0
    assert any(value.any() for name, value in state.items() if "lora_B" in name)
    assert {value.dtype for value in state.values()} == {torch.float32}


def test_v_prediction_and_zero_terminal_snr(make_run, tmp_path):
    from diffusers import EulerDiscreteScheduler

    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "rescale_betas_zero_snr": True}
    good = build_tiny_sdxl(tmp_path / "v", EulerDiscreteScheduler(**betas, prediction_type="v_prediction"))
    assert train(make_run(run_name="v", base_model=str(good), max_steps=2)).status == "finished"
    bad = build_tiny_sdxl(tmp_path / "e", EulerDiscreteScheduler(**betas))
    with pytest.raises(UserError, match="zero terminal SNR.*snr_gamma: null"):
        train(make_run(run_name="e", base_model=str(bad)))


# --- running -----------------------------------------------------------------------------------------------------


def test_interrupt_stops_after_the_step_with_a_checkpoint(make_run):
    config = make_run(save_every=50, run_name="stopped")

    def press(event):
        if isinstance(event, Stepped) and event.step == 3:
            os.kill(os.getpid(), signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    run = train(config, press)
    assert (run.status, run.step) == ("interrupted", 4) and signal.getsignal(signal.SIGINT) is before
    assert read_status(config.run_dir)["status"] == "interrupted" and run.export is None
    assert train(config).status == "finished"
    train(whole := make_run(save_every=50, run_name="whole"))
    assert result_of(config, 6) == result_of(whole, 6)


def test_training_runs_in_a_thread(make_run):
    results = []
    thread = threading.Thread(target=lambda: results.append(train(make_run(max_steps=2))))
    thread.start()
    thread.join()
    assert results[0].status == "finished"


def test_a_process_that_is_gone_is_not_running(make_run):
    config = make_run(max_steps=2)
    with pytest.raises(Killed):
        train(config, kill_at(1))
    assert read_status(config.run_dir)["status"] == "stopped"
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    path = config.run_dir / "status.json"
    path.write_text(json.dumps({"status": "running", "pid": gone.pid}))
    assert read_status(config.run_dir)["status"] == "stopped"
    path.write_text(json.dumps({"status": "running", "pid": os.getpid()}))
    assert read_status(config.run_dir)["status"] == "running"


def test_rows_that_a_kill_cut_short_are_left_out(tmp_path):
    path = tmp_path / runlog.METRICS
    path.write_text("step,loss,learning_rate,epoch,grad_norm\n2,0.5,0.1,1,0\n4,0.25,0.1,2,0\n6,0.1")
    assert [row["step"] for row in read_metrics(tmp_path)] == [2, 4]
    runlog.Metrics(tmp_path, first_step=2).write(step=3, loss=1 / 3, learning_rate=0.1, epoch=1.5, grad_norm=2.0)
    assert path.read_text() == "step,loss,learning_rate,epoch,grad_norm\n2,0.5,0.1,1,0\n3,0.33333333,0.1,1.5,2\n"


def test_running_a_finished_run_again_keeps_what_it_said(make_run):
    config = make_run()
    first = train(config)
    summary, again = (config.run_dir / "training_summary.txt").read_text(), train(config)
    assert (config.run_dir / "training_summary.txt").read_text() == summary and "6 steps" in summary
    assert (again.status, again.step) == ("finished", 6) and again.loss > 0 and first.loss > 0
    assert read_status(config.run_dir)["loss"] == again.loss
    assert read_status(config.run_dir)["seconds"] == round(first.seconds, 1)


def test_pictures_that_a_kill_kept_from_being_drawn_are_drawn(make_run):
    config = make_run(validate_every=2)

    def kill_after_saving(event):
        if isinstance(event, Saved) and event.step == 4:
            raise Killed

    with pytest.raises(Killed):
        train(config, kill_after_saving)
    events = []
    train(config, events.append)
    assert [event.step for event in events if isinstance(event, Validated)] == [4, 6]
    events.clear()
    train(config, events.append)
    assert not any(isinstance(event, Validated) for event in events)  # they are all there


def test_a_full_disk_is_a_sentence_wherever_it_is_met(make_run, monkeypatch):
    write, config = runlog.write_atomic, make_run()

    def full(path, content):
        if path.name == runlog.METRICS:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(path, content)

    monkeypatch.setattr(runlog, "write_atomic", full)
    with pytest.raises(UserError, match="is full: make room"):
        train(config)
    assert "is full" in read_status(config.run_dir)["error"]


def test_trackers_write_below_the_run_and_fail_with_a_sentence(tmp_path):
    begun = []

    class Accelerator:
        log_with = ["wandb"]

        def init_trackers(self, project, settings, options):
            begun.append((project, settings, options))
            if len(begun) > 1:
                raise RuntimeError("No API key configured.")

    runlog.start_trackers(Accelerator(), tmp_path / "", {"max_steps": 6})
    assert begun[0][1] == {"max_steps": "6"} and begun[0][2]["wandb"]["dir"] == str(tmp_path / "logs") and (tmp_path / "logs").is_dir()
    with pytest.raises(UserError, match="No API key configured.*use_wandb"):
        runlog.start_trackers(Accelerator(), tmp_path, {})


def test_half_precision_weights_are_trained_with_a_scaled_loss(make_run):
    """Their gradients would be lost below what fp16 can tell apart, autocast or not."""
    for settings, scaled in ({"precision": "fp16"}, True), ({"precision": "fp32"}, False):
        assert train_module.prepare(make_run(**settings), train_module.Accelerator()).scaler.is_enabled() == scaled


def test_one_trainer_a_folder(make_run):
    config = make_run()
    with runlog.only_trainer(config.run_dir), pytest.raises(UserError, match="Another training"):
        train(config)
    assert train(config).status == "finished"


@pytest.mark.exports
def test_what_a_run_leaves_behind(make_run):
    config = make_run(validate_every=4, validation_prompts=["hero", "a cat"], num_validation_images=2, save_total_limit=2)
    events = []
    run = train(config, events.append)
    folder = config.run_dir
    assert (folder / "training_metrics.csv").read_text().startswith("step,loss,learning_rate,epoch")
    assert [row["step"] for row in read_metrics(folder)] == [2, 4, 6]
    assert [event.step for event in events if isinstance(event, Validated)] == [0, 4, 6]
    prompts = json.loads((folder / "validation_images" / "step-4" / "prompts.json").read_text())
    assert [(p["prompt"], p["seed"]) for p in prompts["pictures"]] == [("hero", 42), ("hero", 123), ("a cat", 42), ("a cat", 123)]
    assert all((folder / "validation_images" / "step-4" / p["file"]).is_file() for p in prompts["pictures"])
    assert [path.name for path in run.checkpoints] == ["checkpoint-4", "checkpoint-6"]
    assert [event.step for event in events if isinstance(event, Saved)] == [2, 4, 6]
    status = read_status(folder)
    assert (status["status"], status["step"], status["max_steps"]) == ("finished", 6, 6)
    summary = (folder / "training_summary.txt").read_text()
    assert all(word in summary for word in ("finished at step 6 of 6", "rank 4", "peak memory", "learning_rate 0.01"))
    assert (folder / "final" / "run.safetensors").is_file() and run.export.ok and (folder / "config.yaml").is_file()


def test_validation_at_fixed_seeds_changes_nothing_and_ends_nothing(make_run, monkeypatch):
    quiet, shown = make_run(run_name="quiet"), make_run(run_name="shown", validate_every=2)
    train(quiet)
    train(shown)
    assert result_of(quiet, 6) == result_of(shown, 6)
    first, last = ((shown.run_dir / "validation_images" / f"step-{n}" / "prompt-0_seed-42.png").read_bytes() for n in (0, 6))
    assert first != last

    def broken(*_, **__):
        raise RuntimeError("no picture today")

    monkeypatch.setattr(validation.models, "generate", broken)
    events = []
    run = train(make_run(run_name="blind", validate_every=2), events.append)
    told = [event.message for event in events if isinstance(event, Notice)]
    assert run.status == "finished" and sum("no picture today" in sentence for sentence in told) == 4


@pytest.mark.exports
def test_a_checkpoint_loads_into_a_pipeline(make_run):
    config = make_run()
    run = train(config)
    pipeline = models.load_pipeline(config.base_model)
    base = models.generate(pipeline, ["hero"], [1], 64, 64, steps=2)[0]
    for source in (run.checkpoints[-1], config.run_dir / "final" / "run.safetensors"):
        models.load_lora(pipeline, source)
        assert models.generate(pipeline, ["hero"], [1], 64, 64, steps=2)[0] != base
        models.unload_lora(pipeline)
        assert models.generate(pipeline, ["hero"], [1], 64, 64, steps=2)[0] == base


def test_disk_space_is_asked_for_before_the_first_step(make_run, monkeypatch):
    from lora_nb import checkpoint

    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda _: type("U", (), {"free": 1 << 20}))
    events = []
    with pytest.raises(UserError, match="make room"):
        train(make_run(), events.append)
    assert not any(isinstance(event, Stepped) for event in events)


def test_refusals_before_anything_is_loaded(make_run, project):
    config = make_run()
    cases = {"fp16": {"precision": "fp16"}, "resolution is 128": {"resolution": 128}, "not square": {"buckets": False}, "notebook 01": {"run_name": "empty"}}
    for words, settings in cases.items():
        with pytest.raises(UserError, match=words):
            train(config.model_copy(update=settings))
    assert len(cases) == 4 and not (project / "outputs" / "empty").exists()


def test_sizes_that_a_run_needs(make_run):
    """The forecast of the disk is not below what is written."""
    config = make_run(max_steps=4, save_every=1, save_total_limit=2)
    job = train_module.prepare(config, train_module.Accelerator())
    forecast = train_module._bytes_needed(job)
    run = train(config)
    written = sum(file.stat().st_size for path in run.checkpoints for file in path.glob("*.safetensors"))
    assert 0.6 * forecast < written < forecast


def test_preservation_holds_prompts_about_anybody(make_run):
    """After the same steps the UNet's answer to "a man" has moved less from the base's."""
    moved, text = {}, None
    for weight in (4.0, 0.0):
        config = make_run(run_name=f"weight{weight:g}", preservation_weight=weight, trigger_token="hero", max_steps=12, caption_dropout=0.0)
        encode(config)
        events = []
        train(config, events.append)
        assert not [event for event in events if isinstance(event, Notice) and "were encoded" in event.message]  # notebook 02 made them all
        job = prepare(config, Accelerator(mixed_precision="no"))
        resume(job, ignore)
        group = step_module.micro_batches(job, step_module.draws_at(job, 50))[0]
        captions = [config.about_anybody(job.samples[one.index].caption) for one in group]
        text = text or [job.source.embeddings(caption) for caption in captions]  # which the first run has put into its cache
        noise, timesteps = torch.stack([one.noise for one in group]), torch.tensor([one.timestep for one in group])
        with torch.no_grad():
            moved[weight] = preservation_loss(
                job.unet, job.noise_scheduler, noise.flip(0), noise, timesteps, *map(torch.stack, zip(*text, strict=True)), torch.zeros(len(group), 6)
            ).mean().item()
    assert captions[0].startswith("a man, number ")
    assert 0 < moved[4.0] < 0.7 * moved[0.0]
