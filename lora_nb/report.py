"""What validation found, as a verdict, tables and numbers that read the same in a notebook and in a terminal."""

import html
import textwrap
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from .buckets import Crop, drawn_place, plan_crop
from .captions import Absorption, absorption, find_trigger
from .errors import UserError
from .files import full_disk_is_a_sentence
from .findings import COLOURS, ERROR, SEVERITIES, WARNING, Finding, printable
from .layouts import Record
from .manifest import PLAIN, SCHEMA_VERSION, Manifest, ManifestFile, read_manifest, relative_root, write_manifest

NONE_HELD_OUT = " for notebook 04 (put some into reference/, or set HELD_OUT_SHARE or --held-out)"
_COLOURS = {"ready": COLOURS["ready"], "ready with warnings": COLOURS[WARNING], "not ready": COLOURS[ERROR]}


@dataclass(frozen=True)
class Picture:
    """One record after it was decoded. Sizes in pixels, upright; None where decoding failed."""

    record: Record
    findings: tuple[Finding, ...]
    width: int | None = None
    height: int | None = None
    format: str | None = None
    sha256: str | None = None
    bucket: tuple[int, int] | None = None
    tokens: int = 0
    twins: int | None = None  # pictures that are nearly the same share this number
    excluded: str | None = None  # the user's reason

    @property
    def image_path(self) -> str:
        return self.record.image_path

    @property
    def severity(self) -> str:
        """The worst of its findings, or "ready"."""
        found = {each.severity for each in self.findings}
        return next((severity for severity in SEVERITIES[:2] if severity in found), "ready")

    @property
    def verdict(self) -> str:
        """ "excluded", "error", "warning" or "ready"."""
        return "excluded" if self.excluded is not None else self.severity

    @property
    def usable(self) -> bool:
        return self.excluded is None and self.severity != ERROR


@dataclass(frozen=True, repr=False)
class Verdict:
    """One line: level is "ready", "ready with warnings" or "not ready"."""

    level: str
    sentence: str

    def __str__(self):
        return f"{self.level.capitalize()}: {self.sentence}"

    __repr__ = __str__

    def _repr_html_(self):
        return f'<b style="color:{_COLOURS[self.level]}">{self.level.capitalize()}</b>: {html.escape(self.sentence)}'


class Table:
    """Rows for reading: aligned text in a terminal, an HTML table in a notebook, one page at a time."""

    def __init__(self, headings, rows, page=1, page_size=50):
        self.headings, self.all_rows = tuple(headings), [tuple(map(str, row)) for row in rows]
        self.rows = self.all_rows[(page - 1) * page_size : page * page_size]
        pages = max(1, -(-len(self.all_rows) // page_size))
        self.note = f"page {page} of {pages}, {len(self.all_rows)} rows in all" if pages > 1 else ""

    def __str__(self):
        if not self.all_rows:
            return "(nothing)"
        columns = list(zip(self.headings, *self.rows, strict=True))
        widths = [min(70, max(1, *map(len, column))) for column in columns]  # a column may be empty
        lines = []
        for row in (self.headings, tuple("-" * width for width in widths), *self.rows):
            cells = [textwrap.wrap(cell, width) or [""] for cell, width in zip(row, widths, strict=True)]
            for number in range(max(map(len, cells))):
                parts = [cell[number] if number < len(cell) else "" for cell in cells]
                lines.append("  ".join(part.ljust(width) for part, width in zip(parts, widths, strict=True)).rstrip())
        return "\n".join([*lines, *filter(None, [self.note])])

    __repr__ = __str__

    def _repr_html_(self):
        if not self.all_rows:
            return "<i>nothing</i>"
        style = 'style="text-align:left;vertical-align:top"'
        head = "".join(f"<th {style}>{html.escape(heading)}</th>" for heading in self.headings)
        body = "".join(
            "<tr>" + "".join(f"<td {style}>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in self.rows
        )
        note = f"<p><i>{self.note}</i></p>" if self.note else ""
        return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>{note}"


@dataclass
class Report:
    """The result of `validate`. findings: those that belong to no picture; settings: what it was validated for."""

    root: Path
    layout: str
    pictures: list[Picture]
    findings: list[Finding]
    settings: dict
    leave_out_errors: bool = False

    @cached_property
    def statistics(self) -> dict:
        """The numbers of the pictures that go on."""
        return statistics(self.pictures, self.settings["trigger_token"])

    @cached_property
    def absorption(self) -> Absorption | None:
        """Which words the trigger will absorb and which stay promptable; None without a trigger token."""
        trigger = self.settings["trigger_token"]
        train = [picture.record.caption for picture in self.usable if picture.record.split == "train"]
        return absorption(train, trigger) if trigger else None

    @property
    def usable(self) -> list[Picture]:
        """The pictures that go on: neither excluded nor with an error."""
        return [picture for picture in self.pictures if picture.usable]

    @cached_property
    def all_findings(self) -> list[Finding]:
        """Errors first; within a severity in the order of the files. Excluded pictures have had their say."""
        told = (each for picture in self.pictures if picture.excluded is None for each in picture.findings)
        return sorted([*self.findings, *told], key=lambda each: (SEVERITIES.index(each.severity), each.file, each.code))

    @property
    def counts(self) -> dict[str, int]:
        """Findings by severity."""
        found = Counter(each.severity for each in self.all_findings)
        return {severity: found[severity] for severity in SEVERITIES}

    @property
    def verdict(self) -> Verdict:
        """Whether training may start, and if not why, in one line."""
        errors = [each for each in self.all_findings if each.severity == ERROR]
        train = [picture for picture in self.usable if picture.record.split == "train"]
        if not train:
            return Verdict(
                "not ready", f"none of {_count(len(self.pictures), 'picture')} can be trained on.{_first(errors)}"
            )
        if errors and not self.leave_out_errors:
            return Verdict("not ready", f"{_count(len(errors), 'error')}.{_first(errors)}")
        held_out = len(self.usable) - len(train)
        parts = [f"{_count(len(train), 'picture')} to train on, {held_out or 'none'} held out{'' if held_out else NONE_HELD_OUT}"]
        if left_out := len(self.pictures) - len(self.usable):
            parts.append(f"{left_out} left out")
        warnings = self.counts[WARNING]
        if warnings or errors:
            return Verdict("ready with warnings", f"{', '.join(parts)}; {_count(warnings, 'warning')} to read.")
        return Verdict("ready", f"{', '.join(parts)}.")

    @property
    def ready(self) -> bool:
        return self.verdict.level != "not ready"

    def require_ready(self) -> Verdict:
        """The verdict; raises it as UserError when it is "not ready"."""
        if not self.ready:
            raise UserError(f"{self.verdict} Or leave such pictures out: exclude them, or set LEAVE_OUT_ERRORS = True (`run -p LEAVE_OUT_ERRORS True`).")
        return self.verdict

    def table(self, severity: str | None = None, page: int = 1, page_size: int = 50) -> Table:
        """A row per finding with its cure, errors first; of one severity where it is given."""
        rows = [
            (each.severity, printable(each.file, 80) or "(data set)", each.message, each.cure)
            for each in self.all_findings
            if severity in (None, each.severity)
        ]
        return Table(("severity", "file", "finding", "cure"), rows, page, page_size)

    def numbers(self) -> Table:
        """The statistics, a row each."""
        return Table(
            ("what", "value"), [(name.replace("_", " "), _show(value)) for name, value in self.statistics.items()]
        )

    def worst(self, most: int = 24) -> list[Picture]:
        """Pictures by how much is wrong with them, those with errors first."""
        weight = {severity: 100 ** (2 - place) for place, severity in enumerate(SEVERITIES)}
        return sorted(
            self.pictures, key=lambda each: (-sum(weight[one.severity] for one in each.findings), each.image_path)
        )[:most]

    def crop(self, picture: Picture) -> Crop:
        """How a usable picture becomes its bucket."""
        middle = self.settings["center_crop"]
        at = (0.5, 0.5) if middle else drawn_place(self.settings["seed"], picture.sha256)
        return plan_crop(picture.width, picture.height, picture.bucket, at)

    def as_json(self) -> dict:
        """The whole report as JSON-able values."""
        return {
            "verdict": self.verdict.level,
            "sentence": self.verdict.sentence,
            "layout": self.layout,
            "counts": self.counts,
            "statistics": self.statistics,
            "findings": [
                {
                    "severity": each.severity,
                    "code": each.code,
                    "file": each.file,
                    "message": each.message,
                    "cure": each.cure,
                }
                for each in self.all_findings
            ],
            "pictures": [{"image_path": each.image_path, "verdict": each.verdict} for each in self.pictures],
        }

    def manifest(self, folder) -> Manifest:
        """The usable pictures as a manifest that will lie in `folder`."""
        samples = [_sample(picture, self.crop(picture)) for picture in self.usable]
        left_out = [_excluded(picture) for picture in self.pictures if not picture.usable]
        metadata = {
            "dataset_root": relative_root(self.root, folder),
            "trigger_token": self.settings["trigger_token"],
            "resolution": self.settings["resolution"],
            "total_samples": len(samples),
            "statistics": self.statistics,
            "settings": self.settings,
        }
        content = {"schema_version": SCHEMA_VERSION, "metadata": metadata, "samples": samples, "excluded": left_out}
        return Manifest(ManifestFile.model_validate(content), folder)

    def write(self, folder) -> Manifest:
        """Write dataset_manifest.json into `folder` and return it.

        Raises UserError where that is a run that has been trained on other pictures or captions: it would be lost.
        """
        manifest, there = self.manifest(folder), Path(folder) / PLAIN
        if there.is_file() and any(Path(folder).glob("checkpoints/checkpoint-*")):
            before = read_manifest(there)
            if (before.training_data, before.metadata.trigger_token) != (manifest.training_data, manifest.metadata.trigger_token):
                raise UserError(
                    f"The run {Path(folder).name} has been trained on other data ({_count(len(before.train()), 'picture')} of "
                    f"{before.metadata.trigger_token or 'no trigger'}): take another run name, or move {folder} away."
                )
        with full_disk_is_a_sentence(folder):
            write_manifest(manifest, there)
        return manifest


def _count(number, noun) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _first(errors) -> str:
    if not errors:
        return ""
    more = " (The table of findings has the others.)" if len(errors) > 1 else ""
    return f" {errors[0].message.rstrip('.')}. {errors[0].cure}{more}"


def _show(value) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_show(each)}" for name, each in value.items()) or "none"
    return f"{value:g}" if isinstance(value, float) else str(value)


def statistics(pictures, trigger: str | None) -> dict:
    """The numbers of a data set, over the pictures that are usable. Lengths in words and CLIP tokens, sizes in pixels."""

    def has_trigger(picture):
        return trigger and find_trigger(picture.record.caption, trigger).words_before is not None

    used = [picture for picture in pictures if picture.usable]
    train = [picture for picture in used if picture.record.split == "train"]
    return {
        "pictures": len(pictures),
        "usable": len(used),
        "held_out": len(used) - len(train),
        "samples_an_epoch": sum(picture.record.repeats for picture in train),
        "width": _spread([picture.width for picture in used]),
        "height": _spread([picture.height for picture in used]),
        "caption_words": _spread([len(picture.record.caption.split()) for picture in used]),
        "caption_tokens": _spread([picture.tokens for picture in used]),
        "trigger_coverage": round(sum(map(bool, map(has_trigger, used))) / len(used), 3) if used else 0.0,
        "formats": _tally(picture.format for picture in used),
        "buckets": _tally(f"{picture.bucket[0]}x{picture.bucket[1]}" for picture in used),
    }


def _spread(values) -> dict:
    return {"min": min(values), "mean": round(sum(values) / len(values), 1), "max": max(values)} if values else {}


def _tally(values) -> dict:
    return dict(sorted(Counter(values).items(), key=lambda pair: (-pair[1], pair[0])))


def _sample(picture: Picture, crop: Crop) -> dict:
    record, bucket = picture.record, picture.bucket
    return {
        "image_path": record.image_path,
        "caption": record.caption,
        "width": picture.width,
        "height": picture.height,
        "format": picture.format,
        "sha256": picture.sha256,
        "repeats": record.repeats,
        "split": record.split,
        "bucket": bucket,
        "crop": {"resized": crop.resized, "left": crop.left, "top": crop.top},
        "original_size": (picture.height, picture.width),
        "crop_top_left": (crop.top, crop.left),
        "target_size": (bucket[1], bucket[0]),
        "findings": sorted({each.code for each in picture.findings}),
    }


def _excluded(picture: Picture) -> dict:
    errors = [each.message for each in picture.findings if each.severity == ERROR]
    reason = picture.excluded if picture.excluded is not None else " ".join(errors)
    return {"image_path": printable(picture.image_path, 4096), "reason": reason}
