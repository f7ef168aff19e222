"""What one LoRA module is called: by diffusers, in SGM (the original SDXL code), and in kohya files.

A *path* is the classic diffusers/transformers module path, as in `down_blocks.1.attentions.0.proj_in` or
`text_model.encoder.layers.3.mlp.fc1`. Block numbers come from the UNet's own structure, never from a table,
so a UNet of any depth has its names. Duck-typed: nothing here imports diffusers.
"""

PARTS = ("unet", "text_encoder", "text_encoder_2")
KOHYA_PREFIX = {"unet": "lora_unet_", "text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_"}

_OUTSIDE_BLOCKS = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_INSIDE_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}


def sgm_blocks(unet) -> dict[str, str]:
    """Diffusers path of every resnet, attention and resampler of `unet` -> its SGM path.

    SGM counts a UNet flat: `input_blocks` (conv_in first), `middle_block`, `output_blocks`, each entry being a
    resnet `.0`, then its attention `.1`; a downsampler is an entry of its own, an upsampler the last of its entry.
    """
    names = {}
    entry = 1  # input_blocks.0 is conv_in
    for i, block in enumerate(unet.down_blocks):
        for j in range(len(block.resnets)):
            names[f"down_blocks.{i}.resnets.{j}"] = f"input_blocks.{entry}.0"
            if _children(block, "attentions"):
                names[f"down_blocks.{i}.attentions.{j}"] = f"input_blocks.{entry}.1"
            entry += 1
        if _children(block, "downsamplers"):
            names[f"down_blocks.{i}.downsamplers.0"] = f"input_blocks.{entry}.0"
            entry += 1

    if unet.mid_block is not None:
        names["mid_block.resnets.0"] = "middle_block.0"
        names["mid_block.attentions.0"] = "middle_block.1"
        names["mid_block.resnets.1"] = "middle_block.2"

    entry = 0
    for i, block in enumerate(unet.up_blocks):
        attends = bool(_children(block, "attentions"))
        for j in range(len(block.resnets)):
            names[f"up_blocks.{i}.resnets.{j}"] = f"output_blocks.{entry}.0"
            if attends:
                names[f"up_blocks.{i}.attentions.{j}"] = f"output_blocks.{entry}.1"
            entry += 1
        if _children(block, "upsamplers"):
            names[f"up_blocks.{i}.upsamplers.0"] = f"output_blocks.{entry - 1}.{2 if attends else 1}"
    return names


def _children(block, name) -> list:
    return list(getattr(block, name, None) or [])


def sgm_path(path: str, blocks: dict[str, str]) -> str:
    """The SGM path of a UNet module; `blocks` is `sgm_blocks(unet)`. Raises KeyError for a module SGM has not."""
    if path in _OUTSIDE_BLOCKS:
        return _OUTSIDE_BLOCKS[path]
    parts = path.split(".")
    depth = 3 if parts[0] == "mid_block" else 4
    block, inside = ".".join(parts[:depth]), ".".join(parts[depth:])
    if ".resnets." in block:
        inside = _INSIDE_RESNET[inside]
    elif ".downsamplers." in block:
        inside = {"conv": "op"}[inside]
    return f"{blocks[block]}.{inside}"


def classic_path(part: str, path: str) -> str:
    """Undo what library versions add or drop: PEFT's `base_layer`, transformers 5's missing `text_model.`."""
    path = path.removesuffix(".base_layer")
    flattened = part != "unet" and path.startswith(("encoder.", "embeddings.", "final_layer_norm"))
    return f"text_model.{path}" if flattened else path


def kohya_name(part: str, path: str, blocks: dict[str, str]) -> str:
    """The name of a module in a kohya file, before `.lora_down.weight` and the like."""
    inner = sgm_path(path, blocks) if part == "unet" else path
    return KOHYA_PREFIX[part] + inner.replace(".", "_")


def module_names(part: str, model) -> dict[str, str]:
    """Kohya name -> classic path, for every module of `model` that has a weight. Used to read kohya files back.

    Both spellings in circulation are there for the UNet: SGM blocks, and diffusers blocks with underscores.
    """
    blocks = sgm_blocks(model) if part == "unet" else {}
    names = {}
    for live_path, module in model.named_modules():
        path = classic_path(part, live_path)
        if getattr(module, "weight", None) is None or ".lora_" in path:
            continue
        names[KOHYA_PREFIX[part] + path.replace(".", "_")] = path
        try:
            names[kohya_name(part, path, blocks)] = path
        except KeyError:
            continue  # a module SGM has not: only its diffusers spelling exists
    return names
