"""Make data/tiny_sdxl and data/tiny_clip from nothing: `python tools/train_tiny_sdxl.py`.

Four stages, each seeded and resumable (run the same command again): the VAE on a wide drawn world, its latents, the CLIP
used by the evaluation, and the UNet with both text encoders. About 85 minutes on two CPU cores, minutes on a GPU.
`tools/check_tiny_sdxl.py` then says what the result can do.
"""

import argparse
import math
import random
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDPMScheduler
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent))
from drawn_world import caption, disturb, draw, made_up_name, random_character, random_scene, setting_caption  # noqa: E402
from muon import Muon  # noqa: E402
from tiny_sdxl_parts import (  # noqa: E402
    RATIOS,
    build_clip,
    build_image_processor,
    build_scheduler,
    build_text_encoders,
    build_tokenizer,
    build_unet,
    build_vae,
    count,
    save_pipeline,
)

ROOT = Path(__file__).resolve().parent.parent
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def main():
    options = parse_options()
    options.work.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(options.seed)
    stages = {"vae": train_vae, "latents": encode_scenes, "unet": train_unet, "clip": train_clip, "save": save}
    for name in options.stages or stages:
        print(f"== {name}", flush=True)
        stages[name](options)


def parse_options():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", nargs="*", choices=("vae", "latents", "unet", "clip", "save"), help="only these, in this order")
    parser.add_argument("--work", type=Path, default=ROOT / "outputs" / "tiny_sdxl_recipe", help="where checkpoints lie")
    parser.add_argument("--out", type=Path, default=ROOT / "data", help="where tiny_sdxl and tiny_clip are written")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--vae-steps", type=int, default=8000)
    parser.add_argument("--unet-steps", type=int, default=4500)
    parser.add_argument("--clip-steps", type=int, default=1500)
    parser.add_argument("--scenes", type=int, default=20000, help="base scenes for the UNet")
    parser.add_argument("--processes", type=int, default=2, help="for drawing")
    return parser.parse_args()


# ---- the drawn pictures


def wide_picture(seed: int) -> np.ndarray:
    """One picture of the VAE's world, 144 px so that it can be shifted: base scenes, any shapes in any colours, disturbed ones.

    As SDXL's own VAE it has seen more than its UNet: every shape of this world, but no character's choice of them.
    """
    rng = random.Random(seed)
    scene = random_scene(rng) if rng.random() < 0.4 else random_character(rng)
    image = draw(scene, 144, 144, supersample=2)
    if rng.random() < 0.6:
        image = disturb(draw(scene, 288, 288, supersample=1), rng).resize((144, 144), 4)
    return np.asarray(image)


def base_picture(seed: int):
    """A base scene as (picture uint8 [H, W, 3], caption, time ids [6]) with SDXL's micro-conditioning made true."""
    rng = random.Random(seed)
    scene = random_scene(rng)
    width, height = RATIOS[seed % len(RATIOS)]
    words, kind = base_caption(scene, rng), rng.random()
    original, crop = (height, width), (0, 0)
    if kind < 0.12:  # a small original, enlarged: blurred
        factor = rng.uniform(0.4, 0.8)
        original = (round(height * factor), round(width * factor))
        image = draw(scene, original[1], original[0]).resize((width, height), 3)
    elif kind < 0.3:  # cut out of a larger picture
        wide, high = round(width * rng.uniform(1.0, 1.3)), round(height * rng.uniform(1.0, 1.3))
        crop = (rng.randrange(high - height + 1), rng.randrange(wide - width + 1))
        image = draw(scene, wide, high).crop((crop[1], crop[0], crop[1] + width, crop[0] + height))
        original = (high, wide)
    else:
        image = draw(scene, width, height)
    if kind >= 0.12:  # the original was larger than what is trained on: it looks the same
        factor = rng.choice((1.0, rng.uniform(1.0, 7.0)))
        original = (round(original[0] * factor), round(original[1] * factor))
    return np.asarray(image), words, (*original, *crop, height, width)


def base_caption(scene, rng):
    """Mostly what is seen; sometimes only the setting, and now and then a name that means nobody: these draw anybody."""
    kind = rng.random()
    if kind > 0.2:
        return caption(scene, rng)
    return setting_caption(f"a {scene.person}" if kind > 0.06 else made_up_name(rng), scene, rng)


def clip_picture(seed: int):
    """A picture and its caption for the CLIP: it knows every shape of the world, but no character by name."""
    rng = random.Random(seed)
    scene = random_scene(rng)
    if rng.random() < 0.4:
        scene = replace(random_character(rng), hat_colour=scene.hat_colour, robe_colour=scene.robe_colour, pattern_colour=scene.pattern_colour)
    width, height = RATIOS[seed % len(RATIOS)]
    return np.asarray(draw(scene, width, height)), caption(scene, rng)


def draw_all(function, seeds, processes, note):
    """`function` over `seeds` in processes, in order, with progress."""
    with ProcessPoolExecutor(processes) as pool:
        return list(tqdm(pool.map(function, seeds, chunksize=64), total=len(seeds), desc=note, mininterval=5))


def to_pixels(pictures) -> torch.Tensor:
    """uint8 [B, H, W, 3] -> float32 [B, 3, H, W] in [-1, 1]."""
    return torch.as_tensor(np.stack(pictures)).to(DEVICE).permute(0, 3, 1, 2).float() / 127.5 - 1


# ---- training, the same for all three


class Ema:
    """The running mean of parameters, with a warm-up so that early steps do not linger."""

    def __init__(self, modules, decay=0.999):
        self.modules, self.decay, self.step = modules, decay, 0
        self.shadow = [[p.detach().clone() for p in module.parameters()] for module in modules]

    @torch.no_grad()
    def update(self):
        self.step += 1
        keep = min(self.decay, self.step / (self.step + 10))
        for module, shadow in zip(self.modules, self.shadow, strict=True):
            torch._foreach_lerp_(shadow, list(module.parameters()), 1 - keep)

    def copy_to_modules(self):
        for module, shadow in zip(self.modules, self.shadow, strict=True):
            for parameter, mean in zip(module.parameters(), shadow, strict=True):
                parameter.data.copy_(mean)


def fit(name, modules, loss_at, steps, learning_rate, work, save_every=250):
    """Minimise loss_at(step) over `modules` with a cosine; resumes from work/<name>.pt; ends with the EMA weights.

    Muon turns the matrices and convolutions; tables of embeddings, biases and norms are left to AdamW.
    """
    parameters = [p for module in modules for p in module.parameters()]
    tables = {id(table.weight) for module in modules for table in module.modules() if isinstance(table, torch.nn.Embedding)}
    matrices = [p for p in parameters if p.ndim > 1 and id(p) not in tables]
    others = [p for p in parameters if p.ndim < 2 or id(p) in tables]
    optimizers = Muon(matrices, learning_rate), torch.optim.AdamW(others, lr=learning_rate, betas=(0.9, 0.98), weight_decay=0, fused=True)
    ema, first, path = Ema(modules), 0, work / f"{name}.pt"
    if path.exists():
        state = torch.load(path, weights_only=True, map_location=DEVICE)
        for module, weights in zip(modules, state["modules"], strict=True):
            module.load_state_dict(weights)
        for optimizer, old in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(old)
        ema.shadow, ema.step, first = state["shadow"], state["step"], state["step"]
    bar, mean, warmup = tqdm(range(first, steps), initial=first, total=steps, desc=name, mininterval=15), None, min(200, steps // 10)
    for step in bar:
        scale = min(1, (step + 1) / warmup) * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * step / steps)))
        for group in (group for optimizer in optimizers for group in optimizer.param_groups):
            group["lr"] = learning_rate * scale
        loss = loss_at(step)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        ema.update()
        mean = loss.item() if mean is None else 0.98 * mean + 0.02 * loss.item()
        bar.set_postfix(loss=f"{mean:.4f}", refresh=False)
        if (step + 1) % save_every == 0 or step + 1 == steps:
            state = {"modules": [m.state_dict() for m in modules], "optimizers": [o.state_dict() for o in optimizers], "shadow": ema.shadow, "step": step + 1}
            torch.save(state, path.with_suffix(".tmp"))
            path.with_suffix(".tmp").rename(path)
    ema.copy_to_modules()


def autocast():
    return torch.autocast(DEVICE, torch.bfloat16)


# ---- the stages


def train_vae(options):
    """Reconstruction on the wide world: L1, L1 of gradients, squared error and a little KL."""
    vae = build_vae().to(DEVICE)
    print(f"VAE: {count(vae) / 1e6:.2f} M parameters")
    pool = np.stack(draw_all(wide_picture, range(12000), options.processes, "drawing"))

    def loss_at(step):
        rng = np.random.default_rng((options.seed, step))
        x, y = rng.integers(0, 17, 2)
        batch = pool[rng.integers(0, len(pool), 8), y:y + 128, x:x + 128]
        pixels = to_pixels([picture[:, ::-1] if rng.random() < 0.5 else picture for picture in batch])
        with autocast():
            posterior = vae.encode(pixels).latent_dist
            output = vae.decode(posterior.sample()).sample
        error = output.float() - pixels
        edges = error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean()
        mean, logvar = posterior.mean.float(), posterior.logvar.float()
        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
        return error.abs().mean() + edges + 2 * error.square().mean() + 3e-4 * kl

    fit("vae", [vae], loss_at, options.vae_steps, 4e-3, options.work)
    vae.save_pretrained(options.work / "vae")


@torch.no_grad()
def encode_scenes(options):
    """Latents (mean and deviation), captions and time ids of the base scenes; the latents' deviation becomes scaling_factor."""
    vae = AutoencoderKL.from_pretrained(options.work / "vae").to(DEVICE).eval()
    seeds = range(1_000_000, 1_000_000 + options.scenes)
    scenes = draw_all(base_picture, seeds, options.processes, "drawing")
    latents, all_means = [None] * len(scenes), []
    for ratio in tqdm(range(len(RATIOS)), desc="encoding"):
        members = [i for i in range(len(scenes)) if seeds[i] % len(RATIOS) == ratio]
        for start in range(0, len(members), 32):
            part = members[start:start + 32]
            with autocast():
                posterior = vae.encode(to_pixels([scenes[i][0] for i in part])).latent_dist
            all_means.append(posterior.mean.float().flatten())
            for k, i in enumerate(part):
                latents[i] = torch.stack([posterior.mean[k], posterior.std[k]]).half().cpu()
    vae.register_to_config(scaling_factor=round(1 / torch.cat(all_means).std().item(), 5))
    vae.save_pretrained(options.work / "vae")
    print("scaling_factor", vae.config.scaling_factor)
    torch.save({"latents": latents, "captions": [s[1] for s in scenes], "time_ids": torch.tensor([s[2] for s in scenes])}, options.work / "scenes.pt")


def train_unet(options):
    """The UNet and both text encoders on the base scenes, with SDXL's conditioning and classifier-free dropout."""
    scenes = torch.load(options.work / "scenes.pt", weights_only=True)
    scale = AutoencoderKL.load_config(options.work / "vae")["scaling_factor"]
    tokenizer = world_tokenizer()
    unet, encoders = build_unet().to(DEVICE), [encoder.to(DEVICE) for encoder in build_text_encoders(tokenizer)]
    print(f"UNet: {count(unet) / 1e6:.2f} M, text encoders: {sum(map(count, encoders)) / 1e6:.2f} M parameters")
    tokens = tokenizer(scenes["captions"], padding="max_length", truncation=True, return_tensors="pt").input_ids.to(DEVICE)
    # the second tokenizer pads with "!", as SDXL's does
    pad_2 = tokenizer.convert_tokens_to_ids("!")
    ends = (tokens == tokenizer.eos_token_id).int().argmax(1, keepdim=True)
    tokens_2 = torch.where(torch.arange(77, device=DEVICE)[None] > ends, pad_2, tokens)
    empty = tokenizer("", padding="max_length", return_tensors="pt").input_ids.to(DEVICE)
    empty_2 = torch.where(torch.arange(77, device=DEVICE)[None] > 1, pad_2, empty)
    by_ratio = [[i for i in range(len(tokens)) if i % len(RATIOS) == r] for r in range(len(RATIOS))]
    stacks = [torch.stack([scenes["latents"][i] for i in members]).to(DEVICE) for members in by_ratio]
    noise_scheduler = DDPMScheduler.from_config(build_scheduler().config)

    snr = noise_scheduler.alphas_cumprod / (1 - noise_scheduler.alphas_cumprod)
    weights = (snr.clamp(max=5) / snr).to(DEVICE)  # min-SNR: nearly clean pictures do not drown the rest

    def loss_at(step, batch=32):
        rng = torch.Generator().manual_seed(options.seed * 10_000_019 + step)
        ratio = step % len(RATIOS)
        rows = torch.randint(len(by_ratio[ratio]), (batch,), generator=rng)
        index = torch.tensor(by_ratio[ratio])[rows]
        mean, std = stacks[ratio][rows].float().unbind(1)
        latents = (mean + std * torch.randn(mean.shape, generator=rng).to(DEVICE)) * scale
        noise = torch.randn(latents.shape, generator=rng).to(DEVICE)
        timesteps = ((torch.rand(1, generator=rng) + torch.arange(batch) / batch) % 1 * 1000).long().to(DEVICE)  # evenly spread
        drop = torch.rand(batch, 1, generator=rng).to(DEVICE)
        words = torch.where(drop < 0.05, empty, tokens[index])
        words_2 = torch.where(drop < 0.05, empty_2, tokens_2[index])
        with autocast():
            first = encoders[0](words, output_hidden_states=True)
            second = encoders[1](words_2, output_hidden_states=True)
            prompt_embeds = torch.cat([first.hidden_states[-2], second.hidden_states[-2]], -1)
            # half of the dropped captions are zeros: that is what the pipeline's negative prompt is
            zero = (drop > 0.95).float()
            prompt_embeds, pooled = prompt_embeds * (1 - zero[:, None]), second.text_embeds * (1 - zero)
            conditions = {"text_embeds": pooled, "time_ids": scenes["time_ids"][index].to(DEVICE).float()}
            output = unet(noise_scheduler.add_noise(latents, noise, timesteps), timesteps, prompt_embeds, added_cond_kwargs=conditions).sample
        return (weights[timesteps] * (output.float() - noise).square().mean((1, 2, 3))).mean()

    fit("unet", [unet, *encoders], loss_at, options.unet_steps, 4e-3, options.work)
    for name, part in (("unet", unet), ("text_encoder", encoders[0]), ("text_encoder_2", encoders[1])):
        torch.save(part.state_dict(), options.work / f"{name}_final.pt")


def train_clip(options):
    """Both towers contrastively on pictures of every shape of the world and their captions."""
    tokenizer, processor = world_tokenizer(), build_image_processor()
    clip = build_clip(tokenizer).to(DEVICE)
    print(f"CLIP: {count(clip) / 1e6:.2f} M parameters")
    pairs = draw_all(clip_picture, range(2_000_000, 2_015_000), options.processes, "drawing")
    tokens = tokenizer([words for _, words in pairs], padding="max_length", truncation=True, return_tensors="pt").input_ids.to(DEVICE)
    by_ratio = [[i for i in range(len(pairs)) if i % len(RATIOS) == r] for r in range(len(RATIOS))]
    pictures = [processor.preprocess([pairs[i][0] for i in members], return_tensors="pt").pixel_values.half() for members in by_ratio]

    def loss_at(step, batch=96):
        rng = torch.Generator().manual_seed(options.seed * 10_000_019 + step)
        ratio = step % len(RATIOS)
        rows = torch.randint(len(by_ratio[ratio]), (batch,), generator=rng)
        pixels = pictures[ratio][rows].float().to(DEVICE)
        pixels = pixels * (0.9 + 0.2 * torch.rand(batch, 1, 1, 1, generator=rng).to(DEVICE)) + 0.06 * torch.randn(pixels.shape, generator=rng).to(DEVICE)
        words = tokens[torch.tensor(by_ratio[ratio])[rows]]
        with autocast():
            output = clip(input_ids=words[:, :48] if (words[:, 48:] == tokenizer.pad_token_id).all() else words, pixel_values=pixels)
        logits, target = output.logits_per_image.float(), torch.arange(batch, device=DEVICE)
        return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2

    fit("clip", [clip], loss_at, options.clip_steps, 2e-3, options.work)
    folder = options.out / "tiny_clip"
    clip.half().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    processor.save_pretrained(folder)


def save(options):
    """The pipeline folder in fp16."""
    tokenizer = world_tokenizer()
    unet, encoders = build_unet(), build_text_encoders(tokenizer)
    for name, part in (("unet", unet), ("text_encoder", encoders[0]), ("text_encoder_2", encoders[1])):
        part.load_state_dict(torch.load(options.work / f"{name}_final.pt", weights_only=True, map_location="cpu"))
    vae = AutoencoderKL.from_pretrained(options.work / "vae")
    vae.register_to_config(_name_or_path="")  # no folder of this machine
    print("saved", save_pipeline(options.out / "tiny_sdxl", vae, encoders, tokenizer, unet))


def world_tokenizer():
    """The tokenizer of the world's words; a trigger such as aldar_kose_man falls into pieces, as in CLIP's own."""
    rng = random.Random(7)
    scenes = [random_scene(rng) for _ in range(4000)]
    extra = ["kalpak cone hat zigzags diamonds goatee forked beard he is " * 3]
    return build_tokenizer([caption(scene, rng) for scene in scenes] + extra * 20)


if __name__ == "__main__":
    started = time.time()
    main()
    print(f"done in {(time.time() - started) / 60:.1f} minutes")
