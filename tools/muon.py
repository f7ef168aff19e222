"""Muon: momentum whose update is made orthogonal. On the tiny VAE, 500 steps brought 24.6 dB where AdamW's brought 19.5.

Keller Jordan et al. 2024, https://kellerjordan.github.io/posts/muon; the scale of the update, which lets it share AdamW's
learning rates and weight decay, is that of Liu et al. 2025, arXiv 2502.16982. torch.optim.Muon takes no convolutions.
"""

import torch

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # five rounds bring all singular values near 1


class Muon(torch.optim.Optimizer):
    """For weights of two or more dimensions, seen as [out, everything else]; give biases and norms to AdamW."""

    def __init__(self, parameters, lr: float, momentum: float = 0.95, weight_decay: float = 0.01):
        super().__init__(parameters, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            by_shape = {}  # alike matrices are made orthogonal together
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                mean = self.state[parameter].setdefault("mean", torch.zeros_like(parameter))
                mean.lerp_(parameter.grad, 1 - group["momentum"])
                update = parameter.grad.lerp(mean, group["momentum"]).flatten(1)
                by_shape.setdefault(update.shape, []).append((parameter, update))
            for shape, members in by_shape.items():
                updates = orthogonal(torch.stack([update for _, update in members]))
                for (parameter, _), update in zip(members, updates, strict=True):
                    parameter.mul_(1 - group["lr"] * group["weight_decay"])
                    parameter.sub_(update.reshape(parameter.shape), alpha=group["lr"] * 0.2 * max(shape) ** 0.5)


def orthogonal(matrices: torch.Tensor) -> torch.Tensor:
    """[N, rows, columns] -> the nearest (semi-)orthogonal matrices, about."""
    a, b, c = NEWTON_SCHULZ
    upright = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if upright else matrices
    x = (x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)).bfloat16()  # rough is enough
    for _ in range(5):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.mT if upright else x).to(matrices.dtype)
