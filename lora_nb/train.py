"""Train the LoRA: prepare what a step needs, then the loop, which tells others through `on_event` and never prints.

A run goes on by itself from its newest whole checkpoint, to the bits of a run that was never stopped.
"""

import hashlib
import json
import signal
import threading
import time
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import torch
from accelerate import Accelerator

from lora_nb import cache, models
from lora_nb.checkpoint import (
    check_space,
    latest_checkpoint,
    list_checkpoints,
    load_checkpoint,
    prune,
    save_checkpoint,
)
from lora_nb.config import FREE_TO_CHANGE, Config
from lora_nb.draws import draw, generator_of, indices_at
from lora_nb.errors import UserError
from lora_nb.events import Notice, Saved, Stepped, ignore
from lora_nb.export import ExportResult, diffusers_tensors, export_lora
from lora_nb.files import sha256_file
from lora_nb.lora_file import lora_of
from lora_nb.losses import diffusion_loss, sample_posterior, scale_latents
from lora_nb.manifest import best_manifest, read_manifest
from lora_nb.memory import is_out_of_memory, out_of_memory, peak_memory, quantize_nf4, release, save_memory
from lora_nb.metadata import lora_metadata
from lora_nb.optimizers import build_optimizer, learning_rate_factor, pack_state, unpack_state
from lora_nb.runlog import Metrics, only_trainer, write_status, write_summary
from lora_nb.validation import Validator, live_embeddings
from lora_nb.weights import fingerprint

CHECKPOINTS = "checkpoints"
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


@dataclass
class Job:
    """Everything that a step needs. `batch` pictures make a step, over all processes and micro-batches."""

    config: Config
    accelerator: Accelerator
    source: cache.Samples
    samples: list
    unet: torch.nn.Module
    text: tuple[list, list] | None  # tokenizers and text encoders, if these are trained
    noise_scheduler: object
    vae_config: dict
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    trainable: dict[str, torch.nn.Parameter]
    rate_factor: object
    zeros_for_empty: bool
    batch: int
    micro_batch: int
    identity: dict  # hashes of data and weights, which a continuation must share
    base_rates: list[float] = field(default_factory=list)

    @property
    def device(self) -> torch.device:
        return self.accelerator.device

    def autocast(self):
        """Half-precision arithmetic where the settings ask for it."""
        if self.config.mixed_precision == "no":
            return nullcontext()
        return torch.autocast(self.device.type, models.DTYPES[self.config.mixed_precision])


def train(config: Config, on_event=ignore) -> Run:
    """Train until max_steps, or until interrupted, and export; a run that has begun goes on by itself.

    Needs the manifest of notebook 01 in `config.run_dir`; takes latents and embeddings from notebook 02 if they are
    there, else encodes as it goes. Under `accelerate launch` all processes call this. Raises UserError.
    """
    trackers = [name for name, wanted in {"wandb": config.use_wandb, "tensorboard": config.use_tensorboard}.items() if wanted]
    accelerator = Accelerator(log_with=trackers or None, project_dir=str(config.run_dir / "logs"))
    tell = on_event if accelerator.is_main_process else ignore
    device = accelerator.device.type
    config.check_machine(device, bf16=device != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False))
    for sentence in config.warnings():
        tell(Notice(sentence))
    with only_trainer(config.run_dir) if accelerator.is_main_process else nullcontext():
        try:
            job = prepare(config, accelerator, tell)
            return _run(job, tell)
        except BaseException as error:
            if is_out_of_memory(error):
                error = out_of_memory(error, config)
            if accelerator.is_main_process:
                _try_status(config.run_dir, error)
            if isinstance(error, UserError):
                raise error from None
            raise


# --- preparing ---------------------------------------------------------------------------------------------------


def prepare(config: Config, accelerator: Accelerator, on_event=ignore) -> Job:
    """Load the base, add LoRA, open the data, build the optimizer; nothing is trained yet."""
    half = models.DTYPES.get(config.precision) or models.DTYPES.get(config.mixed_precision, torch.float32)
    noise_scheduler = models.load_part(config.base_model, "noise_scheduler")
    _check_prediction(noise_scheduler, config)
    source, identity = _open_data(config, accelerator, half, on_event)
    samples = [sample for sample in source.manifest.train() for _ in range(sample.repeats)]
    if not samples:
        raise UserError(f"The manifest in {config.run_dir} has no pictures to train on: run notebook 01 again and see its findings.")

    unet, text, groups = _load_trainable(config, accelerator.device, half)
    trainable = {name: parameter for _, parameters in groups for name, parameter in parameters.items()}
    optimizer = build_optimizer(
        config.optimizer, [{"params": list(parameters.values()), "lr": rate} for rate, parameters in groups],
        use_8bit_adam=config.use_8bit_adam, betas=(config.adam_beta1, config.adam_beta2),
        epsilon=config.adam_epsilon, weight_decay=config.weight_decay,
    )  # fmt: skip
    job = Job(
        config, accelerator, source, samples, unet, text, noise_scheduler,
        models.vae_config(config.base_model, config.vae_model), optimizer,
        torch.amp.GradScaler(accelerator.device.type, enabled=config.mixed_precision == "fp16"), trainable,
        learning_rate_factor(config.lr_scheduler, config.lr_warmup_steps, config.max_steps, config.learning_rate,
                             config.lr_num_cycles, config.lr_power),
        models.zeros_for_empty_prompt(config.base_model),
        batch=config.batch_size * config.gradient_accumulation_steps * accelerator.num_processes,
        micro_batch=config.batch_size, identity=identity, base_rates=[rate for rate, _ in groups],
    )  # fmt: skip
    _check_frozen(job)
    return job


def _check_prediction(noise_scheduler, config) -> None:
    settings = noise_scheduler.config
    if settings.prediction_type not in ("epsilon", "v_prediction", "sample"):
        raise UserError(f"{config.base_model} predicts {settings.prediction_type!r} (scheduler_config.json), which this engine cannot train.")
    zero_terminal = noise_scheduler.alphas_cumprod[-1] < 1e-6
    if zero_terminal and settings.prediction_type == "epsilon" and (config.snr_gamma or config.debiased_estimation):
        raise UserError(
            f"{config.base_model} has zero terminal SNR and predicts epsilon: weights by SNR are not finite there; "
            "set snr_gamma: null and debiased_estimation: false, or correct prediction_type in its scheduler_config.json."
        )


def _open_data(config, accelerator, dtype, on_event):
    """Where latents and embeddings come from, and the hashes that a continuation must share."""
    manifest = read_manifest(best_manifest(config.run_dir))
    if manifest.metadata.resolution != config.resolution:
        raise UserError(f"The manifest is for {manifest.metadata.resolution} px and resolution is {config.resolution}: run notebook 01 again with the same settings.")  # fmt: skip
    if not config.buckets and any(width != height for width, height in (sample.bucket for sample in manifest.train())):
        raise UserError("buckets is false and the manifest has pictures that are not square: run notebook 01 again with the same settings.")  # fmt: skip
    weights = cache.weights_of(config.base_model, config.vae_model)
    device, stay = accelerator.device, not config.enable_cpu_offload
    if any(sample.latent_path for sample in manifest.samples):
        source = cache.cached_samples(manifest, weights, config.random_flip)
        if not config.train_text_encoder and accelerator.is_main_process:
            wanted = ["", config.validation_negative_prompt, *config.prompts]
            if made := cache.encode_captions(manifest.folder, wanted, config.base_model, weights, dtype, device, on_event):
                on_event(Notice(f"{made} new prompts were encoded and added to the cache."))
                release()
        accelerator.wait_for_everyone()
    else:
        on_event(Notice("There are no cached latents: pictures and captions are encoded as training goes."))
        source = cache.fresh_samples(manifest, config.base_model, config.vae_model, dtype=dtype, device=device, stay=stay)
    seen = [[s.sha256, s.caption, s.repeats, s.bucket, s.crop_top_left, s.split] for s in manifest.samples]
    data = hashlib.sha256(json.dumps(seen).encode()).hexdigest()[:16]
    return source, {"data": data, "unet": fingerprint(config.base_model, "unet"), "vae": weights.vae, "text": weights.text}


def _load_trainable(config, device, dtype):
    """The UNet and, if they are trained, tokenizers and text encoders; and (learning rate, named parameters) groups."""
    lora = {"rank": config.lora_rank, "alpha": config.lora_alpha, "dropout": config.lora_dropout, "rslora": config.use_rslora}
    unet = models.load_part(config.base_model, "unet", dtype)
    if config.precision == "nf4":
        quantize_nf4(unet, dtype)
    unet.to(device)
    models.add_lora(unet, targets=config.lora_target_modules, seed=config.seed, **lora)
    save_memory(unet.train(), config.gradient_checkpointing, config.enable_xformers)
    groups = [(config.learning_rate, _trainable(unet, "unet"))]
    if not config.train_text_encoder:
        return unet, None, groups
    tokenizers, text_encoders = models.load_text_encoders(config.base_model, dtype, device)
    rates = config.text_encoder_learning_rates
    for number, (text_encoder, rate) in enumerate(zip(text_encoders, rates, strict=True), start=1):
        if not rate:
            continue
        models.add_lora(text_encoder, targets=models.TEXT_TARGETS, seed=config.seed + number, **lora)
        save_memory(text_encoder, config.gradient_checkpointing)
        if number == 1:  # SDXL reads the last but one layer of encoder 1: its last layer never gets a gradient
            text_encoder.get_submodule(_last_layer(text_encoder)).requires_grad_(False)
        groups.append((rate, _trainable(text_encoder, "text_encoder" if number == 1 else "text_encoder_2")))
    return unet, (tokenizers, text_encoders), groups


def _trainable(model, part) -> dict:
    return {f"{part}.{name}": parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def _last_layer(text_encoder) -> str:
    suffix = f"encoder.layers.{text_encoder.config.num_hidden_layers - 1}"
    return next(name for name, _ in text_encoder.named_modules() if name.endswith(suffix))


def _check_frozen(job) -> None:
    """Only the LoRA may learn."""
    modules = [job.unet, *(job.text[1] if job.text else [])]
    learning = {id(parameter) for module in modules for parameter in module.parameters() if parameter.requires_grad}
    if learning != {id(parameter) for parameter in job.trainable.values()}:
        raise RuntimeError("weights of the base require gradients, or LoRA weights do not")


# --- one step ----------------------------------------------------------------------------------------------------


def draws_at(job: Job, step: int) -> list:
    """This process's draws of a step (from 0)."""
    config, vae = job.config, job.vae_config
    scale = 2 ** (len(vae["block_out_channels"]) - 1)
    share = job.batch // job.accelerator.num_processes
    first = job.accelerator.process_index * share
    indices = indices_at(step, tuple(sample.bucket for sample in job.samples), job.batch, config.seed)
    return [
        draw(
            index, step * job.batch + place, _latent_shape(vae["latent_channels"], job.samples[index].bucket, scale),
            config.seed, flips=config.random_flip, caption_dropout=config.caption_dropout,
            noise_offset=config.noise_offset, timesteps=job.noise_scheduler.config.num_train_timesteps,
        )
        for place, index in list(enumerate(indices))[first : first + share]
    ]  # fmt: skip


def _latent_shape(channels, bucket, scale):
    return channels, bucket[1] // scale, bucket[0] // scale


def micro_batches(job: Job, draws: list) -> list[list]:
    """Draws in groups of one bucket, at most `job.micro_batch` each."""
    by_bucket: dict = {}
    for one in draws:
        by_bucket.setdefault(job.samples[one.index].bucket, []).append(one)
    size = job.micro_batch
    return [group[at : at + size] for group in by_bucket.values() for at in range(0, len(group), size)]


def losses_of(job: Job, group: list, train_text: bool = False) -> torch.Tensor:
    """Loss of each draw of a group of one bucket, float32 [B]."""
    config, device = job.config, job.device
    samples = [job.samples[one.index] for one in group]
    captions = ["" if one.drop_caption else sample.caption for one, sample in zip(group, samples, strict=True)]
    posterior = torch.stack([job.source.latents(sample, one.flip) for one, sample in zip(group, samples, strict=True)])
    latents = sample_posterior(posterior.to(device), torch.stack([one.posterior_noise for one in group]).to(device))
    ids = [models.time_ids(s.original_size, s.crop_top_left, s.target_size) for s in samples]
    with job.autocast():
        prompt_embeds, pooled_prompt_embeds = _text_of(job, captions, train_text)
        return diffusion_loss(
            job.unet, job.noise_scheduler, scale_latents(latents, job.vae_config),
            torch.stack([one.noise for one in group]).to(device),
            torch.tensor([one.timestep for one in group], device=device),
            prompt_embeds, pooled_prompt_embeds, torch.tensor(ids, dtype=torch.float32, device=device),
            snr_gamma=config.snr_gamma, debiased=config.debiased_estimation, loss_type=config.loss_type, huber_c=config.huber_c,
        )  # fmt: skip


def _text_of(job, captions, train_text):
    if job.text is None:
        pairs = [job.source.embeddings(caption) for caption in captions]
        return tuple(torch.stack(parts).to(job.device) for parts in zip(*pairs, strict=True))
    with torch.set_grad_enabled(train_text):
        embeds = models.encode_prompts(*job.text, captions)
    if job.zeros_for_empty:
        said = torch.tensor([bool(caption) for caption in captions], device=job.device)
        embeds = tuple(part * said.view(-1, *[1] * (part.ndim - 1)) for part in embeds)
    return embeds


def accumulate(job: Job, step: int) -> tuple[float, list]:
    """Gradients of a step's mean loss, from all micro-batches and processes. Returns that loss and this process's draws."""
    config, draws = job.config, draws_at(job, step)
    train_text = job.text is not None and step < (config.text_encoder_stop_step or float("inf"))
    seen = []
    for number, group in enumerate(micro_batches(job, draws)):
        if config.lora_dropout:
            torch.manual_seed(generator_of(config.seed, "dropout", step, number, job.accelerator.process_index).initial_seed())
        losses = losses_of(job, group, train_text)
        job.scaler.scale(losses.sum() / job.batch).backward()
        seen += zip(group, losses.detach(), strict=True)
    values = torch.stack([loss for _, loss in seen]).tolist()
    bad = [(one, value) for (one, _), value in zip(seen, values, strict=True) if not -float("inf") < value < float("inf")]
    if bad:
        named = ", ".join(f"{job.samples[one.index].image_path} at timestep {one.timestep}" for one, _ in bad)
        raise UserError(f"The loss of step {step + 1} is not finite ({named}): nothing was updated; look at these pictures, lower learning_rate, or take bf16 for fp16.")  # fmt: skip
    return sum(values) / job.batch, draws


def synchronise(job: Job, loss: float, stop: bool) -> tuple[float, bool]:
    """Add up gradients and loss of all processes in one message; any that wants to stop stops all."""
    if job.accelerator.num_processes == 1:
        return loss, stop
    parameters = [parameter for parameter in job.trainable.values() if parameter.grad is not None]
    flat = torch.cat([*(p.grad.flatten() for p in parameters), torch.tensor([loss, float(stop)], device=job.device)])
    flat = job.accelerator.reduce(flat, reduction="sum")
    for parameter, grad in zip(parameters, flat[:-2].split([p.numel() for p in parameters]), strict=True):
        parameter.grad.copy_(grad.view_as(parameter))
    return flat[-2].item(), bool(flat[-1])


def optimise(job: Job, step: int) -> float:
    """Clip and apply the gradients at the learning rates of `step`; returns their norm."""
    for group, rate in zip(job.optimizer.param_groups, job.base_rates, strict=True):
        group["lr"] = rate * job.rate_factor(step)
    job.scaler.unscale_(job.optimizer)
    norm = torch.nn.utils.clip_grad_norm_(job.trainable.values(), job.config.max_grad_norm or float("inf")).item()
    if not -float("inf") < norm < float("inf") and not job.scaler.is_enabled():
        raise UserError(f"The gradient of step {step + 1} is not finite: nothing was updated; lower learning_rate, or take bf16 for fp16.")
    job.scaler.step(job.optimizer)  # skips the update where fp16 overflowed, and update() lowers the scale
    job.scaler.update()
    return norm


def check_learning(job: Job, step: int, draws: list) -> bool:
    """After an early step: every LoRA weight has a finite gradient, and those that have one moved.

    Returns whether there was something to see: with a learning rate of 0 (warm-up), or captions all dropped, a later
    step is looked at. Raises UserError that names what does not learn.
    """
    resting = job.text is not None and step >= (job.config.text_encoder_stop_step or float("inf"))
    parts = ("unet.",) if resting else ("unet.", "text_encoder")
    watched = {name: parameter for name, parameter in job.trainable.items() if name.startswith(parts)}
    lost = [name for name, parameter in watched.items() if parameter.grad is None or not torch.isfinite(parameter.grad).all()]
    if lost and not job.scaler.is_enabled():
        raise UserError(f"{len(lost)} of {len(watched)} LoRA weights got no finite gradient, {lost[0]} first: they would not learn; try another lora_target_modules or precision.")  # fmt: skip
    if lost or job.optimizer.param_groups[0]["lr"] == 0 or all(one.drop_caption for one in draws):
        return False
    still = [name for name, p in watched.items() if "lora_B" in name and p.grad.any() and not p.any()]
    if still:
        raise UserError(f"{len(still)} LoRA modules have a gradient and did not move, {still[0]} first: raise learning_rate or change optimizer.")  # fmt: skip
    return True


# --- the loop ----------------------------------------------------------------------------------------------------


def _run(job: Job, on_event) -> Run:
    """From the newest checkpoint to the end: step, log, save, validate; then export."""
    config, main = job.config, job.accelerator.is_main_process
    began = time.monotonic()
    step, window = resume(job, on_event)
    validator = _validator(job)
    if main:
        check_space(config.run_dir, _bytes_needed(job), "The run")
        config.save()
        metrics = Metrics(config.run_dir, step)
        if step == 0 and config.validate_every:
            validator.draw(0, on_event)
    if job.accelerator.log_with:
        job.accelerator.init_trackers("lora_nb", {name: str(value) for name, value in config.model_dump().items()})
    first, checked, loss = step, False, None
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
                pace = (time.monotonic() - began) / (step - first)
                write_status(config.run_dir, "running", step=step, max_steps=config.max_steps, loss=row["loss"],
                             seconds_left=round(pace * (config.max_steps - step), 1), seconds=round(time.monotonic() - began, 1))  # fmt: skip
            if main and (step % config.save_every == 0 or last):
                on_event(Saved(step, save(job, step, window)))
            if main and config.validate_every and (step % config.validate_every == 0 or step == config.max_steps):
                validator.draw(step, on_event)
            if stop and step < config.max_steps:
                on_event(Notice(f"Interrupted: step {step} is saved; run again to go on."))
                break
    return _finish(job, step, loss, time.monotonic() - began, step - first, on_event)


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


def adapters(job: Job) -> list:
    """The LoRA modules of the UNet and of the text encoders that have one."""
    models_by_part = {"unet": job.unet}
    if job.text:
        models_by_part |= dict(zip(("text_encoder", "text_encoder_2"), job.text[1], strict=True))
    return [module for part, model in models_by_part.items() for module in lora_of(model, part)]


def save(job: Job, step: int, window: list[float]) -> Path:
    """A checkpoint of everything that the next step depends on."""
    tensors, settings = diffusers_tensors(adapters(job), torch.float32)
    optimizer, tree = pack_state(job.optimizer)
    state = {
        "step": step, "config": job.config.model_dump(), "batch": job.batch, "identity": job.identity,
        "window": window, "scaler": job.scaler.state_dict(), "optimizer": tree,
    }  # fmt: skip
    header = {"format": "pt", "lora_adapter_metadata": json.dumps(settings, sort_keys=True)}
    folder = job.config.run_dir / CHECKPOINTS
    return save_checkpoint(folder, step, (tensors, header), optimizer, state, job.config.save_total_limit)


def resume(job: Job, on_event) -> tuple[int, list[float]]:
    """Put the newest whole checkpoint into the job; returns its step and the losses since the last row of metrics."""
    folder = job.config.run_dir / CHECKPOINTS
    path = latest_checkpoint(folder, on_event)
    if path is None:
        return 0, []
    tensors, optimizer, state = load_checkpoint(path)
    check_continuity(job, state)
    parts = {"unet": job.unet} | (dict(zip(("text_encoder", "text_encoder_2"), job.text[1], strict=True)) if job.text else {})
    for part, model in parts.items():
        own = {name.removeprefix(f"{part}."): value for name, value in tensors.items() if name.startswith(f"{part}.")}
        if own:
            flat = part != "unet" and not hasattr(model, "text_model")
            models.load_lora_state_dict(model, {name.removeprefix("text_model.") if flat else name: value for name, value in own.items()})
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
    """LoRA and two moments for every checkpoint that is kept and one more, three exports, pictures."""
    config, weights = job.config, sum(parameter.numel() for parameter in job.trainable.values())
    kept = (config.save_total_limit or config.max_steps // config.save_every) + 1
    rounds = config.max_steps // config.validate_every + 1 if config.validate_every else 0
    pictures = rounds * len(config.prompts) * config.num_validation_images * 2 * config.resolution**2
    return weights * (kept * (4 + (2 if config.use_8bit_adam else 8)) + 8) + pictures


def _finish(job: Job, step: int, loss, seconds: float, steps_done: int, on_event) -> Run:
    """Export a finished run, write summary and status."""
    config = job.config
    finished = step >= config.max_steps
    status, export = "finished" if finished else "interrupted", None
    if job.accelerator.is_main_process:
        if finished:
            export = _export(job, step, on_event)
        prune(config.run_dir / CHECKPOINTS, config.save_total_limit)
        kept = [number for number, _ in list_checkpoints(config.run_dir / CHECKPOINTS)]
        pace = f"{1000 * seconds / steps_done:.0f} ms, validation and saving included" if steps_done else "none were left to do"
        write_summary(config.run_dir, {
            "run": config.run_name, "status": f"{status} at step {step} of {config.max_steps}", "base": config.base_model,
            "device": f"{job.device.type}, {job.accelerator.num_processes} process(es), {config.precision} base, {config.mixed_precision} arithmetic",
            "pictures": f"{len(job.samples)}, {config.resolution} px, {job.batch} a step, "
            + ("from the cache" if job.source.cached else "encoded while training"),
            "LoRA": f"rank {config.lora_rank}, alpha {config.lora_alpha:g}, {sum(p.numel() for p in job.trainable.values()):,} weights in {config.lora_target_modules}",
            "time": f"{seconds:.0f} s in this session, {steps_done} steps", "a step": pace,
            "peak memory": f"{peak_memory(job.device):.2f} GiB", "last loss": loss, "checkpoints": kept,
            "settings": "; ".join(f"{name} {value}" for name, _, value, _ in config.differences()),
        })  # fmt: skip
        write_status(config.run_dir, status, step=step, max_steps=config.max_steps, loss=loss, seconds=round(seconds, 1))
    if job.accelerator.log_with:
        job.accelerator.end_training()
    job.accelerator.wait_for_everyone()
    checkpoints = tuple(path for _, path in list_checkpoints(config.run_dir / CHECKPOINTS))
    return Run(config.run_dir, status, step, loss, seconds, checkpoints, export)


def _export(job: Job, step: int, on_event) -> ExportResult:
    config, manifest = job.config, best_manifest(job.config.run_dir)
    text_encoders = tuple(encoder if _has_lora(encoder) else None for encoder in job.text[1]) if job.text else (None, None)
    metadata = lora_metadata(
        config.run_name, config.model_dump(), steps=step, captions=[sample.caption for sample in job.samples],
        buckets=[sample.bucket for sample in job.samples], manifest_sha256=sha256_file(manifest),
        prediction_type=job.noise_scheduler.config.prediction_type,
    )  # fmt: skip
    return export_lora(
        config.run_dir / "final", job.unet, text_encoders, run_name=config.run_name, metadata=metadata,
        dtype=config.export_dtype, on_event=on_event,
    )  # fmt: skip


def _has_lora(model) -> bool:
    return any("lora_A" in name for name, _ in model.named_parameters())


def _try_status(run_dir, error) -> None:
    try:
        write_status(run_dir, "failed", error=f"{error}" if isinstance(error, UserError) else f"{type(error).__name__}: {error}")
    except (OSError, UserError):
        pass  # the disk is full: what failed is already on its way to the user
