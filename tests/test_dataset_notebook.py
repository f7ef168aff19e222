"""What notebook 01 shows: plots, widgets, and the promise that nothing heavy is imported for it."""

import subprocess
import sys

import pytest
from damage import TRIGGER, encoded, scene, write_pair
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lora_nb import plots, views
from lora_nb.captions import clip_tokenizers
from lora_nb.dataset import (
    read_exclusions,
    read_overrides,
    scan,
    validate,
    write_caption,
    write_exclusions,
    write_overrides,
)
from lora_nb.layouts import Tree, describe_layout, expected_caption, pair
from lora_nb.widgets import caption_editor, exclude_picker


@pytest.fixture
def report(tmp_path):
    for number in range(5):
        write_pair(
            tmp_path / "set",
            f"{number}.png",
            encoded(scene(number, (400, 300 + 40 * number)), "PNG"),
            f"{TRIGGER}, {number}".encode(),
        )
    write_pair(tmp_path / "set", "bad$x.png", b"", b"x")
    return validate(scan(tmp_path / "set"), 128, TRIGGER, workers=0, tokenizers=clip_tokenizers(""))


def test_every_plot_draws(report):
    figures = [
        plots.sizes_against_buckets(*views.sizes(report)),
        plots.sizes_against_buckets([(100 + n, 100) for n in range(9000)], [(128, 128)], most=1000),
        plots.caption_lengths([picture.tokens for picture in report.usable]),
        plots.caption_lengths([]),
        plots.word_counts(*views.words(report)),
        plots.word_counts([], 0),
        plots.contact_sheet(views.contact_cells(report)),
        plots.contact_sheet([]),
        plots.crop_preview(views.crop_cells(report)),
        plots.crop_preview([]),
    ]
    for figure in figures:
        figure.canvas.draw()
    assert "sample of 9,000" in figures[1].axes[0].get_legend().get_texts()[-1].get_text()


def test_the_worst_come_first(report):
    cells = views.contact_cells(report, most=2)
    assert cells[0][0] is None and "empty-file" in cells[0][1] and len(cells) == 2


def test_exclusions_and_captions_by_hand(report, tmp_path):
    run, names = tmp_path / "run", [picture.image_path for picture in report.pictures]
    picker = exclude_picker(names, read_exclusions(run), lambda chosen: write_exclusions(run, chosen))
    chosen, reason, buttons, _ = picker.children
    assert not run.exists()  # without a hand nothing is written
    chosen.value, reason.value = "bad$x.png", "<empty>"
    buttons.children[0].click()
    assert read_exclusions(run) == {"bad$x.png": "<empty>"}
    buttons.children[1].click()
    assert read_exclusions(run) == {}

    records = scan(tmp_path / "set")
    captions = {record.image_path: record.caption for record in records}
    write_overrides(run, {"1.png": "kept before"})
    editor = caption_editor(
        captions,
        read_overrides(run),
        lambda said: write_overrides(run, said),
        lambda *said: write_caption(records, *said),
    )
    chosen, text, row, _ = editor.children
    keep, into_file = row.children
    chosen.value = "1.png"
    assert text.value == "kept before"
    chosen.value, text.value = "0.png", "new"
    keep.click()
    assert read_overrides(run) == {"0.png": "new", "1.png": "kept before"}
    assert (tmp_path / "set/0.png.txt").read_text() == f"{TRIGGER}, 0"  # the user's file only when asked
    into_file.value = True
    keep.click()
    assert (tmp_path / "set/0.png.txt").read_text() == "new\n"


def test_no_model_library_is_imported():
    code = "import sys, lora_nb.dataset, lora_nb.plots, lora_nb.views, lora_nb.config; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "PIL" in loaded and not {"torch", "transformers", "diffusers", "ipywidgets"} & set(loaded)


part = st.text(st.characters(blacklist_characters="/\0", blacklist_categories=("Cs",)), min_size=1, max_size=8)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(names=st.lists(st.lists(part, min_size=1, max_size=3), min_size=1, max_size=6))
def test_any_names_are_paired_without_an_exception(names, tmp_path):
    pictures = sorted({"/".join(parts) + ".png" for parts in names})
    captions = sorted({expected_caption(name) for name in pictures})
    tree = Tree(tmp_path, pictures=pictures, captions=captions)
    records, _ = pair(tree, {})
    assert describe_layout(tree)
    told = {record.image_path for record in records}
    assert told <= set(pictures) and all(record.findings for record in records)  # no file is there: each says so
