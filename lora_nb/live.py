"""A training as it goes, for a notebook: curves, pictures and plain lines. Everything shown is read from the run's folder,
so the same calls show it in a fresh kernel, while another process trains."""

import json
import time
from pathlib import Path

from IPython.display import display

from lora_nb import plots
from lora_nb.events import Saved, Stepped, Validated
from lora_nb.grids import labelled_grid
from lora_nb.printing import printer
from lora_nb.runlog import read_metrics


class LiveTraining:
    """An `on_event` that keeps one figure of loss and learning rate and one strip of samples up to date.

    every_s: least seconds between redraws of the curves, which never take more than a fiftieth of the time; a plain line
    of progress comes every `line_every` steps.
    """

    def __init__(self, run_dir, every_s: float = 4.0, line_every: int = 100):
        self.run_dir, self.every_s, self.line_every = Path(run_dir), every_s, line_every
        self._tell, self._redraw_at, self._shown = printer(), 0.0, {}

    def __call__(self, event) -> None:
        if isinstance(event, Stepped):
            if event.step % self.line_every == 0:
                print(f"step {event.step}: loss {event.loss:.4f}")
            if time.monotonic() > self._redraw_at:
                self.draw_curves()
        elif isinstance(event, Validated):
            self._show("strip", sample_strip(self.run_dir))
        elif not isinstance(event, Saved):
            self._tell(event)

    def draw_curves(self) -> None:
        """Redraw the curves now."""
        began = time.monotonic()
        if rows := read_metrics(self.run_dir):
            self._show("curves", plots.training_curves(rows))
        now = time.monotonic()
        self._redraw_at = now + max(self.every_s, 50 * (now - began))

    def _show(self, name, picture) -> None:
        if name in self._shown:
            self._shown[name].update(picture)
        else:
            self._shown[name] = display(picture, display_id=True)


def sample_strip(run_dir, seed: int | None = None, most: int = 6, cell: int = 128):
    """Validation pictures of one seed, a row a prompt and a column a step: an RGB PIL picture, None before the first.

    seed: one of those drawn, the first without. most: columns, evenly spread, the newest among them.
    """
    folders = sorted((Path(run_dir) / "validation_images").glob("step-*/prompts.json"), key=lambda path: int(path.parent.name[5:]))
    if not folders:
        return None
    step_by = max(1, -(-len(folders) // most))
    folders = folders[::-1][::step_by][::-1]
    columns = []
    for path in folders:
        entries = json.loads(path.read_text(encoding="utf-8"))["pictures"]
        wanted = seed if seed is not None else entries[0]["seed"]
        columns.append({entry["prompt"]: path.parent / entry["file"] for entry in entries if entry["seed"] == wanted})
    prompts = list(columns[-1])
    rows = [[column.get(prompt) for column in columns] for prompt in prompts]
    return labelled_grid(rows, prompts, [path.parent.name.replace("-", " ") for path in folders], cell)
