"""The loss of a step: noised latents in, one number a picture out. Everything model-specific is read from configs."""

import torch

from lora_nb.models import compute_snr, without_lora


def sample_posterior(posterior, noise):
    """Latents drawn from the VAE's posterior. posterior: [B, 2, C, h, w], mean and log-variance; noise: [B, C, h, w]."""
    mean, logvar = posterior.unbind(1)
    return mean + torch.exp(0.5 * logvar.clamp(-30.0, 20.0)) * noise


def scale_latents(latents, vae_config: dict):
    """From the VAE's units to the UNet's, by scaling_factor, and shift_factor or latents_mean and _std where set."""
    scaling = vae_config.get("scaling_factor", 0.18215)
    if vae_config.get("latents_mean") is not None:
        mean, std = (torch.tensor(vae_config[name], device=latents.device).view(1, -1, 1, 1) for name in ("latents_mean", "latents_std"))  # fmt: skip
        return (latents - mean) * scaling / std
    return (latents - (vae_config.get("shift_factor") or 0.0)) * scaling


def diffusion_loss(
    unet, noise_scheduler, latents, noise, timesteps, prompt_embeds, pooled_prompt_embeds, time_ids,
    *, snr_gamma=5.0, debiased=False, loss_type="l2", huber_c=0.1,
):  # fmt: skip
    """Loss of each picture, float32 [B].

    latents, noise: [B, C, h, w], scaled; timesteps: int64 [B]; prompt_embeds: [B, 77, D]; pooled_prompt_embeds: [B, P];
    time_ids: [B, 6]. What is predicted (epsilon, v or sample) follows from the scheduler's config.
    """
    noisy = noise_scheduler.add_noise(latents, noise, timesteps)
    prediction = predict(unet, noisy, timesteps, prompt_embeds, pooled_prompt_embeds, time_ids)
    target = _target(noise_scheduler, latents, noise, timesteps).float()
    error = (prediction - target).square()
    if loss_type == "huber":
        error = 2 * huber_c * ((error + huber_c**2).sqrt() - huber_c)
    return error.mean(dim=(1, 2, 3)) * timestep_weights(noise_scheduler, timesteps, snr_gamma, debiased)


def preservation_loss(
    unet, noise_scheduler, latents, noise, timesteps, prompt_embeds, pooled_prompt_embeds, time_ids, *, snr_gamma=5.0, debiased=False,
):  # fmt: skip
    """How far the LoRA moves the base's own answer to prompts that do not call the character, float32 [B].

    The same shapes as `diffusion_loss`; the target is what the UNet says without its LoRA. ai-toolkit calls this
    differential output preservation.
    """
    inputs = noise_scheduler.add_noise(latents, noise, timesteps), timesteps, prompt_embeds, pooled_prompt_embeds, time_ids
    with torch.no_grad(), without_lora(unet):
        target = predict(unet, *inputs)
    error = (predict(unet, *inputs) - target).square()
    return error.mean(dim=(1, 2, 3)) * timestep_weights(noise_scheduler, timesteps, snr_gamma, debiased)


def predict(unet, noisy, timesteps, prompt_embeds, pooled_prompt_embeds, time_ids):
    """The UNet's answer to noised latents, float32 [B, C, h, w]."""
    dtype = unet.conv_in.weight.dtype
    added = {"text_embeds": pooled_prompt_embeds.to(dtype), "time_ids": time_ids}
    return unet(
        noisy.to(dtype), timesteps, prompt_embeds.to(dtype), return_dict=False,
        added_cond_kwargs=added if unet.config.addition_embed_type == "text_time" else None,
    )[0].float()  # fmt: skip


def timestep_weights(noise_scheduler, timesteps, snr_gamma=5.0, debiased=False):
    """Weight of each timestep [B]: min-SNR (Hang et al. 2023), debiased (Yu et al. 2023) or one.

    v-prediction's loss is already (SNR + 1) times epsilon's seen from the picture, hence the other divisor.
    """
    if snr_gamma is None and not debiased:
        return torch.ones_like(timesteps, dtype=torch.float32)
    snr = compute_snr(noise_scheduler, timesteps).float()
    prediction_type = noise_scheduler.config.prediction_type
    if debiased:
        return 1 / (snr + 1) if prediction_type == "v_prediction" else snr.clamp(max=1000).rsqrt()
    divisor = {"epsilon": snr, "v_prediction": snr + 1, "sample": torch.ones_like(snr)}[prediction_type]
    return snr.clamp(max=snr_gamma) / divisor


def _target(noise_scheduler, latents, noise, timesteps):
    prediction_type = noise_scheduler.config.prediction_type
    if prediction_type == "v_prediction":
        return noise_scheduler.get_velocity(latents, noise, timesteps)
    return {"epsilon": noise, "sample": latents}[prediction_type]
