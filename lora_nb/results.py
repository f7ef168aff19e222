"""What an evaluation leaves behind: rows of scores, grids as PNG, what was learned of each picture, the chosen file."""

import csv
import io
import json
from pathlib import Path

import numpy as np

from lora_nb import scores
from lora_nb.choose import balance
from lora_nb.errors import UserError
from lora_nb.export_run import export_checkpoint
from lora_nb.files import sha256_file, write_atomic, write_json
from lora_nb.findings import CODES
from lora_nb.grids import labelled_grid
from lora_nb.report import Table
from lora_nb.sampling import write_png

BANDS = ("detail", "texture", "shapes", "layout")  # of loss_grid.TIMESTEPS
WITH_INTERVALS = ("identity", "adherence", "diversity", "leak", "drift")


# ---- numbers


def score_rows(evaluation) -> list[dict]:
    """One flat row for the base (step 0) and for each candidate measured, in the order of scores.csv."""
    scale, choice = evaluation.scale(), evaluation.choice
    rows = [_row(0, 0.0, {"identity": scale.base_identity, "adherence": scale.base_adherence})]
    for candidate in sorted(evaluation.candidates.values(), key=lambda c: (c.step, c.strength)):
        row = _row(candidate.step, candidate.strength, {name: getattr(candidate, name) for name in WITH_INTERVALS})
        row |= dict(zip(("balance", "balance_low", "balance_high"), balance(candidate, scale), strict=True))
        row |= {"copies": candidate.copies, "held_out_loss": candidate.held_out_loss, "train_loss": candidate.train_loss}
        if evaluation.samples is not None and candidate.strength == 1:
            row |= _bands(evaluation, candidate.step)
        row["chosen"] = bool(choice and (choice.step, choice.strength) == (candidate.step, candidate.strength))
        rows.append(row)
    return rows


def _row(step, strength, grids) -> dict:
    row = {"step": step, "strength": strength}
    for name, values in grids.items():
        mean, low, high = scores.estimate(values)
        row |= {name: mean, f"{name}_low": low, f"{name}_high": high}
    return row


def _bands(evaluation, step) -> dict:
    part = "held_out" if evaluation.manifest.held_out() else "train"
    ratios = scores.loss_ratios(evaluation.losses(step)[part], evaluation.losses(0)[part])
    return {f"loss_{band}": float(ratio) for band, ratio in zip(BANDS, ratios, strict=True)}


def score_table(rows: list[dict]) -> Table:
    """Rows of scores to look at: means with their 95 % intervals, a star at the chosen one."""
    names = [name for name in ("identity", "adherence", "diversity", "leak", "drift", "balance", "votes_won") if any(row.get(name) is not None for row in rows)]
    cells = [
        (
            ("★ " if row.get("chosen") else "") + ("base" if row["step"] == 0 else f"step {row['step']}"),
            f"{row['strength']:g}" if row["step"] else "", *(_interval(row, name) for name in names),
            "" if row.get("copies") is None else f"{row['copies']:.0%}", _fixed(row.get("held_out_loss")),
        )
        for row in rows
    ]  # fmt: skip
    return Table(("candidate", "strength", *names, "near copies", "held-out loss"), cells)


def _interval(row, name) -> str:
    return f"{row[name]:.3f} [{_fixed(row[f'{name}_low'])}, {_fixed(row[f'{name}_high'])}]" if row.get(name) is not None else ""


def _fixed(value) -> str:
    return "" if value is None or np.isnan(value) else f"{value:.3f}"


def picture_learning(evaluation) -> list[dict]:
    """How far each training picture was learned: loss ratios to the base by step, "first", "learned", "last" or "never", a reason.

    Learned means half of the way down that the median picture goes; never, not even at the last step.
    """
    base, steps = evaluation.losses(0)["train"], evaluation.steps
    ratios = np.stack([scores.learned(evaluation.losses(step)["train"], base) for step in steps])  # [steps, pictures]
    halfway = (1 + np.median(ratios[-1])) / 2
    below = ratios <= halfway
    place = np.where(below.any(axis=0), below.argmax(axis=0), len(steps))
    order = ratios.mean(axis=0)
    rows = []
    for n, sample in enumerate(evaluation.manifest.train()):
        never = place[n] == len(steps)
        verdict = "never" if never else "first" if order[n] <= np.quantile(order, 0.1) else "last" if order[n] >= np.quantile(order, 0.9) else "learned"  # fmt: skip
        rows.append({
            "image_path": sample.image_path, "verdict": verdict, "learned_by": None if never else steps[place[n]],
            "ratios": [float(ratio) for ratio in ratios[:, n]], "reason": _reason(evaluation, sample) if verdict in ("never", "last") else "",
        })  # fmt: skip
    return sorted(rows, key=lambda row: row["ratios"][-1])


def _reason(evaluation, sample) -> str:
    """The likely cause, from what notebook 01 found on the picture."""
    if (trigger := evaluation.manifest.metadata.trigger_token) and trigger.lower() not in sample.caption.lower():
        return f"its caption lacks {trigger}"
    bad = [code for code in sample.findings if CODES.get(code, ("info",))[0] != "info"]
    if bad:
        return "notebook 01 found: " + ", ".join(bad)
    return "nothing was found on it; look whether its view, light or clothes are unlike the others"


# ---- pictures: each grid is saved as evaluation/grids/<name>.png, whose path is returned


def before_after(evaluation, step: int, strength: float = 1.0) -> Path:
    """Base above, LoRA below, at the same prompts and the first seed."""
    base, lora = evaluation.draw(0).pictures, evaluation.draw(step, strength).pictures
    rows = [[row[0] for row in base], [row[0] for row in lora]]
    return _save(evaluation, "before_after", labelled_grid(rows, ["base", f"LoRA, step {step}"], evaluation.plan.prompts))


def checkpoint_grid(evaluation) -> Path:
    """A row a prompt, a column a checkpoint, base first, all at the first seed; the chosen column is framed."""
    steps = [0, *evaluation.steps]
    drawn = [evaluation.draw(step).pictures for step in steps]
    rows = [[pictures[n][0] for pictures in drawn] for n in range(len(evaluation.plan.prompts))]
    chosen = [steps.index(evaluation.choice.step)] if evaluation.choice and evaluation.choice.step else []
    marks = [(row, column) for column in chosen for row in range(len(rows))]
    labels = ["base", *(f"step {step}" for step in steps[1:])]
    return _save(evaluation, "checkpoints", labelled_grid(rows, evaluation.plan.prompts, labels, marks=marks))


def quiet_grid(evaluation, step: int, strength: float = 1.0) -> Path:
    """Prompts that do not call the character: the base's pictures above, the LoRA's below, two seeds at most."""
    prompts, seeds = evaluation.plan.quiet_prompts, range(min(2, len(evaluation.plan.seeds)))
    grids = [evaluation.draw(*which).quiet for which in ((0,), (step, strength))]
    rows = [[row[seed] for row in grid for seed in seeds] for grid in grids]
    labels = [prompt or "(empty prompt)" for prompt in prompts for _ in seeds]
    return _save(evaluation, "without_trigger", labelled_grid(rows, ["base", f"LoRA, step {step}"], labels))


def strength_grid(evaluation, step: int, prompts: int = 4) -> Path:
    """A row a strength that was measured at `step`, a column a prompt."""
    strengths = sorted(strength for at, strength in evaluation.candidates if at == step)
    rows = [[row[0] for row in evaluation.draw(step, strength).pictures[:prompts]] for strength in strengths]
    labels = [f"strength {strength:g}" for strength in strengths]
    return _save(evaluation, "strengths", labelled_grid(rows, labels, evaluation.plan.prompts[:prompts]))


def copies_grid(evaluation, step: int, strength: float = 1.0, pairs: int = 6) -> Path:
    """The samples nearest to a training picture above, those training pictures below; near copies are framed."""
    copies = evaluation.copies(step, strength)
    paths = [path for row in evaluation.draw(step, strength).pictures for path in row]
    order = np.argsort(-(copies.similarity + 2 * copies.copied))[:pairs]
    training = evaluation.training_pictures
    rows = [[paths[n] for n in order], [training[copies.nearest[n]] for n in order]]
    labels = [f"{copies.similarity[n]:.2f}, {copies.hash_distance[n]:.0%} of bits" for n in order]
    marks = [(row, column) for column, n in enumerate(order) if copies.copied[n] for row in (0, 1)]
    return _save(evaluation, "nearest", labelled_grid(rows, ["sample", "nearest training picture"], labels, marks=marks))


def _save(evaluation, name, picture) -> Path:
    return write_png(evaluation.folder / "grids" / f"{name}.png", picture)


# ---- files


def save_results(evaluation) -> Path:
    """scores.csv, pictures.json (what was learned of each), choice.json and the chosen LoRA in final/. Returns the folder."""
    rows = score_rows(evaluation)
    write_atomic(evaluation.folder / "scores.csv", _csv(rows))
    if evaluation.samples is not None:
        learned = picture_learning(evaluation)
        write_json(evaluation.folder / "pictures.json", {"steps": evaluation.steps, "pictures": learned})
    choice = evaluation.choice
    if choice is None:
        raise UserError("Nothing has been chosen yet: call choose() first.")
    file = copy_chosen(evaluation) if choice.step else None
    record = choice.as_dict() | {
        "file": file.relative_to(evaluation.run_dir).as_posix() if file else None,
        "checkpoint": sha256_file(evaluation.checkpoints[choice.step]) if file else None,
        "plan": evaluation.plan.as_dict(),
        "scorers": [evaluation.embedder.name, evaluation.picture_embedder.name],
        "identity_ceiling": evaluation.scale().identity_ceiling,
        "references": len(evaluation.references),
        "held_out": evaluation.has_held_out,
    }
    write_json(evaluation.folder / "choice.json", record)
    return evaluation.folder


def copy_chosen(evaluation) -> Path:
    """The chosen checkpoint as final/<run>_chosen.safetensors, for every program; it is to be loaded at the chosen strength.

    It is exported and proved as any checkpoint is, unless it lies there already.
    """
    run_dir, step = evaluation.run_dir, evaluation.choice.step
    chosen = run_dir / "final" / f"{run_dir.name}_chosen.safetensors"
    if chosen.is_file() and read_choice(run_dir).get("checkpoint") == sha256_file(evaluation.checkpoints[step]):
        return chosen
    if evaluation.checkpoints[step].parent == chosen.parent:  # a run of which only final/ was kept
        files = [chosen.with_name(f"{run_dir.name}.safetensors")]
    else:
        files = export_checkpoint(run_dir, step, formats=("kohya",)).files
    if not files:
        raise UserError(f"Step {step} could not be exported truthfully; run `python -m lora_nb export {run_dir.name} --checkpoint {step}` to see why.")
    return write_atomic(chosen, files[0].read_bytes())


def read_scores(run_dir) -> list[dict]:
    """The rows of a run's scores.csv as numbers; [] before its first evaluation."""
    path = Path(run_dir) / "evaluation" / "scores.csv"
    if not path.is_file():
        return []
    with open(path, encoding="utf-8", newline="") as file:
        return [{name: _number(value) for name, value in row.items()} for row in csv.DictReader(file)]


def read_choice(run_dir) -> dict:
    """A run's choice.json, {} before its first evaluation."""
    path = Path(run_dir) / "evaluation" / "choice.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _csv(rows) -> str:
    names = list(dict.fromkeys(name for row in sorted(rows, key=len, reverse=True) for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows({name: _text(value) for name, value in row.items()} for row in rows)
    return text.getvalue()


def _text(value):
    if isinstance(value, float):
        return "" if np.isnan(value) else f"{value:.6g}"
    return value


def _number(value):
    if value in ("", "True", "False"):
        return {"": None, "True": True, "False": False}[value]
    return int(value) if value.lstrip("-").isdigit() else float(value)
