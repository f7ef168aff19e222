"""Manifests: the same bytes twice, portable, and refused in a sentence when they were edited or are hostile."""

import copy
import json
import shutil

import numpy as np
import pytest
from damage import TRIGGER, encoded, rotated_exif, scene, write_pair
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lora_nb import manifest as manifests
from lora_nb import preprocess as processing
from lora_nb.dataset import best_manifest, buckets, open_sample, preprocess, read_manifest, scan, validate
from lora_nb.errors import UserError
from lora_nb.images import open_rgb


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A project folder with a data set in data/set and its manifests in outputs/run."""
    project = tmp_path_factory.mktemp("project")
    folder = project / "data" / "set"
    for number, size in enumerate([(400, 400), (300, 500), (640, 360)]):
        write_pair(folder, f"{number}.png", encoded(scene(number, size), "PNG"), f"{TRIGGER}, {number}".encode())
    write_pair(folder, "turned.jpg", rotated_exif(), f"{TRIGGER}, turned".encode())
    write_pair(folder, "bad.png", b"", b"x")
    report = validate(scan(folder), 128, TRIGGER, workers=0, leave_out_errors=True)
    preprocess(report.write(project / "outputs" / "run"), workers=0)
    return project


@pytest.fixture
def content(made):
    return json.loads((made / "outputs/run/dataset_manifest.json").read_text("utf-8"))


def test_the_fields_that_others_read(content):
    assert content["schema_version"] == 1
    assert content["metadata"]["total_samples"] == 4 == content["metadata"]["statistics"]["usable"]
    assert content["metadata"]["dataset_root"] == "../../data/set"
    turned = content["samples"][3]
    assert (turned["image_path"], turned["width"], turned["height"]) == ("turned.jpg", 400, 500)
    assert turned["original_size"] == [500, 400] and turned["target_size"] == turned["bucket"][::-1]
    assert content["excluded"] == [{"image_path": "bad.png", "reason": "bad.png has no content (0 bytes)."}]


def test_a_second_run_writes_the_same_bytes(made, tmp_path):
    project = tmp_path / "elsewhere"
    shutil.copytree(made / "data", project / "data")
    report = validate(scan(project / "data/set"), 128, TRIGGER, workers=2, leave_out_errors=True)
    preprocess(report.write(project / "outputs" / "run"), workers=2)
    names = sorted(path.relative_to(project).as_posix() for path in (project / "outputs").rglob("*") if path.is_file())
    assert len(names) == 6
    for name in names:
        assert (project / name).read_bytes() == (made / name).read_bytes(), name


def test_processed_pixels_are_those_made_on_the_fly(made, tmp_path):
    shutil.copytree(made, tmp_path / "moved")  # paths are relative: the whole project may move
    run = tmp_path / "moved/outputs/run"
    plain, processed = read_manifest(run / "dataset_manifest.json"), read_manifest(best_manifest(run))
    assert [sample.processed_path is None for sample in plain.samples] == [True] * 4
    for before, after in zip(plain.samples, processed.samples, strict=True):
        assert processed.path_of(after.processed_path).is_file()
        one, two = open_sample(plain, before), open_sample(processed, after)
        assert one.size == two.size == tuple(after.bucket) and one.mode == two.mode == "RGB"
        assert np.array_equal(np.asarray(one), np.asarray(two))


def test_preprocessing_goes_on_where_it_was(made, tmp_path, monkeypatch):
    shutil.copytree(made, tmp_path / "again")
    run = tmp_path / "again/outputs/run"
    files = sorted((run / "processed_images").iterdir())
    want = [path.read_bytes() for path in files]
    files[0].unlink()
    files[1].write_bytes(want[1][:500])  # as a full disk would leave it
    made_now = []
    monkeypatch.setattr(processing, "write_atomic", lambda path, data: (made_now.append(path), path.write_bytes(data)))
    preprocess(read_manifest(run / "dataset_manifest.json"), workers=0)
    assert sorted(made_now) == files[:2]
    assert [path.read_bytes() for path in files] == want


def test_a_picture_that_changed_is_named(made, tmp_path):
    shutil.copytree(made, tmp_path / "changed")
    run = tmp_path / "changed/outputs/run"
    shutil.rmtree(run / "processed_images")
    (tmp_path / "changed/data/set/0.png").write_bytes(encoded(scene(99), "PNG"))
    with pytest.raises(UserError, match=r"1 pictures could not be preprocessed: 0.png \(changed\)"):
        preprocess(read_manifest(run / "dataset_manifest.json"), workers=0)


def test_place_of_the_crop_is_drawn_from_the_seed(made):
    records = scan(made / "data/set")
    crops = [
        [(sample.crop.left, sample.crop.top) for sample in
         validate(records, 128, square=True, center_crop=False, seed=seed, workers=0, leave_out_errors=True).manifest(made).samples]
        for seed in (1, 1, 2)
    ]  # fmt: skip
    assert crops[0] == crops[1] != crops[2]


def edited(content, path, value):
    changed = copy.deepcopy(content)
    place = changed
    for part in path[:-1]:
        place = place[part]
    if value is KeyError:
        del place[path[-1]]
    else:
        place[path[-1]] = value
    return json.dumps(changed)


@pytest.mark.parametrize(
    "path, value",
    [
        (["schema_version"], 2),
        (["schema_version"], KeyError),
        (["samples"], {}),
        (["surprise"], 1),
        (["metadata", "resolution"], "128"),
        (["metadata", "dataset_root"], 5),
        (["samples", 0, "image_path"], "../../../etc/passwd"),
        (["samples", 0, "image_path"], "/etc/passwd"),
        (["samples", 0, "image_path"], "a\0b.png"),
        (["samples", 0, "image_path"], ""),
        (["samples", 0, "processed_path"], "../out.png"),
        (["samples", 0, "latent_path"], "/tmp/x.safetensors"),
        (["samples", 0, "width"], "400"),
        (["samples", 0, "width"], -1),
        (["samples", 0, "width"], 1e300),
        (["samples", 0, "height"], True),
        (["samples", 0, "caption"], None),
        (["samples", 0, "caption"], "x" * 70_000),
        (["samples", 0, "sha256"], "nonsense"),
        (["samples", 0, "split"], "test"),
        (["samples", 0, "repeats"], 0),
        (["samples", 0, "bucket"], [128]),
        (["samples", 0, "bucket"], [10**6, 10**6]),
        (["samples", 0, "bucket"], [100, 100]),
        (["samples", 0, "crop", "left"], 64),
        (["samples", 0, "extra"], "typo"),
    ],
)
def test_an_edited_manifest_names_the_field_and_the_cure(content, tmp_path, path, value):
    file = tmp_path / "dataset_manifest.json"
    file.write_text(edited(content, path, value))
    with pytest.raises(UserError, match="run notebook 01 again") as error:
        read_manifest(file)
    assert "dataset_manifest.json" in str(error.value) and str(path[-1]) in str(error.value)


@pytest.mark.parametrize(
    "data", [b"", b"{", b"[]", b"null", b"\xff\xfe{", b"[" * 200_000, b'{"samples": ' + b"9" * 6000 + b"}"]
)
def test_what_is_no_manifest_is_refused(tmp_path, data, monkeypatch):
    (tmp_path / "m.json").write_bytes(data)
    with pytest.raises(UserError, match="m.json"):
        read_manifest(tmp_path / "m.json")
    monkeypatch.setattr(manifests, "MAX_BYTES", 0)
    with pytest.raises(UserError, match=r"m.json"):
        (tmp_path / "m.json").write_bytes(data + b" ")
        read_manifest(tmp_path / "m.json")


def test_missing_manifests_say_which_notebook(tmp_path):
    with pytest.raises(UserError, match="run notebook 01 first"):
        read_manifest(tmp_path / "m.json")
    with pytest.raises(UserError, match="holds no manifest"):
        best_manifest(tmp_path)


def test_links_out_of_the_root_are_not_opened(made, tmp_path):
    shutil.copytree(made, tmp_path / "linked")
    (tmp_path / "linked/data/set/0.png").unlink()
    (tmp_path / "secret.png").write_bytes(encoded(scene(0), "PNG"))
    (tmp_path / "linked/data/set/0.png").symlink_to(tmp_path / "secret.png")
    manifest = read_manifest(tmp_path / "linked/outputs/run/dataset_manifest.json")
    with pytest.raises(UserError, match="leads out of"):
        open_sample(manifest, manifest.samples[0])


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=10), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_edit_is_read_or_refused(content, tmp_path, data):
    sample = data.draw(st.sampled_from(sorted(content["samples"][0])))
    path = data.draw(
        st.sampled_from([["samples", 0, sample], ["metadata", "settings"], ["metadata"], ["samples", 0], ["excluded"]])
    )
    (tmp_path / "m.json").write_text(edited(content, path, data.draw(json_values)))
    try:
        read_manifest(tmp_path / "m.json")
    except UserError as error:
        assert "m.json" in str(error)


@pytest.mark.parametrize("resolution", [64, 100, 128, 512, 768, 1024, 1536])
def test_buckets(resolution):
    sizes = buckets(resolution)
    step = max(16, round(resolution / 16 / 16) * 16)
    assert {(height, width) for width, height in sizes} == set(sizes)
    assert all(width % step == 0 and height % step == 0 for width, height in sizes)
    assert all(width * height <= 1.35 * resolution**2 for width, height in sizes) or resolution < 128
    assert len(buckets(resolution, square=True)) == 1


def test_buckets_of_sdxl_and_of_the_small_model():
    assert {(1024, 1024), (832, 1216), (1536, 640), (512, 2048)} <= set(buckets(1024)) and len(buckets(1024)) == 41
    assert {(128, 128), (112, 144), (144, 112)} <= set(buckets(128))


def test_open_rgb_turns_upright(made):
    assert open_rgb(made / "data/set/turned.jpg").size == (400, 500)
