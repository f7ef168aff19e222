"""Export what a run made: its last weights as training ends, or any checkpoint later, with every proof and a model card.

A checkpoint is exported without the base's weights: its LoRA is put into a hollow model of the base's shapes.
"""

import json
from pathlib import Path

from lora_nb import models
from lora_nb.checkpoint import damage, list_checkpoints, load_checkpoint
from lora_nb.checks import ExportResult
from lora_nb.config import Config, read_config
from lora_nb.errors import UserError
from lora_nb.events import OnEvent, ignore
from lora_nb.export import DIFFUSERS_FILE, FORMATS, export_lora
from lora_nb.files import full_disk_is_a_sentence, project_root, sha256_file
from lora_nb.lora_names import PARTS
from lora_nb.manifest import best_manifest, read_manifest
from lora_nb.metadata import lora_metadata
from lora_nb.model_card import write_model_card
from lora_nb.proof import PictureRoad, fill_with_zero, library_roads


def export_trained(
    config: Config, unet, text_encoders, step: int, prediction_type: str, *, run_dir=None, into=None, run_name: str | None = None,
    formats=FORMATS, dtype: str | None = None, picture: PictureRoad | None = None, on_event: OnEvent = ignore,
) -> ExportResult:  # fmt: skip
    """Export adapters of `step` with the run's own header, proved by diffusers, PEFT and, if one is given, a picture.
    A model card with the validation pictures of that step lies beside the files.

    text_encoders: a pair, None where one has no adapter. run_dir, into, run_name and dtype: default those of the
    configuration, and `final/`.
    """
    run_dir = Path(run_dir or config.run_dir)
    path = best_manifest(run_dir)
    samples = [sample for sample in read_manifest(path).train() for _ in range(sample.repeats)]
    metadata = lora_metadata(
        config.run_name, config.model_dump(), steps=step, captions=[sample.caption for sample in samples],
        buckets=[sample.bucket for sample in samples], manifest_sha256=sha256_file(path), prediction_type=prediction_type,
    )  # fmt: skip
    roads = (*library_roads(unet, text_encoders), *([picture] if picture else []))
    with full_disk_is_a_sentence(run_dir):
        result = export_lora(
            into or run_dir / "final", unet, text_encoders, run_name=run_name or config.run_name, metadata=metadata,
            dtype=dtype or config.export_dtype, formats=formats, roads=roads, on_event=on_event,
        )  # fmt: skip
        if any(path.suffix == ".safetensors" and path.name != DIFFUSERS_FILE for path in result.files):
            write_model_card(result.folder, validation_samples(run_dir, step))
    return result


def validation_samples(run_dir, step: int, most: int = 4) -> list[tuple[Path, str]]:
    """(picture, prompt) of one seed of each prompt drawn at `step`, at most `most`; none where none were drawn."""
    folder = Path(run_dir) / "validation_images" / f"step-{step}"
    if not (folder / "prompts.json").is_file():
        return []
    first = {}
    for entry in json.loads((folder / "prompts.json").read_text(encoding="utf-8"))["pictures"]:
        first.setdefault(entry["prompt"], folder / entry["file"])
    return [(path, prompt) for prompt, path in list(first.items())[:most] if path.is_file()]


def export_checkpoint(
    run, step: int | None = None, *, formats=FORMATS, dtype: str | None = None, into=None, on_event: OnEvent = ignore
) -> ExportResult:
    """Export a checkpoint of a run: the newest into `final/`, a chosen `step` into `exports/step-N/`.

    run: the run's folder, or its name under outputs/. Raises UserError for a run, step or checkpoint that is not there
    or is damaged.
    """
    run_dir = run_folder(run)
    config = read_config(run_dir / "config.yaml")
    path = _checkpoint(run_dir, step)
    tensors, _, state = load_checkpoint(path)
    parts = {part: _adapted(config, part, tensors) for part in PARTS if any(name.startswith(f"{part}.") for name in tensors)}
    prediction = models.load_part(config.base_model, "noise_scheduler").config.prediction_type
    chosen = {} if step is None else {"into": run_dir / "exports" / f"step-{step}", "run_name": f"{config.run_name}-{step:06d}"}
    return export_trained(
        config, parts["unet"], (parts.get("text_encoder"), parts.get("text_encoder_2")), state["step"], prediction,
        run_dir=run_dir, formats=formats, dtype=dtype, on_event=on_event, **{**chosen, **({"into": into} if into else {})},
    )  # fmt: skip


def run_folder(run) -> Path:
    """The folder of a run, given as a path or as a name under outputs/. Raises UserError if none is there."""
    places = (Path(run), project_root() / run, project_root() / "outputs" / run)
    for place in places:
        if (place / "config.yaml").is_file():
            return place
    known = sorted(path.parent.name for path in (project_root() / "outputs").glob("*/config.yaml"))
    raise UserError(f"There is no run {run}; " + (f"outputs/ holds {', '.join(known)}." if known else "train one first."))


def _checkpoint(run_dir: Path, step: int | None) -> Path:
    found = dict(list_checkpoints(run_dir / "checkpoints"))
    if not found:
        raise UserError(f"{run_dir} holds no checkpoints; train first.")
    if step is not None and step not in found:
        raise UserError(f"{run_dir} has no checkpoint of step {step}; it has {', '.join(map(str, found))}.")
    path = found[max(found) if step is None else step]
    if reason := damage(path):
        raise UserError(f"{path} is damaged ({reason}); export another of {', '.join(map(str, found))}.")
    return path


def _adapted(config: Config, part: str, tensors: dict):
    """A hollow part with the checkpoint's LoRA."""
    model = fill_with_zero(models.empty_part(config.base_model, part))
    targets = config.lora_target_modules if part == "unet" else models.TEXT_TARGETS
    models.add_lora(model, config.lora_rank, config.lora_alpha, targets, rslora=config.use_rslora)
    own = {name.removeprefix(f"{part}."): tensor for name, tensor in tensors.items() if name.startswith(f"{part}.")}
    if part != "unet" and not hasattr(model, "text_model"):  # transformers 5 has flattened it, files have not
        own = {name.removeprefix("text_model."): tensor for name, tensor in own.items()}
    models.load_lora_state_dict(model, own)
    return model
