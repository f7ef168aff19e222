"""Files that are whole or absent, their hashes, full disks, and where the project lies."""

import errno
import hashlib
import json
import os
import tempfile
from contextlib import contextmanager
from pathlib import Path

from lora_nb.errors import UserError

FULL_DISK = {errno.ENOSPC, errno.EFBIG, getattr(errno, "EDQUOT", errno.ENOSPC)}


def project_root(start=None) -> Path:
    """The folder that holds `lora_nb/` and `notebooks/`, found from `start` (the working folder) upwards.

    JupyterLab and nbval run in the notebook's folder, papermill in the caller's; LORA_NB_ROOT overrides.
    """
    if os.environ.get("LORA_NB_ROOT"):
        return Path(os.environ["LORA_NB_ROOT"]).resolve()
    here = Path(start or Path.cwd()).resolve()
    for folder in (here, *here.parents):
        if (folder / "notebooks").is_dir() and (folder / "lora_nb").is_dir():
            return folder
    installed_from = Path(__file__).resolve().parent.parent
    return installed_from if (installed_from / "notebooks").is_dir() else here


def from_root(path) -> Path:
    """`path` as it is shown: from the project's root where it lies below it and somebody works there, else as it is."""
    path, root = Path(path), project_root()
    return path.relative_to(root) if path.is_relative_to(root) and Path.cwd().is_relative_to(root) else path


def write_atomic(path, content) -> Path:
    """Write `content` (bytes or str) beside `path`, sync, then rename: the file is whole or absent."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    data = content.encode("utf-8") if isinstance(content, str) else content
    handle, beside = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name[:40]}.", suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(beside, 0o644)
        os.replace(beside, path)
    except BaseException:
        Path(beside).unlink(missing_ok=True)
        raise
    return path


def write_json(path, value) -> Path:
    """Readable JSON, the same bytes for the same value."""
    return write_atomic(path, json.dumps(value, indent=2, ensure_ascii=False, sort_keys=False) + "\n")


@contextmanager
def full_disk_is_a_sentence(folder):
    """Turns a full disk at any write into a UserError."""
    try:
        yield
    except OSError as error:
        if error.errno not in FULL_DISK:
            raise
        raise UserError(f"The disk under {folder} is full: make room and run again; what is there already is whole.") from error


def sha256_file(path) -> str:
    """Hex SHA-256 of a file's bytes."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def sync_folder(folder) -> None:
    """Make renames in a folder last through a power cut (Windows needs and knows no such thing)."""
    if os.name == "nt":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
