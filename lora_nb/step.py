"""One optimizer step: this process's draws, their loss and gradients, the update, and a look whether it learns."""

import torch

from lora_nb import models
from lora_nb.draws import Draw, draw, generator_of
from lora_nb.errors import UserError
from lora_nb.job import Job
from lora_nb.losses import diffusion_loss, preservation_loss, sample_posterior, scale_latents


def draws_at(job: Job, step: int) -> list[Draw]:
    """This process's draws of a step (from 0)."""
    config, vae = job.config, job.vae_config
    scale = 2 ** (len(vae["block_out_channels"]) - 1)
    share = job.batch // job.accelerator.num_processes
    first = job.accelerator.process_index * share
    return [
        draw(
            index, step * job.batch + place, _latent_shape(vae["latent_channels"], job.samples[index].bucket, scale),
            config.seed, flips=config.random_flip, caption_dropout=config.caption_dropout,
            noise_offset=config.noise_offset, timesteps=job.noise_scheduler.config.num_train_timesteps,
        )
        for place, index in list(enumerate(job.order.at(step)))[first : first + share]
    ]  # fmt: skip


def _latent_shape(channels, bucket, scale):
    return channels, bucket[1] // scale, bucket[0] // scale


def micro_batches(job: Job, draws: list[Draw]) -> list[list[Draw]]:
    """Draws in groups of one bucket, at most `job.micro_batch` each."""
    by_bucket: dict = {}
    for one in draws:
        by_bucket.setdefault(job.samples[one.index].bucket, []).append(one)
    size = job.micro_batch
    return [group[at : at + size] for group in by_bucket.values() for at in range(0, len(group), size)]


def losses_of(job: Job, group: list[Draw], train_text: bool = False) -> torch.Tensor:
    """Loss of each draw of a group of one bucket, float32 [B]."""
    config, device = job.config, job.device
    samples = [job.samples[one.index] for one in group]
    captions = ["" if one.drop_caption else sample.caption for one, sample in zip(group, samples, strict=True)]
    posterior = torch.stack([job.source.latents(sample, one.flip) for one, sample in zip(group, samples, strict=True)])
    latents = sample_posterior(posterior.to(device), torch.stack([one.posterior_noise for one in group]).to(device))
    ids = [models.time_ids(s.original_size, s.crop_top_left, s.target_size) for s in samples]
    noised = (
        scale_latents(latents, job.vae_config), torch.stack([one.noise for one in group]).to(device),
        torch.tensor([one.timestep for one in group], device=device),
    )  # fmt: skip
    time_ids, weighting = torch.tensor(ids, dtype=torch.float32, device=device), {"snr_gamma": config.snr_gamma, "debiased": config.debiased_estimation}
    with job.autocast():
        losses = diffusion_loss(
            job.unet, job.noise_scheduler, *noised, *_text_of(job, captions, train_text), time_ids,
            loss_type=config.loss_type, huber_c=config.huber_c, **weighting,
        )  # fmt: skip
        anybody = [config.about_anybody(sample.caption) for sample in samples]
        rows = [row for row, sample in enumerate(samples) if config.preservation_weight and anybody[row] != sample.caption]
        if rows:
            text = _text_of(job, [anybody[row] for row in rows], False)
            kept = preservation_loss(job.unet, job.noise_scheduler, *(part[rows] for part in noised), *text, time_ids[rows], **weighting)
            losses = losses.index_add(0, torch.tensor(rows, device=device), kept, alpha=config.preservation_weight)
    return losses


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


def accumulate(job: Job, step: int) -> tuple[float, list[Draw]]:
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
    if job.scaler.is_enabled() and job.scaler.get_scale() < 1:
        raise UserError(f"fp16 overflows at every step up to {step + 1}: nothing is learned; take mixed_precision bf16, or fp32 where there is none.")  # fmt: skip
    return norm


def check_learning(job: Job, step: int, draws: list[Draw]) -> bool:
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
