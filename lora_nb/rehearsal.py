"""A training without a base model: the same lines over weights and pictures that are made up, to see what they would need.

With tensors that have shapes, types and lifetimes but no content (PyTorch's FakeTensorMode), a step of full-size SDXL takes
seconds on any machine; with random weights it takes what the real one takes.
"""

from dataclasses import dataclass
from functools import partial
from math import prod
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

from lora_nb import models
from lora_nb.buckets import buckets
from lora_nb.config import Config, resolve_path
from lora_nb.job import Job
from lora_nb.ledger import Ledger
from lora_nb.memory import quantize_nf4, save_memory
from lora_nb.optimizers import build_optimizer
from lora_nb.step import draws_at, losses_of, micro_batches


def normalise_as_gpus_do(model) -> None:
    """Norms in fp32 under autocast, as on a GPU (a processor stays in half precision): more to keep for the backward pass."""
    for module in model.modules():
        if isinstance(module, (torch.nn.GroupNorm, torch.nn.LayerNorm)):
            module.forward = partial(_norm, module, module.forward)


def _norm(module, usual, x):
    if not torch.is_autocast_enabled("cpu"):
        return usual(x)
    weight, bias = (value if value is None else value.float() for value in (module.weight, module.bias))
    if isinstance(module, torch.nn.GroupNorm):
        return F.group_norm(x.float(), module.num_groups, weight, bias, module.eps)
    return F.layer_norm(x.float(), module.normalized_shape, weight, bias, module.eps)


# --- NF4 without bitsandbytes ------------------------------------------------------------------------------------


class FourBit(torch.nn.Linear):
    """Takes the memory of bitsandbytes' Linear4bit, and computes nothing true."""

    def __init__(self, linear, compute_dtype):
        super().__init__(linear.in_features, linear.out_features, bias=False, device="meta")
        self.bias, self.compute_dtype = linear.bias, compute_dtype
        count = self.in_features * self.out_features
        self.weight = torch.nn.Parameter(torch.empty((count + 1) // 2, 1, dtype=torch.uint8, device="meta"), requires_grad=False)
        blocks = -(-count // 64)  # each has a scale of 8 bits; 256 scales have a 32-bit one; two tables and an offset
        scales = blocks + 4 * -(-blocks // 256) + 4 * (16 + 256) + 4
        self.register_buffer("quant_state", torch.empty(scales, dtype=torch.uint8, device="meta"))

    def forward(self, x):
        bias = None if self.bias is None else self.bias.to(self.compute_dtype)
        return _Dequantised.apply(x.to(self.compute_dtype), self.weight, bias, self.out_features).to(x.dtype)


class _Dequantised(torch.autograd.Function):
    """The product with a weight that is unpacked for this product only; for the backward pass the packed one is kept."""

    @staticmethod
    def forward(ctx, x, packed, bias, out_features):
        ctx.save_for_backward(packed)
        ctx.shape = (out_features, x.shape[-1])
        return F.linear(x, x.new_empty(ctx.shape), bias)

    @staticmethod
    def backward(ctx, grad):
        return grad @ grad.new_empty(ctx.shape), None, None, None


def pretend_nf4(model, compute_dtype) -> None:
    """`memory.quantize_nf4` for a model on the meta device: the same layers, the same bytes."""
    for name, module in list(model.named_modules()):
        if type(module) is torch.nn.Linear and not name.startswith(("time_embedding", "add_embedding")):
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, FourBit(module, compute_dtype))


# --- a job ---------------------------------------------------------------------------------------------------


def base_of(config: Config) -> str:
    """The base whose sizes count: the configuration's if it lies on this disk, else SDXL's bundled configs. No download."""
    return config.base_model if resolve_path(config.base_model).exists() else str(models.SDXL)


def rehearsal_job(config: Config, device="cpu", fake: FakeTensorMode | None = None) -> Job:
    """The Job that `job.prepare` would make, without a base, pictures or a run folder; its weights are random.

    With `fake` the weights have no content, and the job is to be used under that mode. Every picture has the largest
    bucket of the resolution; latents and embeddings are as if cached.
    """
    base, device = base_of(config), torch.device(device)
    half = models.DTYPES.get(config.precision) or models.DTYPES.get(config.mixed_precision, torch.float32)
    lora = {"rank": config.lora_rank, "alpha": config.lora_alpha, "dropout": config.lora_dropout, "rslora": config.use_rslora}

    def part(name, nf4=False, targets=None, seed=config.seed):
        model = models.empty_part(base, name).to(half).requires_grad_(False).eval()
        if not fake:
            _fill(model, device)
        if nf4:
            (pretend_nf4 if fake else quantize_nf4)(model, half)
        if not fake:
            model.to(device)  # where bitsandbytes quantises
        if targets:
            models.add_lora(model, targets=targets, seed=seed, **lora)
            save_memory(model.train(), config.gradient_checkpointing, config.enable_xformers and not fake)
        if fake:
            with fake:
                _fill(model, device)
        return model

    unet, text = part("unet", config.precision == "nf4", config.lora_target_modules), None
    groups = [(config.learning_rate, _trainable(unet, "unet"))]
    if config.train_text_encoder:
        rates, names = config.text_encoder_learning_rates, ("text_encoder", "text_encoder_2")
        encoders = [part(name, targets=rate and models.TEXT_TARGETS, seed=config.seed + n) for n, (name, rate) in enumerate(zip(names, rates, strict=True), 1)]  # fmt: skip
        last = encoders[0].config.num_hidden_layers - 1  # its output is never read, see job.py
        for name, parameter in encoders[0].named_parameters():
            if f"encoder.layers.{last}." in name:
                parameter.requires_grad_(False)
        text = ([_tokens(encoder) for encoder in encoders], encoders)
        groups += [(rate, _trainable(encoder, name)) for name, rate, encoder in zip(names, rates, encoders, strict=True) if rate]

    return Job(
        config=config,
        accelerator=SimpleNamespace(device=device, num_processes=1, process_index=0, is_main_process=True),
        source=_made_up(unet, config, half),
        samples=_pictures(config),
        unet=unet,
        text=text,
        noise_scheduler=models.load_part(base, "noise_scheduler"),
        vae_config=models.vae_config(base, _vae_of(config)),
        optimizer=None if fake else build_optimizer(
            config.optimizer, [{"params": list(parameters.values()), "lr": rate} for rate, parameters in groups],
            use_8bit_adam=config.use_8bit_adam, weight_decay=config.weight_decay,
        ),
        scaler=torch.amp.GradScaler(device.type, enabled=not fake and "fp16" in (config.precision, config.mixed_precision)),
        trainable={name: parameter for _, parameters in groups for name, parameter in parameters.items()},
        rate_factor=lambda step: 1.0,
        base_rates=[rate for rate, _ in groups],
        zeros_for_empty=models.zeros_for_empty_prompt(base),
        batch=config.batch_size * config.gradient_accumulation_steps,
        micro_batch=config.batch_size,
        identity={},
    )  # fmt: skip


def _trainable(model, part) -> dict:
    return {f"{part}.{name}": parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def _fill(model, device) -> None:
    """Put tensors on `device` in the place of those on the meta device: random weights that keep a signal's size."""
    for module in model.modules():
        for name, value in [*module._parameters.items(), *module._buffers.items()]:
            if value is None or not value.is_meta:
                continue
            filled = torch.zeros(value.shape, dtype=value.dtype, device=device)
            if value.is_floating_point():
                filled.normal_(0, value[0].numel() ** -0.5) if value.dim() > 1 else filled.fill_(float(name == "weight"))
            if name in module._parameters:
                module._parameters[name] = torch.nn.Parameter(filled, requires_grad=value.requires_grad)
            else:
                module._buffers[name] = filled


def _tokens(encoder):
    """A tokenizer that knows one caption."""
    length = encoder.config.max_position_embeddings

    def tokenize(prompts, **options):
        return SimpleNamespace(input_ids=torch.ones(len(prompts), length, dtype=torch.long))

    tokenize.model_max_length = length
    return tokenize


def _pictures(config: Config) -> list:
    width, height = max(buckets(config.resolution, square=not config.buckets), key=prod)
    return [
        SimpleNamespace(image_path=f"{n}.png", caption=config.trigger_token, bucket=(width, height), original_size=(height, width),
                        crop_top_left=(0, 0), target_size=(height, width))
        for n in range(config.batch_size * config.gradient_accumulation_steps)
    ]  # fmt: skip


def _vae_of(config: Config) -> str | None:
    """Another VAE than the base's, if it lies on this disk."""
    return config.vae_model if config.vae_model and resolve_path(config.vae_model).exists() else None


def _made_up(unet, config, dtype):
    base = base_of(config)
    vae = models.vae_config(base, _vae_of(config))
    scale, channels = 2 ** (len(vae["block_out_channels"]) - 1), vae["latent_channels"]
    width = unet.config.cross_attention_dim
    pooled = (unet.config.projection_class_embeddings_input_dim or 0) - 6 * (unet.config.addition_time_embed_dim or 0)
    return SimpleNamespace(
        cached=True,
        latents=lambda sample, flip: torch.zeros(2, channels, sample.bucket[1] // scale, sample.bucket[0] // scale),
        embeddings=lambda caption: (torch.zeros(77, width, dtype=dtype), torch.zeros(pooled, dtype=dtype)),
    )


# --- what it needs -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Needs:
    """Bytes on the device, and operations. `base`: frozen weights, with the VAE's where it stays there between validation
    pictures; `lora`: its weights, gradients and the optimizer's state; `step`: the peak of a step; `picture`: the peak of a
    validation picture, 0 where none is drawn."""

    base: int
    lora: int
    step: int
    picture: int
    step_flop: int
    picture_flop: int  # of one validation picture, all its denoising steps and the decoding

    @property
    def peak(self) -> int:
        return max(self.step, self.picture)

    @property
    def activations(self) -> int:
        """What the larger of both peaks holds beside base and LoRA."""
        return self.peak - self.base - self.lora


def simulate(config: Config, gpu: bool = True) -> Needs:
    """Rehearse a step and a validation picture of `config` on fake tensors, as a GPU (or a processor) would hold them.

    Seconds for full-size SDXL, whatever this machine has. Kernels' own workspaces, the allocator's rounding and the
    driver are not in it.
    """
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    job, vae = rehearsal_job(config, fake=fake), models.empty_part(_vae_of(config) or base_of(config), "vae").requires_grad_(False)
    if gpu and config.precision == "nf4" and config.mixed_precision != "no":
        for module in job.unet.modules():  # PEFT leaves the inputs of 4-bit layers to autocast
            if hasattr(module, "cast_input_dtype_enabled"):
                module.cast_input_dtype_enabled = False
    weights = sum(map(_bytes, job.trainable.values()))
    base = sum(_bytes(tensor) for model in job.parts.values() for tensor in [*model.parameters(), *model.buffers()]) - weights
    state = optimizer_bytes(config, {name: parameter.shape for name, parameter in job.trainable.items()})
    groups = micro_batches(job, draws_at(job, 0))
    if gpu:
        for model in job.parts.values():
            normalise_as_gpus_do(model)
    with fake:
        _fill(vae, job.device)
        step, step_flop = _rehearse_step(job, groups)
        picture, picture_flop = _rehearse_picture(job, vae) if config.validate_every and config.image_seeds else (0, 0)
    stays = sum(map(_bytes, vae.parameters())) if picture and not config.enable_cpu_offload else 0
    held = 2 * weights + state  # before the update all gradients are there, and little else
    return Needs(
        base=base + stays, lora=held, step=max(step, base + 2 * weights) + state + stays, picture=picture and picture + state,
        step_flop=step_flop, picture_flop=picture_flop,
    )  # fmt: skip


def _bytes(tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _rehearse_step(job: Job, groups: list) -> tuple[int, int]:
    """Peak bytes and operations of a step's micro-batches; after the second, whose gradients add up, all are alike."""
    ledger = Ledger(*job.parts.values())
    with ledger:
        for group in groups[:2]:
            (losses_of(job, group, train_text=job.text is not None).sum() / job.batch).backward()
    for parameter in job.trainable.values():
        parameter.grad = None
    return ledger.peak, ledger.flop * len(groups) // min(2, len(groups))


@torch.no_grad()
def _rehearse_picture(job: Job, vae) -> tuple[int, int]:
    """Peak bytes and operations of a validation picture, as validation.py draws it."""
    config, unet = job.config, job.unet.eval()
    scale = 2 ** (len(vae.config.block_out_channels) - 1)
    multiple = 2 ** (len(unet.config.block_out_channels) - 1) * 8
    side = max(multiple, round(config.resolution / multiple) * multiple) // scale
    guided = 2 if config.validation_guidance > 1 else 1
    embeds, pooled = job.source.embeddings("")
    latents = torch.zeros(1, vae.config.latent_channels, side, side)
    denoise, decode = Ledger(*job.parts.values(), vae), Ledger(*job.parts.values(), vae)
    with denoise, job.autocast():
        dtype = unet.conv_in.weight.dtype
        added = {"text_embeds": torch.stack([pooled] * guided), "time_ids": torch.zeros(guided, 6)}
        unet(
            torch.cat([latents] * guided).to(dtype), torch.tensor(500), torch.stack([embeds] * guided), return_dict=False,
            added_cond_kwargs=added if unet.config.addition_embed_type == "text_time" else None,
        )  # fmt: skip
    with decode:
        vae.decode(latents)
    unet.train()
    return max(denoise.peak, decode.peak), config.validation_steps * denoise.flop + decode.flop


def optimizer_bytes(config: Config, shapes: dict) -> int:
    """Bytes of the optimizer's state on the device, for LoRA weights of these shapes by name."""
    counts = [prod(shape) for shape in shapes.values()]
    if config.optimizer == "adafactor":  # a row and a column for every matrix
        return 4 * sum((prod(shape) // shape[-1] + prod(shape) // shape[-2]) for shape in shapes.values())
    if config.optimizer == "prodigy":  # two moments, a sum of gradients, and where it began: for up matrices a zero
        return 4 * sum(3 * count + (1 if "lora_B" in name else count) for name, count in zip(shapes, counts, strict=True))
    if config.use_8bit_adam:  # small tensors stay in 32 bits; blocks of 256 have a scale; two tables for all
        small = [count for count in counts if count < 4096]
        large = [count for count in counts if count >= 4096]
        return sum(8 * count for count in small) + sum(2 * count + 8 * -(-count // 256) for count in large) + 2048 * bool(large)
    return sum(8 * count + 4 for count in counts)
