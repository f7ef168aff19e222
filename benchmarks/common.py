"""What the benchmarks on the CPU share: a workplace away from the user's runs, fresh processes, a stopwatch, tables."""

import datetime
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path
from statistics import median

import psutil

from lora_nb.metadata import library_versions

PROJECT = Path(__file__).resolve().parent.parent


@contextmanager
def workplace():
    """A temporary project root that links to the real data and notebooks; runs are written below it and thrown away."""
    with tempfile.TemporaryDirectory(prefix="lora_nb_benchmark_") as folder:
        for name in ("data", "notebooks", "lora_nb"):
            (Path(folder) / name).symlink_to(PROJECT / name)
        os.environ["LORA_NB_ROOT"] = folder
        yield Path(folder)


def prepare_run(config, on_event=print) -> None:
    """Notebooks 01 and 02 without their pictures: manifest, cropped pictures, latents and embeddings."""
    from lora_nb import cache
    from lora_nb.config import resolve_path
    from lora_nb.dataset import preprocess, scan, validate
    from lora_nb.manifest import best_manifest, read_manifest

    report = validate(scan(resolve_path(config.dataset_path)), config.resolution, config.trigger_token, square=not config.buckets)
    preprocess(report.write(config.run_dir))
    manifest = read_manifest(best_manifest(config.run_dir))
    captions = config.captions_beside(sample.caption for sample in manifest.samples)
    cache.encode(best_manifest(config.run_dir), config.base_model, config.vae_model, captions=captions)


def measured_in_a_fresh_process(script, *arguments) -> dict:
    """What `python script *arguments` prints as its last line, which is JSON."""
    command = [sys.executable, str(script), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


class StepClock:
    """Looks at the clock after every optimizer step of this process, whoever makes it; after `last` steps it calls `end`."""

    def __init__(self, last: int, end):
        from torch.optim.optimizer import register_optimizer_step_post_hook

        self.times, self.cpu, self.last, self.end = [], [], last, end
        register_optimizer_step_post_hook(self._tick)

    def _tick(self, *_):
        self.times.append(time.perf_counter())
        self.cpu.append(time.process_time())
        if len(self.times) == self.last:
            self.end(self)

    def ms_a_step(self, after: int) -> dict[str, float]:
        """Means over the steps after the first `after`, everything between them included: of the time, and of the
        processor time of all threads, which counts no waiting and so can be compared on a busy machine too."""
        steps = len(self.times) - after
        return {name: 1000 * (times[-1] - times[after - 1]) / steps for name, times in (("ms", self.times), ("cpu_ms", self.cpu))}


def print_and_leave(values: dict) -> None:
    """End this process at once, with its measurement as the last line: what would come after is not part of it."""
    print(json.dumps(values), flush=True)
    os._exit(0)


def spread(values, digits=1) -> str:
    """Median and range."""
    return f"{median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def table(header, rows) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def machine() -> str:
    """Date, machine and versions, one line."""
    processor = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.partition(":")[2].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        processor = names[0] if names else processor
    memory = psutil.virtual_memory().total / 2**30
    versions = ", ".join(f"{name} {version}" for name, version in library_versions().items() if name != "lora_nb")
    return f"{datetime.date.today()}, {psutil.cpu_count()} cores {processor}, {memory:.0f} GiB, {versions}"


def verdict(checks: dict[str, bool]) -> int:
    """Print which aims were met; the exit code."""
    for name, met in checks.items():
        print(f"{'met' if met else 'NOT MET'}: {name}")
    return 0 if all(checks.values()) else 1
