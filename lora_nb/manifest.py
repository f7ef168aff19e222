"""The file that carries a data set from notebook to notebook: `dataset_manifest.json`."""

import hashlib
import json
import os
from pathlib import Path, PurePath
from typing import Annotated, Any, Literal

from PIL import Image
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from .buckets import Crop, fit
from .errors import UserError
from .files import write_json
from .images import BadPicture, open_rgb

SCHEMA_VERSION = 1
PLAIN, PROCESSED, WITH_LATENTS = (
    "dataset_manifest.json",
    "dataset_manifest_processed.json",
    "dataset_manifest_with_latents.json",
)
MAX_BYTES = 256 << 20


def _inside(path: str) -> str:
    """A path that stays below its folder on the system that reads it (Windows splits at backslashes too)."""
    native = PurePath(path)
    if not native.parts or native.anchor or ".." in native.parts or "\0" in path:
        raise ValueError("must be a path below its folder")
    return path


InsidePath = Annotated[str, AfterValidator(_inside), Field(max_length=4096)]
Side = Annotated[int, Field(gt=0, le=1_000_000)]
BucketSide = Annotated[int, Field(gt=0, le=16384, multiple_of=8)]
Offset = Annotated[int, Field(ge=0, le=1_000_000)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class CropRecord(_Strict):
    """Resize to `resized` (width, height), then cut the bucket out at (left, top)."""

    resized: tuple[Side, Side]
    left: Offset
    top: Offset


class Sample(_Strict):
    """One picture and its caption. Sizes in pixels; `width` and `height` are those after EXIF rotation.

    original_size, crop_top_left and target_size are SDXL's conditioning, each (height, width) or (top, left).
    """

    image_path: InsidePath
    caption: Annotated[str, Field(max_length=65536)]
    width: Side
    height: Side
    format: str
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    repeats: Annotated[int, Field(ge=1, le=100_000)] = 1
    split: Literal["train", "held_out"] = "train"
    bucket: tuple[BucketSide, BucketSide]
    crop: CropRecord
    original_size: tuple[Side, Side]
    crop_top_left: tuple[Offset, Offset]
    target_size: tuple[Side, Side]
    processed_path: InsidePath | None = None
    findings: list[str] = []
    latent_path: InsidePath | None = None
    embedding_path: InsidePath | None = None

    @model_validator(mode="after")
    def _crop_holds_bucket(self):
        right, bottom = self.crop.left + self.bucket[0], self.crop.top + self.bucket[1]
        if right > self.crop.resized[0] or bottom > self.crop.resized[1]:
            raise ValueError("the crop (left, top) puts the bucket outside the resized picture")
        return self


class Excluded(_Strict):
    """A picture that stays out of training, and why."""

    image_path: str
    reason: str


class Metadata(_Strict):
    """What the samples have in common. dataset_root: posix, relative to the manifest's folder."""

    dataset_root: str
    trigger_token: str | None = None
    resolution: Side
    total_samples: int
    statistics: dict[str, Any] = {}
    settings: dict[str, Any] = {}


class ManifestFile(_Strict):
    """The file's content, as it is written."""

    schema_version: Literal[1]
    metadata: Metadata
    samples: list[Sample]
    excluded: list[Excluded] = []


class Manifest:
    """A manifest in memory: its content, and `folder`, from which its paths are read."""

    def __init__(self, content: ManifestFile, folder):
        self.content, self.folder = content, Path(folder).resolve()

    @property
    def samples(self) -> list[Sample]:
        return self.content.samples

    @property
    def metadata(self) -> Metadata:
        return self.content.metadata

    @property
    def excluded(self) -> list[Excluded]:
        return self.content.excluded

    @property
    def root(self) -> Path:
        """The data set's folder, absolute."""
        return Path(os.path.normpath(self.folder / self.metadata.dataset_root))

    def train(self) -> list[Sample]:
        """The samples that training sees."""
        return [sample for sample in self.samples if sample.split == "train"]

    def held_out(self) -> list[Sample]:
        """The samples kept for evaluation."""
        return [sample for sample in self.samples if sample.split == "held_out"]

    @property
    def training_data(self) -> str:
        """A hash of all that training takes from this file: pictures, captions, crops and repeats, in their order."""
        seen = [[s.sha256, s.caption, s.repeats, s.bucket, s.crop_top_left] for s in self.train()]
        return hashlib.sha256(json.dumps(seen).encode()).hexdigest()[:16]

    def with_samples(self, samples) -> "Manifest":
        """The same manifest about changed samples (`sample.model_copy(update={...})`)."""
        return Manifest(self.content.model_copy(update={"samples": list(samples)}), self.folder)

    def original(self, sample: Sample) -> Path:
        """Where the untouched picture lies."""
        return _join(self.root, sample.image_path)

    def path_of(self, relative: str) -> Path:
        """A processed picture's, latent's or embedding's path, given relative to the manifest's folder."""
        return _join(self.folder, relative)


def _join(folder: Path, relative: str) -> Path:
    path = folder / relative
    if not path.resolve().is_relative_to(folder.resolve()):
        raise UserError(
            f"{relative} leads out of {folder}: a manifest may only name files below its folders; run notebook 01 again."
        )
    return path


def relative_root(root, folder) -> str:
    """`root` as a posix path relative to `folder`; absolute only where they lie on different drives."""
    try:
        return Path(os.path.relpath(Path(root).resolve(), Path(folder).resolve())).as_posix()
    except ValueError:  # Windows, two drives
        return Path(root).resolve().as_posix()


def write_manifest(manifest: Manifest, path) -> Path:
    """Write the manifest; the same content gives the same bytes. Its paths are relative to `manifest.folder`."""
    return write_json(path, manifest.content.model_dump(mode="json"))


def read_manifest(path) -> Manifest:
    """A manifest, checked field by field. Raises UserError with the first thing that is wrong and the cure."""
    path = Path(path)
    try:
        if path.stat().st_size > MAX_BYTES:
            raise UserError(
                f"{path} is larger than {MAX_BYTES >> 20} MB: it is no manifest of ours; run notebook 01 again."
            )
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): run notebook 01 first.") from error
    try:
        return Manifest(ManifestFile.model_validate_json(data), path.parent)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(map(str, first["loc"])) or "the file"
        raise UserError(
            f"{path.name} cannot be used: {place}: {first['msg'].removeprefix('Value error, ')}; run notebook 01 again to rewrite it."
        ) from None


def best_manifest(run_dir) -> Path:
    """The manifest of a run that is furthest along: with latents, else processed, else plain."""
    for name in (WITH_LATENTS, PROCESSED, PLAIN):
        if (path := Path(run_dir) / name).is_file():
            return path
    raise UserError(f"{run_dir} holds no manifest: run notebook 01 (or `python -m lora_nb validate DIR --output {run_dir}`) first.")


def open_sample(manifest: Manifest, sample: Sample) -> Image.Image:
    """The sample's RGB picture at exactly its bucket: from `processed_path` where that exists, else made the same way."""
    if sample.processed_path and (path := manifest.path_of(sample.processed_path)).is_file():
        source, make = path, lambda image: image
    else:
        crop = Crop(sample.crop.resized, sample.crop.left, sample.crop.top)
        source, make = manifest.original(sample), lambda image: fit(image, sample.bucket, crop)
    try:
        image = make(open_rgb(source))
    except BadPicture as bad:
        raise UserError(f"{source} can no longer be read ({bad.code}): run notebook 01 again.") from bad
    if image.size != tuple(sample.bucket):
        raise UserError(f"{source} is {image.width}x{image.height} and not its bucket's size: run notebook 01 again.")
    return image
