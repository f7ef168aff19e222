"""Optimizers and learning rates, and their state as plain tensors and JSON."""

import torch

from lora_nb.models import get_scheduler


def build_optimizer(
    name: str, groups: list[dict], *, use_8bit_adam=False, betas=(0.9, 0.999), epsilon=1e-8, weight_decay=0.01
) -> torch.optim.Optimizer:
    """adamw (fused, or with 8-bit state), adafactor or prodigy over `groups` of {"params", "lr"}."""
    if name == "adafactor":
        # Scaled by the learning rate alone, as AdamW: by a weight's own size, a LoRA's up matrix would not leave its zeros.
        return torch.optim.Adafactor(groups, eps=(None, 1.0), weight_decay=weight_decay)
    if name == "prodigy":
        from prodigyopt import Prodigy

        return Prodigy(groups, betas=betas, weight_decay=weight_decay, safeguard_warmup=True, use_bias_correction=True)
    if use_8bit_adam:
        from bitsandbytes.optim import AdamW8bit

        return AdamW8bit(groups, betas=betas, eps=epsilon, weight_decay=weight_decay)
    return torch.optim.AdamW(groups, betas=betas, eps=epsilon, weight_decay=weight_decay, fused=True)


def learning_rate_factor(name: str, warmup_steps: int, max_steps: int, learning_rate=1.0, cycles=1, power=1.0):
    """diffusers' schedule as a pure function: factor of the learning rate at a step (from 0), with no state to save."""
    placeholder = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=learning_rate)
    schedule = get_scheduler(
        name, placeholder, num_warmup_steps=warmup_steps, num_training_steps=max_steps, num_cycles=cycles, power=power
    )
    return schedule.lr_lambdas[0]


def pack_state(optimizer) -> tuple[dict[str, torch.Tensor], dict]:
    """The optimizer's state as named tensors and a JSON tree that says where each belongs."""
    tensors = {}

    def pack(value, path):
        if isinstance(value, torch.Tensor):
            tensors[path] = value.detach().to("cpu", copy=True).contiguous()  # 8-bit AdamW's share their tables: no file takes that
            return {"tensor": path}
        if isinstance(value, dict):
            return {"dict": [[key, pack(item, f"{path}.{key}")] for key, item in value.items()]}
        if isinstance(value, (list, tuple)):
            return {"list": [pack(item, f"{path}.{index}") for index, item in enumerate(value)]}
        return {"value": value}

    state = optimizer.state_dict()
    return tensors, {"state": pack(state["state"], "state"), "param_groups": pack(state["param_groups"], "groups")}


def unpack_state(optimizer, tensors: dict[str, torch.Tensor], tree: dict) -> None:
    """Put what `pack_state` gave back into an optimizer over the same parameters."""

    def unpack(node):
        (kind, value), *_ = node.items()
        if kind == "tensor":
            return tensors[value]
        if kind == "dict":
            return {key: unpack(item) for key, item in value}
        return [unpack(item) for item in value] if kind == "list" else value

    optimizer.load_state_dict({name: unpack(node) for name, node in tree.items()})
