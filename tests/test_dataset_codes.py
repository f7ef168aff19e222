"""Findings that need a failing disk, decoder or clock to appear."""

import os

import pytest
from damage import JPEG, TRIGGER, encoded, rotated_exif, scene, write_pair
from PIL import ImageOps

from lora_nb import dataset, images
from lora_nb.dataset import scan, validate
from lora_nb.layouts import pair, walk


def codes(report):
    return {(each.file, each.code) for each in report.all_findings}


@pytest.fixture
def folder(tmp_path):
    for number in range(9):
        write_pair(tmp_path / "set", f"{number}.png", encoded(scene(number), "PNG"), f"{TRIGGER}, {number}".encode())
    return tmp_path / "set"


def test_a_crash_or_hang_of_a_decoder_costs_one_picture(folder, monkeypatch):
    for name in ("crash.png", "hang.png"):
        write_pair(folder, name, JPEG, f"{TRIGGER}, {name}".encode())
    monkeypatch.setenv("PYTHONPATH", os.path.dirname(__file__))
    real = dataset.run_isolated
    monkeypatch.setattr(dataset, "run_isolated", lambda function, *rest: real("misbehaving_decoder:inspect", *rest))
    report = validate(scan(folder), 128, TRIGGER, workers=1, time_limit_s=20)
    assert codes(report) == {("crash.png", "decoder-crashed"), ("hang.png", "decoder-hung")}
    assert len(report.usable) == 9


def test_a_file_that_went_away_or_is_too_large(folder, monkeypatch):
    records = scan(folder)
    (folder / "0.png").unlink()
    monkeypatch.setattr(images, "MAX_FILE_BYTES", (folder / "1.png").stat().st_size - 1)
    found = codes(validate(records, 128, TRIGGER, workers=0))
    assert {("0.png", "unreadable"), ("1.png", "file-too-large")} <= found


def test_a_caption_or_folder_that_cannot_be_read(folder, monkeypatch):
    tree = walk(folder)
    (folder / "0.png.txt").unlink()
    records, _ = pair(tree, {})
    assert [each.code for each in records[0].findings] == ["caption-unreadable"]

    (folder / "locked").mkdir()
    scandir = os.scandir

    def refuse(path):
        if str(path).rstrip("/").endswith("locked"):
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    assert ("locked/", "folder-unreadable") in {(each.file, each.code) for each in scan(folder).findings}


def test_damaged_exif_does_not_cost_the_picture(folder, monkeypatch):
    def fail(image):
        raise ValueError("not enough data")

    monkeypatch.setattr(ImageOps, "exif_transpose", fail)
    write_pair(folder, "turned.jpg", rotated_exif(), f"{TRIGGER}, turned".encode())
    report = validate(scan(folder), 128, TRIGGER, workers=0)
    assert codes(report) == {("turned.jpg", "exif-damaged")} and report.ready


@pytest.mark.parametrize("name", ["con.png", "star*.png", "new\nline.png"])
def test_names_that_do_not_travel(folder, name):
    write_pair(folder, name, encoded(scene(50), "PNG"), f"{TRIGGER}, name".encode())
    assert (name, "name-not-portable") in codes(validate(scan(folder), 128, TRIGGER, workers=0))
