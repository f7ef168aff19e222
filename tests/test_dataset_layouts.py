"""Every layout is recognised, and what cannot be paired is named."""

import errno
import json
import os
import sys
import zipfile

import pytest
from damage import JPEG, PNG, encoded, scene, write_pair

from lora_nb import sources
from lora_nb.dataset import read_exclusions, read_overrides, scan, with_overrides, write_caption
from lora_nb.errors import UserError


def codes(records):
    """(file, code) of everything that the scan alone can find."""
    return {
        (each.file, each.code) for each in [*records.findings, *(one for record in records for one in record.findings)]
    }


def captions(records):
    return {record.image_path: record.caption for record in records}


def put(folder, files):
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


def test_images_with_captions_and_reference(tmp_path):
    put(tmp_path, {
        "images/b.jpg": JPEG, "images/a.png": PNG, "images/deep/c.png": PNG,
        "captions/a.txt": "first", "captions/b.caption": "second", "captions/deep/c.txt": "third",
        "reference/images/a.png": PNG, "reference/captions/a.txt": "held", "cover.jpg": JPEG, "captions/x.txt": "lost",
    })  # fmt: skip
    records = scan(tmp_path)
    assert captions(records) == {
        "images/a.png": "first",
        "images/b.jpg": "second",
        "images/deep/c.png": "third",
        "reference/images/a.png": "held",
    }
    assert [record.split for record in records] == ["train", "train", "train", "held_out"]
    assert codes(records) == {("cover.jpg", "outside-layout"), ("captions/x.txt", "caption-without-picture")}
    assert "images/ with captions/" in repr(records)


def test_captions_beside_pictures(tmp_path):
    put(tmp_path, {
        "a.jpg": JPEG, "a.png": PNG, "a.txt": "shared", "b.png": PNG, "b.txt": "one", "b.caption": "two",
        "C.PNG": PNG, "c.TXT": "other case", "d.png": PNG,
    })  # fmt: skip
    records = scan(tmp_path)
    assert captions(records) == {
        "C.PNG": "other case",
        "a.jpg": "shared",
        "a.png": "shared",
        "b.png": "one",
        "d.png": None,
    }
    assert codes(records) == {
        ("a.png", "same-stem"), ("b.png", "two-captions"), ("C.PNG", "caption-other-spelling"), ("d.png", "missing-caption"),
    }  # fmt: skip
    (missing,) = [each for record in records for each in record.findings if each.code == "missing-caption"]
    assert missing.message == "Missing caption for: d.png" and "d.txt" in missing.cure


def test_kohya_folders_keep_repeats(tmp_path):
    put(tmp_path, {"10_hero man/a.png": PNG, "10_hero man/a.txt": "said", "3_hero man/b.png": PNG})
    records = scan(tmp_path)
    assert [(record.repeats, record.caption) for record in records] == [(10, "said"), (3, "hero man")]
    assert codes(records) == {("3_hero man/b.png", "caption-from-folder")}
    assert records.layout.startswith("kohya")


def test_hugging_face_jsonl(tmp_path):
    rows = [
        json.dumps({"file_name": "train/a.png", "text": "first\nline"}), "", "{broken", json.dumps(["list"]), json.dumps({"text": "no name"}),
        json.dumps({"file_name": "gone.png", "text": "x"}), json.dumps({"file_name": "train/a.png", "text": "again"}),
        json.dumps({"file_name": "../../etc/passwd", "text": "x"}), json.dumps({"file_name": "train/b.png"}), "[" * 100_000,
    ]  # fmt: skip
    put(
        tmp_path,
        {
            "metadata.jsonl": "\n".join(rows),
            "train/a.png": PNG,
            "train/b.png": PNG,
            "train/c.png": PNG,
            "train/c.txt": "from a file",
            "train/a.txt": "what no row says",
        },
    )
    records = scan(tmp_path)
    assert ("train/a.png", "two-captions") in codes(records)  # the row counts
    write_caption(records, "train/c.png", "from a file")
    with pytest.raises(UserError, match="a row of metadata.jsonl"):
        write_caption(records, "train/a.png", "would not be read")
    assert captions(records) == {"train/a.png": "first line", "train/b.png": None, "train/c.png": "from a file"}
    found = [each.code for each in records.findings]
    assert sorted(found) == ["metadata-row"] * 6 + ["metadata-twice", "metadata-without-picture"]


def test_hugging_face_csv(tmp_path):
    put(
        tmp_path,
        {
            "train/metadata.csv": '\ufefffile_name,caption\na.png,"one, two"\nb.png,\n',
            "train/a.png": PNG,
            "train/b.png": PNG,
        },
    )
    records = scan(tmp_path)
    assert captions(records) == {"train/a.png": "one, two", "train/b.png": None}
    assert codes(records) == {("train/b.png", "empty-caption")}


@pytest.mark.skipif(sys.platform != "linux", reason="only there both names can exist")
def test_twins_of_case_and_accents(tmp_path):
    put(
        tmp_path,
        {"A.png": PNG, "a.png": PNG, "é.png": PNG, "e\u0301.png": PNG, "Á.png": PNG, "A\u0301.txt": "decomposed"},
    )
    found = codes(scan(tmp_path))
    assert {("a.png", "case-twins"), ("é.png", "unicode-twins"), ("Á.png", "caption-other-spelling")} <= found


@pytest.mark.skipif(sys.platform == "win32", reason="links need rights there")
def test_a_folder_that_is_a_link_out_is_said(tmp_path):
    put(tmp_path / "elsewhere", {"a.png": PNG})
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "images").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="no pictures .images is a link that leads out"):
        scan(tmp_path / "set")
    put(tmp_path / "set", {"b.png": PNG, "b.txt": "said"})
    assert ("images", "link-leaves-folder") in codes(scan(tmp_path / "set"))


@pytest.mark.skipif(sys.platform == "win32", reason="links need rights there")
def test_links_inside_are_followed_and_those_out_are_not(tmp_path):
    folder = put(tmp_path / "set", {"a.png": PNG, "a.txt": "said", "b.txt": "said too"})
    put(tmp_path, {"secret.txt": "of another", "outside/x.png": PNG})
    os.symlink("a.png", folder / "b.png")
    write_pair(folder, "c.png", PNG, None)
    os.symlink(tmp_path / "secret.txt", folder / "c.txt")
    os.symlink(tmp_path / "outside", folder / "linked")
    os.symlink(folder, folder / "round")
    records = scan(folder)
    assert captions(records) == {"a.png": "said", "b.png": "said too", "c.png": None}
    assert ("c.txt", "link-leaves-folder") in codes(records)


def test_order_is_that_of_the_names(tmp_path, monkeypatch):
    put(tmp_path, {f"{name}.png": PNG for name in ("b", "a10", "a2", "Z", "ä")})
    first = [record.image_path for record in scan(tmp_path)]
    entries = os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: list(entries(path))[::-1])
    assert [record.image_path for record in scan(tmp_path)] == first == sorted(first)


def test_bad_folders_end_in_a_sentence(tmp_path):
    with pytest.raises(UserError, match="There is no folder"):
        scan(tmp_path / "nowhere")
    with pytest.raises(UserError, match="holds no pictures"):
        scan(tmp_path)
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(UserError, match="neither a folder nor a zip"):
        scan(tmp_path / "a.txt")


def make_zip(path, files):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def test_zip_of_a_layout(tmp_path):
    archive = make_zip(
        tmp_path / "my set.zip", {"set/images/a.png": PNG, "set/captions/a.txt": "said", "__MACOSX/set/._a.png": b"x"}
    )
    records = scan(archive, unpack_into=tmp_path / "unpacked")
    assert captions(records) == {"images/a.png": "said"}
    assert captions(scan(archive, unpack_into=tmp_path / "unpacked")) == captions(records)
    assert len(list((tmp_path / "unpacked").iterdir())) == 1


def test_zip_that_wants_out(tmp_path):
    link = zipfile.ZipInfo("link.png")
    link.external_attr = 0o120777 << 16
    hostile = {
        "../out.png": PNG,
        "/abs.png": PNG,
        "C:/win.png": PNG,
        "..\\back.png": PNG,
        link: "/etc/passwd",
        "a.png": PNG,
        "a.txt": "said",
    }
    with zipfile.ZipFile(tmp_path / "bad.zip", "w") as archive:
        for name, content in hostile.items():
            archive.writestr(name, content)
    records = scan(tmp_path / "bad.zip", unpack_into=tmp_path / "unpacked")
    assert captions(records) == {"a.png": "said"}
    assert [each.code for each in records.findings] == ["archive-entry-refused"] * 5
    assert not (tmp_path / "out.png").exists() and not (tmp_path / "unpacked" / "out.png").exists()


def test_zip_with_a_damaged_entry_costs_one_picture(tmp_path):
    archive = make_zip(tmp_path / "set.zip", {"a.png": encoded(scene(1), "PNG"), "b.png": encoded(scene(2), "PNG")})
    data = bytearray(archive.read_bytes())
    data[400:410] = bytes(10)
    archive.write_bytes(data)
    records = scan(archive, unpack_into=tmp_path / "unpacked")
    assert captions(records) == {"b.png": None}
    assert ("a.png", "archive-entry-damaged") in codes(records)


def test_a_full_disk_is_not_the_archives_fault(tmp_path, monkeypatch):
    archive = make_zip(tmp_path / "set.zip", {"a.png": PNG})

    def full(path, mode="r", **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(sources, "open", full, raising=False)
        with pytest.raises(UserError, match="is full: make room"):
            scan(archive, unpack_into=tmp_path / "unpacked")
    assert captions(scan(archive, unpack_into=tmp_path / "unpacked")) == {"a.png": None}


def test_zip_limits(tmp_path, monkeypatch):
    archive = make_zip(tmp_path / "bomb.zip", {"a.png": bytes(3_000_000)})
    monkeypatch.setattr(sources, "MAX_UNPACKED_BYTES", 1_000_000)
    with pytest.raises(UserError, match="unpacks to more"):
        scan(archive, unpack_into=tmp_path / "unpacked")
    assert not list((tmp_path / "unpacked").iterdir())
    monkeypatch.setattr(sources, "MAX_ENTRIES", 0)
    with pytest.raises(UserError, match="files, more than"):
        scan(archive, unpack_into=tmp_path / "unpacked")
    (tmp_path / "no.zip").write_bytes(b"PK\3\4 nothing")
    with pytest.raises(UserError, match="cannot be unpacked"):
        scan(tmp_path / "no.zip", unpack_into=tmp_path / "unpacked")


def test_overrides_lie_over_the_captions(tmp_path):
    put(tmp_path / "set", {"a.png": PNG, "a.txt": "old", "b.png": PNG})
    put(tmp_path / "run", {"caption_overrides.json": json.dumps({"b.png": "new", "gone.png": "x", "a.png": " "})})
    records = with_overrides(scan(tmp_path / "set"), read_overrides(tmp_path / "run"))
    assert captions(records) == {"a.png": None, "b.png": "new"}
    assert codes(records) == {("a.png", "empty-caption"), ("gone.png", "override-without-picture")}
    assert (tmp_path / "set/a.txt").read_text() == "old"


@pytest.mark.parametrize("content", ["{", "[]", '{"a": 1}', "[" * 100_000])
def test_damaged_notes_name_their_cure(tmp_path, content):
    assert read_exclusions(tmp_path) == {}
    put(tmp_path, {"exclusions.json": content})
    with pytest.raises(UserError, match="mend it or remove it"):
        read_exclusions(tmp_path)
