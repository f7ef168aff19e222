"""The data set doctor: scan a folder, validate what lies in it, and hand on a manifest.

    records = scan("data/aldar_kose")
    report = validate(records, resolution=1024, trigger_token="aldar_kose_man")
    manifest = preprocess(report.write("outputs/my_run"))

Nothing is ever changed in the user's folder.
"""

from dataclasses import dataclass, field, replace
from pathlib import Path

from .buckets import buckets, cut_off, enlargement, nearest_bucket
from .captions import absorption, find_trigger, measure
from .errors import UserError
from .events import OnEvent, Progress, ignore
from .files import project_root
from .findings import Finding, finding
from .images import ENDINGS
from .layouts import Record, describe_layout, existing_folder, pair, walk
from .manifest import Manifest, Sample, best_manifest, open_sample, read_manifest, write_manifest
from .preprocess import preprocess
from .report import Picture, Report
from .sources import read_metadata, unpack
from .workers import Failure, run_isolated

__all__ = [
    "Manifest", "Picture", "Record", "Records", "Report", "Sample", "best_manifest", "buckets", "open_sample",
    "preprocess", "read_manifest", "scan", "validate", "write_manifest",
]  # fmt: skip

TOO_SMALL, FAR_TOO_SMALL = 1.02, 4.0  # times enlarged
EXTREME_ASPECT = 2.5  # long side over short
MUCH_CUT = 0.2  # share of the area


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
        raise UserError(
            f"{folder} holds no pictures: put them into {folder}/images with captions in {folder}/captions, or .txt files beside them."
        )
    rows, row_findings = read_metadata(source, tree.metadata, tree.pictures)
    records, loose = pair(tree, rows)
    return Records(source, describe_layout(tree), records, findings + tree.findings + row_findings + loose)


def validate(
    records: Records,
    resolution: int,
    trigger_token: str | None = None,
    square: bool = False,
    tokenizers=(),
    workers: int | None = None,
    time_limit_s: float = 30.0,
    on_event: OnEvent = ignore,
) -> Report:
    """Decode every picture to its last byte and say everything that is wrong, at once.

    resolution: side in pixels of the square that a bucket's area equals. square: crop all to it instead of buckets.
    tokenizers: see captions.clip_tokenizers; without them token counts are estimates.
    workers, time_limit_s: see workers.run_isolated.
    """
    sizes = buckets(resolution, square)
    readable = [record for record in records if record.readable]
    facts, done = {}, 0

    def take(index, result):
        nonlocal done
        done += 1
        facts[readable[index].image_path] = result
        on_event(Progress("validate", done, len(readable), readable[index].image_path))

    jobs = [{"path": str(record.path), "resolution": resolution} for record in readable]
    run_isolated("lora_nb.images:inspect", jobs, take, workers, time_limit_s)
    pictures = [_picture(record, facts.get(record.image_path), sizes, trigger_token, tokenizers) for record in records]
    settings = {"resolution": resolution, "trigger_token": trigger_token, "square": square}
    said = [picture.record.caption for picture in pictures if picture.usable]
    learned = absorption(said, trigger_token) if trigger_token else None
    return Report(records.root, records.layout, pictures, list(records.findings), settings, learned)


def _picture(record, found, sizes, trigger_token, tokenizers) -> Picture:
    name, said = record.image_path, list(record.findings)
    length = measure(record.caption, tokenizers) if record.caption else None
    if record.caption:
        said += _caption_findings(name, record.caption, length, trigger_token)
    picture = Picture(record, (), tokens=length.tokens if length else 0)
    if isinstance(found, Failure):
        code = {"crashed": "decoder-crashed", "hung": "decoder-hung"}.get(found.kind, "damaged")
        said.append(finding(code, name, reason=found.detail))
    elif found:
        said += [finding(code, name, **facts) for code, facts in found["notices"]]
        if found["bad"]:
            said.append(finding(found["bad"][0], name, **found["bad"][1]))
        else:
            picture = _with_facts(picture, found, sizes)
            said += _fitness_findings(picture)
    return replace(picture, findings=tuple(said))


def _with_facts(picture, found, sizes):
    bucket = nearest_bucket(found["width"], found["height"], sizes)
    kept = {name: found[name] for name in ("width", "height", "format", "sha256")}
    return replace(picture, bucket=bucket, **kept)


def _fitness_findings(picture):
    name, width, height = picture.image_path, picture.width, picture.height
    bucket = f"{picture.bucket[0]}x{picture.bucket[1]}"
    scale, lost = enlargement(width, height, picture.bucket), cut_off(width, height, picture.bucket)
    if not name.lower().endswith(ENDINGS[picture.format]):
        yield finding("wrong-ending", name, format=picture.format, expected=ENDINGS[picture.format][0])
    if scale > TOO_SMALL:
        code = "far-too-small" if scale > FAR_TOO_SMALL else "too-small"
        yield finding(code, name, width=width, height=height, scale=scale, bucket=bucket)
    if max(width, height) / min(width, height) > EXTREME_ASPECT:
        yield finding("extreme-aspect", name, width=width, height=height, ratio=max(width, height) / min(width, height))
    if lost > MUCH_CUT:
        yield finding("crop-cuts", name, bucket=bucket, share=lost)


def _caption_findings(name, caption, length, trigger):
    if length.tail:
        how = "about" if length.estimated else "exactly"
        yield finding("caption-too-long", name, how=how, tokens=length.tokens, tail=length.tail)
    if not trigger:
        return
    found = find_trigger(caption, trigger)
    if found.spelled:
        yield finding("trigger-spelling", name, trigger=trigger, found=found.spelled)
    elif found.words_before is None:
        yield finding("trigger-missing", name, trigger=trigger)
    elif found.words_before:
        yield finding("trigger-not-first", name, words=found.words_before)
