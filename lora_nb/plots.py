"""Rows and pictures in, matplotlib Figure out. Imports none of our modules and opens no run folder."""

from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

# ---- evaluation: rows of scores.csv and pictures.json


def score_curves(rows):
    """Likeness, obedience and leak by step at full strength, each with its interval; the base dotted, the choice marked."""
    base, full = rows[0], sorted((row for row in rows if row.get("strength") == 1), key=lambda row: row["step"])
    figure = Figure(figsize=(10, 2.8), layout="constrained")
    titles = {"identity": "likeness to the references", "adherence": "obedience to the prompt", "leak": "leak without the trigger"}
    for axes, (name, title) in zip(figure.subplots(1, 3), titles.items(), strict=True):
        steps, means = [row["step"] for row in full], [row[name] for row in full]
        axes.fill_between(steps, [row[f"{name}_low"] for row in full], [row[f"{name}_high"] for row in full], alpha=0.2)
        axes.plot(steps, means, "o-")
        axes.axhline(base.get(name) or 0.0, color="grey", linestyle=":", label="base")
        for row in rows:
            if row.get("chosen"):
                axes.plot(row["step"], row[name], "*", markersize=15, color="tab:red", label=f"chosen, at {row['strength']:g}")
        axes.set(title=title, xlabel="step")
        axes.legend(fontsize="small")
    return figure


def score_front(rows):
    """Every candidate by likeness and obedience, with intervals; up and right is better, the chosen one a star."""
    figure = Figure(figsize=(6, 4.4), layout="constrained")
    axes = figure.subplots()
    for row in rows:
        x, y = row["identity"], row["adherence"]
        spans = [[[mid - row[f"{name}_low"]], [row[f"{name}_high"] - mid]] for name, mid in (("identity", x), ("adherence", y))]
        colour = "tab:red" if row.get("chosen") else "grey" if row["step"] == 0 else "tab:blue"
        axes.errorbar(x, y, xerr=spans[0], yerr=spans[1], fmt="*" if row.get("chosen") else "o", color=colour, alpha=0.6, markersize=12 if row.get("chosen") else 5)
        name = "base" if row["step"] == 0 else f"{row['step']}" + ("" if row["strength"] == 1 else f" at {row['strength']:g}")
        axes.annotate(name, (x, y), textcoords="offset points", xytext=(6, 5), fontsize=8)
    axes.set(xlabel="likeness to the references →", ylabel="obedience to the prompt →")
    return figure


def loss_bands(rows):
    """Denoising loss on held-out pictures as a share of the base's, by step, a line a timestep band; below 1 is learned."""
    full = sorted((row for row in rows if row.get("strength") == 1), key=lambda row: row["step"])
    figure = Figure(figsize=(6, 3), layout="constrained")
    axes = figure.subplots()
    steps = [0, *(row["step"] for row in full)]
    for name in [name for name in full[0] if name.startswith("loss_")]:
        axes.plot(steps, [1, *(row[name] for row in full)], "o-", label=name.removeprefix("loss_"))
    axes.plot(steps, [1, *(row["train_loss"] for row in full)], "k--", label="training pictures")
    axes.axhline(1, color="grey", linestyle=":")
    axes.set(xlabel="step", ylabel="loss / base's loss")
    axes.legend(fontsize="small")
    return figure


def learning_map(pictures, steps):
    """A row a training picture, a column a step: how much of the base's loss is left. Light rows were not learned."""
    figure = Figure(figsize=(6, 0.9 + 0.16 * len(pictures)), layout="constrained")
    axes = figure.subplots()
    drawn = axes.imshow([row["ratios"] for row in pictures], aspect="auto", cmap="viridis", vmax=1)
    axes.set_xticks(range(len(steps)), steps)
    labels = [row["image_path"].rsplit("/", 1)[-1] + (f" ({row['verdict']})" if row["verdict"] != "learned" else "") for row in pictures]
    axes.set_yticks(range(len(pictures)), labels, fontsize=7)
    axes.set_xlabel("step")
    figure.colorbar(drawn, label="loss / base's loss")
    return figure


def training_curves(rows):
    """Loss, with its running mean, and learning rate by step, from rows of training_metrics.csv."""
    figure = Figure(figsize=(10, 2.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    steps, losses = [row["step"] for row in rows], [row["loss"] for row in rows]
    means = [sum(losses[max(0, n - 9) : n + 1]) / len(losses[max(0, n - 9) : n + 1]) for n in range(len(losses))]
    left.plot(steps, losses, alpha=0.3)
    left.plot(steps, means, label="mean of ten rows")
    left.set(title="loss", xlabel="step")
    left.legend(fontsize="small")
    right.plot(steps, [row["learning_rate"] for row in rows])
    right.set(title="learning rate", xlabel="step")
    return figure


# ---- data set: sizes, captions, words, pictures with their reasons


def sizes_against_buckets(sizes, buckets, most=5000):
    """Every picture's (width, height) as a dot, every bucket as a square that the dots are scaled to; both in pixels.

    Dots on a dashed line keep their aspect ratio; those left of or below their bucket must be enlarged.
    """
    shown, note = _sampled(sizes, most)
    figure = Figure(figsize=(6, 5), layout="constrained")
    axes = figure.subplots()
    far = max([side for size in [*shown, *buckets] for side in size], default=1) * 1.05
    for width, height in buckets:
        scale = far / max(width, height)
        axes.plot([0, width * scale], [0, height * scale], color="0.85", linewidth=0.7, linestyle="--", zorder=0)
    axes.scatter(*zip(*buckets, strict=True), marker="s", s=40, facecolors="none", edgecolors="tab:orange", label="buckets in use")
    axes.scatter([width for width, _ in shown], [height for _, height in shown], s=18, alpha=0.6, label=f"pictures{note}")
    axes.set(xlabel="width in pixels", ylabel="height in pixels", xlim=(0, far), ylim=(0, far), aspect="equal")
    axes.legend(fontsize="small")
    return figure


def caption_lengths(tokens, limit=75):
    """How many captions have how many CLIP tokens, and where the text encoder stops reading."""
    figure = Figure(figsize=(6, 2.6), layout="constrained")
    axes = figure.subplots()
    axes.hist(tokens, bins=range(0, max([limit, *tokens]) + 6, 3), color="tab:blue")
    axes.axvline(limit, color="tab:red", linestyle=":", label=f"{limit} tokens: the rest is cut")
    axes.set(xlabel="tokens in a caption", ylabel="captions")
    axes.legend(fontsize="small")
    return figure


def word_counts(words, captions):
    """(word, captions that hold it) as bars, of `captions` in all."""
    figure = Figure(figsize=(6, 0.6 + 0.22 * max(1, len(words))), layout="constrained")
    axes = figure.subplots()
    axes.barh([word for word, _ in words][::-1], [100 * count / max(1, captions) for _, count in words][::-1], color="tab:blue")
    axes.set(xlabel="per cent of the captions", xlim=(0, 100))
    axes.tick_params(axis="y", labelsize="small")
    return figure


def contact_sheet(cells, columns=6):
    """Pictures in a grid; a cell is (image or None, title, colour of the title). None is a picture that cannot be opened."""
    rows = max(1, -(-len(cells) // columns))
    figure = Figure(figsize=(2.1 * columns, 2.5 * rows), dpi=70, layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes in grid:
        axes.set_axis_off()
    for axes, (image, title, colour) in zip(grid, cells, strict=False):
        axes.imshow(image) if image is not None else axes.text(0.5, 0.5, "✕", fontsize=40, color=colour, ha="center", va="center")
        axes.set_title(title, fontsize=7, color=colour, wrap=True)
    return figure


def crop_preview(cells):
    """Before and after: a cell is (original, (left, top, right, bottom) kept of it in its pixels, the bucket's picture)."""
    figure = Figure(figsize=(2.3 * max(1, len(cells)), 4.8), dpi=70, layout="constrained")
    grid = figure.subplots(2, max(1, len(cells)), squeeze=False)
    for (above, below), (before, (left, top, right, bottom), after) in zip(grid.T, cells, strict=False):
        above.imshow(before)
        above.add_patch(Rectangle((left, top), right - left, bottom - top, fill=False, edgecolor="red", linewidth=2))
        above.set_title(f"{before.width} x {before.height}", fontsize=8)
        below.imshow(after)
        below.set_title(f"{after.width} x {after.height}", fontsize=8)
    for axes in grid.ravel():
        axes.set_axis_off()
    return figure


def _sampled(rows, most):
    """At most `most` rows evenly taken, and a note that says so."""
    rows = list(rows)
    if len(rows) <= most:
        return rows, ""
    return rows[:: -(-len(rows) // most)], f" (a sample of {len(rows):,})"
