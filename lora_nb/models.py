"""The one door to diffusers, transformers and peft: load parts, add LoRA, encode prompts, generate.

Nothing here knows a configuration, and nothing assumes SDXL's sizes: they are read from the model's own configs.
"""

import json
import math
import warnings
from contextlib import contextmanager
from pathlib import Path

import diffusers
import torch
import transformers
from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from diffusers.loaders.single_file_utils import create_diffusers_clip_model_from_ldm, load_single_file_checkpoint
from diffusers.optimization import get_scheduler
from diffusers.training_utils import cast_training_params, compute_snr
from peft import LoraConfig, PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from PIL import Image
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from lora_nb.config import PRESETS, resolve_path
from lora_nb.errors import UserError
from lora_nb.events import Progress, ignore
from lora_nb.weights import locate, pipeline_settings

__all__ = ["PeftModel", "compute_snr", "get_scheduler"]  # others take these from here: one door

SDXL = PRESETS / "sdxl"  # configs and tokenizer for checkpoints that come as one file
PARTS = {
    "unet": UNet2DConditionModel,
    "vae": AutoencoderKL,
    "text_encoder": CLIPTextModel,
    "text_encoder_2": CLIPTextModelWithProjection,
}
ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
TARGETS = {
    "attention": ATTENTION,
    "attention+feed_forward": [*ATTENTION, "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out"],
}
TEXT_TARGETS = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}

transformers.utils.logging.disable_progress_bar()  # parts load in seconds, and on_event tells what matters


def default_device() -> str:
    """"cuda" where there is one, else "cpu"."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def load_part(base_model: str, part: str, dtype=torch.float32, device="cpu"):
    """One part of a base, frozen and in eval mode: unet, vae, text_encoder(_2), tokenizer(_2), scheduler, noise_scheduler.

    `base_model` is a hub id, a diffusers folder or one .safetensors checkpoint; a VAE may come from a folder or file of
    its own. Only this part is read, straight into `dtype`. "scheduler" is the base's sampler, "noise_scheduler" DDPM
    with its betas. Raises UserError if it is missing, gated or half downloaded.
    """
    if part in ("tokenizer", "tokenizer_2"):
        return _load_tokenizer(base_model, part)
    if part in ("scheduler", "noise_scheduler"):
        config = json.loads((_configs(base_model, "scheduler") / "scheduler_config.json").read_text())
        scheduler = DDPMScheduler if part == "noise_scheduler" else getattr(diffusers, config["_class_name"])
        return scheduler.from_config({key: value for key, value in config.items() if not key.startswith("_")})
    place = locate(base_model, part, half=dtype != torch.float32)
    try:
        model = _load_file(place, part, dtype) if place.is_file() else _load_folder(place, part, dtype)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        if "meta tensor" in reason:  # how diffusers says it of a single file
            reason = "some of its weights are missing"
        raise UserError(f"The {part} of {base_model} cannot be loaded from {place}: {reason}") from error
    return model.requires_grad_(False).eval().to(device)


def load_vae(base_model: str, vae_model: str | None = None, dtype=torch.float32, device="cpu"):
    """The base's VAE, or the one that replaces it."""
    return load_part(vae_model or base_model, "vae", dtype, device)


def vae_config(base_model: str, vae_model: str | None = None) -> dict:
    """The VAE's configuration, without its weights."""
    model = vae_model or base_model
    folder = SDXL / "vae" if resolve_path(model).is_file() else locate(model, "vae", half=False)
    return json.loads((folder / "config.json").read_text())


def empty_part(base_model: str, part: str):
    """A UNet, VAE or text encoder of the base's class and shapes on the meta device; its weights are not read."""
    settings = json.loads((_configs(base_model, part) / "config.json").read_text())
    with torch.device("meta"):
        if part in ("unet", "vae"):
            return PARTS[part].from_config(settings)
        return PARTS[part](PARTS[part].config_class.from_dict(settings))


def load_text_encoders(base_model: str, dtype=torch.float32, device="cpu") -> tuple[list, list]:
    """Both tokenizers and both text encoders, in SDXL's order."""
    tokenizers = [load_part(base_model, part) for part in ("tokenizer", "tokenizer_2")]
    return tokenizers, [load_part(base_model, part, dtype, device) for part in ("text_encoder", "text_encoder_2")]


def zeros_for_empty_prompt(base_model: str) -> bool:
    """Whether this base expects zeros, not the encoded "", where there is no caption (SDXL does)."""
    settings = pipeline_settings(str(SDXL) if resolve_path(base_model).is_file() else base_model)
    return settings.get("force_zeros_for_empty_prompt", True)


def encode_prompts(tokenizers, text_encoders, prompts: list[str]):
    """What the UNet is told, as StableDiffusionXLPipeline.encode_prompt computes it.

    Returns prompt_embeds [B, 77, D1 + D2], the last but one hidden states of both encoders side by side, and
    pooled_prompt_embeds [B, P] of the second. Words after 75 tokens are cut (see `truncated`).
    """
    hidden = []
    for tokenizer, text_encoder in zip(tokenizers, text_encoders, strict=True):
        tokens = tokenizer(
            prompts, padding="max_length", max_length=tokenizer.model_max_length, truncation=True, return_tensors="pt"
        )
        output = text_encoder(tokens.input_ids.to(text_encoder.device), output_hidden_states=True)
        hidden.append(output.hidden_states[-2])
    return torch.cat(hidden, dim=-1), output[0]


def truncated(tokenizer, prompt: str) -> str:
    """The end of `prompt` that the text encoder would never see, "" if it sees all."""
    ids = tokenizer(prompt, truncation=False).input_ids
    return tokenizer.decode(ids[tokenizer.model_max_length - 1 : -1]).strip()


def time_ids(original_size, crop_top_left, target_size) -> list[int]:
    """SDXL's micro-conditioning [6]: three (height, width) or (top, left) pairs, in pixels."""
    return [int(value) for pair in (original_size, crop_top_left, target_size) for value in pair]


def add_lora(model, rank: int, alpha: float, targets, dropout: float = 0.0, rslora: bool = False, seed: int = 0) -> list:
    """Freeze `model`, add the PEFT adapter "default" and return its trainable fp32 parameters.

    `targets` is a list of module names or a named set (see TARGETS). Down matrices are drawn on the CPU from `seed`,
    the same on every device; up matrices are zero, so that the model is unchanged at first.
    """
    targets = TARGETS.get(targets, targets) if isinstance(targets, str) else list(targets)
    if unknown := [target for target in targets if not any(f".{name}".endswith(f".{target}") for name, _ in model.named_modules())]:
        raise UserError(f"lora_target_modules {', '.join(unknown)} match nothing in {type(model).__name__}: take attention, attention+feed_forward, or names such as to_q.")  # fmt: skip
    alpha = int(alpha) if float(alpha).is_integer() else alpha
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets, lora_dropout=dropout, use_rslora=rslora)
    model.requires_grad_(False)
    try:
        model.add_adapter(config)
    except ValueError as error:
        raise UserError(f"lora_target_modules {targets} match nothing that can be trained in {type(model).__name__}: {error}") from None  # fmt: skip
    cast_training_params(model, torch.float32)
    generator = torch.Generator().manual_seed(seed)
    trainable = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    for name, parameter in trainable:
        if "lora_A" in name and not parameter.is_meta:
            bound = 1 / math.sqrt(parameter[0].numel())  # kaiming_uniform_ with a = sqrt(5), PEFT's default
            drawn = torch.empty(parameter.shape).uniform_(-bound, bound, generator=generator)
            parameter.data.copy_(drawn)
    return [parameter for _, parameter in trainable]


@contextmanager
def without_lora(model):
    """The base alone for a while: the adapter stays, and is passed by."""
    model.disable_adapters()
    try:
        yield model
    finally:
        model.enable_adapters()


def lora_state_dict(model) -> dict[str, torch.Tensor]:
    """The adapter's matrices by PEFT's names, `MODULE.lora_A.weight`, on the CPU."""
    return {name: value.detach().cpu().contiguous() for name, value in get_peft_model_state_dict(model).items()}


def load_lora_state_dict(model, state: dict[str, torch.Tensor]) -> None:
    """Put matrices by PEFT's names into the adapter that `add_lora` made. Raises UserError if they do not fit."""
    present = lora_state_dict(model)
    if {name: value.shape for name, value in present.items()} != {name: value.shape for name, value in state.items()}:
        raise UserError("The LoRA on disk has other modules or another rank than the settings ask for: take a new run_name.")
    set_peft_model_state_dict(model, state)


def load_pipeline(base_model: str, dtype=torch.float32, device="cpu", vae_model: str | None = None, scheduler: str | None = None):
    """The whole base as a StableDiffusionXLPipeline, quiet, for pictures. The VAE is fp32: in fp16 it overflows."""
    parts = {part: load_part(base_model, part, dtype, device) for part in ("unet", "text_encoder", "text_encoder_2")}
    return assemble(base_model, vae=load_vae(base_model, vae_model, torch.float32, device), scheduler=scheduler, **parts)


def assemble(base_model: str, unet, vae, text_encoder=None, text_encoder_2=None, scheduler: str | None = None):
    """A pipeline around parts that are already loaded; without text encoders it draws from embeddings.

    `scheduler` names a diffusers class; None or DDPMScheduler takes the base's own sampler.
    """
    sampler = load_part(base_model, "scheduler")
    if scheduler not in (None, "DDPMScheduler"):
        sampler = getattr(diffusers, scheduler).from_config(sampler.config)
    tokenizers = {}
    if text_encoder is not None:
        tokenizers = {part: load_part(base_model, part) for part in ("tokenizer", "tokenizer_2")}
    pipeline = StableDiffusionXLPipeline(
        unet=unet, vae=vae, scheduler=sampler, text_encoder=text_encoder, text_encoder_2=text_encoder_2,
        tokenizer=tokenizers.get("tokenizer"), tokenizer_2=tokenizers.get("tokenizer_2"),
        force_zeros_for_empty_prompt=zeros_for_empty_prompt(base_model), add_watermarker=False,
    )  # fmt: skip
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def generate(
    pipeline, prompts, seeds, height, width, steps=25, guidance_scale=5.0, negative_prompt="", on_event=ignore,
    embeddings=None, negative_embeddings=None, batch_size=1,
) -> list:  # fmt: skip
    """One PIL picture a prompt and seed, prompt by prompt; see `generate_pairs`.

    `embeddings`, one (prompt_embeds [1, 77, D], pooled_prompt_embeds [1, P]) a prompt, and `negative_embeddings`, one
    pair, replace the text encoders.
    """
    pairs = [(prompt, seed) for prompt in prompts for seed in seeds]
    a_pair = [pair for pair in embeddings for _ in seeds] if embeddings is not None else None
    return generate_pairs(
        pipeline, pairs, height, width, steps, guidance_scale, negative_prompt, on_event, a_pair, negative_embeddings, batch_size
    )


@torch.no_grad()
def generate_pairs(
    pipeline, pairs, height, width, steps=25, guidance_scale=5.0, negative_prompt="", on_event=ignore,
    embeddings=None, negative_embeddings=None, batch_size=1,
) -> list:  # fmt: skip
    """One PIL picture a (prompt, seed). Each begins at noise of a CPU generator with its own seed, so that it does not
    depend (but for rounding) on what is drawn beside it, `batch_size` at once.

    An empty negative prompt means what it means to the base (zeros for SDXL).
    """
    pictures = []
    for start in range(0, len(pairs), batch_size):
        batch = pairs[start : start + batch_size]
        if embeddings is None:
            conditioning = {"prompt": [prompt for prompt, _ in batch]}
            conditioning["negative_prompt"] = [negative_prompt] * len(batch) if negative_prompt else None
        else:
            conditioning = _conditioning(pipeline, embeddings[start : start + batch_size], negative_embeddings)
        latents = pipeline(
            **conditioning, generator=[torch.Generator().manual_seed(seed) for _, seed in batch], height=height, width=width,
            num_inference_steps=steps, guidance_scale=guidance_scale, output_type="latent",
        ).images  # fmt: skip
        pictures += decode_latents(pipeline.vae, latents)
        on_event(Progress("pictures", len(pictures), len(pairs), batch[-1][0]))
    return pictures


def _conditioning(pipeline, embeddings, negative) -> dict[str, torch.Tensor]:
    """The pipeline's arguments for pairs of embeddings, one a picture, in the UNet's type."""
    negatives = [negative or tuple(map(torch.zeros_like, pair)) for pair in embeddings]
    names = ("prompt_embeds", "pooled_prompt_embeds", "negative_prompt_embeds", "negative_pooled_prompt_embeds")
    values = (*zip(*embeddings, strict=True), *zip(*negatives, strict=True))
    base = pipeline.unet.conv_in.weight  # where and what the frozen base is; LoRA weights may be of another type
    return {name: torch.cat(value).to(base) for name, value in zip(names, values, strict=True)}


@torch.no_grad()
def decode_latents(vae, latents) -> list:
    """PIL pictures of scaled latents [B, C, h, w], in the VAE's own dtype: under autocast to fp16 it would overflow."""
    config = vae.config
    if config.latents_mean is not None:
        mean, std = (torch.tensor(values, device=latents.device).view(1, -1, 1, 1) for values in (config.latents_mean, config.latents_std))  # fmt: skip
        latents = latents * std / config.scaling_factor + mean
    else:
        latents = latents / config.scaling_factor + (config.shift_factor or 0.0)
    with torch.autocast(vae.device.type, enabled=False):
        device = latents.device if hasattr(vae, "_hf_hook") else vae.device  # under offloading it comes to the latents
        images = torch.cat([vae.decode(one[None].to(device, vae.dtype)).sample for one in latents])
    pixels = (images.float() / 2 + 0.5).clamp(0, 1).mul(255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(picture) for picture in pixels]


def load_lora(pipeline, path, strength: float = 1.0) -> None:
    """Put the LoRA at `path` (a .safetensors file, or a folder with one) into `pipeline` in place of any other."""
    path = Path(path)
    file = path if path.is_file() else next(iter(sorted(path.glob("*lora*.safetensors"))), None)
    if file is None:
        raise UserError(f"There is no LoRA at {path}: give a .safetensors file or a folder that holds one.")
    unload_lora(pipeline)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            pipeline.load_lora_weights(str(file.parent), weight_name=file.name, adapter_name="lora", use_safetensors=True)
    except (ValueError, KeyError, OSError, RuntimeError) as error:
        raise UserError(f"{file} is not a LoRA that this base can load: {str(error).strip().splitlines()[0]}") from error
    pipeline.set_adapters(["lora"], [strength])


def unload_lora(pipeline) -> None:
    """Take the LoRA out again; the base is as it was."""
    if pipeline.get_list_adapters():
        pipeline.unload_lora_weights()


def _configs(base_model: str, part: str) -> Path:
    """The folder with the JSON of a part that has no weights; the bundled SDXL one for a single file."""
    return SDXL / part if resolve_path(base_model).is_file() else locate(base_model, part)


def _load_tokenizer(base_model: str, part: str):
    if resolve_path(base_model).is_file():  # both of SDXL's tokenizers have the same words, and differ in the padding
        return CLIPTokenizer.from_pretrained(SDXL / "tokenizer", **({"pad_token": "!"} if part == "tokenizer_2" else {}))
    return CLIPTokenizer.from_pretrained(locate(base_model, part))


def _load_folder(folder: Path, part: str, dtype):
    fp16_only = not any(".fp16" not in file.name for file in folder.glob("*.safetensors"))
    options = {"use_safetensors": True, "local_files_only": True, "variant": "fp16" if fp16_only else None}
    options["dtype" if part.startswith("text") else "torch_dtype"] = dtype
    model, found = PARTS[part].from_pretrained(folder, output_loading_info=True, **options)
    if lacking := sorted(found["missing_keys"]):  # transformers would draw them at random and warn
        raise ValueError(f"{len(lacking)} of its weights are missing, {lacking[0]} first")
    return model


def _load_file(file: Path, part: str, dtype):
    """From one checkpoint file in the original (SGM) layout."""
    options = {"subfolder": part, "torch_dtype": dtype, "local_files_only": True}
    if part in ("unet", "vae"):
        return PARTS[part].from_single_file(str(file), config=str(SDXL), **options)
    checkpoint = load_single_file_checkpoint(str(file), local_files_only=True)
    model = create_diffusers_clip_model_from_ldm(PARTS[part], checkpoint=checkpoint, config=str(SDXL), **options)
    if lacking := [name for name, parameter in model.named_parameters() if parameter.is_meta]:
        raise ValueError(f"{len(lacking)} of its weights are missing, {lacking[0]} first")
    return model


def load_clip(name: str, device="cpu"):
    """A CLIP scorer (model, tokenizer, image processor) from a folder or hub id."""
    image_processor = getattr(transformers, "CLIPImageProcessorPil", transformers.CLIPImageProcessor)
    place = str(resolve_path(name)) if resolve_path(name).is_dir() else name
    try:
        model = transformers.CLIPModel.from_pretrained(place, dtype=torch.float32, use_safetensors=True).eval().to(device)
        return model, CLIPTokenizer.from_pretrained(place), image_processor.from_pretrained(place)
    except OSError as error:
        raise UserError(f"The CLIP scorer {name} cannot be loaded: {str(error).strip().splitlines()[0]}") from None


def load_dino(name: str, device="cpu"):
    """A DINOv2 scorer (model, image processor) from a folder or hub id."""
    place = str(resolve_path(name)) if resolve_path(name).is_dir() else name
    try:
        model = transformers.Dinov2Model.from_pretrained(place, dtype=torch.float32, use_safetensors=True).eval().to(device)
        processor = getattr(transformers, "BitImageProcessorPil", transformers.BitImageProcessor)
        return model, processor.from_pretrained(place)
    except OSError as error:
        raise UserError(f"The DINO scorer {name} cannot be loaded: {str(error).strip().splitlines()[0]}") from None
