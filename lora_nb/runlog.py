"""What a run leaves to be read: training_metrics.csv, status.json, training_summary.txt, trackers' logs, and the lock
on its folder."""

import csv
import datetime
import io
import json
import os
import platform
from contextlib import contextmanager
from pathlib import Path

import filelock
import psutil

from lora_nb.errors import UserError
from lora_nb.files import write_atomic, write_json

METRICS, STATUS, SUMMARY, LOGS = "training_metrics.csv", "status.json", "training_summary.txt", "logs"
COLUMNS = ("step", "loss", "learning_rate", "epoch", "grad_norm")


@contextmanager
def only_trainer(run_dir):
    """Hold the run folder's lock. Raises UserError if another training writes there; a killed one holds nothing."""
    run_dir = Path(run_dir)
    run_dir.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(run_dir / ".training.lock", timeout=0)
    try:
        lock.acquire()
    except filelock.Timeout:
        raise UserError(f"Another training is writing to {run_dir}: wait for it, or take another run_name.") from None
    try:
        yield
    finally:
        lock.release()


class Metrics:
    """training_metrics.csv, a row every few steps, flushed; continuous over a resume."""

    def __init__(self, run_dir, first_step: int):
        """Keep the rows up to `first_step`, drop what a killed run wrote after its last checkpoint."""
        self.path = Path(run_dir) / METRICS
        rows = [row for row in read_metrics(run_dir) if row["step"] <= first_step]
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(COLUMNS)
        writer.writerows([self._text(row) for row in rows])
        write_atomic(self.path, text.getvalue())

    def write(self, **row) -> None:
        """Append one row of COLUMNS."""
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(",".join(self._text(row)) + "\n")

    @staticmethod
    def _text(row) -> list[str]:
        return [str(row["step"]), *(f"{row[name]:.8g}" for name in COLUMNS[1:])]


def read_metrics(run_dir) -> list[dict]:
    """The rows of training_metrics.csv as numbers; a row that a kill cut short is left out."""
    path = Path(run_dir) / METRICS
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")[:-1]  # what follows the last newline is not whole
    rows = []
    for row in csv.DictReader(lines):
        try:
            rows.append({name: int(value) if name == "step" else float(value) for name, value in row.items()})
        except (TypeError, ValueError):
            continue
    return rows


def write_status(run_dir, status: str, **facts) -> None:
    """status.json: what a fresh kernel or another program needs to see how the run stands."""
    now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    write_json(Path(run_dir) / STATUS, {"status": status, **facts, "pid": os.getpid(), "updated": now})


def read_status(run_dir) -> dict:
    """status.json, {} before the first training; "running" becomes "stopped" where that process is gone."""
    path = Path(run_dir) / STATUS
    if not path.is_file():
        return {}
    status = json.loads(path.read_text(encoding="utf-8"))
    if status.get("status") == "running" and not psutil.pid_exists(status["pid"]):
        status["status"] = "stopped"
    return status


def write_summary(run_dir, lines: dict[str, object]) -> Path:
    """training_summary.txt: `name: value` lines, with the machine's name for itself."""
    machine = f"{platform.system()} {platform.machine()}, Python {platform.python_version()}"
    width = max(map(len, lines))
    text = "".join(f"{name.ljust(width)}  {value}\n" for name, value in {**lines, "machine": machine}.items())
    return write_atomic(Path(run_dir) / SUMMARY, text)


def start_trackers(accelerator, run_dir, settings: dict) -> None:
    """Begin a run in accelerate's trackers, if it has any; what they write lies below `run_dir`/logs.

    Raises UserError where one cannot start: not logged in, no network, no disk.
    """
    if not accelerator.log_with:
        return
    run_dir = Path(run_dir)
    (run_dir / LOGS).mkdir(exist_ok=True)
    wandb = {"dir": str(run_dir / LOGS), "name": run_dir.name}
    try:
        accelerator.init_trackers("lora_nb", {name: str(value) for name, value in settings.items()}, {"wandb": wandb})
    except Exception as error:  # each tracker has a family of its own
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"A tracker cannot start ({reason}): mend that, take WANDB_MODE=offline, or set use_wandb and use_tensorboard: false.") from error
