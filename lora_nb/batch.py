"""The four notebooks without a browser: papermill runs them, every one is kept, as a notebook and as a page.

They are the notebooks that a person steps through; only the values of their `parameters` cells are given.
"""

import ast
import logging
import sys
import threading
import time
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import papermill
from nbconvert import HTMLExporter
from papermill.exceptions import PapermillExecutionError

from lora_nb.config import read_value
from lora_nb.errors import UserError
from lora_nb.events import Notice, ignore
from lora_nb.files import from_root, project_root, write_atomic
from lora_nb.runlog import read_status

TELL_EVERY_S = 30
NOTEBOOKS = ("01_validate_dataset", "02_encode_latents", "03_train", "04_evaluate")


def run_notebooks(run_name: str, parameters: dict | None = None, notebooks=NOTEBOOKS, flags: dict | None = None, on_event=ignore) -> list[Path]:
    """Run `notebooks` in order with `parameters`; returns the executed ones, in outputs/<run_name>/notebooks/.

    parameters: name -> value, or text as it was typed, which is read as what the notebook's default is; flags: likewise, but
    what none of these notebooks takes is passed over. Raises UserError for a name that no notebook knows, a value of another
    kind, and a notebook that fails, which is kept as far as it ran.
    """
    root = project_root()
    sources = {name: root / "notebooks" / f"{name}.ipynb" for name in notebooks}
    if missing := [str(path) for path in sources.values() if not path.is_file()]:
        raise UserError(f"There is no {missing[0]}: run this in the project's folder, or set LORA_NB_ROOT to it.")
    known = {name: papermill.inspect_notebook(str(path)) for name, path in sources.items()}
    taken = {name: value for name, value in (flags or {}).items() if any(name in its for its in known.values())}
    values = read_parameters({"RUN_NAME": run_name, **taken, **(parameters or {})}, known)
    folder = root / "outputs" / run_name / "notebooks"
    folder.mkdir(parents=True, exist_ok=True)
    executed = []
    for name, source in sources.items():
        on_event(Notice(f"{name} ..."))
        began = time.monotonic()
        path = folder / f"{name}.ipynb"
        try:
            with _telling(folder.parent, on_event):
                _execute(source, path, {key: value for key, value in values.items() if key in known[name]}, root)
        finally:
            if path.is_file():
                write_page(path)
        on_event(Notice(f"{name} took {time.monotonic() - began:.0f} s: {from_root(path.with_suffix('.html'))}"))
        executed.append(path)
    return executed


def read_parameters(given: dict, known: dict[str, dict]) -> dict:
    """`given` as values of the kinds that the notebooks' defaults have. known: notebook -> papermill's inspection.

    Raises UserError that names every unknown parameter and every value of another kind.
    """
    defaults = {name: _default(entry) for parameters in known.values() for name, entry in parameters.items()}
    values, problems = {}, []
    for name, value in given.items():
        if name not in defaults:
            problems.append(f"no notebook has a parameter {name} (there are {', '.join(sorted(defaults))})")
            continue
        kind = type(defaults[name])
        read = read_value(value) if isinstance(value, str) and kind is not str else value
        if kind is float and type(read) is int:
            read = float(read)
        if type(read) is kind:
            values[name] = read
        else:
            problems.append(f"{name} = {value!r} should be like its default {defaults[name]!r}")
    if problems:
        raise UserError("; ".join(problems) + ".")
    return values


def write_page(path) -> Path:
    """The notebook at `path` as one HTML file beside it."""
    page, _ = HTMLExporter(template_name="lab", embed_images=True).from_filename(str(path))
    return write_atomic(Path(path).with_suffix(".html"), page)


def _default(entry):
    try:
        return ast.literal_eval(entry["default"])
    except (ValueError, SyntaxError):
        return entry["default"]


def _execute(source, path, parameters, root) -> None:
    logging.getLogger("papermill").setLevel(logging.ERROR)
    try:
        papermill.execute_notebook(
            str(source), str(path), parameters, kernel_name="python3", cwd=str(root), progress_bar=sys.stderr.isatty(), request_save_on_cell_execute=True,
            extra_arguments=["--IPKernelApp.log_level=50"],  # its notes on transports are not for readers
        )  # fmt: skip
    except PapermillExecutionError as error:
        kind = "" if error.ename == UserError.__name__ else f"{error.ename}: "
        raise UserError(f"{path.stem} failed in cell [{error.exec_count}]: {kind}{_plain(error.evalue)} It is kept as far as it ran: {from_root(path)}") from None
    except Exception as error:
        if "kernel died" not in str(error).lower() and "DeadKernel" not in type(error).__name__:
            raise
        raise UserError(f"{path.stem}: its kernel died, probably out of memory; take a preset for a smaller GPU, or close other programs. It is kept as far as it ran: {from_root(path)}") from None


@contextmanager
def _telling(run_dir, on_event):
    """Meanwhile a training that writes into `run_dir` is told of every TELL_EVERY_S seconds."""
    done = threading.Event()

    def tell():
        while not done.wait(TELL_EVERY_S):
            now = read_status(run_dir)
            if now.get("status") == "running" and "loss" in now:
                left = timedelta(seconds=round(now["seconds_left"]))
                on_event(Notice(f"step {now['step']} of {now['max_steps']}: loss {now['loss']:.4f}, {left} left"))

    thread = threading.Thread(target=tell, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def _plain(message: str) -> str:
    text = " ".join(message.split())
    return text if text.endswith((".", "!", "?")) else text + "."
