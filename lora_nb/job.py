"""What a training needs before its first step: base, LoRA, data and optimizer, loaded, joined and checked."""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property

import torch
from accelerate import Accelerator

from lora_nb import cache, models
from lora_nb.config import Config, resolve_path
from lora_nb.draws import Order
from lora_nb.errors import UserError
from lora_nb.events import Notice, ignore
from lora_nb.manifest import best_manifest, read_manifest
from lora_nb.memory import quantize_nf4, release, save_memory
from lora_nb.models import DDPMScheduler
from lora_nb.optimizers import build_optimizer, learning_rate_factor
from lora_nb.start_lora import start_from_lora
from lora_nb.weights import fingerprint


@dataclass
class Job:
    """Everything that a step needs. `batch` pictures make a step, over all processes and micro-batches."""

    config: Config
    accelerator: Accelerator
    source: cache.Samples
    samples: list
    unet: torch.nn.Module
    text: tuple[list, list] | None  # tokenizers and text encoders, if these are trained
    noise_scheduler: DDPMScheduler
    vae_config: dict
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    trainable: dict[str, torch.nn.Parameter]  # by part and name
    rate_factor: Callable[[int], float]  # of the base rates, at a step from 0
    base_rates: list[float]
    zeros_for_empty: bool
    batch: int
    micro_batch: int
    identity: dict  # hashes of data and weights, which a continuation must share

    @property
    def device(self) -> torch.device:
        return self.accelerator.device

    @property
    def parts(self) -> dict[str, torch.nn.Module]:
        """The models that may have a LoRA, by the part's name."""
        text_encoders = zip(("text_encoder", "text_encoder_2"), self.text[1], strict=True) if self.text else ()
        return {"unet": self.unet, **dict(text_encoders)}

    @cached_property
    def order(self) -> Order:
        """Which samples each step takes."""
        return Order([sample.bucket for sample in self.samples], self.batch, self.config.seed)

    def autocast(self):
        """Half-precision arithmetic where the settings ask for it."""
        if self.config.mixed_precision == "no":
            return nullcontext()
        return torch.autocast(self.device.type, models.DTYPES[self.config.mixed_precision])


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
    if config.start_from_lora:
        _start_from(config, unet, text, on_event)
    trainable = {name: parameter for _, parameters in groups for name, parameter in parameters.items()}
    optimizer = build_optimizer(
        config.optimizer, [{"params": list(parameters.values()), "lr": rate} for rate, parameters in groups],
        use_8bit_adam=config.use_8bit_adam, betas=(config.adam_beta1, config.adam_beta2),
        epsilon=config.adam_epsilon, weight_decay=config.weight_decay,
    )  # fmt: skip
    factor = learning_rate_factor(
        config.lr_scheduler, config.lr_warmup_steps, config.max_steps, config.learning_rate, config.lr_num_cycles, config.lr_power
    )
    job = Job(
        config=config,
        accelerator=accelerator,
        source=source,
        samples=samples,
        unet=unet,
        text=text,
        noise_scheduler=noise_scheduler,
        vae_config=models.vae_config(config.base_model, config.vae_model),
        optimizer=optimizer,
        scaler=torch.amp.GradScaler(accelerator.device.type, enabled="fp16" in (config.precision, config.mixed_precision)),
        trainable=trainable,
        rate_factor=factor,
        base_rates=[rate for rate, _ in groups],
        zeros_for_empty=models.zeros_for_empty_prompt(config.base_model),
        batch=config.batch_size * config.gradient_accumulation_steps * accelerator.num_processes,
        micro_batch=config.batch_size,
        identity=identity,
    )
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
    _check_same_data(config, manifest)
    if manifest.metadata.resolution != config.resolution:
        raise UserError(f"The manifest is for {manifest.metadata.resolution} px and resolution is {config.resolution}: run notebook 01 again with the same settings.")  # fmt: skip
    if not config.buckets and any(width != height for width, height in (sample.bucket for sample in manifest.train())):
        raise UserError("buckets is false and the manifest has pictures that are not square: run notebook 01 again with the same settings.")  # fmt: skip
    if manifest.metadata.settings.get("center_crop", config.center_crop) != config.center_crop:
        raise UserError(f"center_crop is {config.center_crop} and the manifest was made with the other: run notebook 01 again with the same settings.")
    weights = cache.weights_of(config.base_model, config.vae_model)
    device, stay = accelerator.device, not config.enable_cpu_offload
    if any(sample.latent_path for sample in manifest.samples):
        source = cache.cached_samples(manifest, weights, config.random_flip)
        if not config.train_text_encoder and accelerator.is_main_process:
            wanted = list(dict.fromkeys(["", *config.captions_beside(sample.caption for sample in manifest.train())]))
            if made := cache.encode_captions(manifest.folder, wanted, config.base_model, weights, dtype, device, on_event):
                on_event(Notice(f"{made} new prompts were encoded and added to the cache."))
                release()
        accelerator.wait_for_everyone()
    else:
        on_event(Notice("There are no cached latents: pictures and captions are encoded as training goes."))
        source = cache.fresh_samples(manifest, config.base_model, config.vae_model, dtype=dtype, device=device, stay=stay)
    return source, {"data": manifest.training_data, "unet": fingerprint(config.base_model, "unet"), "vae": weights.vae, "text": weights.text}


def _check_same_data(config, manifest) -> None:
    """The manifest's trigger and folder are those of the settings, which go into the LoRA's header."""
    made_for = manifest.metadata.trigger_token
    if made_for and made_for != config.trigger_token:
        raise UserError(f"The manifest in {config.run_dir} was made for the trigger {made_for!r} and trigger_token is {config.trigger_token!r}: give the same, or run notebook 01 under another run_name.")  # fmt: skip
    folder = resolve_path(config.dataset_path)
    if "dataset_path" in config.model_fields_set and folder.is_dir() and manifest.root.is_dir() and not manifest.root.resolve().is_relative_to(folder.resolve()):
        raise UserError(f"The manifest in {config.run_dir} is about {manifest.root} and dataset_path is {folder}: give the same, or run notebook 01 under another run_name.")  # fmt: skip


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


def _start_from(config, unet, text, on_event) -> None:
    """Another LoRA in place of the random start. Encoders that are not trained are there to name the file's modules."""
    adapted, others = {"unet": unet}, {}
    for number, part in enumerate(("text_encoder", "text_encoder_2")):
        if text and config.text_encoder_learning_rates[number]:
            adapted[part] = text[1][number]
        else:
            others[part] = models.empty_part(config.base_model, part)
    start_from_lora(resolve_path(config.start_from_lora), adapted, others, on_event=on_event)


def _trainable(model, part) -> dict:
    return {f"{part}.{name}": parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def _last_layer(text_encoder) -> str:
    suffix = f"encoder.layers.{text_encoder.config.num_hidden_layers - 1}"
    return next(name for name, _ in text_encoder.named_modules() if name.endswith(suffix))


def _check_frozen(job) -> None:
    """Only the LoRA may learn."""
    learning = {id(parameter) for module in job.parts.values() for parameter in module.parameters() if parameter.requires_grad}
    if learning != {id(parameter) for parameter in job.trainable.values()}:
        raise RuntimeError("weights of the base require gradients, or LoRA weights do not")
