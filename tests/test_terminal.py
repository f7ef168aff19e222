"""`python -m lora_nb VERB` as it is typed: exit codes, one sentence for what can be mended, never a traceback."""

import errno
import shutil

import pytest
import yaml
from PIL import Image

from lora_nb import __main__ as terminal
from lora_nb.__main__ import main


def typed(make_run, tmp_path, **settings) -> tuple[str, ...]:
    """The options of a prepared run."""
    config = make_run(lora_rank=2, max_steps=2, pictures=2, **settings)
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(config.model_dump()))
    return "--preset", "cpu-demo", "--config", str(path)


def test_a_run_outside_the_project(make_run, tmp_path, tmp_path_factory, capsys):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    options = typed(make_run, tmp_path, output_dir=str(elsewhere / "outputs"), dataset_path=str(elsewhere / "data"))
    shutil.copytree(tmp_path / "data", elsewhere / "data")
    assert main(["encode", *options]) == main(["train", *options]) == 0
    assert f"finished at step 2; {elsewhere / 'outputs' / 'run'}" in capsys.readouterr().out


def test_encode_then_train_then_train_again(make_run, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = typed(make_run, tmp_path)
    assert main(["encode", *options]) == main(["train", *options]) == 0
    assert "finished at step 2; outputs/run" in capsys.readouterr().out
    assert main(["train", *options]) == 0
    assert "Going on after step 2" in capsys.readouterr().out


def test_another_character_in_a_trained_run_is_refused(make_run, tmp_path, capsys):
    options = typed(make_run, tmp_path)
    assert main(["train", *options]) == 0
    before = (tmp_path / "outputs" / "run" / "config.yaml").read_bytes(), (tmp_path / "outputs" / "run" / "status.json").read_bytes()
    (tmp_path / "other").mkdir()
    Image.new("RGB", (90, 90), "red").save(tmp_path / "other" / "one.png")
    (tmp_path / "other" / "one.txt").write_text("other_hero, red")
    for given in (["--trigger-token", "other_hero"], ["--dataset", str(tmp_path / "other")]):
        assert main(["train", *options, *given]) == 1
        assert "run_name" in capsys.readouterr().err
    validate = ["validate", str(tmp_path / "other"), "--trigger-token", "other_hero", "--resolution", "64", "--output", str(tmp_path / "outputs" / "run")]
    assert main(validate) == 1 and "take another run name" in capsys.readouterr().out
    assert before == tuple((tmp_path / "outputs" / "run" / name).read_bytes() for name in ("config.yaml", "status.json"))


@pytest.mark.parametrize("words", [["run"], ["sweep", "lora_rank=2"]])
def test_the_notebooks_get_the_data_set_of_a_configuration(tmp_path, monkeypatch, words):
    """Their own DATASET_PATH and TRIGGER_TOKEN lie over CONFIG_FILE, so what it says must come as these."""
    given = []
    monkeypatch.setattr("lora_nb.batch.run_notebooks", lambda *_, flags=None, **__: given.append(flags))
    monkeypatch.setattr("lora_nb.compare.compare", lambda *_, **__: [{"run": "r"}])
    (tmp_path / "mine.yaml").write_text("dataset_path: data/hero\ntrigger_token: hero_man\n")
    (tmp_path / "data" / "hero").mkdir(parents=True)
    assert not main([*words, "--preset", "cpu-demo", "--config", str(tmp_path / "mine.yaml")])
    assert given[0]["DATASET_PATH"] == "data/hero" and given[0]["TRIGGER_TOKEN"] == "hero_man"


def test_a_data_set_needs_its_trigger(tmp_path, capsys):
    assert main(["run", "--dataset", str(tmp_path)]) == 1
    assert "--dataset needs --trigger-token" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"run_name": "absent"}, "run notebook 01 (or `python -m lora_nb validate DIR --output"),
        ({"max_steps": "many"}, "max_steps"),
        ({"optimiser": "adamw"}, "did you mean 'optimizer'"),
        ({"base_model": "nowhere/at/all"}, "check base_model"),
    ],
)
def test_what_can_be_mended_is_one_sentence(make_run, tmp_path, capsys, settings, words):
    make_run()
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump({"run_name": "run", "resolution": 64} | settings))
    assert main(["train", "--preset", "cpu-demo", "--config", str(path)]) == 1
    told = capsys.readouterr().err.strip()
    assert words in told and told.startswith("Error: ") and "\n" not in told


def test_wrong_usage_is_two():
    for words in ([], ["trian"], ["train", "--steps", "3"]):
        with pytest.raises(SystemExit) as ended:
            main(words)
        assert ended.value.code == 2


def test_a_full_disk_is_one_sentence(monkeypatch, capsys):
    def full(options):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(terminal, "doctor", full)
    assert main(["doctor"]) == 1
    assert "is full: make room" in capsys.readouterr().err


def test_paths_that_were_typed_elsewhere_reach_the_notebooks(project, tmp_path_factory, monkeypatch):
    here = tmp_path_factory.mktemp("here")
    (here / "mine.yaml").touch()
    (project / "data").mkdir()
    monkeypatch.chdir(here)
    assert terminal._for_notebooks("mine.yaml") == str(here / "mine.yaml")
    assert terminal._for_notebooks("data") == "data" and terminal._for_notebooks(None) is None
