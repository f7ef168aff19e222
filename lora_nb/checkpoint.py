"""Checkpoints that are whole or absent: written beside, synced, renamed; pruned last; a damaged one is named.

A checkpoint holds the LoRA in diffusers' format (so that it loads into a pipeline as it is), the optimizer's state and
the state of the run, with a manifest of sizes and hashes.
"""

import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path

from lora_nb.errors import UserError
from lora_nb.events import Notice, ignore
from lora_nb.files import full_disk_is_a_sentence, sha256_file, sync_folder, write_atomic, write_json
from lora_nb.lora_file import read_safetensors, write_safetensors

LORA, OPTIMIZER, STATE, MANIFEST = "pytorch_lora_weights.safetensors", "optimizer.safetensors", "state.json", "manifest.json"


def save_checkpoint(folder, step: int, lora, optimizer, state: dict, keep: int | None = None) -> Path:
    """Write `folder`/checkpoint-`step`, whole or not at all, then drop all but the newest `keep`.

    lora: (tensors, metadata) in diffusers' format; optimizer: tensors; state: JSON. Raises UserError on a full disk,
    which leaves the checkpoints before as they were.
    """
    folder = Path(folder)
    final, beside = folder / f"checkpoint-{step}", folder / f".checkpoint-{step}.tmp"
    tensors, metadata = lora
    need = sum(tensor.nbytes for group in (tensors, optimizer) for tensor in group.values())
    with full_disk_is_a_sentence(folder):
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir(parents=True)
        check_space(folder, need, f"checkpoint-{step}")
        try:
            write_safetensors(beside / LORA, tensors, metadata)
            write_safetensors(beside / OPTIMIZER, optimizer)
            write_atomic(beside / STATE, json.dumps(state))  # indented it would take a third of a save's time
            written = {path.name: {"bytes": path.stat().st_size, "sha256": sha256_file(path)} for path in sorted(beside.iterdir())}
            write_json(beside / MANIFEST, {"step": step, "files": written})
            sync_folder(beside)
            if final.exists():  # a damaged one of the same step
                _drop(final)
            os.replace(beside, final)
            sync_folder(folder)
        except BaseException:
            shutil.rmtree(beside, ignore_errors=True)
            raise
    prune(folder, keep)
    return final


def list_checkpoints(folder) -> list[tuple[int, Path]]:
    """(step, path) of everything that is named as a checkpoint, oldest first."""
    found = [(path.name.removeprefix("checkpoint-"), path) for path in Path(folder).glob("checkpoint-*")]
    return sorted((int(step), path) for step, path in found if step.isdigit())


def damage(path: Path) -> str | None:
    """What is wrong with a checkpoint, None if every file is as its manifest says."""
    try:
        files = json.loads((path / MANIFEST).read_text())["files"]
        if not {LORA, OPTIMIZER, STATE} <= set(files):
            return f"{MANIFEST} lists too few files"
        for name, entry in files.items():
            if (path / name).stat().st_size != entry["bytes"] or sha256_file(path / name) != entry["sha256"]:
                return f"{name} has changed since it was written"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{MANIFEST} cannot be read ({type(error).__name__})"
    return None


def latest_checkpoint(folder, on_event=ignore) -> Path | None:
    """The newest whole checkpoint, None if there is none; damaged ones after it are named."""
    return newest_whole(list_checkpoints(folder), on_event)


def newest_whole(checkpoints: Iterable[tuple[int, Path]], on_event=ignore) -> Path | None:
    """The last whole one of (step, path), oldest first; those passed over are named. None if there is none."""
    for _, path in reversed(list(checkpoints)):
        reason = damage(path)
        if reason is None:
            return path
        on_event(Notice(f"{path} is damaged ({reason}) and passed over."))
    return None


def set_aside(folder, after: int) -> None:
    """Take checkpoints of steps after `after` out of the count, as `checkpoint-N.damaged`: a run that goes on from
    `after` makes these steps again, and would drop whole checkpoints for them."""
    for step, path in list_checkpoints(folder):
        if step > after:
            aside = path.with_name(f"{path.name}.damaged")
            shutil.rmtree(aside, ignore_errors=True)
            os.replace(path, aside)


def load_checkpoint(path) -> tuple[dict, dict, dict]:
    """LoRA tensors in diffusers' names, optimizer tensors and the run's state."""
    path = Path(path)
    return read_safetensors(path / LORA)[0], read_safetensors(path / OPTIMIZER)[0], json.loads((path / STATE).read_text())


def prune(folder, keep: int | None) -> None:
    """Drop all but the newest `keep` checkpoints, and what a killed save left behind."""
    for leftover in Path(folder).glob(".checkpoint-*.tmp"):
        shutil.rmtree(leftover, ignore_errors=True)
    if keep is None:
        return
    for _, path in list_checkpoints(folder)[:-keep]:
        _drop(path)


def _drop(path: Path) -> None:
    """Rename, then delete: a kill in between leaves no half checkpoint under a checkpoint's name."""
    doomed = path.with_name(f".{path.name}-dropped.tmp")
    shutil.rmtree(doomed, ignore_errors=True)
    os.replace(path, doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def check_space(folder, need: int, what: str) -> None:
    """Raises UserError if the disk under `folder` has not `need` bytes and a little more."""
    place = next(path for path in (Path(folder).resolve(), *Path(folder).resolve().parents) if path.exists())
    free = shutil.disk_usage(place).free
    if free < 1.05 * need + (1 << 20):
        raise UserError(f"{what} needs {need / 2**20:,.0f} MiB and {place} has {free / 2**20:,.0f} MiB left: make room, or lower save_total_limit.")  # fmt: skip
