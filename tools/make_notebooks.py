"""Run the four notebooks on the embedded default and keep them as they are committed: with pictures, without the rest.

`make notebooks`; `python tools/make_notebooks.py --clean-only` cleans without running. Dropped: widget state, metadata of
this machine and moment, what went to stderr, paths of this machine.
"""

import argparse
import re
import shutil
from pathlib import Path

import nbformat
import papermill

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("0*.ipynb"))
GRID = ROOT / "outputs" / "aldar_kose_lora" / "evaluation" / "grids" / "checkpoints.png"
WIDGET = "application/vnd.jupyter.widget-view+json"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clean-only", action="store_true")
    parser.add_argument("--only", nargs="*", default=[], help="01, 02, 03, 04")
    options = parser.parse_args()
    for path in NOTEBOOKS:
        if options.only and path.name[:2] not in options.only:
            continue
        if not options.clean_only:
            papermill.execute_notebook(str(path), str(path), kernel_name="python3", cwd=str(path.parent))
        notebook = nbformat.read(path, as_version=4)
        clean(notebook)
        nbformat.write(notebook, path)
        pictures = sum("image/png" in output.get("data", {}) for cell in notebook.cells for output in cell.get("outputs", []))
        print(f"{path.name}: {path.stat().st_size / 1024:.0f} KB, {pictures} pictures", flush=True)
    if GRID.is_file():
        shutil.copyfile(GRID, ROOT / "docs" / "checkpoints.png")  # the README's


def clean(notebook) -> None:
    """Keep sources, tags, execution counts and outputs that a reader wants to see."""
    notebook.metadata = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}, "language_info": {"name": "python"}}
    count = 0
    for number, cell in enumerate(notebook.cells):
        cell.id = f"cell-{number:02d}"
        tags = [tag for tag in cell.metadata.get("tags", []) if tag in ("parameters", "nbval-check-output", "nbval-skip", "raises-exception")]
        cell.metadata = {"tags": tags} if tags else {}
        if cell.cell_type == "code":
            count += 1
            cell.execution_count = count
            cell.outputs = [without_place(output, count) for output in cell.outputs if output.get("name") != "stderr"]


def without_place(output, count):
    """An output without widget views, addresses and paths of this machine."""
    if "execution_count" in output:
        output.execution_count = count
    if "transient" in output:
        del output["transient"]
    if "data" in output:
        output.metadata = {}
        if output.data.pop(WIDGET, None) is not None:
            output.data = {"text/plain": "(a widget, here only in a running notebook)"}
        for kind, value in output.data.items():
            if kind.startswith("text/"):
                output.data[kind] = plain(value)
    if "text" in output:
        output.text = plain(output.text)
    return output


def plain(text):
    text = text if isinstance(text, str) else "".join(text)
    return re.sub(r"0x[0-9a-f]{6,}", "0x...", text.replace(f"{ROOT}/", "").replace(str(ROOT), "."))


if __name__ == "__main__":
    main()
