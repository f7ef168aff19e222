"""A crash, a hang or an exception in a worker costs one input and is told apart."""

import os
import time

import pytest

from lora_nb.workers import Failure, default_workers, run_isolated


def misbehave(item):
    """Runs in the worker."""
    if item == "crash":
        os.abort()
    if item == "exit":
        os._exit(3)
    if item == "hang":
        time.sleep(600)
    if item == "raise":
        raise ValueError("no good")
    if item == "print":
        print("a library that talks on stdout")
    return {"said": item}


@pytest.fixture
def on_path(monkeypatch):
    """The workers must find this file as a module."""
    monkeypatch.setenv("PYTHONPATH", os.path.dirname(__file__))


def collect(items, **options):
    results = {}
    run_isolated("test_workers:misbehave", items, results.__setitem__, **options)
    return [results[index] for index in range(len(items))]


@pytest.mark.parametrize("workers", [1, 3])
def test_each_failure_costs_one_input(on_path, workers):
    items = ["one", "crash", "two", "hang", "raise", "print", "exit", "last\n\udcff"]
    results = collect(items, workers=workers, time_limit_s=1.5)
    kinds = [result.kind if isinstance(result, Failure) else result["said"] for result in results]
    assert kinds == ["one", "crashed", "two", "hung", "raised", "print", "crashed", "last\n\udcff"]
    assert "no good" in results[4].detail


def test_no_worker_is_left_behind_when_the_watcher_stops(on_path):
    import psutil

    def stop(index, result):
        raise KeyboardInterrupt

    before = set(psutil.Process().children())
    with pytest.raises(KeyboardInterrupt):
        run_isolated("test_workers:misbehave", ["one", "hang", "hang"], stop, workers=2)
    time.sleep(0.3)
    assert set(psutil.Process().children()) <= before


def test_a_function_that_does_not_exist_is_an_error_not_a_hang(on_path):
    with pytest.raises(RuntimeError, match="did not start"):
        run_isolated("test_workers:nothing", ["one"], print, workers=1)


def test_nothing_to_do_starts_nothing():
    run_isolated("nowhere:nothing", [], print)
    assert default_workers() >= 1
