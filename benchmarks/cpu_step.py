"""What does a training step cost beside what cannot be avoided?

    python benchmarks/cpu_step.py
    python benchmarks/cpu_step.py --diffusers-script train_text_to_image_lora_sdxl.py

The first compares our whole loop (settings of the preset cpu-demo with its log and checkpoints, but without validation pictures and
preservation) with a bare loop: the same UNet, LoRA, loss and optimizer over tensors in memory, no checks, no files. Both
live in one process and take turns, block by block, so that a machine that slows down slows both.

The second adds diffusers' example script on the same model, pictures and settings. It is not part of this project:
download it from diffusers' examples/text_to_image, and `pip install datasets torchvision` (the build for your torch). Each of its runs,
and each of ours beside it, is a fresh process; the same clock looks after every optimizer step of both.

Where other programs keep the cores busy, times mean little: then set OMP_NUM_THREADS=1 and read the processor time, which
counts no waiting (for cores, nor for the disk).
"""

import argparse
import json
import runpy
import sys
import time
from pathlib import Path
from statistics import median

import common
import torch

from lora_nb import models
from lora_nb.config import load_config, read_config, resolve_path
from lora_nb.events import Stepped
from lora_nb.job import prepare
from lora_nb.losses import diffusion_loss, sample_posterior, scale_latents
from lora_nb.manifest import best_manifest, read_manifest
from lora_nb.step import draws_at, micro_batches
from lora_nb.train import Accelerator, train

SHARE_OF_BARE, TIMES_DIFFUSERS = 0.95, 2.0
WARM = 20  # steps that are not counted: warm-up of caches and allocators


# --- a bare loop -------------------------------------------------------------------------------------------------


class Bare:
    """The loop that anybody would write: tensors in memory, loss, gradients, clip, update."""

    def __init__(self, config, steps: int):
        """Takes the micro-batches of the first `steps` steps of our run, so that both see the same shapes."""
        self.unet = models.load_part(config.base_model, "unet")
        self.parameters = models.add_lora(
            self.unet, config.lora_rank, config.lora_alpha, config.lora_target_modules, seed=config.seed
        )
        self.unet.train()
        self.optimizer = torch.optim.AdamW(self.parameters, lr=config.learning_rate, weight_decay=config.weight_decay, fused=True)
        self.noise_scheduler = models.load_part(config.base_model, "noise_scheduler")
        self.vae_config, self.config, self.at = models.vae_config(config.base_model), config, 0
        job = prepare(config, Accelerator())
        self.batches = [[self._tensors(job, group) for group in micro_batches(job, draws_at(job, step))] for step in range(steps)]

    @staticmethod
    def _tensors(job, group):
        samples = [job.samples[one.index] for one in group]
        embeds = [job.source.embeddings(sample.caption) for sample in samples]
        return (
            torch.stack([job.source.latents(sample) for sample in samples]),
            *(torch.stack(part) for part in zip(*embeds, strict=True)),
            torch.tensor([models.time_ids(s.original_size, s.crop_top_left, s.target_size) for s in samples], dtype=torch.float32),
        )

    def step(self) -> float:
        """One optimizer step; its loss."""
        total, pictures = 0.0, self.config.batch_size
        for posterior, prompt_embeds, pooled_prompt_embeds, time_ids in self.batches[self.at]:
            latents = scale_latents(sample_posterior(posterior, torch.randn_like(posterior[:, 0])), self.vae_config)
            noise, timesteps = torch.randn_like(latents), torch.randint(1000, (len(latents),))
            losses = diffusion_loss(
                self.unet, self.noise_scheduler, latents, noise, timesteps, prompt_embeds, pooled_prompt_embeds, time_ids,
                snr_gamma=self.config.snr_gamma,
            )  # fmt: skip
            loss = losses.sum() / pictures
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(self.parameters, self.config.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.at = (self.at + 1) % len(self.batches)
        return total


def against_bare(config, blocks: int, block: int) -> dict[str, list[dict]]:
    """ms and processor ms a step of both, one of each a block. Ours runs; after every `block` of its steps the bare loop makes as many."""
    bare, times = Bare(config, (blocks + 1) * block), {"ours": [], "bare": []}
    began = now()

    def on_event(event):
        nonlocal began
        if not isinstance(event, Stepped) or event.step % block:
            return
        middle = now()
        for _ in range(block):
            bare.step()
        end = now()
        if event.step > block:  # the first block of both warms up
            times["ours"].append(_ms_a_step(began, middle, block))
            times["bare"].append(_ms_a_step(middle, end, block))
        began = now()

    train(config.model_copy(update={"max_steps": (blocks + 1) * block}), on_event)
    return times


def now() -> tuple[float, float]:
    """Seconds of the clock, and of this process on all cores."""
    return time.perf_counter(), time.process_time()


def _ms_a_step(began, ended, steps):
    return dict(zip(("ms", "cpu_ms"), (1000 * (b - a) / steps for a, b in zip(began, ended, strict=True)), strict=True))


# --- diffusers' script -------------------------------------------------------------------------------------------


def script_settings(config, folder, output, steps):
    """The script's options for our settings."""
    return {
        "pretrained_model_name_or_path": resolve_path(config.base_model), "train_data_dir": folder, "output_dir": output,
        "cache_dir": output, "resolution": config.resolution, "train_batch_size": config.batch_size, "rank": config.lora_rank,
        "learning_rate": config.learning_rate, "lr_scheduler": config.lr_scheduler, "lr_warmup_steps": config.lr_warmup_steps,
        "snr_gamma": config.snr_gamma, "max_grad_norm": config.max_grad_norm, "adam_weight_decay": config.weight_decay,
        "seed": config.seed, "max_train_steps": steps + 1, "checkpointing_steps": 10 * steps, "mixed_precision": "no",
    }  # fmt: skip


def run_script(script, config, folder, steps) -> None:
    """Diffusers' script in this process, until `steps` optimizer steps are made."""
    options = script_settings(config, folder, Path(folder).with_name("diffusers_output"), steps)
    sys.argv = [str(script), "--center_crop", *(f"--{name}={value}" for name, value in options.items())]
    runpy.run_path(str(script), run_name="__main__")


def as_imagefolder(config, folder: Path) -> Path:
    """Links to the training pictures, and their captions in one metadata.jsonl, as the script reads them."""
    folder.mkdir(parents=True)
    manifest, lines = read_manifest(best_manifest(config.run_dir)), []
    for number, sample in enumerate(manifest.train()):
        name = f"{number:03d}{Path(sample.image_path).suffix}"
        (folder / name).symlink_to(manifest.original(sample).resolve())
        lines.append(json.dumps({"file_name": name, "text": sample.caption}))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def measure(options) -> None:
    """One run of one of the two, in this process."""
    config = read_config(options.config)
    common.StepClock(options.steps, lambda clock: common.print_and_leave(clock.ms_a_step(WARM)))
    if options.measure == "ours":
        train(config.model_copy(update={"max_steps": options.steps + 1}))
    else:
        run_script(options.diffusers_script, config, options.folder, options.steps)


def against_diffusers(config, script, root, repeats, steps) -> dict[str, list[dict]]:
    """ms and processor ms a step of both, one of each a fresh process, taking turns."""
    folder, path = as_imagefolder(config, root / "imagefolder"), config.save(root / "config.yaml")
    given = ["--config", path, "--folder", folder, "--steps", steps, "--diffusers-script", Path(script).resolve()]
    times = {"ours": [], "diffusers": []}
    for _ in range(repeats):
        for what, values in times.items():
            values.append(common.measured_in_a_fresh_process(__file__, "--measure", what, *given))
            print(f"{what}: {values[-1]}", flush=True)
    return times


# --- both --------------------------------------------------------------------------------------------------------


def compared(reference: str, theirs: list[dict], name: str, ours: list[dict]) -> tuple[str, float]:
    """The table of both, and our speed as a share of the reference's: the median of pairs that were made side by side."""
    share = {unit: median(one[unit] / other[unit] for one, other in zip(theirs, ours, strict=True)) for unit in ("ms", "cpu_ms")}

    def row(title, found, speed):
        return [title, *(cell for unit in share for cell in (common.spread([one[unit] for one in found]), f"{speed[unit]:.3g}"))]

    header = ("median (range)", "ms a step", "speed", "processor ms a step", "speed")
    return common.table(header, [row(reference, theirs, dict.fromkeys(share, 1)), row(name, ours, share)]), share["ms"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--blocks", type=int, default=9, help="of the comparison with the bare loop")
    parser.add_argument("--block", type=int, default=50, help="steps of each in a block; 50 has one checkpoint")
    parser.add_argument("--diffusers-script", metavar="PATH")
    parser.add_argument("--repeats", type=int, default=5, help="runs of diffusers' script, and of ours beside it")
    parser.add_argument("--steps", type=int, default=120, help="of each of those runs")
    for name in ("--measure", "--config", "--folder"):
        parser.add_argument(name, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        return measure(options)
    checks = {}
    with common.workplace() as root:
        config = load_config("cpu-demo", run_name="step", validate_every=None, preservation_weight=0.0)
        common.prepare_run(config)
        times = against_bare(config, options.blocks, options.block)
        table, speed = compared("bare loop, tensors in memory", times["bare"], "our loop: checks, cache, log, checkpoints", times["ours"])
        checks[f"at least {SHARE_OF_BARE} of the bare loop's speed"] = speed >= SHARE_OF_BARE
        print(f"{common.machine()}\n\n{table}\n", flush=True)
        if options.diffusers_script:
            config = load_config(
                "cpu-demo", run_name="script", validate_every=None, preservation_weight=0.0, lora_target_modules="attention", buckets=False,
                save_every=10**6,
            )  # fmt: skip
            common.prepare_run(config)
            times = against_diffusers(config, options.diffusers_script, root, options.repeats, options.steps)
            table, speed = compared("diffusers' script", times["diffusers"], "ours, latents and embeddings cached", times["ours"])
            checks[f"at least {TIMES_DIFFUSERS} times the speed of diffusers' script"] = speed >= TIMES_DIFFUSERS
            print(f"\n{table}\n")
    return common.verdict(checks)


if __name__ == "__main__":
    sys.exit(main())
