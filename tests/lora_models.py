"""Small SDXL models with random weights and adapters, for tests of LoRA files."""

import torch
from diffusers import UNet2DConditionModel
from peft import LoraConfig
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
FEED_FORWARD = [*ATTENTION, "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out"]
TEXT = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]
FULL_SDXL = {
    "sample_size": 128,
    "block_out_channels": (320, 640, 1280),
    "layers_per_block": 2,
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
SMALL = {
    "sample_size": 8,
    "block_out_channels": (8, 16, 16),
    "layers_per_block": 1,
    "transformer_layers_per_block": (1, 1, 2),
    "attention_head_dim": 4,
    "cross_attention_dim": 24,
    "norm_num_groups": 4,
    "addition_time_embed_dim": 4,
    "projection_class_embeddings_input_dim": 6 * 4 + 16,
}


def unet(**shape):
    """An SDXL UNet of these shapes, random weights, the same each time."""
    torch.manual_seed(0)
    return UNet2DConditionModel(
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        use_linear_projection=True,
        addition_embed_type="text_time",
        **(shape or SMALL),
    ).requires_grad_(False)


def text_encoders(layers=(2, 3), width=(8, 16), heads=2):
    """CLIPTextModel and CLIPTextModelWithProjection, random weights."""
    torch.manual_seed(1)
    models = []
    for n, cls in enumerate((CLIPTextModel, CLIPTextModelWithProjection)):
        config = CLIPTextConfig(
            hidden_size=width[n], intermediate_size=2 * width[n], num_hidden_layers=layers[n], num_attention_heads=heads,
            vocab_size=50, projection_dim=width[n], bos_token_id=0, eos_token_id=1,
        )  # fmt: skip
        models.append(cls(config).requires_grad_(False))
    return tuple(models)


def adapt(model, targets, rank=4, alpha=6, seed=0, **settings):
    """Add an adapter whose change is not zero, as after training."""
    model.add_adapter(LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets, **settings))
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.05
    return model
