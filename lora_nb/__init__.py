"""Train an SDXL character LoRA in four notebooks, or without a browser: `python -m lora_nb`."""

import logging
import os

# The libraries' advice at import is about other programs; must be set before they are imported.
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

__version__ = "0.1.0"
