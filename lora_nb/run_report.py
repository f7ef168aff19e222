"""One self-contained HTML file of a run: data, settings, curves, grids, scores, choice, environment. Light enough to send.

Everything is read back from the run's folder, so that it can be written anywhere and at any time.
"""

import base64
import html
import io
import json
from pathlib import Path

from PIL import Image

from lora_nb import plots
from lora_nb.config import read_config
from lora_nb.errors import UserError
from lora_nb.files import write_atomic
from lora_nb.manifest import best_manifest, read_manifest
from lora_nb.metadata import library_versions, public_value
from lora_nb.report import Table
from lora_nb.results import read_choice, read_scores, score_table
from lora_nb.runlog import read_metrics
from lora_nb.votes import Votes

WIDTH = 1100  # pixels, of the widest picture in the file
GRIDS = {
    "before_after": "Before and after: the same prompts and seeds. Look for the character below, and for the place, framing and mood that the prompt asks for in both rows.",
    "checkpoints": "Checkpoints from left to right: look for the column where the character is all there and the prompts are still followed. The chosen one is framed.",
    "strengths": "Strengths of one checkpoint: lower strength keeps more of the base, higher draws more of the character.",
    "without_trigger": "Prompts that do not call the character: both rows should show the same, other, people.",
    "nearest": "Samples above, the nearest training picture below: framed pairs are near copies.",
}  # fmt: skip
STYLE = """body{font:15px/1.5 system-ui,sans-serif;max-width:1120px;margin:2em auto;padding:0 1em;color:#222}
h1{font-size:1.6em}h2{font-size:1.2em;margin-top:2em;border-bottom:1px solid #ddd}img{max-width:100%;height:auto}
table{border-collapse:collapse;font-size:13px}td,th{padding:2px 10px 2px 0;text-align:left;border-bottom:1px solid #eee}
.choice{background:#f3f8f3;border-left:4px solid #2a7;padding:.6em 1em}.bad{background:#fbf3f0;border-color:#c53}
small{color:#777}"""


def write_report(run_dir, quality: int = 82) -> Path:
    """Write evaluation/report.html of the run in `run_dir`. quality: JPEG's, of the pictures in it. Raises UserError."""
    run_dir = Path(run_dir)
    choice, rows = read_choice(run_dir), read_scores(run_dir)
    if not choice or not rows:
        raise UserError(f"{run_dir} has not been evaluated yet: run notebook 04 (or `python -m lora_nb evaluate`) first.")
    rows = Votes(run_dir).join(rows)
    sections = {
        "": _choice(choice),
        "Pictures": "".join(_grid(run_dir, name, words, quality) for name, words in GRIDS.items()),
        "Scores": _scores(rows, choice),
        "Each training picture": _learning(run_dir),
        "Training": _training(run_dir),
        "Data": _data(run_dir),
        "Settings": _settings(run_dir),
        "Made with": _table(("", ""), library_versions().items()),
    }
    body = "".join((f"<h2>{title}</h2>" if title else "") + content for title, content in sections.items() if content)
    title = f"LoRA report: {html.escape(run_dir.name)}"
    page = f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title><style>{STYLE}</style><h1>{title}</h1>{body}</html>\n'
    return write_atomic(run_dir / "evaluation" / "report.html", page)


def _choice(choice) -> str:
    reasons = "".join(f"<li>{html.escape(reason)}</li>" for reason in choice["reasons"])
    file = f"<p>The file: <code>{html.escape(choice['file'])}</code></p>" if choice.get("file") else ""
    bad = "" if choice["verdict"] in ("good", "overtrained", "undertrained") else " bad"
    return f'<div class="choice{bad}"><b>{html.escape(choice["sentence"])}</b><ul>{reasons}</ul>{file}</div>'


def _grid(run_dir, name, words, quality) -> str:
    path = run_dir / "evaluation" / "grids" / f"{name}.png"
    return f"<p>{words}</p>{_jpeg(path, quality)}" if path.is_file() else ""


def _jpeg(path, quality) -> str:
    picture, buffer = Image.open(path).convert("RGB"), io.BytesIO()
    picture.thumbnail((WIDTH, 4 * WIDTH))
    picture.save(buffer, "JPEG", quality=quality, optimize=True)
    return _image("jpeg", buffer.getvalue())


def _figure(figure) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=90)
    return _image("png", buffer.getvalue())


def _image(kind, data: bytes) -> str:
    return f'<img src="data:image/{kind};base64,{base64.b64encode(data).decode()}">'


def _scores(rows, choice) -> str:
    """Table with intervals, the curves, the front and the losses."""
    scorers = " and ".join(html.escape(str(public_value(name))) for name in dict.fromkeys(choice["scorers"]))
    references = "held-out pictures" if choice.get("held_out", True) else "training pictures, as none are held out: it flatters a LoRA that copies"
    words = (
        f"<p><small>Means with 95 % bootstrap intervals over prompts and seeds, by {scorers}. Identity: cosine to {choice['references']} "
        f"{references}; adherence: to the prompt without the character's traits; leak: share of the character in prompts without the "
        "trigger; drift: how far those moved, 1 as far as another seed; held-out loss: as a share of the base's.</small></p>"
    )
    figures = [plots.score_curves(rows), plots.score_front(rows)]
    if any(name.startswith("loss_") for name in rows[0]) and any(row.get("held_out_loss") for row in rows):
        figures.append(plots.loss_bands(rows))
    return score_table(rows)._repr_html_() + words + "".join(map(_figure, figures))


def _learning(run_dir) -> str:
    path = run_dir / "evaluation" / "pictures.json"
    if not path.is_file():
        return ""
    content = json.loads(path.read_text(encoding="utf-8"))
    hard = [(row["image_path"], row["verdict"], f"{row['ratios'][-1]:.2f}", row["reason"]) for row in content["pictures"] if row["verdict"] in ("never", "last")]
    words = "<p>How much of the base's denoising loss is left on each training picture; the pictures learned last or never:</p>"
    return words + _table(("picture", "learned", "loss / base's", "likely reason"), hard) + _figure(plots.learning_map(content["pictures"], content["steps"]))


def _training(run_dir) -> str:
    rows, summary = read_metrics(run_dir), run_dir / "training_summary.txt"
    figure = _figure(plots.training_curves(rows)) if rows else ""
    text = html.escape(summary.read_text(encoding="utf-8")) if summary.is_file() else ""
    return figure + (f"<pre>{text}</pre>" if text else "")


def _data(run_dir) -> str:
    manifest = read_manifest(best_manifest(run_dir))
    facts = {
        "training pictures": len(manifest.train()), "held-out pictures": len(manifest.held_out()), "excluded": len(manifest.excluded),
        "trigger": manifest.metadata.trigger_token or "", "resolution": f"{manifest.metadata.resolution} px",
        "buckets": ", ".join(sorted({f"{width}×{height}" for width, height in (sample.bucket for sample in manifest.samples)})),
    }  # fmt: skip
    return _table(("", ""), facts.items())


def _settings(run_dir) -> str:
    differences = read_config(run_dir / "config.yaml").differences()
    hidden = {"dataset_path", "output_dir"}  # paths of this machine
    rows = [(name, public_value(default), public_value(value), why) for name, default, value, why in differences if name not in hidden]
    return "<p>Settings that are not at their default:</p>" + _table(("setting", "default", "here", "why"), rows)


def _table(head, rows) -> str:
    return Table(head, rows, page_size=1000)._repr_html_()
