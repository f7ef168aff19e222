"""What a data set may come in besides a plain folder: a zip, and Hugging Face's metadata files."""

import contextlib
import csv
import json
import os
import posixpath
import re
import shutil
import stat
import tempfile
import zipfile
from pathlib import Path

from .captions import MAX_BYTES as MAX_CAPTION_BYTES
from .errors import UserError
from .files import FULL_DISK, full_disk_is_a_sentence, sha256_file, write_json
from .findings import Finding, finding

MAX_ENTRIES = 200_000
MAX_UNPACKED_BYTES = 20 << 30
MAX_METADATA_BYTES = 256 << 20
CAPTION_COLUMNS = ("text", "caption", "prompt", "description")
_FINDINGS = ".unpacked.json"  # hidden, so a scan passes over it


def unpack(archive, into) -> tuple[Path, list[Finding]]:
    """Unpack a zip below `into`, once: (the folder that holds the data set, what was refused).

    Nothing leaves that folder: no `..`, absolute name, link or encrypted entry, at most MAX_ENTRIES entries and
    MAX_UNPACKED_BYTES bytes as really unpacked, whatever the headers promise.
    """
    folder = Path(into) / f"{re.sub(r'[^A-Za-z0-9_-]+', '_', Path(archive).stem)[:40]}-{sha256_file(archive)[:12]}"
    if not (folder / _FINDINGS).is_file():
        Path(into).mkdir(parents=True, exist_ok=True)
        beside = Path(tempfile.mkdtemp(dir=into, prefix=".unpacking-"))
        try:
            with full_disk_is_a_sentence(into):
                refused = _extract(archive, beside)
                write_json(beside / _FINDINGS, [[each.code, each.file, each.message, each.cure] for each in refused])
            os.replace(beside, folder)
        finally:
            shutil.rmtree(beside, ignore_errors=True)
    findings = [Finding(*each) for each in json.loads((folder / _FINDINGS).read_text("utf-8"))]
    return _only_folder(folder), findings


def _extract(archive, folder) -> list[Finding]:
    refused, left = [], MAX_UNPACKED_BYTES
    try:
        with zipfile.ZipFile(archive) as file:
            entries = file.infolist()
            if len(entries) > MAX_ENTRIES:
                raise UserError(
                    f"{archive} holds {len(entries):,} files, more than {MAX_ENTRIES:,}: unpack it yourself."
                )
            for entry in entries:
                name = entry.filename.replace("\\", "/")
                reason = _refusal(name, entry)
                if reason:
                    refused.append(finding("archive-entry-refused", name, reason=reason))
                elif not name.endswith("/"):
                    left -= _extract_one(file, entry, folder / name, left, refused)
                if left < 0:
                    raise UserError(
                        f"{archive} unpacks to more than {MAX_UNPACKED_BYTES >> 30} GB: unpack it yourself and check what it is."
                    )
    except (zipfile.BadZipFile, OSError) as error:
        if getattr(error, "errno", None) in FULL_DISK:
            raise
        raise UserError(f"{archive} cannot be unpacked ({error}): make the archive again.") from error
    return refused


def _refusal(name, entry):
    if name.startswith("/") or ".." in name.split("/") or re.match(r"[A-Za-z]:", name) or "\0" in name:
        return "it would be written outside the folder"
    if stat.S_ISLNK(entry.external_attr >> 16):
        return "it is a link"
    return "it is encrypted" if entry.flag_bits & 1 else None


def _extract_one(file, entry, path, left, refused) -> int:
    """Bytes written; more than `left` means that the limit was passed."""
    written = 0
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with file.open(entry) as source, open(path, "xb") as target:
            while (block := source.read(1 << 20)) and written <= left:
                written += target.write(block)
    except FileExistsError:
        refused.append(finding("archive-entry-refused", entry.filename, reason="its name is there already"))
    except Exception as error:  # bad checksum, unknown compression, a name that is too long: zlib.error, OSError, ...
        with contextlib.suppress(OSError):
            path.unlink()
        if getattr(error, "errno", None) in FULL_DISK:  # the archive is not to blame, and a second try would help
            raise
        refused.append(finding("archive-entry-damaged", entry.filename, reason=str(error)[:120]))
    return written


def _only_folder(folder: Path) -> Path:
    """Step down while an archive holds nothing but one folder that is no part of a layout itself."""
    while True:
        entries = [entry for entry in folder.iterdir() if not entry.name.startswith((".", "__MACOSX"))]
        if len(entries) != 1 or not entries[0].is_dir() or re.fullmatch(r"images|\d+_.+", entries[0].name):
            return folder
        folder = entries[0]


def read_metadata(root: Path, names, pictures) -> tuple[dict[str, tuple[str, str]], list[Finding]]:
    """image_path -> (caption, metadata file) from metadata.jsonl or metadata.csv files, and the rows that could not be used."""
    captions, findings, known = {}, [], set(pictures)
    for name in names:
        for number, row in _rows(root / name, name, findings):
            _take_row(row, name, number, captions, known, findings)
    return captions, findings


def _rows(path, name, findings):
    if path.stat().st_size > MAX_METADATA_BYTES:
        raise UserError(f"{name} is larger than {MAX_METADATA_BYTES >> 20} MB: split the data set.")
    try:
        text = path.read_text("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{name} cannot be read ({error}): save it as UTF-8.") from error
    if name.lower().endswith(".csv"):
        try:
            yield from enumerate(csv.DictReader(text.splitlines(keepends=True)), start=2)
        except csv.Error as error:
            findings.append(finding("metadata-row", name, row="?", reason=str(error)))
        return
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            yield number, json.loads(line)
        except (ValueError, RecursionError) as error:
            findings.append(finding("metadata-row", name, row=number, reason=f"no JSON: {str(error)[:80]}"))


def _take_row(row, name, number, captions, known, findings):
    file_name = row.get("file_name") if isinstance(row, dict) else None
    if not isinstance(file_name, str) or not file_name:
        findings.append(finding("metadata-row", name, row=number, reason="it has no file_name"))
        return
    path = posixpath.normpath(posixpath.join(posixpath.dirname(name), file_name.replace("\\", "/")))
    caption = next((row[column] for column in CAPTION_COLUMNS if row.get(column) is not None), None)
    if path.startswith(("/", "..")) or re.match(r"[A-Za-z]:", file_name):
        findings.append(finding("metadata-row", name, row=number, reason="its file_name leads out of the folder"))
    elif not isinstance(caption, str):
        findings.append(
            finding("metadata-row", name, row=number, reason=f"it has no column {' or '.join(CAPTION_COLUMNS)}")
        )
    elif path not in known:
        findings.append(finding("metadata-without-picture", name, row=number, other=file_name))
    elif path in captions:
        findings.append(finding("metadata-twice", name, row=number, other=file_name))
    else:
        captions[path] = caption[:MAX_CAPTION_BYTES], name
