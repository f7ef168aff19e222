"""One picture from its file: decoded to the last byte, brought to upright sRGB, and measured.

Everything here may run in a worker process (see workers.py), because decoders crash and hang.
"""

import hashlib
import io
from pathlib import Path

import numpy as np
from PIL import Image, ImageCms, ImageFilter, ImageOps

from .duplicates import contrast, signature

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF", "AVIF")  # a file never reaches another decoder of Pillow's
ENDINGS = {
    "PNG": (".png",),
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif", ".mpo"),
    "WEBP": (".webp",),
    "BMP": (".bmp", ".dib"),
    "TIFF": (".tif", ".tiff"),
    "GIF": (".gif",),
    "AVIF": (".avif",),
}
PICTURE_ENDINGS = frozenset(ending for endings in ENDINGS.values() for ending in endings)
FOREIGN_ENDINGS = frozenset(
    ".heic .heif .jxl .jp2 .j2k .psd .svg .tga .exr .hdr .ico .eps .dng .cr2 .cr3 .nef .arw .raw .orf .rw2".split()
)

MAX_PIXELS = 120_000_000  # above every camera on sale; 360 MB as RGB
MAX_FILE_BYTES = 512 << 20
BACKGROUND = (255, 255, 255)  # behind transparent pixels


class BadPicture(Exception):
    """This picture cannot be used. code: a key of findings.CODES; facts: what its sentence needs."""

    def __init__(self, code: str, **facts):
        super().__init__(code, facts)
        self.code, self.facts = code, facts


def read_bytes(path) -> bytes:
    """The file's bytes, at most MAX_FILE_BYTES."""
    try:
        size = Path(path).stat().st_size
        if size > MAX_FILE_BYTES:
            raise BadPicture("file-too-large", size=size >> 20, limit=MAX_FILE_BYTES >> 20)
        data = Path(path).read_bytes()
    except OSError as error:
        raise BadPicture("unreadable", reason=error.strerror or type(error).__name__) from error
    if not data:
        raise BadPicture("empty-file")
    return data


def decode(data: bytes, brightness: bool = False) -> tuple[Image.Image, dict, list[tuple[str, dict]]]:
    """Every pixel of one picture: (upright sRGB image, facts, notices).

    facts: format, mode. notices: (code, facts) of what was done to get there.
    brightness: where the format has it apart from the colours, a JPEG's, it is enough: mode L, in little more than half
    the time. Every byte is read all the same.
    Raises BadPicture, whatever the decoder raised.
    """
    Image.MAX_IMAGE_PIXELS = None  # our own limit is checked below, before a pixel is decoded
    notices = []
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except Exception as error:  # header parsers raise struct.error, ValueError, ... besides UnidentifiedImageError
        raise BadPicture(_unidentified(data)) from error
    facts = {"format": "JPEG" if image.format == "MPO" else image.format, "mode": image.mode}
    if image.width * image.height > MAX_PIXELS:
        raise BadPicture("too-many-pixels", width=image.width, height=image.height, limit=MAX_PIXELS // 1_000_000)
    try:
        frames = getattr(image, "n_frames", 1)
        if frames > 1 and image.format != "MPO":  # phones put a preview or a depth map behind the photograph
            raise BadPicture("several-frames", frames=frames)
        brightness = brightness and image.format == "JPEG" and image.mode == "RGB" and "icc_profile" not in image.info
        if brightness:
            image.draft("L", image.size)
        image.load()
        image = _upright(image, notices)
        return image if brightness else _to_srgb(image, notices), facts, notices
    except BadPicture:
        raise
    except Exception as error:
        truncated = isinstance(error, EOFError) or "truncated" in str(error).lower()
        raise BadPicture("truncated" if truncated else "damaged", reason=_reason(error)) from error


def open_rgb(path, expect_sha256: str | None = None) -> Image.Image:
    """The upright sRGB picture of a file. Raises BadPicture, also when the file is no longer the expected one."""
    data = read_bytes(path)
    if expect_sha256 and hashlib.sha256(data).hexdigest() != expect_sha256:
        raise BadPicture("changed")
    return decode(data)[0]


def _reason(error) -> str:
    return f"{type(error).__name__}: {error}".strip()[:200]


_MAGIC = (b"\x89PNG", b"\xff\xd8\xff", b"RIFF", b"BM", b"II*\0", b"MM\0*", b"GIF8")


def _unidentified(data: bytes) -> str:
    """The code for a file that no decoder takes."""
    head = data[:512].lstrip().lower()
    if not any(data[:4096]):
        return "damaged-zeros"
    if head.startswith((b"<!doctype", b"<html", b"<?xml", b"<svg", b"{")):
        return "web-page"
    return "damaged-header" if data.startswith(_MAGIC) or data[4:8] == b"ftyp" else "not-a-picture"


def _upright(image, notices):
    try:
        orientation = image.getexif().get(0x0112, 1)
        if orientation not in range(2, 9):
            return image
        turned = ImageOps.exif_transpose(image)
    except Exception as error:  # a damaged EXIF block must not cost the picture
        notices.append(("exif-damaged", {"reason": _reason(error)}))
        return image
    notices.append(("exif-rotated", {}))
    return turned


def _to_srgb(image, notices):
    profile = image.info.get("icc_profile")
    if image.mode in ("CMYK", "LAB") or (profile and image.mode == "RGB"):
        image = _through_profile(image, profile, notices)
    if image.mode in ("I;16", "I;16L", "I;16B", "I;16N", "I"):
        image = _eight_bits(image, notices)
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        return _on_background(image.convert("RGBA"), notices)
    if image.mode not in ("RGB", "L", "P", "1", "YCbCr", "HSV", "RGBX"):
        raise BadPicture("unsupported-mode", mode=image.mode)
    if image.mode in ("L", "1"):
        notices.append(("greyscale", {}))
    return image if image.mode == "RGB" else image.convert("RGB")


def _through_profile(image, profile, notices):
    mode = image.mode
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile or b""))
        if mode == "RGB" and "srgb" in ImageCms.getProfileDescription(source).lower():
            return image
        converted = ImageCms.profileToProfile(image, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
        converted.info.pop("icc_profile", None)
    except Exception as error:  # a missing or damaged profile
        if mode != "RGB":
            raise BadPicture("unsupported-mode", mode=mode) from error
        notices.append(("profile-damaged", {"reason": _reason(error)}))
        return image
    notices.append(("profile-converted", {"mode": mode}))
    return converted


def _eight_bits(image, notices):
    low, high = image.getextrema()
    if low < 0 or high > 65535:
        raise BadPicture("unsupported-mode", mode=f"{image.mode}, values {low} to {high}")
    notices.append(("sixteen-bit", {}))
    return image.convert("I").point(lambda value: value * (1 / 257) + 0.5).convert("L")  # convert alone saturates


def _on_background(image, notices):
    if image.getchannel("A").getextrema()[0] == 255:
        return image.convert("RGB")
    notices.append(("transparent", {}))
    canvas = Image.new("RGBA", image.size, (*BACKGROUND, 255))
    return Image.alpha_composite(canvas, image).convert("RGB")


BLUR_SIDE = 192  # pixels; the centre square that blur is judged by, at training scale


def blur(image: Image.Image, resolution: int) -> float:
    """How blurred a picture will be at `resolution`: 0 crisp, 1 smooth (Crété-Roffet et al. 2007).

    Blurring a sharp picture once more takes most of its edges away, blurring a blurred one hardly any. So the measure
    does not depend on how much there is to see. Above about 0.6 a Gaussian of two pixels or more went over it.
    """
    shrink = max(1, int((image.width * image.height) ** 0.5 / resolution))
    side = BLUR_SIDE * shrink
    left, top = max(0, (image.width - side) // 2), max(0, (image.height - side) // 2)
    middle = image.crop((left, top, min(image.width, left + side), min(image.height, top + side)))
    grey = middle.reduce(shrink).convert("L")
    sharp, soft = (np.asarray(each, dtype=np.int16) for each in (grey, grey.filter(ImageFilter.BoxBlur(4))))
    worst = 0.0
    for axis in (0, 1):
        edges, left_over = np.abs(np.diff(sharp, axis=axis)), np.abs(np.diff(soft, axis=axis))
        if total := int(edges.sum()):
            worst = max(worst, 1 - int(np.maximum(0, edges - left_over).sum()) / total)
    return worst


def inspect(job: dict) -> dict:
    """What validation needs to know of one file, as JSON-able facts; a bad picture is an answer, not an error.

    job: {"path", "resolution"}. Returns {"bad": [code, facts] | None, "notices": [[code, facts], ...],
    "sha256", "file_bytes", "format", "mode", "width", "height" (upright), "contrast" (grey levels, standard deviation),
    "blur", "signature"} as far as it got.
    """
    found = {"bad": None, "notices": []}
    try:
        data = read_bytes(job["path"])
        found["sha256"] = hashlib.sha256(data).hexdigest()
        found["file_bytes"] = len(data)
        image, facts, notices = decode(data, brightness=True)
    except BadPicture as bad:
        found["bad"] = [bad.code, bad.facts]
        return found
    signed = signature(image)
    found |= facts | {"notices": notices, "width": image.width, "height": image.height}
    return found | {"signature": signed, "contrast": contrast(signed), "blur": blur(image, job["resolution"])}
