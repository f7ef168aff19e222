"""Runs side by side, and a batch of runs that survives a failure and goes on where it stopped."""

import pytest

from lora_nb.compare import compare, comparison_table
from lora_nb.config import load_config
from lora_nb.errors import UserError
from lora_nb.files import write_atomic, write_json
from lora_nb.sweep import parse_grid, sweep, trials_of


def evaluated(folder, name, balance, seeds=(1, 2), **settings):
    """The files of a run that compare reads."""
    run = folder / name
    load_config("cpu-demo", run_name=name, **settings).save(run / "config.yaml")
    chosen = balance is not None
    record = {"step": 20 if chosen else None, "strength": 0.8 if chosen else None, "verdict": "good" if chosen else "learned nothing"}
    plan = {"prompts": ["a"], "seeds": list(seeds)}
    write_json(run / "evaluation" / "choice.json", record | {"file": None, "plan": plan, "scorers": ["clip"]})
    row = f"20,0.8,{balance},{balance - 0.1},{balance + 0.1},0.8,True\n" if chosen else "20,0.8,0,0,0,0.5,False\n"
    write_atomic(run / "evaluation" / "scores.csv", "step,strength,balance,balance_low,balance_high,identity,chosen\n" + row)
    write_json(run / "status.json", {"seconds": 30.0})
    return run


def test_runs_are_ranked_with_the_settings_in_which_they_differ(tmp_path):
    runs = [evaluated(tmp_path, "a", 0.5, lora_rank=8), evaluated(tmp_path, "b", 0.7, lora_rank=16), evaluated(tmp_path, "c", None, lora_rank=4)]
    rows = compare(runs)
    assert [row["run"] for row in rows] == ["b", "a", "c"]
    assert [row["lora_rank"] for row in rows] == [16, 8, 4] and "learning_rate" not in rows[0]
    assert rows[0]["seconds"] == 30 and rows[2]["balance"] is None
    assert "0.70 [0.60, 0.80]" in str(comparison_table(rows))


def test_runs_measured_differently_are_said_not_to_compare(tmp_path):
    notices = []
    compare([evaluated(tmp_path, "a", 0.5), evaluated(tmp_path, "b", 0.7, seeds=(3,))], notices.append)
    assert "do not compare" in notices[0].message


def test_a_run_without_evaluation_is_named(tmp_path):
    with pytest.raises(UserError, match="Not evaluated yet: nowhere"):
        compare([tmp_path / "nowhere"])


def test_a_grid_is_read_as_people_write_it():
    assert parse_grid(["lora_rank=8,16", "learning_rate=1e-4", "buckets=true,false", "optimizer=adamw"]) == {
        "lora_rank": [8, 16], "learning_rate": [1e-4], "buckets": [True, False], "optimizer": ["adamw"],
    }  # fmt: skip
    with pytest.raises(UserError, match="setting=value"):
        parse_grid(["lora_rank"])


def test_every_setting_is_checked_before_anything_runs():
    with pytest.raises(UserError, match="lora_rank"):
        trials_of({"lora_rnk": [8]}, "try", "cpu-demo")
    with pytest.raises(UserError, match="-3"):
        trials_of({"lora_rank": [8, -3]}, "try", "cpu-demo")
    names = [trial.run_name for trial in trials_of({"lora_rank": [8, 16], "learning_rate": [1e-4]}, "try", "cpu-demo")]
    assert names == ["try-lora_rank8-learning_rate0.0001", "try-lora_rank16-learning_rate0.0001"]


def test_a_failure_ends_only_its_run_and_a_second_call_runs_only_what_is_not_done(tmp_path):
    trials, ran = trials_of({"lora_rank": [4, 8, 16]}, "try", "cpu-demo"), []

    def run_one(name, settings):
        ran.append(settings["lora_rank"])
        if settings["lora_rank"] == 8 and len(ran) < 4:
            raise RuntimeError("trace\nout of memory")

    first = sweep(trials, tmp_path / "sweep.json", run_one)
    assert [(t.status, t.error) for t in first] == [("done", ""), ("failed", "out of memory"), ("done", "")]
    second = sweep(trials, tmp_path / "sweep.json", run_one)
    assert ran == [4, 8, 16, 8] and [t.status for t in second] == ["done"] * 3


def test_a_killed_sweep_goes_on_after_the_last_whole_run(tmp_path):
    trials, ran = trials_of({"lora_rank": [4, 8]}, "try", "cpu-demo"), []

    def run_one(name, settings):
        if len(ran) == 1:
            raise KeyboardInterrupt
        ran.append(name)

    with pytest.raises(KeyboardInterrupt):
        sweep(trials, tmp_path / "sweep.json", run_one)
    sweep(trials, tmp_path / "sweep.json", lambda name, settings: ran.append(name))
    assert ran == [trial.run_name for trial in trials]

