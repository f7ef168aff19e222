"""Where the files of a base model lie, whether they are whole, and the fingerprint of their weights. No torch."""

import hashlib
import json
from pathlib import Path

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError

from lora_nb.config import resolve_path
from lora_nb.errors import UserError

# Where a part lies inside one SDXL checkpoint file.
SINGLE_FILE_PREFIXES = {
    "unet": "model.diffusion_model.",
    "vae": "first_stage_model.",
    "text_encoder": "conditioner.embedders.0.",
    "text_encoder_2": "conditioner.embedders.1.",
}
SAMPLE = 32 * 1024  # bytes read from each end of a tensor; whole tensors up to twice that


def locate(model: str, part: str, half: bool = True) -> Path:
    """The folder that holds `part` (its own files, not the pipeline's), or the single .safetensors file.

    `model` is a diffusers folder, a folder with just the part, one .safetensors file or a hub id, which is downloaded
    (half precision if `half` and offered). Raises UserError for a missing, gated or half-downloaded one.
    """
    path = resolve_path(model)
    if path.is_file():
        if path.suffix != ".safetensors":
            raise UserError(f"{model} is not a .safetensors file: pickled checkpoints can run code; convert it first.")
        check_whole(path)
        return path
    folder = path if path.is_dir() else _download(model, part, half)
    if (folder / part).is_dir():
        folder = folder / part
    elif not (folder / "config.json").is_file() or (folder / "model_index.json").is_file():
        raise UserError(f"{model} has no folder {part!r}: give a diffusers folder, a hub id or a .safetensors file.")
    if lacking := _lacking(folder, part):
        raise UserError(f"{folder} has no {lacking}: it is half downloaded; delete it and download it again.")
    for file in weight_files(folder):
        check_whole(file)
    return folder


def _lacking(folder: Path, part: str) -> str | None:
    """A file that `part` cannot do without and `folder` does not hold. Without its words a tokenizer loads, and knows none."""
    if part == "scheduler":
        needed = ["scheduler_config.json"]
    elif part.startswith("tokenizer"):
        needed = ["tokenizer_config.json", *(["vocab.json", "merges.txt"] if not (folder / "tokenizer.json").is_file() else [])]
    else:
        needed = ["config.json"]
    return next((name for name in needed if not (folder / name).is_file()), None)


def pipeline_settings(model: str) -> dict:
    """model_index.json of a diffusers folder or hub id."""
    index = locate(model, "scheduler").parent / "model_index.json"
    if not index.is_file():
        raise UserError(f"{index.parent} has no model_index.json: it is half downloaded, or no whole pipeline.")
    return json.loads(index.read_text(encoding="utf-8"))


def weight_files(folder: Path) -> list[Path]:
    """The .safetensors of a part, full precision before the fp16 variant, never both."""
    files = sorted(folder.glob("*.safetensors"))
    full = [file for file in files if ".fp16" not in file.name]
    return full or files


def fingerprint(model: str, part: str) -> str:
    """16 hex digits that change with the weights of `part`: names, shapes, types and samples of every tensor.

    Reads at most 64 KiB of each tensor, so that gigabytes take a second; two fine-tunes differ in every tensor.
    """
    place = locate(model, part)
    prefix = SINGLE_FILE_PREFIXES[part] if place.is_file() else ""
    digest = hashlib.sha256()
    for path in [place] if place.is_file() else weight_files(place):
        header, start = read_header(path)
        with open(path, "rb") as file:
            names = sorted(name for name in header if name != "__metadata__")
            for name in [name for name in names if name.startswith(prefix)] or names:  # a VAE's own file has no prefix
                digest.update(json.dumps([name.removeprefix(prefix), header[name]["dtype"], header[name]["shape"]]).encode())
                first, last = (start + offset for offset in header[name]["data_offsets"])
                for offset in {first, max(first, last - SAMPLE)}:
                    file.seek(offset)
                    digest.update(file.read(min(SAMPLE, last - offset)))
    return digest.hexdigest()[:16]


def read_header(path: Path) -> tuple[dict, int]:
    """The JSON header of a .safetensors file and the offset of its data. Raises UserError if it is damaged."""
    try:
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            return json.loads(file.read(min(length, 100_000_000))), 8 + length
    except ValueError:
        raise UserError(f"{path} is damaged or half downloaded: delete it and download it again.") from None


def check_whole(path: Path) -> None:
    """Raises UserError unless the file is as long as its header says."""
    header, start = read_header(path)
    ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
    if path.stat().st_size != start + max(ends, default=0):
        raise UserError(f"{path} is half downloaded ({path.stat().st_size:,} bytes of {start + max(ends):,}): delete it and download it again.")  # fmt: skip


def _download(model: str, part: str, half: bool) -> Path:
    """The local snapshot of a hub repository with the files of `part`, from the disk if they are there."""
    if len(Path(model).parts) != 2 or model.startswith((".", "/", "~")):
        raise UserError(f"There is no model at {model}: check base_model and vae_model.")
    wanted = ["model_index.json", "config.json", f"{part}/*.json", f"{part}/*.txt"]
    weights = [f"{part}/*.safetensors", "*.safetensors"]
    try:
        try:
            folder = Path(snapshot_download(model, local_files_only=True))
            whole = not _lacking(folder / part, part)
            if whole and (part.startswith("tokenizer") or part == "scheduler" or any((folder / part).glob("*.safetensors"))):
                return folder
        except LocalEntryNotFoundError:
            pass
        files = HfApi().list_repo_files(model)
        mine = [name for name in files if name.startswith(f"{part}/")] or [name for name in files if "/" not in name]
        halves = [name for name in mine if name.endswith(".fp16.safetensors")]
        fulls = [name for name in mine if name.endswith(".safetensors") and name not in halves and "/openvino" not in name]
        wanted += (halves if half and halves else fulls) or weights
        return Path(snapshot_download(model, allow_patterns=wanted))
    except GatedRepoError:
        raise UserError(f"{model} is gated: accept its licence on https://huggingface.co/{model} and run `hf auth login`.") from None  # fmt: skip
    except RepositoryNotFoundError:
        raise UserError(f"There is no folder {model} here and no model of that name on the hub: check base_model, or run `hf auth login` if it is private.") from None  # fmt: skip
    except Exception as error:  # offline, time-outs, full disks: the hub's clients raise their own families
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"{model} is not on this machine and cannot be downloaded ({reason}): connect, or set base_model to a folder.") from None  # fmt: skip
