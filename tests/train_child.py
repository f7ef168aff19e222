"""A training in a process of its own: `python train_child.py CONFIG`, or with KILLS INSIDE_SAVES SEED behind it.

With kills, a parent that has imported everything forks one child after another and ends each by SIGKILL, some at a
random moment and some at a random file operation inside a save, until that many were killed; every run that comes
through is compared, byte for byte, with one that was never killed. Prints what it counted as JSON.
"""

import json
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"

import torch

from lora_nb import checkpoint
from lora_nb import train as train_module
from lora_nb.config import read_config

PRECIOUS = ("checkpoints", "training_metrics.csv")


def result_of(run_dir, step):
    folder = run_dir / "checkpoints" / f"checkpoint-{step}"
    files = [folder / checkpoint.LORA, folder / checkpoint.OPTIMIZER, run_dir / "training_metrics.csv"]
    return [file.read_bytes() for file in files]


def start(config, arm=lambda: None) -> int:
    """A forked child that trains; returns its process id."""
    if pid := os.fork():
        return pid
    arm()
    train_module.train(config)
    os._exit(0)


def kill_inside_a_save(rng):
    """Count file operations of the next saves and die at one of them."""
    left = rng.randint(1, 25)

    def counted(function):
        def call(*args, **kwargs):
            nonlocal left
            left -= 1
            if left == 0:
                Path(os.environ["KILL_LOG"]).write_text("inside")
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return call

    save = checkpoint.save_checkpoint

    def watched(*args, **kwargs):
        real = os.fsync, os.replace, os.unlink, os.rmdir
        os.fsync, os.replace, os.unlink, os.rmdir = map(counted, real)
        try:
            return save(*args, **kwargs)
        finally:
            os.fsync, os.replace, os.unlink, os.rmdir = real

    train_module.save_checkpoint = watched


def clear(run_dir):
    shutil.rmtree(run_dir / "checkpoints", ignore_errors=True)
    (run_dir / "training_metrics.csv").unlink(missing_ok=True)


def kill_often(config, kills, inside_saves, seed):
    rng = random.Random(seed)
    run_dir, log = config.run_dir, config.run_dir / "killed"
    os.environ["KILL_LOG"] = str(log)
    began = time.monotonic()
    assert os.waitpid(start(config), 0)[1] == 0
    whole, duration = result_of(run_dir, config.max_steps), time.monotonic() - began
    clear(run_dir)
    counted = {"killed": 0, "inside_saves": 0, "whole_runs": 0}
    while counted["killed"] < kills or not counted["whole_runs"] or (run_dir / "checkpoints").exists():
        log.unlink(missing_ok=True)
        enough = counted["killed"] >= kills
        inside = not enough and counted["inside_saves"] < inside_saves
        pid = start(config, (lambda: kill_inside_a_save(rng)) if inside else lambda: None)
        rng.random()  # the child's copy moves on by itself
        if not inside and not enough:
            time.sleep(rng.uniform(0.3, 0.8) * duration)
            os.kill(pid, signal.SIGKILL)
        status = os.waitpid(pid, 0)[1]
        if os.WIFSIGNALED(status):
            counted["killed"] += 1
            counted["inside_saves"] += log.exists()
            continue
        assert status == 0, "a continued training failed"
        assert result_of(run_dir, config.max_steps) == whole, "a continued run is not the run that was never killed"
        counted["whole_runs"] += 1
        clear(run_dir)
    return counted


if __name__ == "__main__":
    torch.set_num_threads(1)
    settings = read_config(sys.argv[1])
    if len(sys.argv) > 2:
        print(json.dumps(kill_often(settings, *map(int, sys.argv[2:5]))))
    else:
        print(train_module.train(settings).status)
