"""The settings in a LoRA file's header, back as a configuration that trains the same again."""

import json
import re
from pathlib import Path

from lora_nb.config import Config, build, resolve_path
from lora_nb.errors import UserError
from lora_nb.lora_file import read_safetensors
from lora_nb.metadata import CONFIG_KEY, MANIFEST_KEY, SS_SETTINGS, VERSIONS_KEY, library_versions

_PLACES = ("base_model", "vae_model", "dataset_path", "start_from_lora")  # may have been folders of another machine


def write_replay(path, to="training_config.yaml") -> str:
    """Write the settings in the header of `path` to `to`, whole; returns what was done and what to look after.

    Raises UserError where `to` exists, or the file holds no settings.
    """
    to = Path(to)
    if to.exists():
        raise UserError(f"{to} exists; move it away, or name another file.")
    config, notes = replay(path)
    config.save(to)
    return "\n".join([f"{to} holds the settings of {path}.", *(f"! {note}" for note in notes)])


def replay(path) -> tuple[Config, list[str]]:
    """The settings in a file's header as a configuration, and sentences about what they cannot bring back.

    Our own files give every setting; kohya's those that both know. Raises UserError for a file that says nothing.
    """
    _, metadata = read_safetensors(path)
    if CONFIG_KEY not in metadata:
        return _replay_foreign(path, metadata)
    try:
        values, versions = json.loads(metadata[CONFIG_KEY]), json.loads(metadata.get(VERSIONS_KEY) or "{}")
    except ValueError as error:
        raise UserError(f"The settings in the header of {path} are damaged ({error}); replay another file of the run.") from error
    notes = [f"There is no setting {name} in this version; it was {values.pop(name)!r}." for name in list(values) if name not in Config.model_fields]
    here = library_versions()
    notes += [f"{name} was {then}, and is {here.get(name, 'missing')} here." for name, then in versions.items() if here.get(name) != then]
    config = build(values, where=str(path))
    notes += [
        f"{name} was a place of another machine and is {place!r} here: set it."
        for name in _PLACES
        if (place := getattr(config, name)) and "/" not in place and not resolve_path(place).exists()
    ]
    if metadata.get("ss_steps", str(config.max_steps)) != str(config.max_steps):
        notes.append(f"This file is a checkpoint of step {metadata['ss_steps']} of {config.max_steps}.")
    if MANIFEST_KEY in metadata:
        notes.append(f"The same weights need the same data: manifest sha256 {metadata[MANIFEST_KEY]}.")
    return config, notes


def _replay_foreign(path, metadata) -> tuple[Config, list[str]]:
    names = {ss: ours for ours, ss in SS_SETTINGS.items()} | {
        "ss_network_dim": "lora_rank",
        "ss_network_alpha": "lora_alpha",
        "ss_optimizer": "optimizer",
    }
    values, lost = {}, []
    side = re.match(r"\(?(\d+)", metadata.get("ss_resolution") or "")
    if side:
        values["resolution"] = int(side[1])
    for ss, ours in names.items():
        text = metadata.get(ss)
        if text in (None, "None", ""):
            continue
        try:
            build(values | {ours: _plain(text)}, where=str(path))
            values[ours] = _plain(text)
        except UserError:
            lost.append(f"{ss} = {text} is no setting here.")
    if not values:
        raise UserError(f"The header of {path} holds no settings; only files of this program and kohya's do.")
    return build(values, where=str(path)), ["Another program made this file; only the settings that both know are here.", *lost]


def _plain(text: str):
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return {"True": True, "False": False}.get(text, text)
