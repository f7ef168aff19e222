"""The package's shape: imports run one way, light modules stay light, watchers stay outside."""

import ast
import graphlib
import subprocess
import sys
from pathlib import Path

import pytest

import lora_nb

PACKAGE = Path(lora_nb.__file__).parent
MODULES = sorted(path.stem for path in PACKAGE.glob("*.py") if path.stem != "__init__")


def imports(module, everywhere=True) -> tuple[set[str], set[str]]:
    """(our modules, others) that `module` imports; `everywhere` counts imports within functions too."""
    tree = ast.parse((PACKAGE / f"{module}.py").read_text(encoding="utf-8"))
    nodes = ast.walk(tree) if everywhere else tree.body
    ours, others = set(), set()
    for node in nodes:
        if isinstance(node, ast.Import):
            others |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names = {alias.name for alias in node.names}
            if node.level or (node.module or "").split(".")[0] == "lora_nb":
                rest = (node.module or "").removeprefix("lora_nb").lstrip(".")
                ours |= {rest.split(".")[0]} if rest else names & set(MODULES)
            else:
                others.add(node.module.split(".")[0])
    return ours, others


def test_imports_have_no_cycle():
    graph = {module: imports(module)[0] - {"", module} for module in MODULES}
    assert len(graph) > 20
    order = list(graphlib.TopologicalSorter(graph).static_order())
    assert order.index("files") < order.index("manifest") < order.index("cache") < order.index("train") < order.index("__main__")


def test_plots_import_none_of_our_modules():
    assert imports("plots")[0] == set()


def closure(module) -> set[str]:
    """Everything of ours that importing `module` brings in."""
    seen, open_ = set(), {module}
    while open_:
        one = open_.pop()
        seen.add(one)
        open_ |= {name for name in imports(one)[0] if name in MODULES} - seen
    return seen


@pytest.mark.parametrize("module", ["train", "evaluate", "cache"])
def test_the_verbs_do_not_know_who_watches(module):
    brought = closure(module)
    assert len(brought) > 5
    assert not brought & {"plots", "widgets", "live", "batch"}
    for one in brought:
        assert not imports(one)[1] & {"IPython", "papermill", "ipywidgets", "matplotlib"}, one


def test_only_widgets_imports_ipywidgets():
    assert [module for module in MODULES if "ipywidgets" in imports(module)[1]] == ["widgets"]


def test_light_modules_import_without_torch():
    code = "import sys, lora_nb.config, lora_nb.dataset, lora_nb.plots, lora_nb.validate_command; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
