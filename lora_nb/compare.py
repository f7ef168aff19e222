"""Several runs side by side: the settings in which they differ, what their chosen checkpoints score, what they cost."""

from pathlib import Path

from lora_nb.config import read_config
from lora_nb.errors import UserError
from lora_nb.events import Notice, ignore
from lora_nb.report import Table
from lora_nb.results import read_choice, read_scores
from lora_nb.runlog import read_status

OWN = ("run_name", "output_dir")  # differ by nature
SCORES = ("balance", "identity", "adherence", "leak", "copies")


def compare(run_dirs, on_event=ignore) -> list[dict]:
    """One row a run, best first: run, settings that differ, step, strength, verdict, scores, seconds, megabytes.

    Runs are ranked by the balance of their chosen checkpoint; those without a choice come last, in the order given. Raises
    UserError for a run that was not evaluated; a Notice says if they were measured with other prompts, seeds or scorers.
    """
    run_dirs = [Path(run_dir) for run_dir in run_dirs]
    if lacking := [run_dir.name for run_dir in run_dirs if not read_choice(run_dir)]:
        raise UserError(f"Not evaluated yet: {', '.join(lacking)}; run notebook 04 (or `python -m lora_nb evaluate`) on them.")
    configs = [read_config(run_dir / "config.yaml").model_dump() for run_dir in run_dirs]
    differing = [name for name in configs[0] if name not in OWN and any(config[name] != configs[0][name] for config in configs)]
    measured = {str((read_choice(run_dir)["plan"], read_choice(run_dir)["scorers"])) for run_dir in run_dirs}
    if len(measured) > 1:
        on_event(Notice("These runs were measured with different prompts, seeds or scorers, so their scores do not compare: evaluate them with the same."))  # fmt: skip
    rows = [_row(run_dir, {name: config[name] for name in differing}) for run_dir, config in zip(run_dirs, configs, strict=True)]
    return sorted(rows, key=lambda row: -1 if row["balance"] is None else row["balance"], reverse=True)


def _row(run_dir, settings) -> dict:
    choice = read_choice(run_dir)
    chosen = next((row for row in read_scores(run_dir) if row.get("chosen")), {})
    file = run_dir / choice["file"] if choice.get("file") else None
    return {
        "run": run_dir.name, **settings, "step": choice["step"], "strength": choice["strength"], "verdict": choice["verdict"],
        **{name: chosen.get(name) for name in SCORES}, "balance_low": chosen.get("balance_low"), "balance_high": chosen.get("balance_high"),
        "seconds": read_status(run_dir).get("seconds"), "megabytes": file.stat().st_size / 1e6 if file and file.is_file() else None,
    }  # fmt: skip


def comparison_table(rows: list[dict]) -> Table:
    """`compare`'s rows to look at, the best first."""
    names = [name for name in rows[0] if not name.startswith("balance_")]
    cells = [tuple(_cell(row, name) for name in names) for row in rows]
    return Table(["training" if name == "verdict" else name for name in names], cells)


def _cell(row, name) -> str:
    value = row[name]
    if value is None:
        return "-"
    if name == "balance":
        return f"{value:.2f} [{row['balance_low']:.2f}, {row['balance_high']:.2f}]"
    if name in SCORES:
        return f"{value:.3f}"
    return f"{value:.1f}" if name in ("seconds", "megabytes") else str(value)
