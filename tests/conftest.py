"""A random SDXL of the real classes, small enough to train in milliseconds, and runs on a few drawn pictures."""

import hashlib
import json
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import pytest
from PIL import Image

from lora_nb.buckets import buckets, nearest_bucket, plan_crop
from lora_nb.config import PRESETS, Config, build
from lora_nb.manifest import PLAIN, CropRecord, Manifest, ManifestFile, Metadata, Sample, write_manifest

SIZES = [(80, 80), (90, 90), (70, 70), (60, 100), (100, 60), (64, 64), (66, 110)]  # three buckets at 64 px
FAST = {
    "resolution": 64, "precision": "fp32", "mixed_precision": "no", "use_8bit_adam": False, "batch_size": 2,
    "gradient_checkpointing": False, "learning_rate": 1e-2, "lr_scheduler": "constant", "lora_rank": 4, "lora_alpha": 4,
    "max_steps": 6, "save_every": 2, "validate_every": None, "log_every": 2, "lora_target_modules": "attention+feed_forward",
    "caption_dropout": 0.2, "num_validation_images": 1, "validation_steps": 2,
}  # fmt: skip


def build_tiny_sdxl(folder, scheduler=None):
    """Write a diffusers folder with random weights: 64 px, latents 8 x 8, text widths 16 + 24, pooled 24."""
    import torch
    from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    torch.manual_seed(0)
    text = dict(vocab_size=514, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, eos_token_id=2)  # noqa: C408
    tokenizers = write_tokenizers(folder / "words")
    StableDiffusionXLPipeline(
        unet=UNet2DConditionModel(
            sample_size=8, block_out_channels=(32, 32, 64), layers_per_block=1, norm_num_groups=8, cross_attention_dim=40,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), attention_head_dim=(2, 2, 4),
            use_linear_projection=True, addition_embed_type="text_time", addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=6 * 8 + 24,
        ),
        vae=AutoencoderKL(
            block_out_channels=(8, 8, 8, 8), down_block_types=("DownEncoderBlock2D",) * 4, norm_num_groups=4,
            up_block_types=("UpDecoderBlock2D",) * 4, sample_size=64, scaling_factor=0.5,
        ),
        text_encoder=CLIPTextModel(CLIPTextConfig(hidden_size=16, **text)),
        text_encoder_2=CLIPTextModelWithProjection(CLIPTextConfig(hidden_size=24, projection_dim=24, **text)),
        tokenizer=tokenizers[0], tokenizer_2=tokenizers[1],
        scheduler=scheduler or EulerDiscreteScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"),
    ).save_pretrained(folder)  # fmt: skip
    return folder


def write_tokenizers(folder):
    """CLIP's two tokenizers with an alphabet for a vocabulary: loaded in no time."""
    from transformers import CLIPTokenizer

    alphabet = json.loads((PRESETS / "sdxl" / "tokenizer" / "vocab.json").read_text(encoding="utf-8"))
    words = [*list(alphabet)[:512], "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True)
    (folder / "vocab.json").write_text(json.dumps({word: n for n, word in enumerate(words)}), encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")
    options = {"model_max_length": 77, "bos_token": words[-2], "eos_token": words[-1], "unk_token": words[-1]}
    return [CLIPTokenizer.from_pretrained(folder, pad_token=pad, **options) for pad in (words[-1], "!")]


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory):
    """Path of the random SDXL."""
    return build_tiny_sdxl(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(autouse=True)
def project(tmp_path, monkeypatch):
    """Every test has a project root of its own: nothing is written into the repository."""
    monkeypatch.setenv("LORA_NB_ROOT", str(tmp_path))
    return tmp_path


@pytest.fixture
def make_run(project, tiny_base):
    """make_run(**settings) -> Config, with pictures and a manifest as notebook 01 leaves them."""

    def make(pictures=7, run_name="run", **settings) -> Config:
        config = build(FAST | {"base_model": str(tiny_base), "run_name": run_name, "dataset_path": "data"} | settings)
        write_dataset(project / "data", config, pictures)
        return config

    return make


def write_dataset(root, config, pictures=7):
    """Drawn pictures with captions, and the run's plain manifest."""
    (root / "images").mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    samples = []
    for n, size in enumerate(SIZES[:pictures]):
        path = root / "images" / f"p{n}.png"
        pixels = np.repeat(np.repeat(rng.integers(0, 255, (5, 5, 3), dtype=np.uint8), 20, axis=0), 20, axis=1)
        if not path.exists():
            Image.fromarray(pixels).resize(size).save(path)
        bucket = nearest_bucket(*size, buckets(config.resolution, square=not config.buckets))
        crop = plan_crop(*size, bucket)
        samples.append(
            Sample(
                image_path=f"images/p{n}.png", caption=f"hero, number {n} of the story", width=size[0], height=size[1],
                format="PNG", sha256=hashlib.sha256(path.read_bytes()).hexdigest(), bucket=bucket,
                crop=CropRecord(resized=crop.resized, left=crop.left, top=crop.top), original_size=size[::-1],
                crop_top_left=(crop.top, crop.left), target_size=bucket[::-1],
            )
        )  # fmt: skip
    metadata = Metadata(dataset_root="../../data", resolution=config.resolution, total_samples=len(samples))
    content = ManifestFile(schema_version=1, metadata=metadata, samples=samples)
    return write_manifest(Manifest(content, config.run_dir), config.run_dir / PLAIN)
