"""A grid of settings as a batch of runs: resumable, and one failure does not end the rest."""

import itertools
import json
from dataclasses import dataclass
from pathlib import Path

from lora_nb.config import load_config, read_value
from lora_nb.errors import UserError
from lora_nb.events import Notice, Progress, ignore
from lora_nb.files import write_json


@dataclass(frozen=True)
class Trial:
    """One run of a sweep. status is "waiting", "done" or "failed"; error is one line."""

    run_name: str
    settings: dict
    status: str = "waiting"
    error: str = ""


def parse_grid(words) -> dict[str, list]:
    """["lora_rank=8,16", "learning_rate=1e-4"] -> {"lora_rank": [8, 16], "learning_rate": [0.0001]}. Raises UserError."""
    grid = {}
    for word in words:
        name, sign, values = word.partition("=")
        if not sign or not values:
            raise UserError(f"{word!r} is not of the form setting=value,value.")
        grid[name] = [read_value(value) for value in values.split(",")]
    return grid


def trials_of(grid: dict[str, list], sweep_name: str, preset: str = "auto", yaml_path=None) -> list[Trial]:
    """Every combination, each a run of its own name. All settings are checked before anything runs. Raises UserError."""
    if not grid or not all(grid.values()):
        raise UserError("A sweep needs at least one setting with values, like lora_rank=8,16.")
    combinations = [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]
    trials = [Trial(f"{sweep_name}-{_slug(settings)}", settings) for settings in combinations]
    problems = {}
    for trial in trials:
        try:
            load_config(preset, yaml_path, run_name=trial.run_name, **trial.settings)
        except UserError as error:
            problems[str(error)] = trial.run_name
    if problems:
        raise UserError(" ".join(problems))
    return trials


def _slug(settings) -> str:
    """Short, and fit for a folder's name: lora_rank 8, learning_rate 1e-4 -> lora_rank8-learning_rate0.0001."""
    text = "-".join(f"{name}{value}" for name, value in settings.items())
    return "".join(letter if letter.isalnum() or letter in "._-" else "_" for letter in text)


def sweep(trials: list[Trial], record, run_one, on_event=ignore) -> list[Trial]:
    """Run every trial that is not done and keep `record` (a JSON file) up to date; call again to go on.

    run_one(run_name, settings) does the whole job, 01 to 04; whatever it raises is written down and the next trial runs.
    """
    record = Path(record)
    before = _read(record)
    states = {trial.run_name: before.get((trial.run_name, json.dumps(trial.settings, sort_keys=True)), trial) for trial in trials}
    for number, trial in enumerate(trials):
        on_event(Progress("runs", number, len(trials), trial.run_name))
        if states[trial.run_name].status != "done":
            states[trial.run_name] = _run(trial, run_one, on_event)
            _write(record, states.values())
    on_event(Progress("runs", len(trials), len(trials)))
    _write(record, states.values())
    return list(states.values())


def _run(trial, run_one, on_event) -> Trial:
    try:
        run_one(trial.run_name, trial.settings)
    except Exception as error:  # one failure, whatever it is, must not end the others
        line = str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__
        on_event(Notice(f"{trial.run_name} failed: {line}"))
        return Trial(trial.run_name, trial.settings, "failed", line)
    return Trial(trial.run_name, trial.settings, "done")


def _read(record) -> dict:
    if not record.is_file():
        return {}
    trials = [Trial(**entry) for entry in json.loads(record.read_text(encoding="utf-8"))]
    return {(trial.run_name, json.dumps(trial.settings, sort_keys=True)): trial for trial in trials}


def _write(record, trials) -> None:
    write_json(record, [trial.__dict__ for trial in trials])

