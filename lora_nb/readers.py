"""Which modules other programs find in a LoRA file, by the rules in their public code, none of which is imported.

Read in kohya's sd-scripts (networks/lora.py), ComfyUI (comfy/lora.py, comfy/utils.py) and A1111/Forge
(extensions-builtin/Lora/networks.py). The programs count SGM blocks from a model's configuration; so does this,
and never from the module tree that `lora_names` walks, so that one checks the other.
"""

import re

_ATTENTION = [f"attn{n}.{to}" for n in (1, 2) for to in ("to_q", "to_k", "to_v", "to_out.0")]
_TRANSFORMER = [*_ATTENTION, "ff.net.0.proj", "ff.net.2"]
_TEXT_LAYER = [*(f"self_attn.{p}" for p in ("q_proj", "k_proj", "v_proj", "out_proj")), "mlp.fc1", "mlp.fc2"]
_RESNET = {"in_layers.2": "conv1", "emb_layers.1": "time_emb_proj", "out_layers.3": "conv2", "skip_connection": "conv_shortcut"}
_OUTER = {
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "label_emb.0.0": "add_embedding.linear_1",
    "label_emb.0.2": "add_embedding.linear_2",
    "input_blocks.0.0": "conv_in",
    "out.2": "conv_out",
}


def programs(unet_config, text_layers: tuple[int, int] = (0, 0)) -> dict[str, set[str]]:
    """Program -> names of modules it reads in a file for this model, as spelled before `.lora_down.weight`.

    unet_config: mapping like `unet.config`; text_layers: layers of text encoder 1 and 2.
    """
    sgm = sgm_to_diffusers(unet_config)
    kohya_unet = {_kohya(path) for path in sgm if _kohya_adapts(sgm[path])}
    every_unet = {_kohya(path) for path in sgm}
    text = {f"lora_te{n}_" + name for n in (1, 2) for name in _text_names(text_layers[n - 1])}
    text_in_comfyui = {f"lora_te{n}_" + name for n in (1, 2) for name in _text_names(min(text_layers[n - 1], 32))}
    underscored = {_kohya(path) for path in sgm.values()}
    old_diffusers = {f"unet.{_old_processor(path)}" for path in sgm.values()}
    return {
        "kohya": kohya_unet | text,
        "ComfyUI": every_unet | underscored | old_diffusers | text_in_comfyui,
        # A1111 counts three entries a level, which is so for SDXL and SD 1.5
        "A1111/Forge": every_unet | text | (underscored if unet_config["layers_per_block"] == 2 else set()),
    }


_SGM = r"lora_unet_(input_blocks_\d+_|middle_block_|output_blocks_\d+_)\d"
_TEXT = r"lora_te[12]_text_model_encoder_layers_\d+_(self_attn_(q|k|v|out)_proj|mlp_fc[12])$"
_UNDERSCORED = r"lora_unet_(down_blocks|mid_block|up_blocks)_"
_OLD_UNET = r"(unet\.)?(down_blocks|mid_block|up_blocks)\.(?!.*attn\d\.to_)"  # attention as `processor.to_q` only
_OLD_TEXT = r"text_encoder(_2)?\.text_model\.encoder\.layers\.\d+\.(self_attn\.(q|k|v|out)_proj|mlp\.fc[12])$"
_TODAY = r"(unet|text_encoder|text_encoder_2)\.|(down_blocks|mid_block|up_blocks)\."
_SPELLINGS = {
    "kohya": (_SGM, _TEXT),
    "ComfyUI": (_SGM, _TEXT, _UNDERSCORED, _OLD_UNET, _OLD_TEXT, r"diffusion_model\."),
    "A1111/Forge": (_SGM, _TEXT, _UNDERSCORED),
    "diffusers": (_SGM, _TEXT, _UNDERSCORED, _TODAY),
    "PEFT": (r"base_model\.model\.",),
}


def spelled_for(name: str) -> set[str]:
    """Programs that understand how this SDXL module is spelled, whatever the depth of the model."""
    return {program for program, spellings in _SPELLINGS.items() if any(re.match(s, name) for s in spellings)}


def sgm_to_diffusers(config) -> dict[str, str]:
    """SGM path -> diffusers path of every convolution and linear layer, counted as the original UNet is built."""
    per_level = config["layers_per_block"]
    down, up = config["down_block_types"], config["up_block_types"]
    levels = len(config["block_out_channels"])
    depth = config["transformer_layers_per_block"]
    depth = [depth] * levels if isinstance(depth, int) else list(depth)
    depth_up = config.get("reverse_transformer_layers_per_block") or depth[::-1]

    names = dict(_OUTER)
    for level in range(levels):
        for layer in range(per_level):
            entry = f"input_blocks.{1 + level * (per_level + 1) + layer}"
            names |= _resnet(f"{entry}.0", f"down_blocks.{level}.resnets.{layer}")
            if "CrossAttn" in down[level]:
                names |= _transformer(f"{entry}.1", f"down_blocks.{level}.attentions.{layer}", _of_layer(depth[level], layer))
        if level < levels - 1:
            names[f"input_blocks.{(level + 1) * (per_level + 1)}.0.op"] = f"down_blocks.{level}.downsamplers.0.conv"

    names |= _resnet("middle_block.0", "mid_block.resnets.0") | _resnet("middle_block.2", "mid_block.resnets.1")
    names |= _transformer("middle_block.1", "mid_block.attentions.0", _of_layer(depth[-1], 0))

    for level in range(levels):
        attends = "CrossAttn" in up[level]
        for layer in range(per_level + 1):
            entry = f"output_blocks.{level * (per_level + 1) + layer}"
            names |= _resnet(f"{entry}.0", f"up_blocks.{level}.resnets.{layer}")
            if attends:
                names |= _transformer(f"{entry}.1", f"up_blocks.{level}.attentions.{layer}", _of_layer(depth_up[level], layer))
        if level < levels - 1:
            names[f"{entry}.{1 + attends}.conv"] = f"up_blocks.{level}.upsamplers.0.conv"
    return names


def _of_layer(depth, layer: int) -> int:
    """Distilled SDXLs give a depth a layer where SDXL has one a level."""
    return depth if isinstance(depth, int) else depth[min(layer, len(depth) - 1)]


def _resnet(sgm: str, diffusers: str) -> dict[str, str]:
    return {f"{sgm}.{inner}": f"{diffusers}.{outer}" for inner, outer in _RESNET.items()}


def _transformer(sgm: str, diffusers: str, depth: int) -> dict[str, str]:
    inside = ["proj_in", "proj_out", *(f"transformer_blocks.{n}.{name}" for n in range(depth) for name in _TRANSFORMER)]
    return {f"{sgm}.{name}": f"{diffusers}.{name}" for name in inside}


def _kohya(path: str) -> str:
    return "lora_unet_" + path.replace(".", "_")


def _kohya_adapts(diffusers_path: str) -> bool:
    """kohya loads weights for transformers, resnets and resamplers, not for what lies outside the blocks."""
    return any(block in diffusers_path for block in (".attentions.", ".resnets.", "samplers."))


def _old_processor(path: str) -> str:
    """ComfyUI knows diffusers' attention only in its old spelling, so today's diffusers files are lost on it."""
    return path.replace(".to_", ".processor.to_").removesuffix(".0" if path.endswith("to_out.0") else "\0")


def _text_names(layers: int) -> list[str]:
    return [f"text_model_encoder_layers_{n}_{name.replace('.', '_')}" for n in range(layers) for name in _TEXT_LAYER]
