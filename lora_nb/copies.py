"""Whole copies of checkpoints in a second folder (a mounted Drive), and the way back from there on a fresh machine.

A mounted Drive loses appended and overwritten files, so a copy is a folder of a name never used before, checked by
hash after it was written, and found again only if every file is as its manifest says.
"""

import os
import re
import shutil
import uuid
from pathlib import Path

from lora_nb.checkpoint import damage, list_checkpoints, newest_whole
from lora_nb.errors import UserError
from lora_nb.events import Notice, OnEvent, ignore
from lora_nb.files import FULL_DISK, full_disk_is_a_sentence

_NAME = re.compile(r"checkpoint-(\d+)-[0-9a-f]{8}$")


def copy_checkpoint(checkpoint, into, keep: int | None = None) -> Path:
    """Copy one whole checkpoint folder to `into`/checkpoint-N-xxxxxxxx, read it back, and drop all but the newest `keep`.

    Raises UserError if the place is missing, full, or gives back other bytes than it was given.
    """
    checkpoint, into = Path(checkpoint), Path(into)
    copy = into / f"{checkpoint.name}-{uuid.uuid4().hex[:8]}"
    try:
        into.mkdir(parents=True, exist_ok=True)
        beside = into / f".{copy.name}.tmp"
        _copy_files(checkpoint, beside)
        if reason := damage(beside):
            shutil.rmtree(beside, ignore_errors=True)
            raise UserError(f"The copy of {checkpoint.name} in {into} is damaged ({reason}); check the place that copy_checkpoints_to names.")
        os.replace(beside, copy)
    except OSError as error:
        shutil.rmtree(into / f".{copy.name}.tmp", ignore_errors=True)
        cure = "make room there" if error.errno in FULL_DISK else "mount the Drive, or set copy_checkpoints_to: null"
        raise UserError(f"{checkpoint.name} cannot be copied to {into} ({error.strerror or error}); {cure}.") from error
    _prune(into, keep, int(_NAME.match(copy.name)[1]))
    return copy


def copies(folder) -> list[tuple[int, Path]]:
    """(step, path) of every copy in `folder`, oldest first, whole or not."""
    found = [(_NAME.match(path.name), path) for path in Path(folder).glob("checkpoint-*")]
    return sorted((int(match[1]), path) for match, path in found if match)


def newest_copy(folder, on_event: OnEvent = ignore) -> Path | None:
    """The newest whole copy in `folder`; damaged ones after it are named. None where there is none."""
    return newest_whole(copies(folder), on_event)


def bring_back(folder, checkpoints, on_event: OnEvent = ignore) -> Path | None:
    """Copy the newest whole copy in `folder` into `checkpoints`, if it is further than what lies there whole.

    Returns the checkpoint that was brought, or None. A folder that is not there counts as empty: on a first start the
    Drive holds nothing yet.
    """
    here = max((step for step, path in list_checkpoints(checkpoints) if damage(path) is None), default=0)
    if not any(step > here for step, _ in copies(folder)):
        return None
    newest = newest_copy(folder, on_event)
    step = int(_NAME.match(newest.name)[1]) if newest else 0
    if step <= here:
        return None
    brought = Path(checkpoints) / f"checkpoint-{step}"
    beside = brought.with_name(f".{brought.name}.tmp")
    shutil.rmtree(beside, ignore_errors=True)
    with full_disk_is_a_sentence(checkpoints):
        _copy_files(newest, beside)
    if reason := damage(beside):
        shutil.rmtree(beside, ignore_errors=True)
        raise UserError(f"{newest} could not be read back whole ({reason}); check the Drive and run again.")
    shutil.rmtree(brought, ignore_errors=True)  # a damaged one of the same step
    os.replace(beside, brought)
    on_event(Notice(f"Brought checkpoint-{step} from {folder}."))
    return brought


def _copy_files(source: Path, into: Path) -> None:
    """A checkpoint is a flat folder; copytree would hide a full disk in an error of its own."""
    into.mkdir(parents=True)
    for file in sorted(source.iterdir()):
        shutil.copyfile(file, into / file.name)


def _prune(folder: Path, keep: int | None, newest: int) -> None:
    """Of copies of steps after `newest` none is whole: they do not count. A copy that cannot be dropped (a Drive being
    synced) is dropped the next time."""
    for leftover in folder.glob(".checkpoint-*.tmp"):
        shutil.rmtree(leftover, ignore_errors=True)
    for _, path in [each for each in copies(folder) if each[0] <= newest][: -keep if keep else 0]:
        doomed = path.with_name(f".{path.name}.tmp")
        try:
            os.replace(path, doomed)
        except OSError:
            continue
        shutil.rmtree(doomed, ignore_errors=True)
