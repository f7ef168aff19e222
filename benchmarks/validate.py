"""Is validation linear in time, flat in memory, and close to the speed of bare decoding?

    python benchmarks/validate.py                    # 200 and 20,000 pictures: some minutes, 4 GB of disk
    python benchmarks/validate.py --counts 100 300   # a try

Pictures are generated once into a cache folder. Every measurement runs in a fresh process; "bare" decodes the same
files with as many processes and does nothing else: Image.open(path).convert("RGB").
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import psutil
from PIL import Image, ImageFilter

SIZES = ((1024, 1024), (832, 1216), (1216, 832), (1152, 896), (768, 1344))
FASTEST = 0.8  # of bare decoding, at least
FLAT_MB = 300  # more than the small set, at most


def draw(job) -> None:
    """One photograph-like JPEG: smooth colours, edges and grain; its number is its seed."""
    folder, number = job
    path = Path(folder) / f"{number:06d}.jpg"
    if path.exists():
        return
    random = np.random.default_rng(number)
    width, height = SIZES[number % len(SIZES)]
    coarse = Image.fromarray(random.integers(0, 256, (12, 12, 3), dtype=np.uint8)).resize(
        (width, height), Image.Resampling.BICUBIC
    )
    edges = Image.fromarray(random.integers(0, 256, (9, 7, 3), dtype=np.uint8)).resize(
        (width, height), Image.Resampling.NEAREST
    )
    picture = Image.blend(coarse, edges.rotate(float(random.uniform(0, 90))).filter(ImageFilter.GaussianBlur(1)), 0.4)
    grain = Image.fromarray(random.integers(96, 160, (height, width), dtype=np.uint8)).convert("RGB")
    Image.blend(picture, grain, 0.1).save(path, quality=88)
    path.with_suffix(".txt").write_text(f"some_hero, picture {number}")


def generate(folder: Path, count: int) -> Path:
    """`count` pictures with captions; those that are there are kept."""
    folder.mkdir(parents=True, exist_ok=True)
    with ProcessPoolExecutor() as pool:
        list(pool.map(draw, [(str(folder), number) for number in range(count)], chunksize=32))
    return folder


def decode(path) -> int:
    return Image.open(path).convert("RGB").width


def bare(folder: Path) -> None:
    """What cannot be avoided: every picture decoded to RGB."""
    with ProcessPoolExecutor() as pool:
        list(pool.map(decode, sorted(folder.glob("*.jpg")), chunksize=16))


def doctor(folder: Path) -> None:
    """The whole of notebook 01 but the plots: scan, validate, report, manifest."""
    from lora_nb.dataset import scan, validate

    report = validate(scan(folder), 1024, "some_hero")
    assert report.ready, str(report.verdict)
    str(report.table())
    with tempfile.TemporaryDirectory() as run:
        report.write(run)


def measure(what: str, folder: Path) -> dict:
    """{"seconds", "peak_mb" of this process, "with_workers_mb" of it and its children} of one verb in this process."""
    together, stop = [0], threading.Event()
    watcher = threading.Thread(target=_watch, args=(together, stop), daemon=True)
    watcher.start()
    began = time.perf_counter()
    {"bare": bare, "doctor": doctor}[what](folder)
    seconds = time.perf_counter() - began
    stop.set()
    watcher.join()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"seconds": round(seconds, 2), "peak_mb": round(peak), "with_workers_mb": round(together[0] / 2**20)}


def _watch(together, stop):
    me = psutil.Process()
    while not stop.wait(0.5):
        try:
            together[0] = max(together[0], sum(each.memory_info().rss for each in [me, *me.children(recursive=True)]))
        except psutil.NoSuchProcess:  # a worker has just ended
            continue


def in_fresh_process(what: str, folder: Path) -> dict:
    command = [sys.executable, __file__, "--measure", what, "--folder", str(folder)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--counts", type=int, nargs=2, default=[200, 20_000], metavar=("SMALL", "LARGE"))
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "lora_nb_benchmark_pictures")
    parser.add_argument("--measure", choices=("bare", "doctor"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(options.measure, options.folder)))
        return 0
    rows = []
    for count in options.counts:
        folder = generate(options.folder / str(count), count)
        bare(folder)  # so that both find the files in the page cache, or neither
        row = {"pictures": count} | {what: in_fresh_process(what, folder) for what in ("bare", "doctor")}
        row["share_of_bare_speed"] = round(row["bare"]["seconds"] / row["doctor"]["seconds"], 3)
        print(json.dumps(row), flush=True)
        rows.append(row)
    return _judge(*rows)


def _judge(small, large) -> int:
    growth = large["pictures"] / small["pictures"]
    checks = {
        f"at least {FASTEST} of bare decoding": large["share_of_bare_speed"] >= FASTEST,
        f"peak memory within {FLAT_MB} MB": large["doctor"]["peak_mb"] - small["doctor"]["peak_mb"] <= FLAT_MB,
        "time linear": large["doctor"]["seconds"] <= 1.2 * growth * small["doctor"]["seconds"],
    }
    for name, met in checks.items():
        print(f"{'met' if met else 'NOT MET'}: {name}")
    return 0 if all(checks.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
