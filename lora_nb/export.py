"""Write a trained LoRA for every program, and keep only the files that read back as what was trained.

The libraries' own converters are not used: they lose alpha, the SGM block names and, under transformers 5, the
first text encoder.
"""

import json
import os
import shutil
import tempfile
from collections import Counter
from pathlib import Path

import torch

from lora_nb.checks import PROOF_FILE, Check, ExportResult, Road
from lora_nb.dialects import raw_modules, read_lora
from lora_nb.errors import UserError
from lora_nb.events import Notice, OnEvent, Progress, ignore
from lora_nb.files import sync_folder, write_json
from lora_nb.lora_file import DTYPES, LoraModule, balanced, lora_of, read_safetensors, with_one_alpha, write_safetensors
from lora_nb.lora_names import PARTS, kohya_name, sgm_blocks
from lora_nb.metadata import lora_metadata, network_keys, with_hashes
from lora_nb.readers import programs

FORMATS = ("peft", "diffusers", "kohya")
PEFT_FOLDERS = {part: f"{part}_lora" for part in PARTS}
DIFFUSERS_FILE = "pytorch_lora_weights.safetensors"
# Relative error of a module's change that rounding to the dtype explains, with room to spare.
LIMITS = {"fp32": 1e-6, "fp16": 2e-3, "bf16": 1.5e-2}


def export_lora(
    folder,
    unet,
    text_encoders=(None, None),
    *,
    run_name: str,
    metadata: dict[str, str] | None = None,
    dtype: str = "fp16",
    formats=FORMATS,
    adapter: str = "default",
    roads: tuple[Road, ...] = (),
    on_event: OnEvent = ignore,
) -> ExportResult:
    """Write the adapter of `unet` (and of the text encoders, where they have one) into `folder`, proved.

    folder: the run's `final/`; it is built beside and then renamed, so it is whole or as it was.
    run_name: names the kohya file. metadata: `lora_metadata(...)`. dtype: "fp16", "fp32" or "bf16", for the kohya
    and diffusers files; PEFT's keep the precision of training. roads: further proofs, `library_roads(...)` and `PictureRoad`.
    Rank and alpha are the adapter's own, rank-stabilised or not.

    Every file is read back and compared, module by module, with the adapter; one that differs is left out and named
    in `rejected`. Raises UserError where there is nothing to export, or it cannot be exported truthfully.
    """
    if dtype not in DTYPES or not set(formats) <= set(FORMATS):
        raise UserError(f"Export knows dtypes {', '.join(DTYPES)} and formats {', '.join(FORMATS)}, not {dtype!r} and {formats!r}.")
    metadata = lora_metadata(run_name) if metadata is None else metadata
    models = {part: model for part, model in zip(PARTS, (unet, *text_encoders), strict=False) if model is not None}
    trained = [module for part, model in models.items() for module in lora_of(model, part, adapter)]
    _refuse_unusable(trained, adapter)

    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}.", suffix=".tmp"))
    try:
        written = _write(beside, trained, models, formats, run_name, metadata, DTYPES[dtype], adapter)
        checks, rejected = [], []
        for n, (path, kind) in enumerate(written):
            on_event(Progress("prove", n, len(written), path.name))
            found = prove(path, kind, trained, models, LIMITS["fp32" if kind == "peft" else dtype], roads)
            checks += found
            if not all(check.ok for check in found):
                rejected.append(path.name)
                shutil.rmtree(path) if path.is_dir() else path.unlink()
                on_event(Notice(f"{path.name} failed its proof and was not kept; see the table."))
        on_event(Progress("prove", len(written), len(written)))
        kept = tuple(folder / path.name for path, _ in written if path.name not in rejected)
        result = ExportResult(folder, kept, tuple(checks), tuple(rejected))
        result.save(beside / PROOF_FILE)
        _swap_in(beside, folder)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise
    return result


def _refuse_unusable(trained: list[LoraModule], adapter: str) -> None:
    if not trained:
        raise UserError(f"The model has no LoRA adapter named {adapter!r}; add one and train before exporting.")
    broken = [m.path for m in trained if not (torch.isfinite(m.down).all() and torch.isfinite(m.up).all())]
    if broken:
        raise UserError(f"{len(broken)} of {len(trained)} LoRA modules hold NaN or infinity, {broken[0]} first; export an earlier checkpoint.")


def _write(folder, trained, models, formats, run_name, metadata, dtype, adapter) -> list[tuple[Path, str]]:
    """The files of every format, with the format of each."""
    written = []
    plain = with_one_alpha(trained)
    metadata = metadata | network_keys(Counter(m.rank for m in plain).most_common(1)[0][0], plain[0].alpha)
    if "peft" in formats:
        for part, model in models.items():
            own = [module for module in trained if module.part == part]
            if own:
                written.append((write_peft(folder / PEFT_FOLDERS[part], own, model, adapter), "peft"))
    if "diffusers" in formats:
        tensors, adapter_settings = diffusers_tensors(trained, dtype)
        header = {**metadata, "format": "pt", "lora_adapter_metadata": json.dumps(adapter_settings, sort_keys=True)}
        header["modelspec.implementation"] = "diffusers"
        written.append((write_safetensors(folder / DIFFUSERS_FILE, tensors, with_hashes(header, tensors)), "diffusers"))
    if "kohya" in formats:
        tensors = kohya_tensors(trained, sgm_blocks(models["unet"]), dtype)
        path = folder / f"{run_name}.safetensors"
        written.append((write_safetensors(path, tensors, with_hashes(metadata, tensors)), "kohya"))
    return written


def kohya_tensors(modules: list[LoraModule], blocks: dict[str, str], dtype) -> dict[str, torch.Tensor]:
    """kohya's keys: SGM block names, and a 0-d alpha a module (float32: rank-stabilised alphas are no whole numbers)."""
    tensors = {}
    for module in _rounding_well(modules, dtype):
        name = kohya_name(module.part, module.path, blocks)
        tensors[f"{name}.lora_down.weight"] = module.down.to(dtype)
        tensors[f"{name}.lora_up.weight"] = module.up.to(dtype)
        tensors[f"{name}.alpha"] = torch.tensor(float(module.alpha))
    return tensors


def _rounding_well(modules: list[LoraModule], dtype) -> list[LoraModule]:
    modules = with_one_alpha(modules)
    return [balanced(module) for module in modules] if dtype == torch.float16 else modules


def diffusers_tensors(modules: list[LoraModule], dtype) -> tuple[dict[str, torch.Tensor], dict]:
    """diffusers' keys, and the adapter settings without which its loader takes alpha = rank."""
    tensors, settings = {}, {}
    modules = _rounding_well(modules, dtype)
    for part in PARTS:
        own = [module for module in modules if module.part == part]
        for module in own:
            tensors[f"{part}.{module.path}.lora_A.weight"] = module.down.to(dtype)
            tensors[f"{part}.{module.path}.lora_B.weight"] = module.up.to(dtype)
        if own:
            settings |= {f"{part}.{name}": value for name, value in _plain_lora_config(own).items()}
    return tensors, settings


def _plain_lora_config(modules: list[LoraModule]) -> dict:
    """PEFT's settings for modules of one alpha. transformers 5 has no `text_model.` level, and PEFT matches endings."""
    paths = {module.path.removeprefix("text_model."): module.rank for module in modules}
    rank = Counter(paths.values()).most_common(1)[0][0]
    alpha = modules[0].alpha
    return {
        "r": rank,
        "lora_alpha": int(alpha) if float(alpha).is_integer() else alpha,
        "rank_pattern": {path: own for path, own in paths.items() if own != rank},
        "alpha_pattern": {},
        "target_modules": sorted(paths),
        "use_rslora": False,
        "use_dora": False,
        "lora_bias": False,
        "bias": "none",
    }


def write_peft(folder, modules: list[LoraModule], model, adapter: str = "default") -> Path:
    """A PEFT adapter folder as trained: its own settings, precision and module names (`base_model.model.…`)."""
    folder = Path(folder)
    flattened = modules[0].part != "unet" and not hasattr(model, "text_model")
    tensors = {}
    for module in modules:
        live = module.path.removeprefix("text_model.") if flattened else module.path
        tensors[f"base_model.model.{live}.lora_A.weight"] = module.down
        tensors[f"base_model.model.{live}.lora_B.weight"] = module.up
    settings = model.peft_config[adapter].to_dict()
    settings |= {"base_model_name_or_path": None, "inference_mode": True, "revision": None}  # the first is a private path
    write_json(folder / "adapter_config.json", _plain_json(settings))
    write_safetensors(folder / "adapter_model.safetensors", tensors, {"format": "pt"})
    return folder


def _plain_json(value):
    """Sets become sorted lists, so that the same adapter makes the same file."""
    if isinstance(value, dict):
        return {str(key): _plain_json(item) for key, item in value.items()}
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    if isinstance(value, (list, tuple)):
        return [_plain_json(item) for item in value]
    return value if value is None or isinstance(value, (bool, int, float)) else str(getattr(value, "value", value))


def prove(path: Path, kind: str, trained, models, limit: float, roads=()) -> list[Check]:
    """Read `path` back by our reader and every road for its format, and count what each program would find."""
    expected = [module for module in trained if kind != "peft" or PEFT_FOLDERS[module.part] == path.name]
    checks = []
    if kind == "kohya":
        layers = tuple(_text_layers(models.get(part)) for part in PARTS[1:])
        names = [raw.name for raw in raw_modules(read_safetensors(path)[0], path)]
        for program, readable in programs(models["unet"].config, layers).items():
            checks.append(Check(path.name, program, sum(name in readable for name in names), len(expected), note="names"))
    own = Road("lora_nb", FORMATS, lambda file: read_lora(file, **models))
    return checks + [road.check(path, expected, limit) for road in (own, *roads) if kind in road.formats]


def _text_layers(text_encoder) -> int:
    return text_encoder.config.num_hidden_layers if text_encoder is not None else 0


def _swap_in(beside: Path, folder: Path) -> None:
    """Put `beside` in the place of `folder`, keeping what others laid there (a model card, pictures)."""
    for path in beside.rglob("*"):
        if path.is_dir():
            sync_folder(path)
    sync_folder(beside)
    os.chmod(beside, 0o755)
    if not folder.exists():
        os.replace(beside, folder)
        return
    for entry in folder.iterdir():
        ours = entry.name in (*PEFT_FOLDERS.values(), PROOF_FILE) or entry.suffix == ".safetensors"
        if not ours and not (beside / entry.name).exists():
            shutil.copytree(entry, beside / entry.name) if entry.is_dir() else shutil.copy2(entry, beside / entry.name)
    old = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}.", suffix=".old"))
    os.replace(folder, old / folder.name)
    os.replace(beside, folder)
    shutil.rmtree(old, ignore_errors=True)
