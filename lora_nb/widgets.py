"""Notebook widgets, of core ipywidgets only. Callbacks set values and never plot; every default is the value without a hand."""

import base64
import html
from pathlib import Path

import ipywidgets as widgets

from lora_nb.errors import UserError


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


def exclude_picker(names, exclusions: dict, on_change):
    """Choose a picture, say why, and take it out or back; `on_change(exclusions)` is called with {name: reason}.

    names: image paths, those that need a look first. exclusions: what is excluded already.
    """
    chosen = widgets.Dropdown(options=list(names), description="picture")
    reason = widgets.Text(description="reason", placeholder="blurred, not him, ...")
    out, back, listed = widgets.Button(description="leave out"), widgets.Button(description="take back"), widgets.HTML()
    excluded = dict(exclusions)

    def show():
        rows = "".join(f"<li>{html.escape(name)}: {html.escape(why)}</li>" for name, why in sorted(excluded.items()))
        listed.value = f"<ul>{rows}</ul>" if rows else "<i>nothing is left out</i>"

    def leave_out(button):
        excluded[chosen.value] = reason.value or "left out by hand"
        on_change(dict(sorted(excluded.items())))
        show()

    def take_back(button):
        excluded.pop(chosen.value, None)
        on_change(dict(sorted(excluded.items())))
        show()

    out.on_click(leave_out)
    back.on_click(take_back)
    show()
    return widgets.VBox([chosen, reason, widgets.HBox([out, back]), listed])


def caption_editor(captions: dict, overrides: dict, on_change, write_file=None):
    """Edit captions by hand; `on_change(overrides)` is called with all {name: caption} that lie over the files'.

    captions: {name: caption or None} as in the user's files; overrides: those kept before. write_file(name, caption) also changes such a file, and is
    called only while its box is ticked.
    """
    overrides = dict(overrides)
    chosen = widgets.Dropdown(options=list(captions), description="picture")
    text = widgets.Text(description="caption", layout=widgets.Layout(width="90%"))
    keep, said = widgets.Button(description="keep"), widgets.HTML()
    into_file = widgets.Checkbox(description="also change my caption file", value=False, disabled=write_file is None)

    def choose(change=None):
        text.value = overrides.get(chosen.value, captions.get(chosen.value) or "")

    def store(button):
        overrides[chosen.value] = text.value
        on_change(dict(sorted(overrides.items())))
        said.value = f"kept for {html.escape(chosen.value)}; validate again to see what it does"
        if into_file.value and write_file is not None:
            try:
                write_file(chosen.value, text.value)
            except UserError as error:  # a traceback of a button would go where nobody looks
                said.value = html.escape(str(error))

    chosen.observe(choose, names="value")
    keep.on_click(store)
    choose()
    return widgets.VBox([chosen, text, widgets.HBox([keep, into_file]), said])


def preset_picker(value: str, presets):
    """Choose a preset; `.value` is the choice, at first `value`, the notebook's parameter. presets: names without "auto"."""
    return widgets.Dropdown(options=["auto", *presets], value=value, description="preset")
