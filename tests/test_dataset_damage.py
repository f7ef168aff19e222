"""Sixty kinds of damage and odd names in one folder: one verdict each, no exception, no hang."""

import os
import sys

import damage
import numpy as np
import pytest
from damage import CAPTIONS, NAMES, PICTURES, RESOLUTION, TRIGGER, encoded, scene, write_pair

from lora_nb.dataset import preprocess, read_manifest, scan, validate
from lora_nb.findings import CODES
from lora_nb.images import BadPicture, decode

posix = pytest.mark.skipif(sys.platform == "win32", reason="names and pipes that Windows does not have")


@pytest.fixture(scope="module")
def spoiled(tmp_path_factory):
    """Everything at once, in one folder, validated in worker processes."""
    folder = tmp_path_factory.mktemp("spoiled")
    for number, (name, (picture, _, _)) in enumerate(PICTURES.items()):
        write_pair(folder, name, picture, f"{TRIGGER}, picture {number}".encode())
    for number, name in enumerate(NAMES):
        write_pair(folder, name, encoded(scene(100 + number), "PNG"), f"{TRIGGER}, name {number}".encode())
    for number, (name, (caption, _)) in enumerate(CAPTIONS.items()):
        write_pair(folder, f"{name}.png", encoded(scene(200 + number), "PNG"), caption)
    damage.odd_files(folder)
    os.rename(os.fsencode(folder / "tab\tbed.png"), os.fsencode(folder) + b"/not-\xff-utf8.png")
    report = validate(scan(folder), RESOLUTION, TRIGGER, workers=2, time_limit_s=60)
    return {picture.image_path: picture for picture in report.pictures}, report


@posix
def test_more_than_sixty_kinds_have_one_verdict_each(spoiled):
    pictures, report = spoiled
    assert len(pictures) == len(report.pictures) >= 60
    assert {picture.verdict for picture in pictures.values()} == {"ready", "warning", "error"}
    assert not report.ready


@posix
@pytest.mark.parametrize("name", PICTURES)
def test_damage_is_named(spoiled, name):
    _, code, verdict = PICTURES[name]
    picture = spoiled[0][name]
    codes = {each.code for each in picture.findings}
    assert code is None or code in codes
    assert verdict in (None, picture.verdict), codes


@posix
@pytest.mark.parametrize("name", [name for name in NAMES if "\t" not in name])
def test_odd_names_are_names(spoiled, name):
    picture = spoiled[0][name]
    assert picture.verdict == "ready"
    assert picture.record.caption == f"{TRIGGER}, name {NAMES.index(name)}"


@posix
@pytest.mark.parametrize("name", CAPTIONS)
def test_captions_are_read_or_refused(spoiled, name):
    _, code = CAPTIONS[name]
    picture = spoiled[0][f"{name}.png"]
    assert code in {each.code for each in picture.findings}
    assert picture.usable == (CODES[code][0] != "error")


@posix
@pytest.mark.parametrize(
    "name, code",
    [
        ("link-out.png", "link-leaves-folder"),
        ("link-broken.png", "broken-link"),
        ("loop.png", "broken-link"),
        ("pipe.png", "not-a-file"),
        ("sock.png", "not-a-file"),
        ("not-\udcff-utf8.png", "name-not-unicode"),
    ],
)
def test_files_that_are_none(spoiled, name, code):
    assert [each.code for each in spoiled[0][name].findings] == [code]


@posix
def test_left_overs_are_passed_over_and_notes_named(spoiled):
    pictures, report = spoiled
    assert not {"._good.png", ".hidden.png"} & set(pictures)
    assert [each.file for each in report.findings if each.code == "other-file"] == ["notes.md"]


@posix
def test_report_manifest_and_pictures_come_out_of_it(spoiled, tmp_path):
    report = spoiled[1]
    str(report.table(page_size=1000)).encode()  # encodable, whatever the names were
    assert "<b>bold" not in report.table(page_size=1000)._repr_html_()
    report.write(tmp_path)
    manifest = read_manifest(tmp_path / "dataset_manifest.json")
    assert {sample.image_path for sample in manifest.samples} == {picture.image_path for picture in report.usable}
    processed = preprocess(manifest, workers=2)
    assert all(processed.path_of(sample.processed_path).is_file() for sample in processed.samples)


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"keep_rgb": True}])
def test_brightness_alone_finds_the_same_damage(options):
    """Validation reads of a JPEG only the brightness: what is broken is broken there too, and the picture is the same."""
    whole, random = encoded(scene(1), "JPEG", **options), np.random.default_rng(0)
    luma, colours = decode(whole, brightness=True)[0], decode(whole)[0].convert("L")
    assert luma.mode == "L" and np.abs(np.asarray(luma, int) - np.asarray(colours, int)).mean() < 2
    verdicts = []
    for _ in range(120):
        data = bytearray(whole)
        for place in random.integers(0, len(data), 3):
            data[place] = random.integers(0, 256)
        data = bytes(data[: random.integers(1, 2 * len(data))])
        verdicts.append([_verdict(data, brightness) for brightness in (False, True)])
    assert all(a == b for a, b in verdicts) and {a == "fine" for a, _ in verdicts} == {True, False}


def _verdict(data, brightness):
    try:
        decode(data, brightness)
    except BadPicture as bad:
        return bad.code
    return "fine"
