"""Make the pictures that training reads: upright RGB PNG at bucket size, in parallel, resumable, whole or absent."""

import hashlib
import io
import json
import re
from pathlib import Path, PurePosixPath

from .buckets import Crop, fit
from .errors import UserError
from .events import OnEvent, Progress, ignore
from .files import FULL_DISK, write_atomic
from .images import BadPicture, open_rgb
from .manifest import PROCESSED, Manifest, Sample, write_manifest
from .workers import Failure, run_isolated

FOLDER = "processed_images"
_FULL = "the disk is full"
RECIPE = 1  # raised when the same settings begin to give other pixels


def preprocess(manifest: Manifest, workers=None, time_limit_s=120.0, on_event: OnEvent = ignore) -> Manifest:
    """Write every sample's picture below `manifest.folder`, and the manifest that names them.

    Pictures that are there already, whole and of the right size, are kept, so an interrupted run goes on where it was.
    Returns the manifest with `processed_path`. Raises UserError naming every picture that failed.
    """
    samples = [sample.model_copy(update={"processed_path": f"{FOLDER}/{_name(sample)}"}) for sample in manifest.samples]
    jobs = [_job(manifest, sample) for sample in samples]
    failed, done = [], 0

    def take(index, result):
        nonlocal done
        done += 1
        if result is not None:
            detail = result.detail if isinstance(result, Failure) else result
            failed.append(f"{samples[index].image_path} ({detail})")
        on_event(Progress("preprocess", done, len(jobs), samples[index].image_path))

    run_isolated("lora_nb.preprocess:process", jobs, take, workers, time_limit_s)
    if failed:
        cure = "make room and run again" if any(_FULL in each for each in failed) else "validate the data set again"
        raise UserError(f"{len(failed)} pictures could not be preprocessed: {', '.join(sorted(failed)[:5])}; {cure}.")
    processed = manifest.with_samples(samples)
    write_manifest(processed, manifest.folder / PROCESSED)
    return processed


def _name(sample: Sample) -> str:
    """A readable file name that changes when the picture or its crop does."""
    what = [RECIPE, sample.sha256, list(sample.bucket), sample.crop.model_dump(mode="json")]
    key = hashlib.sha256(json.dumps(what).encode()).hexdigest()[:12]
    stem = re.sub(r"[^A-Za-z0-9_-]+", "_", PurePosixPath(sample.image_path).stem)[:60]
    return f"{stem}-{key}.png"


def _job(manifest, sample):
    return {
        "source": str(manifest.original(sample)),
        "target": str(manifest.path_of(sample.processed_path)),
        "sha256": sample.sha256,
        "bucket": sample.bucket,
        "crop": sample.crop.model_dump(mode="json"),
    }


def process(job: dict) -> str | None:
    """Make one picture, in a worker: None when it is there, else why not."""
    target, bucket = Path(job["target"]), tuple(job["bucket"])
    if _is_whole(target, bucket):
        return None
    try:
        image = open_rgb(job["source"], expect_sha256=job["sha256"])
    except BadPicture as bad:
        return bad.code
    crop = Crop(tuple(job["crop"]["resized"]), job["crop"]["left"], job["crop"]["top"])
    png = io.BytesIO()
    fit(image, bucket, crop).save(png, "PNG", optimize=True)
    try:
        write_atomic(target, png.getvalue())
    except OSError as error:
        if error.errno not in FULL_DISK:
            raise
        return _FULL
    return None


def _is_whole(path: Path, size) -> bool:
    try:
        return path.is_file() and open_rgb(path).size == size
    except BadPicture:
        return False
