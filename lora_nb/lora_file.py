"""LoRA weights apart from any model: one record a module, how two differ, and files of the same bytes for the same content.

The change that a module makes to its weight is `alpha / rank * up @ down`, in every format and program.
"""

import json
import math
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from lora_nb.errors import UserError
from lora_nb.files import write_atomic
from lora_nb.lora_names import classic_path

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class LoraModule:
    """One adapted module: `down` [rank, in(, kh, kw)], `up` [out, rank(, 1, 1)], scale alpha / rank."""

    part: str
    path: str
    down: torch.Tensor
    up: torch.Tensor
    alpha: float

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    @property
    def size(self) -> int:
        """Elements of the weight that it changes."""
        return self.up.shape[0] * self.down[0].numel()

    def delta(self) -> torch.Tensor:
        """What is added to the module's weight, float32 [out, in(, kh, kw)]."""
        flat = self.scale * (self.up.float().flatten(1) @ self.down.float().flatten(1))
        return flat.reshape(self.up.shape[0], *self.down.shape[1:])


def lora_of(model, part: str, adapter: str = "default") -> list[LoraModule]:
    """The LoRA modules of a PEFT-adapted model, detached on the CPU, by their classic paths.

    alpha is the effective one (`scaling * rank`), so rank-stabilised LoRA and alpha patterns need no further care.
    Raises UserError for DoRA, which no two programs read alike.
    """
    modules = []
    for path, module in model.named_modules():
        if adapter not in getattr(module, "lora_A", {}):
            continue
        if adapter in (getattr(module, "lora_magnitude_vector", None) or {}):
            raise UserError("The adapter was trained with DoRA, which other programs read differently or not at all; train with use_dora off to export it.")
        down, up = module.lora_A[adapter].weight, module.lora_B[adapter].weight
        alpha = module.scaling[adapter] * down.shape[0]
        modules.append(LoraModule(part, classic_path(part, path), _on_cpu(down), _on_cpu(up), alpha))
    return modules


def _on_cpu(tensor) -> torch.Tensor:
    return tensor.detach().to("cpu", copy=True).contiguous()


def with_one_alpha(modules: list[LoraModule]) -> list[LoraModule]:
    """The same changes under one alpha: modules with another one carry the difference in `up`.

    diffusers scales a file wrongly whose modules have different alphas.
    """
    if not modules:
        return []
    alpha = Counter(module.alpha for module in modules).most_common(1)[0][0]
    return [
        module if module.alpha == alpha else replace(module, alpha=alpha, up=module.up * (module.alpha / alpha))
        for module in modules
    ]


def balanced(module: LoraModule) -> LoraModule:
    """The same change with a power of two moved from `down` to `up`, where `up` is so small that fp16 would lose it.

    A LoRA begins with `up` at zero, and after few steps some of it lies below what fp16 can tell apart. Powers of two
    cost no precision.
    """
    up, down = module.up.abs().max().item(), module.down.abs().max().item()
    if up == 0 or down == 0 or min(up, down) >= 2**-10:
        return module
    shift = 2.0 ** round(math.log2(down / up) / 2)
    return replace(module, up=module.up * shift, down=module.down / shift)


def change_norm(module: LoraModule) -> float:
    """Frobenius norm of `delta()`, without building it.

    |U D|^2 = sum((U^T U) * (D D^T)) needs only rank x rank products; float64 keeps it good to about 1e-8.
    """
    return math.sqrt(_squared_norm([(module, 1.0)]))


def relative_difference(a: LoraModule, b: LoraModule, floor: float = 0.0) -> float:
    """|delta(a) - delta(b)| / |delta(a)| in the Frobenius norm; a norm below `floor` counts as `floor`.

    Infinite where either holds NaN or infinity.
    """
    difference = math.sqrt(_squared_norm([(a, 1.0), (b, -1.0)])) / max(change_norm(a), floor, 1e-30)
    return difference if math.isfinite(difference) else math.inf


def _squared_norm(terms) -> float:
    up = torch.cat([sign * m.scale * m.up.double().flatten(1) for m, sign in terms], dim=1)
    down = torch.cat([m.down.double().flatten(1) for m, _ in terms], dim=0)
    return max(((up.T @ up) * (down @ down.T)).sum().item(), 0.0)


def safetensors_bytes(tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None) -> bytes:
    """A safetensors file with its metadata in sorted order (the library's own order changes from run to run)."""
    plain = save({name: tensor.contiguous() for name, tensor in tensors.items()})
    length = int.from_bytes(plain[:8], "little")
    header = json.loads(plain[8 : 8 + length])
    if metadata:
        header = {"__metadata__": dict(sorted(metadata.items())), **header}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    text += b" " * (-len(text) % 8)  # the data must begin at a multiple of 8
    return len(text).to_bytes(8, "little") + text + plain[8 + length :]


def write_safetensors(path, tensors, metadata=None) -> Path:
    """Whole or absent, and the same bytes for the same content."""
    return write_atomic(path, safetensors_bytes(tensors, metadata))


def read_safetensors(path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Tensors and metadata of a file. Raises UserError that names a missing, damaged or foreign file."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path} does not exist; give the path of a .safetensors file.")
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, dict(file.metadata() or {})
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{path} is not a whole safetensors file ({error}); download or export it again.") from error
