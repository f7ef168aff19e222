"""Does a training start, and step, as fast with 20,000 pictures as with 32?

    python benchmarks/start.py

Both runs have a whole manifest, originals and caches. The large one's pictures, latents and embeddings are hard links
to those of the demo's 32 under 20,000 names, so that a training opens, checks and reads as many files as a real one.
Every measurement is a fresh process that does what `python -m lora_nb train` does, from the start of the process to
its first optimizer step, and on for some steps; the two sizes take turns.
"""

import argparse
import os
import resource
import sys
import time
from pathlib import Path
from statistics import median

import common
import psutil

WITHIN, STEP_WITHIN = 2.0, 1.1
WARM = 10  # steps that are not counted


def enlarge(config, count: int) -> None:
    """Make the run's data set `count` pictures large: every entry valid, every file there under a name of its own."""
    from lora_nb import cache
    from lora_nb.files import sha256_file
    from lora_nb.manifest import PROCESSED, WITH_LATENTS, Manifest, read_manifest, write_manifest

    manifest, weights = read_manifest(config.run_dir / WITH_LATENTS), cache.weights_of(config.base_model)
    folder, originals = manifest.folder, config.run_dir / "pictures"
    originals.mkdir()
    few = manifest.train()
    for number, sample in enumerate(few):  # a copy, because links need one file system
        (originals / f"{number}{Path(sample.image_path).suffix}").write_bytes(manifest.original(sample).read_bytes())
    large = []
    for number in range(count):
        like, caption = few[number % len(few)], f"{few[number % len(few)].caption}, number {number}"
        suffix = Path(like.image_path).suffix
        names = {
            "image_path": f"{number:06d}{suffix}", "processed_path": f"processed_images/{number:06d}.png",
            "latent_path": f"{cache.LATENTS}/{number:032x}.safetensors",
            "embedding_path": f"{cache.EMBEDDINGS}/{cache.embedding_key(caption, weights)}.safetensors",
        }  # fmt: skip
        os.link(originals / f"{number % len(few)}{suffix}", originals / names["image_path"])
        for field in ("processed_path", "latent_path", "embedding_path"):
            os.link(folder / getattr(like, field), folder / names[field])
        if config.preservation_weight:
            anybody = [cache.embedding_key(config.about_anybody(text), weights) for text in (like.caption, caption)]
            os.link(*(folder / cache.EMBEDDINGS / f"{key}.safetensors" for key in anybody))
        large.append(like.model_copy(update=names | {"caption": caption}))

    def write(name, samples, **settings):
        changed = {"dataset_root": originals.name, "total_samples": count, "settings": manifest.metadata.settings | settings}
        metadata = manifest.metadata.model_copy(update=changed)
        content = manifest.content.model_copy(update={"metadata": metadata, "samples": samples})
        return write_manifest(Manifest(content, folder), folder / name)

    before = [sample.model_copy(update={"latent_path": None, "embedding_path": None}) for sample in large]
    record = manifest.metadata.settings["cache"] | {"source_sha256": sha256_file(write(PROCESSED, before))}
    write(WITH_LATENTS, large, cache=record)


def measure(config_path, steps: int) -> None:
    """One training in this process, until `steps` optimizer steps are made."""
    began = time.perf_counter() - (time.time() - psutil.Process().create_time())

    from lora_nb.__main__ import main as command

    def end(clock):
        common.print_and_leave({"start_s": clock.times[0] - began, "start_cpu_s": clock.cpu[0], **clock.ms_a_step(WARM), "peak_mb": peak_mb()})

    clock = common.StepClock(steps, end)
    code = command(["train", "--preset", "cpu-demo", "--config", config_path])
    sys.exit(f"ended with {code} after {len(clock.times)} steps")


def peak_mb() -> float:
    """The most memory that this process has held. Linux hands a parent's ru_maxrss on, so ask for its own there."""
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--counts", type=int, nargs=2, default=[32, 20_000], metavar=("SMALL", "LARGE"))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--steps", type=int, default=110)
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        return measure(options.measure, options.steps)
    from lora_nb.config import load_config

    with common.workplace() as root:
        results, paths = {count: [] for count in options.counts}, {}
        for count in options.counts:
            config = load_config("cpu-demo", run_name=f"start_{count}", validate_every=None, buckets=False, max_steps=10_000)
            common.prepare_run(config)
            enlarge(config, count)
            paths[count] = config.save(root / f"{count}.yaml")
        for _ in range(options.repeats):
            for count in options.counts:
                results[count].append(common.measured_in_a_fresh_process(__file__, "--measure", paths[count], "--steps", options.steps))
                print(f"{count} pictures: {results[count][-1]}", flush=True)
    rows, medians = [], {}
    for count, found in results.items():
        columns = {name: [one[name] for one in found] for name in found[0]}
        medians[count] = {name: median(values) for name, values in columns.items()}
        digits = {"start_s": 2, "start_cpu_s": 2, "ms": 1, "cpu_ms": 1, "peak_mb": 0}
        rows.append([f"{count:,}", *(common.spread(columns[name], places) for name, places in digits.items())])
    print(f"\n{common.machine()}\n")
    print(common.table(("pictures", "s to the first step, median (range)", "processor s", "ms a step after", "processor ms", "peak MB"), rows) + "\n")
    small, large = (medians[count] for count in options.counts)
    return common.verdict({
        f"start within {WITHIN} times": large["start_s"] <= WITHIN * small["start_s"],
        f"a step within {STEP_WITHIN} times": large["ms"] <= STEP_WITHIN * small["ms"],
    })  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
