"""Train the LoRA: prepare what a step needs, then the loop, which tells others through `on_event` and never prints.

A run goes on by itself from its newest whole checkpoint, to the bits of a run that was never stopped.
"""

import json
import signal
import threading
import time
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator

from lora_nb import cache, models, runlog
from lora_nb.checkpoint import (
    check_space,
    latest_checkpoint,
    list_checkpoints,
    load_checkpoint,
    prune,
    save_checkpoint,
    set_aside,
)
from lora_nb.config import FREE_TO_CHANGE, Config
from lora_nb.copies import bring_back, copy_checkpoint
from lora_nb.errors import UserError
from lora_nb.events import Notice, Saved, Stepped, ignore
from lora_nb.export import ExportResult, diffusers_tensors
from lora_nb.export_run import export_trained
from lora_nb.files import full_disk_is_a_sentence, project_root
from lora_nb.job import Job, prepare
from lora_nb.lora_file import lora_of
from lora_nb.manifest import best_manifest
from lora_nb.memory import is_out_of_memory, out_of_memory, peak_memory, release
from lora_nb.optimizers import pack_state, unpack_state
from lora_nb.runlog import Metrics, only_trainer, start_trackers, write_status, write_summary
from lora_nb.step import accumulate, check_learning, optimise, synchronise
from lora_nb.validation import FOLDER, Validator, live_embeddings

CHECKPOINTS = "checkpoints"
STATUS_EVERY_S = 1.0  # seconds between writes of status.json: each waits for the disk
ENDLESS = ("constant", "constant_with_warmup")  # schedules that do not depend on max_steps


@dataclass(frozen=True)
class Run:
    """How a training ended: "finished" or "interrupted", at `step`; `export` says what lies in final/."""

    run_dir: Path
    status: str
    step: int
    loss: float | None
    seconds: float
    checkpoints: tuple[Path, ...]
    export: ExportResult | None = None


def train(config: Config, on_event=ignore) -> Run:
    """Train until max_steps, or until interrupted, and export; a run that has begun goes on by itself.

    Needs the manifest of notebook 01 in `config.run_dir`; takes latents and embeddings from notebook 02 if they are
    there, else encodes as it goes. Under `accelerate launch` all processes call this. Raises UserError.
    """
    trackers = [name for name, wanted in {"wandb": config.use_wandb, "tensorboard": config.use_tensorboard}.items() if wanted]
    # Half precision is ours (see Job.autocast), whatever accelerate's own configuration says.
    accelerator = Accelerator(mixed_precision="no", log_with=trackers or None, project_dir=str(config.run_dir / runlog.LOGS))
    tell = on_event if accelerator.is_main_process else ignore
    device = accelerator.device.type
    config.check_machine(device, bf16=device != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False))
    for sentence in config.warnings():
        tell(Notice(sentence))
    best_manifest(config.run_dir)  # refuses before a folder is made for the lock
    with only_trainer(config.run_dir) if accelerator.is_main_process else nullcontext():
        try:
            with full_disk_is_a_sentence(config.run_dir):
                return _run(prepare(config, accelerator, tell), tell)
        except BaseException as error:
            if is_out_of_memory(error):
                error = out_of_memory(error, config)
            if accelerator.is_main_process:
                _try_status(config.run_dir, error)
            if isinstance(error, UserError):
                raise error from None
            raise
        finally:
            release()


# --- the loop ----------------------------------------------------------------------------------------------------


def _run(job: Job, on_event) -> Run:
    """From the newest checkpoint to the end: step, log, save, validate; then export."""
    config, main = job.config, job.accelerator.is_main_process
    began = time.monotonic()
    if main and config.copy_checkpoints_to:
        bring_back(_copies_folder(config), config.run_dir / CHECKPOINTS, on_event)
    job.accelerator.wait_for_everyone()
    step, window = resume(job, on_event)
    if step > config.max_steps:
        on_event(Notice(f"The run is at step {step} already, beyond max_steps {config.max_steps}: nothing is left to train."))
    validator = _validator(job)
    before = runlog.read_status(config.run_dir).get("seconds", 0.0) if step else 0.0  # what earlier sessions took
    if main:
        check_space(config.run_dir, _bytes_needed(job), "The run")
        config.save()
        set_aside(config.run_dir / CHECKPOINTS, after=step)
        metrics = Metrics(config.run_dir, step)
        write_status(config.run_dir, "running", step=step, max_steps=config.max_steps, seconds=before)
    start_trackers(job.accelerator, config.run_dir, config.model_dump())
    if main and _validates(config, step) and not (step and validator.has(step)):  # or a kill came between save and pictures
        validator.draw(step, on_event)
    first, checked, loss, told = step, False, None, began
    with stop_on_interrupt() as wants_to_stop:
        while step < config.max_steps:
            started = time.perf_counter()
            loss, draws = _fitting(job, step, on_event)
            loss, stop = synchronise(job, loss, wants_to_stop())
            norm = optimise(job, step)
            checked = checked or check_learning(job, step, draws)
            job.optimizer.zero_grad(set_to_none=True)
            step += 1
            rate, epoch = job.optimizer.param_groups[0]["lr"], step * job.batch / len(job.samples)
            window.append(loss)
            last = step == config.max_steps or stop
            if main:
                on_event(Stepped(step, loss, rate, epoch, time.perf_counter() - started))
            if main and (step % config.log_every == 0 or step == config.max_steps):
                row = {"loss": sum(window) / len(window), "learning_rate": rate, "epoch": epoch, "grad_norm": norm}
                window.clear()
                metrics.write(step=step, **row)
                job.accelerator.log(row, step=step)
                now = time.monotonic()
                if now - told > STATUS_EVERY_S:
                    told, left = now, (now - began) / (step - first) * (config.max_steps - step)
                    write_status(config.run_dir, "running", step=step, max_steps=config.max_steps, loss=row["loss"],
                                 seconds_left=round(left, 1), seconds=round(before + now - began, 1))  # fmt: skip
            if main and (step % config.save_every == 0 or last):
                path = save(job, step, window)
                on_event(Saved(step, path))
                _copy_away(config, path, on_event)
            if main and _validates(config, step):
                validator.draw(step, on_event)
            if stop and step < config.max_steps:
                on_event(Notice(f"Interrupted: step {step} is saved; run again to go on."))
                break
    return _finish(job, validator, step, loss, before, time.monotonic() - began, step - first, on_event)


def _validates(config: Config, step: int) -> bool:
    return bool(config.validate_every) and (step % config.validate_every == 0 or step == config.max_steps)


def _fitting(job: Job, step: int, on_event) -> tuple[float, list]:
    """`accumulate`; with auto_fit, out of memory halves the micro-batch, and the same draws are taken in more parts."""
    while True:
        try:
            return accumulate(job, step)
        except Exception as error:
            if not (is_out_of_memory(error) and job.config.auto_fit and job.micro_batch > 1):
                raise
        job.optimizer.zero_grad(set_to_none=True)
        release()
        job.micro_batch //= 2
        on_event(Notice(f"Out of memory: going on with micro-batches of {job.micro_batch}; the order of the data is the same."))


@contextmanager
def stop_on_interrupt():
    """Yields a callable that says whether Ctrl-C (or the notebook's stop button) was pressed; a second press interrupts."""
    pressed = threading.Event()
    if threading.current_thread() is not threading.main_thread():  # signals belong to the main thread
        yield pressed.is_set
        return
    before = signal.getsignal(signal.SIGINT)

    def press(number, frame):
        pressed.set()
        signal.signal(signal.SIGINT, before)

    signal.signal(signal.SIGINT, press)
    try:
        yield pressed.is_set
    finally:
        signal.signal(signal.SIGINT, before)


# --- keeping and going on ----------------------------------------------------------------------------------------


def save(job: Job, step: int, window: list[float]) -> Path:
    """A checkpoint of everything that the next step depends on."""
    modules = [module for part, model in job.parts.items() for module in lora_of(model, part)]
    tensors, settings = diffusers_tensors(modules, torch.float32)
    optimizer, tree = pack_state(job.optimizer)
    state = {
        "step": step, "config": job.config.model_dump(), "batch": job.batch, "identity": job.identity,
        "window": window, "scaler": job.scaler.state_dict(), "optimizer": tree,
    }  # fmt: skip
    header = {"format": "pt", "lora_adapter_metadata": json.dumps(settings, sort_keys=True)}
    folder = job.config.run_dir / CHECKPOINTS
    return save_checkpoint(folder, step, (tensors, header), optimizer, state, job.config.save_total_limit)


def _copies_folder(config: Config) -> Path:
    return project_root() / Path(config.copy_checkpoints_to).expanduser() / config.run_name


def _copy_away(config: Config, path: Path, on_event) -> None:
    """A second copy where the settings ask for one; a Drive that is gone is told and does not stop the run."""
    if not config.copy_checkpoints_to:
        return
    try:
        copy_checkpoint(path, _copies_folder(config), config.save_total_limit)
    except UserError as error:
        on_event(Notice(f"{error} Training goes on."))


def resume(job: Job, on_event) -> tuple[int, list[float]]:
    """Put the newest whole checkpoint into the job; returns its step and the losses since the last row of metrics."""
    folder = job.config.run_dir / CHECKPOINTS
    path = latest_checkpoint(folder, on_event)
    if path is None:
        if list_checkpoints(folder):
            on_event(Notice("No checkpoint is whole: the training begins anew."))
        return 0, []
    tensors, optimizer, state = load_checkpoint(path)
    check_continuity(job, state)
    for part, model in job.parts.items():
        own = {name.removeprefix(f"{part}."): value for name, value in tensors.items() if name.startswith(f"{part}.")}
        if part != "unet" and not hasattr(model, "text_model"):  # transformers 5 has flattened it, files have not
            own = {name.removeprefix("text_model."): value for name, value in own.items()}
        if own:
            models.load_lora_state_dict(model, own)
    unpack_state(job.optimizer, optimizer, state["optimizer"])
    job.scaler.load_state_dict(state["scaler"])
    on_event(Notice(f"Going on after step {state['step']} from {path}."))
    return state["step"], list(state["window"])


def check_continuity(job: Job, state: dict) -> None:
    """Raises UserError that names every setting, and the data or weights, in which the job differs from its checkpoint."""
    config, then = job.config.model_dump(), state["config"]
    free = FREE_TO_CHANGE if job.config.lr_scheduler in ENDLESS else FREE_TO_CHANGE - {"max_steps"}
    changed = [
        f"{name} ({then.get(name)} -> {value})"
        for name, value in config.items()
        if name not in free and json.loads(json.dumps(value)) != then.get(name)
    ]
    if job.batch != state["batch"]:
        changed.append(f"pictures a step ({state['batch']} -> {job.batch})")
    what = {"data": "the data set", "unet": "the base model", "vae": "the VAE", "text": "the text encoders"}
    changed += [what[name] for name, value in job.identity.items() if value != state["identity"].get(name)]
    if changed:
        raise UserError(f"This is not the run that {job.config.run_dir.name} began: {', '.join(changed)} changed; put it back, or take a new run_name.")  # fmt: skip


def _validator(job: Job) -> Validator:
    embeddings = job.source.embeddings
    if job.text:
        embeddings = live_embeddings(*job.text, cache.encode_caption, job.zeros_for_empty)
    return Validator(job.config, job.unet, embeddings, job.device, job.autocast)


def _bytes_needed(job: Job) -> int:
    """LoRA and the optimizer's state for every checkpoint that is kept and one more, three exports, pictures; less what
    a run that goes on has written already."""
    config, weights = job.config, sum(parameter.numel() for parameter in job.trainable.values())
    moments = {"adamw": 2 if config.use_8bit_adam else 8, "adafactor": 1, "prodigy": 16}[config.optimizer]
    kept = (config.save_total_limit or config.max_steps // config.save_every) + 1
    rounds = config.max_steps // config.validate_every + 1 if config.validate_every else 0
    pictures = rounds * len(config.prompts) * config.num_validation_images * 2 * config.resolution**2
    there = sum(file.stat().st_size for folder in (CHECKPOINTS, FOLDER) for file in (config.run_dir / folder).rglob("*") if file.is_file())
    return max(0, weights * (kept * (4 + moments) + 8) + pictures - there)


def _finish(job: Job, validator: Validator, step: int, loss, before: float, seconds: float, steps_done: int, on_event) -> Run:
    """Export a finished run, write summary and status. `before`: seconds of earlier sessions, `seconds`: of this one."""
    config = job.config
    finished = step >= config.max_steps
    status, export = "finished" if finished else "interrupted", None
    if job.accelerator.is_main_process:
        if finished:
            export = _export(job, step, validator, on_event)
        prune(config.run_dir / CHECKPOINTS, config.save_total_limit)
        kept = [number for number, _ in list_checkpoints(config.run_dir / CHECKPOINTS)]
        if loss is None and (rows := runlog.read_metrics(config.run_dir)):  # nothing was left to do
            loss = rows[-1]["loss"]
        if steps_done or not (config.run_dir / runlog.SUMMARY).is_file():  # else that of the session which trained stays
            write_summary(config.run_dir, _summary(job, f"{status} at step {step}", loss, seconds, steps_done, kept))
        write_status(config.run_dir, status, step=step, max_steps=config.max_steps, loss=loss, seconds=round(before + (seconds if steps_done else 0), 1))
    if job.accelerator.log_with:
        job.accelerator.end_training()
    job.accelerator.wait_for_everyone()
    checkpoints = tuple(path for _, path in list_checkpoints(config.run_dir / CHECKPOINTS))
    return Run(config.run_dir, status, step, loss, seconds, checkpoints, export)


def _summary(job: Job, status: str, loss, seconds: float, steps_done: int, kept: list[int]) -> dict[str, object]:
    """The lines of training_summary.txt."""
    config = job.config
    pace = f"{1000 * seconds / steps_done:.0f} ms, validation and saving included" if steps_done else "none were left to do"
    arithmetic = "fp32" if config.mixed_precision == "no" else config.mixed_precision
    return {
        "run": config.run_name, "status": f"{status} of {config.max_steps}", "base": config.base_model,
        "device": f"{job.device.type}, {job.accelerator.num_processes} process(es), {config.precision} base, {arithmetic} arithmetic",
        "pictures": f"{len(job.samples)}, {config.resolution} px, {job.batch} a step, "
        + ("from the cache" if job.source.cached else "encoded while training"),
        "LoRA": f"rank {config.lora_rank}, alpha {config.lora_alpha:g}, {sum(p.numel() for p in job.trainable.values()):,} weights in {config.lora_target_modules}",
        "time": f"{seconds:.0f} s in this session, {steps_done} steps", "a step": pace,
        "peak memory": f"{peak_memory(job.device):.2f} GiB", "last loss": loss, "checkpoints": kept,
        "settings": "; ".join(f"{name} {value}" for name, _, value, _ in config.differences()),
    }  # fmt: skip


def _export(job: Job, step: int, validator: Validator, on_event) -> ExportResult:
    text_encoders = tuple(encoder if _has_lora(encoder) else None for encoder in job.text[1]) if job.text else (None, None)
    picture = validator.picture_road(job.text[1] if any(text_encoders) else (), on_event)
    prediction = job.noise_scheduler.config.prediction_type
    return export_trained(job.config, job.unet, text_encoders, step, prediction, picture=picture, on_event=on_event)


def _has_lora(model) -> bool:
    return any("lora_A" in name for name, _ in model.named_parameters())


def _try_status(run_dir, error) -> None:
    status = "failed" if isinstance(error, Exception) else "stopped"  # a second Ctrl-C, or the kernel's end
    now = runlog.read_status(run_dir)
    if now.get("status") in ("finished", "interrupted"):  # refused before anything began: what the run said stays true
        return
    kept = {name: now[name] for name in ("step", "max_steps", "seconds") if name in now}
    try:
        write_status(run_dir, status, **kept, error=f"{error}" if isinstance(error, UserError) else f"{type(error).__name__}: {error}")
    except (OSError, UserError):
        pass  # the disk is full: what failed is already on its way to the user
