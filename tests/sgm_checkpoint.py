"""A diffusers folder written as one checkpoint file in the original (SGM) layout, as hubs and UIs pass them round."""

import re

import torch
from safetensors.torch import save_file

from lora_nb import models

UNET = {"conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2", "time_embedding.linear_1": "time_embed.0",
        "time_embedding.linear_2": "time_embed.2", "add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2"}  # fmt: skip
RESNET = {"norm1": "in_layers.0", "conv1": "in_layers.2", "norm2": "out_layers.0", "conv2": "out_layers.3", "time_emb_proj": "emb_layers.1", "conv_shortcut": "skip_connection"}
VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
OPENCLIP = {"layer_norm1": "ln_1", "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj", "self_attn.out_proj": "attn.out_proj"}


def write(base: str, path, dtype=torch.float32):
    """Every part of `base` in one file at `path`."""
    tensors = {}
    unet = models.load_part(base, "unet", dtype)
    layers = unet.config.layers_per_block
    with_attention = {n for n, block in enumerate(unet.up_blocks) if getattr(block, "attentions", None)}
    for name, value in unet.state_dict().items():
        tensors[f"model.diffusion_model.{unet_name(name, layers, with_attention)}"] = value
    vae = models.load_part(base, "vae", dtype)
    for name, value in vae.state_dict().items():
        renamed = vae_name(name, len(vae.config.block_out_channels))
        attention = re.search(r"attn_1\.(q|k|v|proj_out)\.weight", renamed)
        tensors[f"first_stage_model.{renamed}"] = value[:, :, None, None] if attention else value
    for name, value in models.load_part(base, "text_encoder", dtype).state_dict().items():
        tensors[f"conditioner.embedders.0.transformer.text_model.{name.removeprefix('text_model.')}"] = value
    tensors |= openclip(models.load_part(base, "text_encoder_2", dtype).state_dict())
    save_file({name: value.contiguous() for name, value in tensors.items()}, path)
    return path


def unet_name(name, layers, with_attention):
    stem, _, end = name.rpartition(".")
    if stem in UNET:
        return f"{UNET[stem]}.{end}"
    if found := re.match(r"(down|up)_blocks\.(\d+)\.(resnets|attentions)\.(\d+)\.(.+)", name):
        side, block, kind, layer, rest = found.groups()
        index = int(block) * (layers + 1) + int(layer) + (side == "down")
        prefix = f"{'input' if side == 'down' else 'output'}_blocks.{index}.{int(kind == 'attentions')}"
        return f"{prefix}.{resnet(rest) if kind == 'resnets' else rest}"
    if found := re.match(r"mid_block\.(resnets|attentions)\.(\d)\.(.+)", name):
        kind, layer, rest = found.groups()
        return f"middle_block.{1 if kind == 'attentions' else 2 * int(layer)}.{resnet(rest) if kind == 'resnets' else rest}"
    side, block, rest = re.match(r"(down|up)_blocks\.(\d+)\.\w+samplers\.0\.conv\.(.+)", name).groups()
    if side == "down":
        return f"input_blocks.{(int(block) + 1) * (layers + 1)}.0.op.{rest}"
    return f"output_blocks.{int(block) * (layers + 1) + layers}.{2 if int(block) in with_attention else 1}.conv.{rest}"


def resnet(rest):
    stem, _, end = rest.rpartition(".")
    return f"{RESNET[stem]}.{end}"


def vae_name(name, blocks):
    name = name.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
    name = re.sub(r"mid_block\.resnets\.(\d)", lambda found: f"mid.block_{int(found[1]) + 1}", name)
    if "mid_block.attentions.0." in name:
        for new, old in VAE_ATTENTION.items():
            name = name.replace(f"attentions.0.{new}.", f"attentions.0.{old}.")
        return name.replace("mid_block.attentions.0", "mid.attn_1")
    name = re.sub(r"down_blocks\.(\d)", r"down.\1", name)
    name = re.sub(r"up_blocks\.(\d)", lambda found: f"up.{blocks - 1 - int(found[1])}", name)
    return name.replace(".resnets.", ".block.").replace("downsamplers.0", "downsample").replace("upsamplers.0", "upsample")


def openclip(state):
    """OpenCLIP's names: q, k and v in one matrix, the projection transposed."""
    tensors = {}
    top = {"text_model.embeddings.position_embedding.weight": "positional_embedding", "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
           "text_model.final_layer_norm.weight": "ln_final.weight", "text_model.final_layer_norm.bias": "ln_final.bias"}  # fmt: skip
    for name, value in state.items():
        if name == "text_projection.weight":
            tensors["text_projection"] = value.T
        elif name in top:
            tensors[top[name]] = value
        elif found := re.match(r"text_model\.encoder\.layers\.(\d+)\.(.+)\.(weight|bias)", name):
            layer, middle, end = found.groups()
            prefix = f"transformer.resblocks.{layer}."
            if middle in OPENCLIP:
                tensors[f"{prefix}{OPENCLIP[middle]}.{end}"] = value
            elif middle == "self_attn.q_proj":
                three = [state[name.replace("q_proj", other)] for other in ("q_proj", "k_proj", "v_proj")]
                tensors[f"{prefix}attn.in_proj_{end}"] = torch.cat(three)
    return {f"conditioner.embedders.1.model.{name}": value for name, value in tensors.items()}
