"""Notebook widgets, of core ipywidgets only. Callbacks set values and never plot; every default is the value without a hand."""

import base64
import html
from pathlib import Path

import ipywidgets as widgets


def ab_picker(pairs, on_vote):
    """Two pictures at a time and three buttons; `on_vote(pair, "left" | "right" | "same")` is called for each answer.

    Which checkpoint drew which is not shown. `.value` of the returned box's first child says how far one is.
    """
    title, pictures = widgets.HTML(), widgets.HTML()
    buttons = [widgets.Button(description=name) for name in ("left", "right", "same")]
    queue = list(pairs)

    def show():
        done = len(pairs) - len(queue)
        title.value = f"{done} of {len(pairs)} judged" + (f": <b>{html.escape(queue[0].prompt)}</b>" if queue else ". Thank you.")
        images = (_inline(queue[0].left_path), _inline(queue[0].right_path)) if queue else ()
        pictures.value = "".join(f'<img src="{source}" style="width:240px;margin:4px">' for source in images)
        for button in buttons:
            button.disabled = not queue

    def answer(button):
        if queue:
            on_vote(queue.pop(0), button.description)
            show()

    for button in buttons:
        button.on_click(answer)
    show()
    return widgets.VBox([title, pictures, widgets.HBox(buttons)])


def _inline(path) -> str:
    """A PNG file as a data URL, so that nothing is served from disk."""
    return "data:image/png;base64," + base64.b64encode(Path(path).read_bytes()).decode()
