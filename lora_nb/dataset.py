"""The data set doctor: scan a folder, validate what lies in it, and hand on a manifest.

    records = scan("data/aldar_kose")
    report = validate(records, resolution=1024, trigger_token="aldar_kose_man")
    manifest = preprocess(report.write("outputs/my_run"))

Nothing is ever changed in the user's folder.
"""

import json
from dataclasses import dataclass, field, replace
from pathlib import Path

from .buckets import buckets
from .captions import decode_caption
from .duplicates import TwinSearch
from .errors import UserError
from .events import OnEvent, Progress, ignore
from .files import project_root, write_atomic, write_json
from .findings import ERROR, Finding, finding
from .judge import compare, judge, set_apart, trigger_nowhere
from .layouts import CAPTION_ENDINGS, Record, describe_layout, existing_folder, expected_caption, pair, walk
from .manifest import Manifest, Sample, best_manifest, open_sample, read_manifest, write_manifest
from .preprocess import preprocess
from .report import Picture, Report
from .sources import read_metadata, unpack
from .workers import run_isolated

__all__ = [
    "Manifest", "Picture", "Record", "Records", "Report", "Sample", "best_manifest", "buckets", "open_sample",
    "preprocess", "read_exclusions", "read_manifest", "read_overrides", "scan", "validate", "with_overrides",
    "write_caption", "write_exclusions", "write_manifest", "write_overrides",
]  # fmt: skip

EXCLUSIONS, OVERRIDES = "exclusions.json", "caption_overrides.json"  # the user's notes, in the run's folder


@dataclass
class Records:
    """What `scan` found: a sequence of Record, with the folder, its layout in words, and the findings about neither."""

    root: Path
    layout: str
    records: list[Record]
    findings: list[Finding] = field(default_factory=list)

    def __iter__(self):
        return iter(self.records)

    def __len__(self):
        return len(self.records)

    def __getitem__(self, index):
        return self.records[index]

    def __repr__(self):
        held_out = sum(record.split == "held_out" for record in self.records)
        with_caption = sum(bool(record.caption) for record in self.records)
        return (
            f"{len(self) - held_out} pictures to train on and {held_out} held out, {with_caption} with a caption; "
            f"layout: {self.layout}"
        )


def scan(folder, unpack_into=None) -> Records:
    """Find pictures and captions in a folder or zip, in whichever layout, without opening a picture.

    unpack_into: where a zip is unpacked, by default outputs/unpacked below the project.
    Raises UserError when the folder is missing or holds no picture.
    """
    source = existing_folder(folder)
    findings = []
    if source.is_file():
        if source.suffix.lower() != ".zip":
            raise UserError(f"{folder} is neither a folder nor a zip: give the folder that holds the pictures.")
        source, findings = unpack(source, unpack_into or project_root() / "outputs" / "unpacked")
    tree = walk(source)
    if not tree.pictures:
        barred = next((f" ({each.message.rstrip('.')})" for each in tree.findings if each.severity == ERROR), "")
        raise UserError(
            f"{folder} holds no pictures{barred}: put them into {folder}/images with captions in {folder}/captions, or .txt files beside them."
        )
    rows, row_findings = read_metadata(source, tree.metadata, tree.pictures)
    records, loose = pair(tree, rows)
    return Records(source, describe_layout(tree), records, findings + tree.findings + row_findings + loose)


def validate(
    records: Records,
    resolution: int,
    trigger_token: str | None = None,
    *,
    square: bool = False,
    center_crop: bool = True,
    held_out_share: float = 0.0,
    seed: int = 0,
    exclusions=None,
    leave_out_errors: bool = False,
    tokenizers=(),
    workers: int | None = None,
    time_limit_s: float = 30.0,
    on_event: OnEvent = ignore,
) -> Report:
    """Decode every picture to its last byte and say everything that is wrong, at once.

    resolution: pixels; a bucket has about its square in area. square: crop all to it instead of to buckets.
    center_crop: the middle; else a place drawn once for each picture from `seed`.
    held_out_share: of the pictures to keep for evaluation, besides those in the folder `reference`.
    exclusions: {image_path: reason} of pictures that the user leaves out, see read_exclusions.
    leave_out_errors: go on without the pictures that have errors; otherwise one error makes the verdict "not ready".
    tokenizers: see captions.clip_tokenizers; without them token counts are estimates.
    workers, time_limit_s: see workers.run_isolated.
    """
    sizes, exclusions = buckets(resolution, square), exclusions or {}
    facts, twins = _inspect(records, resolution, workers, time_limit_s, on_event)
    pictures = [
        replace(judge(record, found, sizes, trigger_token, tokenizers), excluded=exclusions.get(record.image_path))
        for record, found in zip(records, facts, strict=True)
    ]
    pictures, overall = compare(pictures, twins)
    if held_out_share:
        pictures = set_apart(pictures, held_out_share, seed)
    settings = {
        "resolution": resolution,
        "trigger_token": trigger_token,
        "square": square,
        "center_crop": center_crop,
        "held_out_share": held_out_share,
        "seed": seed,
    }
    findings = [*records.findings, *overall, *trigger_nowhere(pictures, trigger_token), *_unknown_exclusions(records, exclusions)]
    return Report(records.root, records.layout, pictures, findings, settings, leave_out_errors)


def _inspect(records, resolution, workers, time_limit_s, on_event):
    """(what is known of each record's file, the twins among them). Signatures go straight into the search's arrays."""
    facts, search, done = [None] * len(records), TwinSearch(len(records)), 0
    readable = [index for index, record in enumerate(records) if record.readable]

    def take(place, found):
        nonlocal done
        index, done = readable[place], done + 1
        if isinstance(found, dict) and "signature" in found:
            search.add(index, found.pop("signature"))
        facts[index] = found
        on_event(Progress("validate", done, len(readable), records[index].image_path))

    jobs = [{"path": str(records[index].path), "resolution": resolution} for index in readable]
    run_isolated("lora_nb.images:inspect", jobs, take, workers, time_limit_s)
    return facts, search.pairs()


def read_exclusions(run_dir) -> dict[str, str]:
    """{image_path: reason} of the pictures that the user leaves out; {} where nothing was excluded yet."""
    return _read_notes(Path(run_dir) / EXCLUSIONS)


def read_overrides(run_dir) -> dict[str, str]:
    """{image_path: caption} that the user wrote over the captions in the files; {} where there are none."""
    return _read_notes(Path(run_dir) / OVERRIDES)


def write_exclusions(run_dir, exclusions: dict[str, str]) -> Path:
    """Keep the user's exclusion list in the run's folder; the data set's folder is not touched."""
    return write_json(Path(run_dir) / EXCLUSIONS, exclusions)


def write_overrides(run_dir, overrides: dict[str, str]) -> Path:
    """Keep the user's captions in the run's folder; the caption files are not touched."""
    return write_json(Path(run_dir) / OVERRIDES, overrides)


def write_caption(records: Records, image_path: str, caption: str) -> Path:
    """Write a caption into the user's own file, because the user asked for it; makes the file where there is none.

    Raises UserError for a caption that is a row of a metadata file.
    """
    record = next(each for each in records if each.image_path == image_path)
    file = record.caption_path or expected_caption(image_path)
    if not file.lower().endswith(CAPTION_ENDINGS):
        raise UserError(f"The caption of {image_path} is a row of {file}: change it there; it is kept as an override meanwhile.")
    return write_atomic(records.root / file, caption + "\n")


def _read_notes(path) -> dict[str, str]:
    if not path.is_file():
        return {}
    try:
        notes = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read ({error}): mend it or remove it.") from error
    if not isinstance(notes, dict) or not all(isinstance(text, str) for text in notes.values()):
        raise UserError(f'{path} must hold {{"picture": "text", ...}}: mend it or remove it.')
    return notes


def with_overrides(records: Records, overrides: dict[str, str]) -> Records:
    """The records with the user's captions laid over those of the files, which stay as they are."""
    known = {record.image_path for record in records}
    unknown = [finding("override-without-picture", name) for name in overrides if name not in known]
    changed = [_override(record, overrides) for record in records]
    return replace(records, records=changed, findings=records.findings + unknown)


def _override(record, overrides):
    if record.image_path not in overrides:
        return record
    caption, notices = decode_caption(overrides[record.image_path].encode("utf-8", "replace"))
    kept = [
        each for each in record.findings if not each.code.endswith("-caption") and not each.code.startswith("caption-")
    ]
    said = [finding(code, record.image_path, **facts) for code, facts in notices]
    if not caption:
        said.append(finding("empty-caption", record.image_path, expected=OVERRIDES))
    return replace(record, caption=caption or None, findings=(*kept, *said))


def _unknown_exclusions(records, exclusions):
    known = {record.image_path for record in records}
    return [finding("exclusion-without-picture", name) for name in exclusions if name not in known]
