"""The tiny SDXL's parts, untrained: the real one's classes and file layout with small numbers in the configs."""

import json
from pathlib import Path

import torch
from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import (
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
)

RESOLUTION = 128
RATIOS = ((128, 128), (112, 144), (144, 112))  # width, height
WORDS = r"""'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"""  # CLIP's own
START, END = "<|startoftext|>", "<|endoftext|>"


def build_tokenizer(captions, merges: int = 640, pad_token: str = END) -> CLIPTokenizer:
    """A byte-level BPE in CLIP's format whose merges come from `captions`; unknown words fall into pieces."""
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.normalizer = normalizers.Lowercase()
    bpe.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(pattern=Regex(WORDS), behavior="isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe.train_from_iterator(captions, trainers.BpeTrainer(
        vocab_size=2 * len(alphabet) + merges, initial_alphabet=alphabet, end_of_word_suffix="</w>", show_progress=False,
    ))
    learned = [tuple(pair) for pair in json.loads(bpe.to_str())["model"]["merges"]]
    tokens = [*alphabet, *(letter + "</w>" for letter in alphabet), *("".join(pair) for pair in learned), START, END]
    vocab = {token: index for index, token in enumerate(dict.fromkeys(tokens))}
    return CLIPTokenizer(vocab=vocab, merges=learned, unk_token=END, bos_token=START, eos_token=END, pad_token=pad_token, model_max_length=77)


def build_vae() -> AutoencoderKL:
    """4 latent channels, scale 8, as SDXL's; 128 px -> 4 × 16 × 16."""
    return AutoencoderKL(
        in_channels=3, out_channels=3, latent_channels=4, block_out_channels=(16, 32, 64, 64), layers_per_block=1,
        norm_num_groups=8, down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        sample_size=RESOLUTION, force_upcast=True,
    )


def _text_config(tokenizer, width, projection, act):
    return CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=3 * width, num_hidden_layers=3, num_attention_heads=4,
        max_position_embeddings=77, projection_dim=projection, hidden_act=act, pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
    )


def build_text_encoders(tokenizer):
    """CLIPTextModel of width 48 and CLIPTextModelWithProjection of width 80: 48 + 80 = 128, pooled 80."""
    return (
        CLIPTextModel(_text_config(tokenizer, 48, 48, "quick_gelu")),
        CLIPTextModelWithProjection(_text_config(tokenizer, 80, 80, "gelu")),
    )


def build_unet() -> UNet2DConditionModel:
    """SDXL's block types, conditioning and linear projections, 64 to 128 channels wide."""
    return UNet2DConditionModel(
        sample_size=RESOLUTION // 8, in_channels=4, out_channels=4, block_out_channels=(64, 96, 128), layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 1, 1), attention_head_dim=(2, 3, 4), cross_attention_dim=128, use_linear_projection=True,
        addition_embed_type="text_time", addition_time_embed_dim=32, projection_class_embeddings_input_dim=6 * 32 + 80,
        norm_num_groups=32,
    )


def build_scheduler() -> EulerDiscreteScheduler:
    """The scheduler_config of stabilityai/stable-diffusion-xl-base-1.0."""
    return EulerDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", num_train_timesteps=1000, prediction_type="epsilon",
        timestep_spacing="leading", steps_offset=1, interpolation_type="linear", use_karras_sigmas=False,
    )


def build_clip(tokenizer) -> CLIPModel:
    """Both towers, 64-wide shared space; pictures of 128 px in patches of 16."""
    text = _text_config(tokenizer, 96, 64, "quick_gelu").to_dict()
    vision = dict(hidden_size=96, intermediate_size=288, num_hidden_layers=4, num_attention_heads=4, image_size=RESOLUTION, patch_size=16, projection_dim=64)
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=64))


def build_image_processor() -> CLIPImageProcessorPil:
    """CLIP's own preprocessing at 128 px: shortest side, centre crop, CLIP's mean and deviation."""
    return CLIPImageProcessorPil(size={"shortest_edge": RESOLUTION}, crop_size={"height": RESOLUTION, "width": RESOLUTION})


def save_pipeline(folder, vae, text_encoders, tokenizer, unet) -> Path:
    """The diffusers folder that StableDiffusionXLPipeline.from_pretrained opens, in fp16."""
    folder = Path(folder)
    second = build_tokenizer_like(tokenizer, pad_token="!")
    parts = [part.to(torch.float16) for part in (vae, *text_encoders, unet)]
    pipeline = StableDiffusionXLPipeline(
        vae=parts[0], text_encoder=parts[1], text_encoder_2=parts[2], tokenizer=tokenizer, tokenizer_2=second,
        unet=parts[3], scheduler=build_scheduler(), force_zeros_for_empty_prompt=True, add_watermarker=False,
    )
    pipeline.save_pretrained(folder)
    for name, part in (("tokenizer", tokenizer), ("tokenizer_2", second)):
        save_vocabulary(folder / name, part)
    return folder


def build_tokenizer_like(tokenizer, pad_token) -> CLIPTokenizer:
    """The same vocabulary with another padding token, as SDXL's second tokenizer pads with "!"."""
    bpe = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    merges = [tuple(pair) for pair in bpe["merges"]]
    return CLIPTokenizer(vocab=bpe["vocab"], merges=merges, unk_token=END, bos_token=START, eos_token=END, pad_token=pad_token, model_max_length=77)


def save_vocabulary(folder, tokenizer) -> None:
    """vocab.json and merges.txt, which transformers 4 and other programs read beside tokenizer.json."""
    bpe = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    (Path(folder) / "vocab.json").write_text(json.dumps(bpe["vocab"], ensure_ascii=False), encoding="utf-8")
    (Path(folder) / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in bpe["merges"]), encoding="utf-8")


def count(module) -> int:
    """Parameters of a module."""
    return sum(p.numel() for p in module.parameters())
