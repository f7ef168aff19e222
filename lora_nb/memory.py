"""What makes a large base fit: NF4 weights, checkpointing, parts that come to the device only while they are used."""

import ctypes
import gc
import re
from contextlib import contextmanager

import psutil
import torch

from lora_nb.errors import UserError

OUT_OF_MEMORY_CURES = (
    "gradient_checkpointing: true",
    "batch_size: 1 with more gradient_accumulation_steps (auto_fit: true does it)",
    "use_8bit_adam: true",
    "enable_cpu_offload: true",
    "precision: nf4",
    "a smaller lora_rank",
    "a lower resolution",
)


def quantize_nf4(model, compute_dtype=torch.float32) -> int:
    """Swap the model's frozen Linear layers for 4-bit NormalFloat ones (QLoRA's base); returns how many.

    They are quantised when the model moves to its device (also the CPU). Convolutions and the embeddings of time and
    size stay as they are: they are few, and every layer listens to them.
    """
    from bitsandbytes.nn import Linear4bit, Params4bit

    swapped = 0
    for name, module in list(model.named_modules()):
        if type(module) is not torch.nn.Linear or name.startswith(("time_embedding", "add_embedding")):
            continue
        linear = Linear4bit(
            module.in_features, module.out_features, module.bias is not None, compute_dtype, quant_type="nf4", device="meta"
        )
        linear.weight = Params4bit(module.weight.data, requires_grad=False, quant_type="nf4", module=linear)
        linear.bias = module.bias
        linear.support_avx512bf16_for_cpu = False  # else a validation picture packs the weights for inference, for good
        linear.requires_grad_(False)
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, linear)
        swapped += 1
    return swapped


def save_memory(model, gradient_checkpointing: bool, xformers: bool = False) -> None:
    """Recompute activations in the backward pass; xformers' attention if asked for (else PyTorch's own)."""
    if gradient_checkpointing:
        # Not re-entrant: the re-entrant kind loses all gradients silently where no input requires one.
        if hasattr(model, "gradient_checkpointing_enable"):
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            model.train()  # transformers recomputes in training mode only; CLIP has no dropout to disturb
        else:
            model.enable_gradient_checkpointing()
    if xformers:
        model.enable_xformers_memory_efficient_attention()


@contextmanager
def on_device(module, device, stay: bool):
    """`module` on `device` for a while; afterwards back on the CPU unless it may `stay`."""
    module.to(device)
    try:
        yield module
    finally:
        if not stay and torch.device(device).type != "cpu":
            module.to("cpu")
            release()


def release() -> None:
    """Give memory of dropped tensors back to the device and to the machine."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # glibc would keep the 5 GiB of a dropped UNet for itself
    except (OSError, AttributeError):  # no glibc here
        pass


def peak_memory(device) -> float:
    """GiB: the most that PyTorch has held on a GPU; on the CPU, what the process holds."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return psutil.Process().memory_info().rss / 2**30


def out_of_memory(error, config) -> UserError:
    """The sentence for an OutOfMemoryError: what was asked for, and which settings to change in which order."""
    asked = re.search(r"[Tt]ried to allocate [\d.,]+ \w+", str(error))
    done = {
        OUT_OF_MEMORY_CURES[0]: config.gradient_checkpointing,
        OUT_OF_MEMORY_CURES[1]: config.batch_size == 1,
        OUT_OF_MEMORY_CURES[2]: config.use_8bit_adam,
        OUT_OF_MEMORY_CURES[3]: config.enable_cpu_offload,
        OUT_OF_MEMORY_CURES[4]: config.precision == "nf4",
    }
    cures = [cure for cure in OUT_OF_MEMORY_CURES if not done.get(cure)]
    return UserError(
        f"The device ran out of memory at {config.resolution} px, batch {config.batch_size}, rank {config.lora_rank} "
        f"({asked.group() if asked else 'no size given'}); change in this order: {'; '.join(cures)}."
    )


def is_out_of_memory(error) -> bool:
    """Whether `error` says that a device or the host is full."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error)
