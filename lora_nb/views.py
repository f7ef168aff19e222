"""What the plots of a report need: rows and small pictures, opened a few at a time."""

import textwrap

from PIL import Image, ImageOps

from .buckets import fit, plan_crop
from .captions import frequent_words
from .findings import COLOURS, INFO, printable
from .images import BadPicture, open_rgb
from .report import Picture, Report

THUMBNAIL = 240  # pixels


def sizes(report: Report) -> tuple[list, list]:
    """((width, height) of every usable picture, the buckets they go into)."""
    used = report.usable
    return [(each.width, each.height) for each in used], sorted({each.bucket for each in used})


def words(report: Report, most: int = 20) -> tuple[list, int]:
    """((word, captions that hold it), commonest first; the number of captions)."""
    captions = [each.record.caption for each in report.usable]
    return frequent_words(captions, report.settings["trigger_token"], most), len(captions)


def contact_cells(report: Report, most: int = 24) -> list[tuple[Image.Image | None, str, str]]:
    """(thumbnail or None, name and reasons, colour) of the pictures that need a look first, for plots.contact_sheet."""
    return [(_thumbnail(each), _title(each), COLOURS[each.verdict]) for each in report.worst(most)]


def crop_cells(report: Report, most: int = 6) -> list[tuple[Image.Image, tuple, Image.Image]]:
    """(original, box that is kept in its pixels, bucket's picture) where most is cut off, for plots.crop_preview."""
    cut = sorted(report.usable, key=lambda each: (-_lost(each), each.image_path))
    return [_before_and_after(each, report) for each in cut[:most]]


def _thumbnail(picture: Picture):
    if picture.width is None:  # it could not be decoded in a worker: not here either
        return None
    try:
        return ImageOps.contain(open_rgb(picture.record.path), (THUMBNAIL, THUMBNAIL))
    except BadPicture:
        return None


def _title(picture):
    codes = [each.code for each in picture.findings if each.severity != INFO] or ["ready"]
    name = textwrap.shorten(printable(picture.image_path.rsplit("/", 1)[-1], 28).replace("$", r"\$"), 28)
    return "\n".join([name, *codes[:3]])


def _lost(picture):
    crop = plan_crop(picture.width, picture.height, picture.bucket)
    return 1 - picture.bucket[0] * picture.bucket[1] / (crop.resized[0] * crop.resized[1])


def _before_and_after(picture, report):
    crop = report.crop(picture)
    before = open_rgb(picture.record.path)
    across, down = before.width / crop.resized[0], before.height / crop.resized[1]
    width, height = picture.bucket
    box = (crop.left * across, crop.top * down, (crop.left + width) * across, (crop.top + height) * down)
    return before, box, fit(before, picture.bucket, crop)
