"""Train an SDXL character LoRA in four notebooks, or without a browser: `python -m lora_nb`."""

__version__ = "0.1.0"
