"""What a training step of full-size SDXL needs on this GPU, and how well the forecast of it does.

    python benchmarks/gpu_sdxl.py                                      # 24 rows, under ten minutes; a table in Markdown
    python benchmarks/gpu_sdxl.py --resolution 1024 --precision 16-bit nf4 --batch 1 4    # just these, crossed
    python benchmarks/gpu_sdxl.py --all                                # everything crossed: 192 rows, an hour
    python benchmarks/gpu_sdxl.py --forecast-only                      # what is expected of those rows, without a GPU
    python benchmarks/gpu_sdxl.py --device cpu --resolution 512 --steps 1                 # a try without a GPU, 10 GB
    python benchmarks/gpu_sdxl.py --device cpu --base data/tiny_sdxl --resolution 128     # a try in seconds

Weights are random, made on the spot from the bundled configs: nothing is downloaded. Steps are the engine's own
(accumulate, optimise), with latents and embeddings as if cached. Memory is what PyTorch's tensors held at most; on a
processor it is counted by the forecast's own ledger, and the process's peak stands beside it. "of the limit" is the step's
arithmetic over a matrix product measured in the same run. What does not fit is a row too.
"""

import argparse
import itertools
import multiprocessing
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch

from lora_nb import models
from lora_nb.budget import matrix_rate, measure_steps
from lora_nb.config import Config, build
from lora_nb.memory import is_out_of_memory, release
from lora_nb.metadata import library_versions
from lora_nb.rehearsal import rehearsal_job, simulate

# The first value of each is where the others are looked at from.
AXES = {
    "resolution": (1024, 768, 512), "batch": (1, 4), "checkpointing": ("on", "off"), "precision": ("16-bit", "nf4"),
    "rank": (16, 32), "text_encoders": ("off", "on"), "compile": ("off", "on"),
}  # fmt: skip
HEADINGS = (*AXES, "allocated GiB", "reserved GiB", "forecast GiB", "error", "ms a step", "images/s", "TFLOP a step", "of the limit")


def rows_of(options) -> list[dict]:
    """The rows to measure: the axes that were given are crossed; without any, each is changed alone, at every resolution."""
    given = {name: getattr(options, name) for name in AXES if getattr(options, name)}
    if given or options.all:
        values = {name: given.get(name, AXES[name] if options.all else AXES[name][:1]) for name in AXES}
        return [dict(zip(values, row, strict=True)) for row in itertools.product(*values.values())]
    first = {name: values[0] for name, values in AXES.items()}
    rows = []
    for resolution in AXES["resolution"]:
        here = first | {"resolution": resolution}
        rows += [here, *(here | {name: AXES[name][1]} for name in AXES if name != "resolution"), here | {"batch": 4, "checkpointing": "off"}]
    return rows


def config_of(row: dict, base: str, half: str) -> Config:
    return build({
        "base_model": base, "resolution": row["resolution"], "batch_size": row["batch"], "lora_rank": row["rank"], "lora_alpha": row["rank"],
        "precision": "nf4" if row["precision"] == "nf4" else half, "mixed_precision": half,
        "gradient_checkpointing": row["checkpointing"] == "on", "train_text_encoder": row["text_encoders"] == "on",
        "use_8bit_adam": False, "validate_every": None,
    })  # fmt: skip


def measure(row: dict, config: Config, device: str, steps: int) -> dict:
    """{"allocated", "reserved" in GiB, "seconds"} of one row, or {"failed": why}."""
    try:
        job = rehearsal_job(config, device)
        if row["compile"] == "on":
            job.unet.compile_repeated_blocks()
        reset_peak(device)
        found = measure_steps(job, steps)
        return {"allocated": found.peak_gib, "reserved": highest_reserved(device), "seconds": found.seconds}
    except Exception as error:
        return {"failed": "out of memory" if is_out_of_memory(error) else f"{type(error).__name__}: {str(error).strip().splitlines()[0]:.80}"}
    finally:
        job = None
        torch._dynamo.reset()
        release()


def reset_peak(device) -> None:
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    elif Path("/proc/self/clear_refs").exists():  # Linux forgets the highest resident size
        Path("/proc/self/clear_refs").write_text("5")


def highest_reserved(device) -> float | None:
    """GiB: what PyTorch took from a GPU at most; on Linux without one, the process's peak since it was reset."""
    if device == "cuda":
        return torch.cuda.max_memory_reserved() / 2**30
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((int(line.split()[1]) / 2**20 for line in lines if line.startswith("VmHWM")), None)


def forecast_all(configs: list[Config], gpu: bool) -> list:
    """Needs of every configuration, several at a time, each in a process that never touches the GPU."""
    workers = max(1, min(8, (os.cpu_count() or 2) // 2))
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        return list(pool.map(simulate, configs, itertools.repeat(gpu)))


def cells(row, found, needs, rate) -> list[str]:
    """A row of the table."""
    whole = [str(row[name]) for name in AXES]
    guess = needs.step / 2**30 if needs else None
    if "allocated" not in found:
        return [*whole, found["failed"], "", number(guess), "", "", "", number(needs and needs.step_flop / 1e12), ""]
    tflop = needs and needs.step_flop / 1e12
    return [
        *whole, number(found["allocated"]), number(found["reserved"]), number(guess),
        f"{guess / found['allocated'] - 1:+.1%}" if needs else "", f"{1000 * found['seconds']:.0f}",
        f"{row['batch'] / found['seconds']:.2f}", number(tflop), f"{tflop / found['seconds'] / rate:.0%}" if needs else "",
    ]  # fmt: skip


def number(value, digits=2) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def only_forecast(options) -> int:
    rows = rows_of(options)
    needs = forecast_all([config_of(row, options.base, "bf16") for row in rows], gpu=True)
    print_head((*AXES, "base GiB", "LoRA GiB", "activations GiB", "peak GiB", "TFLOP a step"))
    for row, need in zip(rows, needs, strict=True):
        parts = [number(part / 2**30) for part in (need.base, need.lora, need.activations, need.step)]
        print("| " + " | ".join([*(str(row[name]) for name in AXES), *parts, number(need.step_flop / 1e12)]) + " |")
    return 0


def print_head(headings) -> None:
    print("| " + " | ".join(heading.replace("_", " ") for heading in headings) + " |\n|" + "---|" * len(headings))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, values in AXES.items():
        number_or_word = {"type": int} if isinstance(values[0], int) else {"choices": values}
        parser.add_argument(f"--{name.replace('_', '-')}", nargs="+", **number_or_word)
    parser.add_argument("--all", action="store_true", help="cross everything that is not given")
    parser.add_argument("--base", default=str(models.SDXL), help="a diffusers folder, of which only the configs are read (SDXL)")
    parser.add_argument("--device", default=models.default_device(), choices=("cuda", "cpu"))
    parser.add_argument("--steps", type=int, default=5, help="timed steps a row, after one that warms up (5)")
    parser.add_argument("--minutes", type=float, default=8.0, help="rows that would begin later are left out (8)")
    parser.add_argument("--no-forecast", action="store_true")
    parser.add_argument("--forecast-only", action="store_true", help="measure nothing; the forecast for a GPU with bf16")
    options = parser.parse_args()
    if options.forecast_only:
        return only_forecast(options)
    gpu, began = options.device == "cuda", time.monotonic()
    half = "fp16" if gpu and not torch.cuda.is_bf16_supported(including_emulation=False) else "bf16"
    name = torch.cuda.get_device_name() if gpu else f"processor, {torch.get_num_threads()} thread(s)"
    rate = matrix_rate(options.device, models.DTYPES[half])
    print(f"{name}; matrix products in {half}: {rate:.3g} TFLOP/s; " + ", ".join(f"{key} {value}" for key, value in library_versions().items()), flush=True)
    rows = rows_of(options)
    configs, found = [config_of(row, options.base, half) for row in rows], []
    for number_, (row, config) in enumerate(zip(rows, configs, strict=True), 1):
        late = time.monotonic() - began > 60 * options.minutes
        found.append({"failed": "not reached"} if late else measure(row, config, options.device, options.steps))
        print(f"{number_} of {len(rows)}: {row} {found[-1]}", file=sys.stderr, flush=True)
    needs = [None] * len(rows) if options.no_forecast else forecast_all(configs, gpu)
    print_head(HEADINGS)
    for each in zip(rows, found, needs, strict=True):
        print("| " + " | ".join(cells(*each, rate)) + " |")
    if not gpu:
        print("\nOn a processor: allocated is the ledger's count, reserved the process's highest resident size.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
