"""Does training in a notebook, with its live view, cost more than in a terminal?

    python benchmarks/notebook_overhead.py

Notebook 03 under papermill and `python -m lora_nb train` make the same run (the preset cpu-demo, with its validation
pictures and checkpoints) from the same manifest and caches; they take turns. Both are timed by the training itself, from
the first step to the last, so that the notebook's other cells do not count; whole times are given beside it.
"""

import argparse
import json
import shutil
import subprocess
import sys
import time
from statistics import median

import common

MOST = 0.03  # more a step
WAYS = {
    "in a terminal": ["train", "--preset", "cpu-demo"],
    "notebook 03": ["run", "--only", "03", "-p", "PRESET", "cpu-demo"],
}


def run(way: str, name: str, steps: int) -> dict:
    """One training of the run `name`: ms a step as its status.json says, and seconds of the whole command."""
    command = [sys.executable, "-m", "lora_nb", *WAYS[way], "--run-name", name, "--max-steps", str(steps)]
    began = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")
    return {"whole_s": time.perf_counter() - began}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    from lora_nb.config import load_config

    results = {way: [] for way in WAYS}
    with common.workplace() as root:
        config = load_config("cpu-demo", run_name="prepared")
        common.prepare_run(config)
        for number in range(options.repeats):
            for way, found in results.items():
                name = f"run_{number}_{len(found)}_{way.split()[-1]}"
                folder = shutil.copytree(config.run_dir, root / "outputs" / name)
                whole = run(way, name, options.steps)
                status = json.loads((folder / "status.json").read_text())
                assert (status["status"], status["step"]) == ("finished", options.steps), status
                found.append({"ms": 1000 * status["seconds"] / options.steps} | whole)
                print(f"{way}: {found[-1]}", flush=True)
                shutil.rmtree(folder)
    ms = {way: [one["ms"] for one in found] for way, found in results.items()}
    more = median(b / a for a, b in zip(*ms.values(), strict=True)) - 1
    rows = [[way, common.spread(ms[way]), common.spread([one["whole_s"] for one in found])] for way, found in results.items()]
    print(f"\n{common.machine()}; {options.steps} steps\n")
    print(common.table(("training", "ms a step, validation and saving included", "s of the whole command"), rows) + "\n")
    print(f"the notebook takes {more:+.1%} a step\n")
    return common.verdict({f"at most {MOST:.0%} more a step in the notebook": more <= MOST})


if __name__ == "__main__":
    sys.exit(main())
