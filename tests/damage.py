"""Pictures, captions and folders with everything that can be wrong with them, made on the spot."""

import io
import os
import socket
import struct
import tempfile
import zlib

import numpy as np
from PIL import Image, ImageCms, ImageDraw, ImageFilter

RESOLUTION, TRIGGER = 128, "aldar_kose_man"


def scene(seed: int, size=(400, 400)) -> Image.Image:
    """A picture with edges everywhere that is unlike that of any other seed."""
    random = np.random.default_rng(seed)
    image = Image.new("RGB", size, tuple(int(value) for value in random.integers(0, 255, 3)))
    draw = ImageDraw.Draw(image)
    for _ in range(25):
        x, y = random.integers(0, size[0]), random.integers(0, size[1])
        width, height = random.integers(20, max(21, size[0] // 2)), random.integers(20, max(21, size[1] // 2))
        draw.rectangle((x, y, x + width, y + height), fill=tuple(int(value) for value in random.integers(0, 255, 3)))
    return image


def encoded(image, format, **options) -> bytes:
    data = io.BytesIO()
    image.save(data, format, **options)
    return data.getvalue()


def png_chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png_header(width, height, depth=8, colour=2) -> bytes:
    return b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))


def sixteen_bit_grey() -> bytes:
    ramp = np.linspace(0, 65535, 400 * 400, dtype=np.uint16).reshape(400, 400)
    return encoded(Image.fromarray(ramp), "PNG")


def with_alpha(seed) -> Image.Image:
    image = scene(seed).convert("RGBA")
    image.paste((0, 255, 0, 0), (0, 0, 400, 100))  # hidden green, which convert("RGB") would show
    return image


def rotated_exif() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(scene(31, (500, 400)), "JPEG", exif=exif)


def bad_exif() -> bytes:
    data = encoded(scene(32), "JPEG")
    block = b"Exif\0\0MM\0*\xff\xff\xff\xff\x00\x01"
    return data[:2] + b"\xff\xe1" + struct.pack(">H", len(block) + 2) + block + data[2:]


def flipped(data: bytes, share: float, seed=0) -> bytes:
    """`data` with a share of its later bytes changed."""
    array = np.frombuffer(data, np.uint8).copy()
    places = np.random.default_rng(seed).integers(len(array) // 3, len(array), max(1, int(len(array) * share)))
    array[places] ^= 0x5A
    return array.tobytes()


def phone_picture() -> bytes:
    return encoded(scene(33), "MPO", save_all=True, append_images=[scene(34, (100, 100))])


def animation(format) -> bytes:
    return encoded(scene(35), format, save_all=True, append_images=[scene(36)])


JPEG, PNG = encoded(scene(1), "JPEG"), encoded(scene(2), "PNG")
LAB = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
FRONT = f"{TRIGGER}, "

# Each case: file name -> (bytes of the picture, the code that must be found, the verdict on the picture).
PICTURES = {
    "good.jpg": (JPEG, None, "ready"),
    "good.png": (PNG, None, "ready"),
    "good.webp": (encoded(scene(3), "WEBP"), None, "ready"),
    "good.bmp": (encoded(scene(4), "BMP"), None, "ready"),
    "good.tif": (encoded(scene(5), "TIFF"), None, "ready"),
    "good.gif": (encoded(scene(6), "GIF"), None, "ready"),
    "UPPER.JPEG": (encoded(scene(7), "JPEG"), None, "ready"),
    "palette.png": (encoded(scene(8).convert("P"), "PNG"), None, "ready"),
    "progressive.jpg": (encoded(scene(9), "JPEG", progressive=True), None, "ready"),
    "trailing.jpg": (encoded(scene(10), "JPEG") + b"\0" * 999, None, "ready"),
    "opaque-alpha.png": (encoded(scene(11).convert("RGBA"), "PNG"), None, "ready"),
    "srgb.png": (encoded(scene(12), "PNG", icc_profile=SRGB), None, "ready"),
    "phone.jpg": (phone_picture(), None, "ready"),
    "empty.png": (b"", "empty-file", "error"),
    "zeros.jpg": (b"\0" * 5000, "damaged-zeros", "error"),
    "page.jpg": (b"<!DOCTYPE html><html>404", "web-page", "error"),
    "error.png": (b'{"error": "not found"}', "web-page", "error"),
    "noise.png": (bytes(np.random.default_rng(0).integers(0, 255, 4000, np.uint8)), "not-a-picture", "error"),
    "text.jpg": (b"this is my holiday picture", "not-a-picture", "error"),
    "script.jpg": (b"%!PS-Adobe-3.0 EPSF-3.0\n(~/x) run", "not-a-picture", "error"),
    "head-only.png": (PNG[:12], "damaged-header", "error"),
    "head-only.jpg": (JPEG[:20], "damaged-header", "error"),
    "half.jpg": (JPEG[: len(JPEG) // 2], "truncated", "error"),
    "half.png": (PNG[: len(PNG) // 2], "truncated", "error"),
    "half.webp": (encoded(scene(3), "WEBP")[:900], None, "error"),
    "half.bmp": (encoded(scene(4), "BMP")[:9000], "truncated", "error"),
    "half.gif": (encoded(scene(6), "GIF")[:900], None, "error"),
    "half.tif": (encoded(scene(5), "TIFF", compression="tiff_lzw")[:900], None, "error"),
    "flipped.png": (flipped(PNG, 0.02), None, "error"),
    "crc.png": (PNG.replace(b"IDAT", b"IDAT", 1)[:60] + b"\xff\xff" + PNG[62:], None, "error"),
    "no-pixels.png": (png_header(64, 64) + png_chunk(b"IEND", b""), None, "error"),
    "zero-wide.png": (png_header(0, 64) + png_chunk(b"IEND", b""), None, "error"),
    "bomb.png": (png_header(60000, 60000) + png_chunk(b"IDAT", zlib.compress(b"\0")), "too-many-pixels", "error"),
    "big-claim.bmp": (b"BM" + struct.pack("<IHHIIiiHHIIiiII", 99, 0, 0, 54, 40, 2**30, 2**30, 1, 24, 0, 0, 0, 0, 0, 0), None, "error"),
    "animated.gif": (animation("GIF"), "several-frames", "error"),
    "animated.png": (animation("PNG"), "several-frames", "error"),
    "animated.webp": (animation("WEBP"), "several-frames", "error"),
    "pages.tiff": (animation("TIFF"), "several-frames", "error"),
    "cmyk.jpg": (encoded(scene(13).convert("CMYK"), "JPEG"), "unsupported-mode", "error"),
    "float.tif": (encoded(Image.fromarray(np.random.default_rng(1).random((400, 400), np.float32)), "TIFF"), "unsupported-mode", "error"),
    "int32.tif": (encoded(Image.fromarray(np.arange(-80000, 80000, dtype=np.int32).reshape(400, 400)), "TIFF"), "unsupported-mode", "error"),
    "bad-profile.png": (encoded(scene(14), "PNG", icc_profile=b"nonsense"), "profile-damaged", "warning"),
    "lab-profile.png": (encoded(scene(15), "PNG", icc_profile=LAB), "profile-damaged", "warning"),
    "sixteen.png": (sixteen_bit_grey(), "sixteen-bit", None),
    "grey.png": (encoded(scene(16).convert("L"), "PNG"), "greyscale", "ready"),
    "one-bit.png": (encoded(scene(17).convert("1"), "PNG"), "greyscale", "ready"),
    "alpha.png": (encoded(with_alpha(18), "PNG"), "transparent", "warning"),
    "grey-alpha.png": (encoded(with_alpha(19).convert("LA"), "PNG"), "transparent", "warning"),
    "turned.jpg": (rotated_exif(), "exif-rotated", "ready"),
    "bad-exif.jpg": (bad_exif(), None, None),
    "really-png.jpg": (encoded(scene(20), "PNG"), "wrong-ending", "warning"),
    "really-jpeg.gif": (encoded(scene(21), "JPEG"), "wrong-ending", "warning"),
    "dot.png": (encoded(scene(22, (1, 1)), "PNG"), "far-too-small", "error"),
    "small.png": (encoded(scene(23, (90, 90)), "PNG"), "too-small", "warning"),
    "banner.png": (encoded(scene(24, (2000, 300)), "PNG"), "extreme-aspect", "warning"),
    "ribbon.png": (encoded(scene(25, (5000, 200)), "PNG"), "crop-cuts", "warning"),
    "soft.png": (encoded(scene(26).filter(ImageFilter.GaussianBlur(12)), "PNG"), "blurred", "warning"),
    "plain.png": (encoded(Image.new("RGB", (400, 400), "teal"), "PNG"), "uniform", "warning"),
    "phone.heic": (b"\0\0\0\x18ftypheic", "foreign-format", "error"),
    "layers.psd": (b"8BPS", "foreign-format", "error"),
}  # fmt: skip

# Names that must work like any other.
NAMES = [
    "with space.png", "two..dots.png", "ünïcödé.png", "алдар көсе.png", "阿勒达尔.png", "🧙‍♂️.png", "new\nline.png",
    "tab\tbed.png", 'quote"d.png', "semi;colon.png", "star*.png", "<b>bold.png", "back\\slash.png", "%41.png",
    "-dash.png", "~tilde.png", "con.png", "a" * 200 + ".png", "trailing .png", "$HOME.png", "C:drive.png",
]  # fmt: skip

# Each case: name -> (bytes of the caption, or None for none; the code that must be found).
CAPTIONS = {
    "no-caption": (None, "missing-caption"),
    "empty-caption": (b"", "empty-caption"),
    "blank-caption": (b" \n\t\n", "empty-caption"),
    "bom": (b"\xef\xbb\xbf" + FRONT.encode() + b"with a mark", "caption-bom"),
    "utf16": (f"{FRONT}wide".encode("utf-16"), "caption-utf16"),
    "utf16-bare": (f"{FRONT}wide and bare".encode("utf-16-le"), "caption-utf16"),
    "latin1": (f"{FRONT}café".encode("latin-1"), "caption-latin1"),
    "binary": (b"\x89PNG\0\0\0\1\2\3", "caption-binary"),
    "control": (f"{FRONT}bell \a and \u202e turned".encode(), "caption-odd-characters"),
    "lines": (f"{FRONT}one\ntwo\r\nthree".encode(), "caption-several-lines"),
    "huge": (b"word " * 20000, "caption-too-large"),
    "long": (f"{FRONT}{'very ' * 90}last words".encode(), "caption-too-long"),
    "no-trigger": (b"a man in a hat", "trigger-missing"),
    "misspelt": (b"aldar kose man in a hat", "trigger-spelling"),
    "typo": (b"aldar_kse_man in a hat", "trigger-spelling"),
    "late": (b"in the evening under the trees stands aldar_kose_man", "trigger-not-first"),
}


def write_pair(folder, name, picture: bytes, caption: bytes | None):
    """A picture, and beside it its caption under the picture's whole name."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(picture)
    if caption is not None:
        (folder / f"{name}.txt").write_bytes(caption)


def odd_files(folder):
    """Links, pipes, sockets and leftovers of systems."""
    os.symlink("/etc/hostname", folder / "link-out.png")
    os.symlink("nowhere.png", folder / "link-broken.png")
    os.symlink("loop.png", folder / "loop.png")
    os.mkfifo(folder / "pipe.png")
    with socket.socket(socket.AF_UNIX) as server, tempfile.TemporaryDirectory() as short:  # at most 108 characters
        server.bind(f"{short}/sock")
        os.rename(f"{short}/sock", folder / "sock.png")
    for name in ("._good.png", ".hidden.png", "Thumbs.db", "desktop.ini"):
        (folder / name).write_bytes(b"left over")
    (folder / "notes.md").write_text("about this set")
