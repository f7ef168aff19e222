"""Run a function on many inputs in processes that may crash or hang: each costs one input, never the run.

Workers are plain `python -m lora_nb.workers` children that speak JSON lines, so nothing is pickled, nothing forks a
process that holds a GPU, and a script without an `if __name__ == "__main__"` guard works too.
"""

import importlib
import json
import math
import os
import queue
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

START_LIMIT_S = 120  # importing Pillow and SciPy on a loaded machine
ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}  # there is a worker for every core


@dataclass(frozen=True)
class Failure:
    """Why one input gave no result: kind is "crashed", "hung" or "raised"."""

    kind: str
    detail: str


def default_workers() -> int:
    """The cores this process may use (a container's share, not the machine's count)."""
    try:
        return max(1, len(os.sched_getaffinity(0)))
    except AttributeError:  # macOS, Windows
        return os.cpu_count() or 1


def run_isolated(function: str, inputs, on_result, workers=None, time_limit_s=30.0) -> None:
    """Call `on_result(index, result | Failure)` for each of `inputs`, in the order in which they finish.

    function: "package.module:name", called with one JSON-able input, returning a JSON-able result.
    workers: processes; None for one a core, 0 to run in this process (no protection, for tests and debugging).
    time_limit_s: seconds for one input, after which its worker is killed.
    """
    inputs = list(enumerate(inputs))
    if workers == 0:
        call = _load(function)
        for index, item in inputs:
            on_result(index, _guarded(call, item))
        return
    todo, results = queue.SimpleQueue(), queue.Queue(maxsize=256)
    for job in inputs:
        todo.put(job)
    stop = threading.Event()
    count = min(workers or default_workers(), len(inputs))
    lanes = [_Lane(function, todo, results, stop, time_limit_s) for _ in range(count)]
    try:
        for _ in inputs:
            index, result = _next(results, lanes)
            if isinstance(result, BaseException):
                raise result
            on_result(index, result)
    finally:
        stop.set()
        for lane in lanes:
            lane.kill()


def _next(results, lanes):
    """The next result. Meanwhile workers that have passed their time limit are killed."""
    while True:
        for lane in lanes:
            lane.end_if_late()
        try:
            return results.get(timeout=0.1)
        except queue.Empty:
            continue


class _Lane(threading.Thread):
    """One thread that feeds one child process, and replaces the child when it dies."""

    def __init__(self, function, todo, results, stop, time_limit_s):
        super().__init__(daemon=True)
        self.function, self.todo, self.results, self.stop = function, todo, results, stop
        self.time_limit_s = time_limit_s
        self.child, self.hung, self.deadline = None, False, math.inf
        self.start()

    def run(self):
        try:
            while not self.stop.is_set():
                index, item = self.todo.get_nowait()
                self._put((index, self._ask(item)))
        except queue.Empty:
            pass
        except BaseException as error:  # the main thread must hear of it, or it waits for ever
            self._put((-1, error))
        finally:
            self.kill()

    def _put(self, result):
        while not self.stop.is_set():
            try:
                return self.results.put(result, timeout=0.5)
            except queue.Full:
                continue

    def _ask(self, item):
        if self.child is None or self.child.poll() is not None:
            self._start_child()
        self.hung, self.deadline = False, time.monotonic() + self.time_limit_s
        try:
            self.child.stdin.write(json.dumps(item).encode() + b"\n")
            self.child.stdin.flush()
            answer = self.child.stdout.readline()
        except OSError:
            answer = b""
        finally:
            self.deadline = math.inf
        if answer.endswith(b"\n"):
            return _unpack(json.loads(answer))
        self.kill()
        if self.hung:
            return Failure("hung", f"no answer within {self.time_limit_s:g} seconds")
        return Failure("crashed", f"the worker ended with code {self.child.returncode}")

    def _start_child(self):
        source = str(Path(__file__).resolve().parent.parent)
        paths = [source, *filter(None, [os.environ.get("PYTHONPATH")])]
        self.child = subprocess.Popen(
            [sys.executable, "-m", "lora_nb.workers", self.function],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,  # C libraries complain there about damaged pictures
            env={**os.environ, **ONE_THREAD, "PYTHONPATH": os.pathsep.join(paths)},
            start_new_session=os.name == "posix",  # an interrupt is for the parent, which ends its children
        )
        self.deadline = time.monotonic() + START_LIMIT_S
        ready = self.child.stdout.readline()
        self.deadline = math.inf
        if ready != b"ready\n":
            raise RuntimeError(f"a worker process did not start: {sys.executable} -m lora_nb.workers {self.function}")

    def end_if_late(self):
        if time.monotonic() > self.deadline:
            self.hung = True
            self.child.kill()

    def kill(self):
        child = self.child
        if child is not None:
            child.kill()
            child.wait()
            for pipe in (child.stdin, child.stdout):
                try:
                    pipe.close()
                except OSError:  # unsent bytes for a child that is gone
                    pass


def _load(function: str):
    module, name = function.split(":")
    return getattr(importlib.import_module(module), name)


def _guarded(call, item):
    try:
        return call(item)
    except Exception as error:  # decoders raise anything: ValueError, SyntaxError, TypeError, struct.error, MemoryError
        return Failure("raised", f"{type(error).__name__}: {error}")


def _unpack(answer):
    return Failure(*answer["failure"]) if "failure" in answer else answer["result"]


def serve(function: str) -> None:
    """The child: a JSON input a line on stdin, a JSON answer a line on stdout, until stdin closes."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever prints must not break the lines
    call = _load(function)
    answers.write(b"ready\n")
    answers.flush()
    for line in sys.stdin.buffer:
        result = _guarded(call, json.loads(line))
        failed = isinstance(result, Failure)
        answer = {"failure": [result.kind, result.detail]} if failed else {"result": result}
        answers.write(json.dumps(answer).encode() + b"\n")
        answers.flush()


if __name__ == "__main__":
    serve(sys.argv[1])
