"""The loss against diffusers' own parts, by hand."""

import pytest
import torch
from diffusers import DDPMScheduler, StableDiffusionXLPipeline
from torch.nn import functional

from lora_nb import models
from lora_nb.losses import diffusion_loss, preservation_loss, sample_posterior, scale_latents, timestep_weights

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


@pytest.fixture(scope="module")
def pipeline(tiny_base):
    return StableDiffusionXLPipeline.from_pretrained(tiny_base)


def batch(pipeline, count=3):
    generator = torch.Generator().manual_seed(0)
    latents, noise = torch.randn(2, count, 4, 8, 8, generator=generator)
    prompt_embeds, _, pooled, _ = pipeline.encode_prompt(["a", "b c", "d, e"][:count], do_classifier_free_guidance=False)
    ids = pipeline._get_add_time_ids((90, 80), (3, 5), (64, 64), torch.float32, text_encoder_projection_dim=24).repeat(count, 1)
    return latents, noise, torch.tensor([10, 500, 990][:count]), prompt_embeds, pooled, ids


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("loss_type", ["l2", "huber"])
@torch.no_grad()
def test_loss_is_the_reference(pipeline, prediction_type, loss_type):
    scheduler = DDPMScheduler(**BETAS, prediction_type=prediction_type)
    latents, noise, timesteps, prompt_embeds, pooled, ids = batch(pipeline)
    ours = diffusion_loss(
        pipeline.unet, scheduler, latents, noise, timesteps, prompt_embeds, pooled, ids, snr_gamma=5.0, loss_type=loss_type
    )
    for n, t in enumerate(timesteps.tolist()):
        alpha = scheduler.alphas_cumprod[t]
        noisy = alpha.sqrt() * latents[n] + (1 - alpha).sqrt() * noise[n]
        prediction = pipeline.unet(
            noisy[None], t, prompt_embeds[n : n + 1], added_cond_kwargs={"text_embeds": pooled[n : n + 1], "time_ids": ids[:1]}
        ).sample[0]
        velocity = alpha.sqrt() * noise[n] - (1 - alpha).sqrt() * latents[n]
        target = {"epsilon": noise[n], "v_prediction": velocity, "sample": latents[n]}[prediction_type]
        plain = functional.mse_loss(prediction, target)
        if loss_type == "huber":
            plain = (2 * 0.1 * (((prediction - target) ** 2 + 0.01).sqrt() - 0.1)).mean()
        snr = alpha / (1 - alpha)
        divisor = {"epsilon": snr, "v_prediction": snr + 1, "sample": 1}[prediction_type]
        assert torch.allclose(ours[n], plain * min(snr, torch.tensor(5.0)) / divisor, rtol=1e-4, atol=1e-6)


def test_preservation_is_the_distance_from_the_base(tiny_base, pipeline):
    scheduler, inputs = DDPMScheduler(**BETAS), batch(pipeline)
    unet = models.load_part(str(tiny_base), "unet")
    trainable = models.add_lora(unet, 4, 4, "attention")
    noisy = scheduler.add_noise(*inputs[:3])
    added = {"text_embeds": inputs[4], "time_ids": inputs[5]}

    def answer(model):
        with torch.no_grad():
            return model(noisy, inputs[2], inputs[3], added_cond_kwargs=added).sample

    assert preservation_loss(unet, scheduler, *inputs).abs().max() < 1e-10  # a new LoRA changes nothing
    for parameter in trainable:
        parameter.data += 0.05
    moved = preservation_loss(unet, scheduler, *inputs, snr_gamma=None)
    expected = (answer(unet) - answer(pipeline.unet)).square().mean((1, 2, 3))
    assert torch.allclose(moved, expected, rtol=1e-3) and expected.min() > 1e-6
    moved.sum().backward()
    assert all(parameter.requires_grad and parameter.grad.abs().sum() > 0 for parameter in trainable)


def test_weights():
    scheduler = DDPMScheduler(**BETAS)
    timesteps = torch.arange(0, 1000, 37)
    snr = models.compute_snr(scheduler, timesteps)
    assert torch.equal(timestep_weights(scheduler, timesteps, None), torch.ones(len(timesteps)))
    assert torch.allclose(timestep_weights(scheduler, timesteps, None, debiased=True), snr.clamp(max=1000) ** -0.5)
    weights = timestep_weights(scheduler, timesteps, 5.0)
    assert weights.max() == 1 and (weights[snr > 5] < 1).all() and (snr > 5).any()


def test_zero_terminal_snr_is_finite_for_v_prediction():
    scheduler = DDPMScheduler(**BETAS, prediction_type="v_prediction", rescale_betas_zero_snr=True)
    assert torch.isfinite(timestep_weights(scheduler, torch.tensor([999, 0]), 5.0)).all()


def test_posterior_and_scale():
    posterior = torch.stack([torch.full((1, 4, 2, 2), 3.0), torch.full((1, 4, 2, 2), 2.0).log() * 2], dim=1)
    assert torch.allclose(sample_posterior(posterior, torch.full((1, 4, 2, 2), 0.5)), torch.full((1, 4, 2, 2), 4.0))
    latents = torch.ones(1, 4, 2, 2)
    assert scale_latents(latents, {"scaling_factor": 0.13}).unique().item() == pytest.approx(0.13)
    assert scale_latents(latents, {"scaling_factor": 2.0, "shift_factor": 0.25}).unique().item() == pytest.approx(1.5)
    mean_std = {"scaling_factor": 1.0, "latents_mean": [1.0, 0, 0, 0], "latents_std": [1.0, 2, 4, 8]}
    assert scale_latents(latents, mean_std)[0, :, 0, 0].tolist() == [0, 0.5, 0.25, 0.125]


def test_a_pipeline_without_text_time_embedding_gets_none(pipeline):
    """`addition_embed_type` decides, not the name SDXL."""
    seen = {}

    class Spy(torch.nn.Module):
        config = type("Config", (), {"addition_embed_type": None})
        conv_in = torch.nn.Conv2d(4, 4, 1)

        def forward(self, noisy, timesteps, prompt_embeds, added_cond_kwargs, return_dict):
            seen["added"] = added_cond_kwargs
            return (noisy,)

    diffusion_loss(Spy(), DDPMScheduler(**BETAS), *batch(pipeline))
    assert seen == {"added": None}
