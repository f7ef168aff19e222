"""Trainings in processes of their own: killed by SIGKILL, and two under `accelerate launch`.

All fifty kills, twenty of them inside a save: `pytest -m slow tests/test_train_processes.py`.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from lora_nb import cache
from lora_nb.checkpoint import LORA
from lora_nb.manifest import PLAIN
from lora_nb.runlog import read_metrics
from lora_nb.train import train

CHILD = Path(__file__).parent / "train_child.py"


def prepared(make_run, **settings):
    config = make_run(lora_target_modules="attention", **settings)
    cache.encode(config.run_dir / PLAIN, config.base_model)
    return config, config.save()


def killed(make_run, kills, inside_saves, **settings):
    config, path = prepared(make_run, save_every=2, save_total_limit=2, log_every=3, gradient_accumulation_steps=2, batch_size=1, **settings)
    command = [sys.executable, CHILD, path, str(kills), str(inside_saves), "1"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    return json.loads(result.stdout.splitlines()[-1])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_handful_of_kills(make_run):
    counted = killed(make_run, 4, 2, max_steps=8)
    assert counted["killed"] >= 4 and counted["inside_saves"] >= 2 and counted["whole_runs"] >= 1


@pytest.mark.slow
def test_fifty_kills_twenty_inside_a_save(make_run):
    counted = killed(make_run, 50, 20, max_steps=16)
    print(counted)
    assert counted["killed"] >= 50 and counted["inside_saves"] >= 20 and counted["whole_runs"] >= 3


def test_two_processes_are_one(make_run):
    """Two with batch 1 x 2 see what one sees with batch 4, and end with the same weights but for rounding."""
    one, _ = prepared(make_run, run_name="one", batch_size=4, lora_rank=2)
    train(one)
    two, path = prepared(make_run, run_name="two", batch_size=1, gradient_accumulation_steps=2, lora_rank=2)
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1",
              "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]  # fmt: skip
    environment = os.environ | {"ACCELERATE_USE_CPU": "true"}  # --multi_gpu starts processes; this makes them meet over gloo
    result = subprocess.run([*launch, CHILD, path], capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr[-2000:]
    assert result.stdout.count("finished") == 2
    a, b = (load_file(config.run_dir / "checkpoints" / "checkpoint-6" / LORA) for config in (one, two))
    largest = max(value.abs().max() for value in a.values())
    assert len(a) > 0 and max((a[name] - b[name]).abs().max() for name in a) < 1e-3 * largest
    losses = [[row["loss"] for row in read_metrics(config.run_dir)] for config in (one, two)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5) and len(losses[0]) == 3
