"""How near does notebook 02's encoding come to the VAE's bare forward, and what does a second run cost?

    python benchmarks/cpu_encode.py
    python benchmarks/cpu_encode.py --pictures 100 --resolution 512

500 pictures are generated and go through notebook 01 (checked, cropped to 128 px). Then four ways take turns, in one
process: the VAE's bare forward over the same pixels, in memory as it wants them; `cache.encode`, which decodes ahead,
checks, and writes a file a picture; the same work one thing after another; and `cache.encode` again, which finds all
there. The pictures share a caption, so that only the VAE counts.
"""

import argparse
import shutil
import sys
import time
from pathlib import Path
from statistics import median

import common
import numpy as np
import torch
from PIL import Image, ImageFilter

from lora_nb import cache, models
from lora_nb.config import load_config
from lora_nb.dataset import preprocess, scan, validate
from lora_nb.events import Progress
from lora_nb.lora_file import write_safetensors
from lora_nb.manifest import PROCESSED, read_manifest

SHARE_OF_BARE, SECOND_RUN_S = 0.9, 10.0
SIZES = ((560, 720), (720, 560), (640, 640), (600, 800), (900, 680))


def generate(folder: Path, count: int) -> None:
    """`count` different pictures with smooth colours, edges and grain, and the caption that all share."""
    (folder / "images").mkdir(parents=True)
    for number in range(count):
        random = np.random.default_rng(number)
        width, height = SIZES[number % len(SIZES)]
        tiles = Image.fromarray(random.integers(0, 256, (9, 7, 3), dtype=np.uint8)).resize((width, height), Image.Resampling.BICUBIC)
        edges = tiles.rotate(float(random.uniform(0, 90))).filter(ImageFilter.GaussianBlur(1))
        grain = Image.fromarray(random.integers(96, 160, (height, width), dtype=np.uint8)).convert("RGB")
        path = folder / "images" / f"{number:04d}.jpg"
        Image.blend(Image.blend(tiles, edges, 0.4), grain, 0.1).save(path, quality=90)
        path.with_suffix(".txt").write_text("some_hero in a picture")


@torch.no_grad()
def bare(vae, pixels) -> float:
    """Seconds of the VAE alone. pixels: float32 [1, 3, H, W], each in memory."""
    began = time.perf_counter()
    for image in pixels:
        posterior = vae.encode(image).latent_dist
        torch.stack([posterior.mean[0], posterior.logvar[0]])
    return time.perf_counter() - began


def ours(manifest_path, config) -> tuple[float, float, cache.Encoded]:
    """Seconds a picture from the first that is done to the last, seconds of the whole call, and what was done."""
    done = []
    began = time.perf_counter()
    encoded = cache.encode(
        manifest_path, config.base_model,
        on_event=lambda event: done.append(time.perf_counter()) if isinstance(event, Progress) and event.stage == cache.LATENTS else None,
    )  # fmt: skip
    return (done[-1] - done[0]) / (len(done) - 1), time.perf_counter() - began, encoded


def serial(vae, manifest, weights, folder) -> float:
    """Seconds of the same work without threads: decode, key, encode, write, one picture after the other."""
    began = time.perf_counter()
    for sample in manifest.samples:
        pixels = cache.pixels_of(manifest, sample)
        latents = cache.encode_image(vae, pixels)
        file = folder / f"{cache.latent_key(pixels, weights)}.safetensors"
        write_safetensors(file, {"mean": latents[0], "logvar": latents[1]}, {"weights": weights.vae})
    return time.perf_counter() - began


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pictures", type=int, default=500)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--resolution", type=int, default=128)
    options = parser.parse_args()
    count = options.pictures
    with common.workplace() as root:
        config = load_config("cpu-demo", run_name="encode", dataset_path=str(root / "pictures"), resolution=options.resolution)
        generate(root / "pictures", count)
        preprocess(validate(scan(root / "pictures"), config.resolution, "some_hero").write(config.run_dir))
        manifest = read_manifest(config.run_dir / PROCESSED)
        weights, vae = cache.weights_of(config.base_model), models.load_vae(config.base_model)
        arrays = [cache.pixels_of(manifest, sample) for sample in manifest.samples]
        pixels = [torch.from_numpy(one.copy()).permute(2, 0, 1)[None].float() / 127.5 - 1 for one in arrays]
        times = {"bare": [], "ours": [], "whole": [], "serial": [], "again": []}
        bare(vae, pixels[:50])
        for _ in range(options.repeats):
            times["bare"].append(bare(vae, pixels))
            for folder in (cache.LATENTS, cache.EMBEDDINGS, "serial"):
                shutil.rmtree(config.run_dir / folder, ignore_errors=True)
            a_picture, whole, encoded = ours(config.run_dir / PROCESSED, config)
            assert encoded.latents_made == count, encoded
            times["ours"].append(a_picture * count)
            times["whole"].append(whole)
            times["serial"].append(serial(vae, manifest, weights, config.run_dir / "serial"))
            _, again, encoded = ours(config.run_dir / PROCESSED, config)
            assert encoded.latents_made == encoded.embeddings_made == 0, encoded
            times["again"].append(again)

    def share(name):
        return median(one / other for one, other in zip(times["bare"], times[name], strict=True))

    names = {
        "bare": "VAE's bare forward, pixels in memory", "ours": "`cache.encode`, its pictures",
        "whole": "`cache.encode`, with loading the encoders, captions and manifest",
        "serial": "decode, encode and write, one after another", "again": "`cache.encode` again: nothing to do",
    }  # fmt: skip
    rows = [
        [names[name], common.spread(values, 2), f"{1000 * median(values) / count:.1f}", f"{share(name):.2f}" if name != "again" else ""]
        for name, values in times.items()
    ]
    print(f"{common.machine()}; {count} pictures at {config.resolution} px\n")
    print(common.table(("way", "seconds, median (range)", "ms a picture", "speed"), rows) + "\n")
    return common.verdict({
        f"at least {SHARE_OF_BARE} of the bare forward's speed": share("ours") >= SHARE_OF_BARE,
        "faster than one after another": median(times["ours"]) < median(times["serial"]),
        f"nothing to do takes at most {SECOND_RUN_S:.0f} s": median(times["again"]) <= SECOND_RUN_S,
    })  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
