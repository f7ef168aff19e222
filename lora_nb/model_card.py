"""The model card in `final/`, and what a push to the Hugging Face hub would send, before anything is sent.

The card tells the settings and the statistics of the data set, never the data, a path or a token.
"""

import json
import os
import shutil
import sys
from collections import Counter
from pathlib import Path

import yaml
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError

from lora_nb.errors import UserError
from lora_nb.export import DIFFUSERS_FILE
from lora_nb.files import write_atomic
from lora_nb.inspect_lora import inspect_lora
from lora_nb.lora_file import read_safetensors
from lora_nb.metadata import CONFIG_KEY

CARD, SAMPLES = "README.md", "samples"
# What a card shows of the settings; the header of the file holds all of them.
_SHOWN = (
    "resolution max_steps batch_size gradient_accumulation_steps learning_rate lr_scheduler optimizer lora_rank lora_alpha use_rslora "
    "lora_target_modules train_text_encoder snr_gamma noise_offset caption_dropout mixed_precision precision seed"
).split()


def write_model_card(final, samples=()) -> Path:
    """`final/README.md` from the header of the kohya file there, with copies of `samples` beside it.

    samples: (picture path, prompt) pairs. Raises UserError if `final` holds no exported file.
    """
    final = Path(final)
    file = _main_file(final)
    _, header = read_safetensors(file)
    shown = []
    shutil.rmtree(final / SAMPLES, ignore_errors=True)
    for n, (picture, prompt) in enumerate(samples):
        target = final / SAMPLES / f"{n}{Path(picture).suffix}"
        target.parent.mkdir(exist_ok=True)
        shutil.copyfile(picture, target)
        shown.append((f"{SAMPLES}/{target.name}", prompt))
    return write_atomic(final / CARD, model_card(file.name, header, dict(inspect_lora(file).rows), shown))


def _main_file(final: Path) -> Path:
    """The kohya file: the one .safetensors in `final` that is not diffusers'."""
    found = [path for path in sorted(final.glob("*.safetensors")) if path.name != DIFFUSERS_FILE]
    if not found:
        raise UserError(f"{final} holds no exported LoRA; train or export first.")
    return found[0]


def model_card(file_name: str, header: dict[str, str], facts: dict[str, str], samples=()) -> str:
    """Markdown with the hub's YAML head. samples: (path beside the card, prompt) pairs; facts: rows of `inspect_lora`."""
    settings = json.loads(header.get(CONFIG_KEY) or "{}")
    base, trigger = settings.get("base_model"), header.get("modelspec.trigger_phrase", "")
    title = header.get("modelspec.title") or Path(file_name).stem
    on_hub = base if base and base.count("/") == 1 and not base.startswith(("data/", ".", "outputs/")) else None
    head = {
        "license": header.get("modelspec.license"),
        "base_model": on_hub,
        "library_name": "diffusers",
        "pipeline_tag": "text-to-image",
        "instance_prompt": trigger or None,
        "tags": ["stable-diffusion-xl", "lora", "text-to-image", "diffusers", "template:sd-lora"],
        "widget": [{"text": prompt, "output": {"url": path}} for path, prompt in samples] or None,
    }
    head = {key: value for key, value in head.items() if value}
    sections = [
        f"# {title}",
        _opening(base, trigger, header),
        *([_gallery(samples)] if samples else []),
        _usage(file_name, base, trigger),
        f"## Files\n\n{_table(['', ''], facts.items())}",
        f"## Training\n\n{_table(['setting', 'value'], ((name, settings[name]) for name in _SHOWN if settings.get(name) not in (None, '')))}",
        _data_section(header),
    ]
    front = yaml.safe_dump(head, sort_keys=False, allow_unicode=True)
    return f"---\n{front}---\n\n" + "\n\n".join(section for section in sections if section) + "\n"


def _opening(base, trigger, header) -> str:
    calls = f" Write `{trigger}` in the prompt to call it." if trigger else ""
    by = f" By {header['modelspec.author']}." if header.get("modelspec.author") else ""
    return f"A LoRA for {base or 'an SDXL base'}.{calls}{by}"


def _gallery(samples) -> str:
    return "## Samples\n\n" + "\n\n".join(f"![{prompt}]({path})\n\n*{prompt}*" for path, prompt in samples)


def _usage(file_name, base, trigger) -> str:
    return f"""## Use

`{file_name}` goes into the LoRA folder of ComfyUI, A1111, Forge or kohya's tools. In diffusers:

```python
import torch
from diffusers import StableDiffusionXLPipeline

pipeline = StableDiffusionXLPipeline.from_pretrained("{base or '<an SDXL base>'}", torch_dtype=torch.float16).to("cuda")
pipeline.load_lora_weights("<this repository>", weight_name="{file_name}")
image = pipeline("{trigger or 'a prompt'}").images[0]
```"""


def _data_section(header) -> str:
    """Numbers of the data set: pictures, sizes, words of the captions."""
    count = header.get("ss_num_train_images")
    if not count:
        return ""
    rows = [("pictures", count), ("resolution", header.get("modelspec.resolution", ""))]
    sizes = json.loads(header.get("ss_bucket_info") or '{"buckets": {}}')["buckets"].values()
    rows += [("sizes in training", ", ".join(f"{'×'.join(map(str, size['resolution']))}: {size['count']}" for size in sizes))]
    tags = Counter()
    for counts in json.loads(header.get("ss_tag_frequency") or "{}").values():
        tags.update(counts)
    words = [word.strip(".,;:").lower() for tag, n in tags.items() for word in tag.split() for _ in range(n)]
    common = Counter(word for word in words if len(word) > 3).most_common(12)
    rows += [("words in captions", ", ".join(f"{word} ({n})" for word, n in common))]
    return f"## Data\n\nThe pictures themselves are not part of this repository.\n\n{_table(['', ''], rows)}"


def _table(head, rows) -> str:
    lines = [head, ["---"] * len(head), *([str(cell).replace("|", "\\|").replace("\n", " ") for cell in row] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


# --- the hub -----------------------------------------------------------------------------------------------------


def push_to_hub(final, repo_id: str, *, really: bool = False, private: bool = True, token: str | None = None) -> str:
    """Send `final/` to the hub; unless `really`, only say what would be sent. Returns what was, or would be, done.

    The token comes from HF_TOKEN, Colab's secrets or a login, and appears in no output. Hidden files stay here.
    Raises UserError without an exported file, a token, or the hub's consent.
    """
    final = Path(final)
    _main_file(final)
    files = [path for path in sorted(final.rglob("*")) if path.is_file() and not any(p.startswith(".") for p in path.relative_to(final).parts)]
    listing = "\n".join(f"  {path.relative_to(final).as_posix()}  {path.stat().st_size / 2**20:.2f} MiB" for path in files)
    kind = "private" if private else "public"
    total = sum(path.stat().st_size for path in files) / 2**20
    if not really:
        return f"Nothing was sent. A push would put {len(files)} files, {total:.1f} MiB, into the {kind} repository {repo_id}:\n{listing}"
    token = token or hub_token()
    if not token:
        raise UserError("There is no token for the hub: set HF_TOKEN, add it to Colab's secrets, or run `hf auth login`.")
    api = HfApi(token=token)
    try:
        url = api.create_repo(repo_id, private=private, exist_ok=True)
        api.upload_folder(
            repo_id=repo_id, folder_path=final, allow_patterns=[path.relative_to(final).as_posix() for path in files],
            commit_message=f"LoRA {final.resolve().parent.name}",
        )  # fmt: skip
    except (HfHubHTTPError, OSError, ValueError) as error:
        reason = str(error).replace(token, "<token>").strip().splitlines()[0]
        raise UserError(f"The hub refused {repo_id} ({reason}); check the name, the token's write permission and the network.") from None
    return f"Sent {len(files)} files, {total:.1f} MiB, to {url}:\n{listing}"


def hub_token() -> str | None:
    """HF_TOKEN from the environment, from Colab's secrets, or of a login; None without."""
    if os.environ.get("HF_TOKEN"):
        return os.environ["HF_TOKEN"]
    if "google.colab" in sys.modules:
        from google.colab import userdata

        try:
            return userdata.get("HF_TOKEN")
        except Exception:  # no such secret, or not allowed to this notebook: both mean none
            return None
    from huggingface_hub import get_token

    return get_token()
