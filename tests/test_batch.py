"""Notebooks without a browser: parameters are checked, failures are sentences and are kept."""

from pathlib import Path

import nbformat
import pytest

import lora_nb
from lora_nb import batch
from lora_nb.__main__ import main
from lora_nb.batch import NOTEBOOKS, read_parameters, run_notebooks
from lora_nb.errors import UserError
from lora_nb.events import Notice
from lora_nb.runlog import write_status

REPOSITORY = Path(lora_nb.__file__).parent.parent
KNOWN = {"a": {"STEPS": {"default": "10"}, "RATE": {"default": "0.5"}, "FLAG": {"default": "True"}, "NAME": {"default": '"x"'}}}


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A project with one small notebook of its own."""
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "lora_nb").mkdir()
    monkeypatch.setenv("LORA_NB_ROOT", str(tmp_path))

    def write(source):
        notebook = nbformat.v4.new_notebook(metadata={"kernelspec": {"name": "python3", "display_name": "Python 3"}, "language_info": {"name": "python"}})
        parameters = nbformat.v4.new_code_cell('RUN_NAME = "r"\nSTEPS = 3')
        parameters.metadata["tags"] = ["parameters"]
        notebook.cells = [parameters, nbformat.v4.new_code_cell("print('kept', STEPS)"), nbformat.v4.new_code_cell(source)]
        nbformat.write(notebook, tmp_path / "notebooks" / "01_small.ipynb")

    write.root = tmp_path
    return write


def outputs(path):
    return [output for cell in nbformat.read(path, as_version=4).cells for output in cell.get("outputs", [])]


@pytest.mark.parametrize(
    ("given", "read"),
    [({"STEPS": "20"}, 20), ({"RATE": "1e-4"}, 1e-4), ({"RATE": 2}, 2.0), ({"FLAG": "false"}, False), ({"NAME": "7"}, "7")],
)
def test_typed_values_become_what_the_default_is(given, read):
    (value,) = read_parameters(given, KNOWN).values()
    assert value == read and type(value) is type(read)


def test_every_problem_of_the_parameters_is_told_at_once():
    with pytest.raises(UserError, match="STEP .*RATE.*FLAG") as error:
        read_parameters({"STEP": 1, "RATE": "fast", "FLAG": "maybe"}, KNOWN)
    assert "\n" not in str(error.value)


def test_a_notebook_runs_with_its_parameters_and_is_kept_as_a_page(project):
    project("assert STEPS == 5")
    (path,) = run_notebooks("mine", {"STEPS": "5"}, ["01_small"])
    assert path == project.root / "outputs" / "mine" / "notebooks" / "01_small.ipynb"
    assert any(output.get("text") == "kept 5\n" for output in outputs(path))
    assert "kept 5" in path.with_suffix(".html").read_text(encoding="utf-8")


def test_flags_that_no_notebook_takes_are_passed_over_and_parameters_are_not(project):
    project("assert STEPS == 5")
    assert run_notebooks("mine", {}, ["01_small"], {"STEPS": 5, "PRESET": "auto"})
    with pytest.raises(UserError, match="no notebook has a parameter PRESET"):
        run_notebooks("mine", {"PRESET": "auto"}, ["01_small"])


def test_a_training_tells_how_it_stands_meanwhile(project, monkeypatch):
    monkeypatch.setattr(batch, "TELL_EVERY_S", 0.05)
    project("import time; time.sleep(0.5)")
    write_status(project.root / "outputs" / "mine", "running", step=3, max_steps=9, loss=0.5, seconds_left=61.2)
    told = []
    run_notebooks("mine", {}, ["01_small"], on_event=told.append)
    assert Notice("step 3 of 9: loss 0.5000, 0:01:01 left") in told


def test_a_failing_notebook_is_named_with_its_error_and_kept(project):
    project("raise ValueError('the glue came off')")
    with pytest.raises(UserError, match=r"01_small failed in cell \[4\]: ValueError: the glue came off"):
        run_notebooks("mine", {}, ["01_small"])
    kept = project.root / "outputs" / "mine" / "notebooks" / "01_small.ipynb"
    assert any(output.get("text") == "kept 3\n" for output in outputs(kept))


def test_a_dead_kernel_says_what_it_probably_was(project):
    project("import os; os.kill(os.getpid(), 9)")
    with pytest.raises(UserError, match="kernel died, probably out of memory"):
        run_notebooks("mine", {}, ["01_small"])


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["run", "--preset", "gpu-17gb"], "no preset 'gpu-17gb'"),
        (["run", "-p", "MAX_STEP", "3"], "no notebook has a parameter MAX_STEP"),
        (["run", "--only", "05"], "names no notebook"),
        (["encode", "--run-name", "never_made"], "01"),
        (["train", "--run-name", "never_made", "--config", "nowhere.yaml"], "no configuration file"),
        (["evaluate", "never_made"], "There is no run never_made"),
        (["inspect", "nowhere.safetensors"], "nowhere.safetensors"),
    ],
)
def test_bad_words_end_in_one_sentence(words, sentence, capsys, monkeypatch):
    monkeypatch.setenv("LORA_NB_ROOT", str(REPOSITORY))
    assert main(words) == 1
    said = capsys.readouterr().err
    assert sentence in said and "Traceback" not in said


def test_a_wrong_key_in_a_configuration_names_the_nearest(tmp_path, capsys):
    (tmp_path / "mine.yaml").write_text("learning_rat: 1.0e-4\n")
    assert main(["train", "--config", str(tmp_path / "mine.yaml")]) == 1
    assert "did you mean 'learning_rate'" in capsys.readouterr().err


def test_the_notebooks_are_ready_for_a_reader():
    paths = [REPOSITORY / "notebooks" / f"{name}.ipynb" for name in NOTEBOOKS]
    assert len(paths) == 4
    for path in paths:
        notebook = nbformat.read(path, as_version=4)
        code = [cell for cell in notebook.cells if cell.cell_type == "code"]
        assert "widgets" not in notebook.metadata
        assert sum("parameters" in cell.metadata.get("tags", []) for cell in code) == 1
        assert any("nbval-check-output" in cell.metadata.get("tags", []) for cell in code), path.name
        assert not [cell for cell in code if any(output.output_type == "error" for output in cell.outputs)]
        assert any("image/png" in output.get("data", {}) for cell in code for output in cell.outputs), path.name
        assert str(REPOSITORY) not in path.read_text(encoding="utf-8")
