"""What only the whole set shows: twins, domination, equal captions, the split, the verdict; and the terminal."""

import hashlib
import json

import imagehash
import numpy as np
import pytest
from damage import TRIGGER, encoded, scene, write_pair
from PIL import Image, ImageOps

from lora_nb import duplicates, judge
from lora_nb.dataset import scan, validate
from lora_nb.errors import UserError
from lora_nb.images import decode
from lora_nb.report import NONE_HELD_OUT
from lora_nb.validate_command import main


def put(folder, number, image, caption=None, name=None, format="PNG"):
    write_pair(
        folder,
        name or f"{number:03d}.{format.lower()}",
        encoded(image, format),
        (caption or f"{TRIGGER}, {number}").encode(),
    )


def check(folder, **options):
    return validate(scan(folder), 128, TRIGGER, workers=0, **options)


def codes(report):
    return {(each.file, each.code) for each in report.all_findings}


@pytest.fixture
def good(tmp_path):
    """Ten unlike pictures with good captions."""
    for number in range(10):
        put(tmp_path / "set", number, scene(number))
    return tmp_path / "set"


def snapshot(folder):
    return {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.iterdir()}


def test_a_good_set_is_ready_and_left_alone(good):
    before = snapshot(good)
    report = check(good)
    assert str(report.verdict) == f"Ready: 10 pictures to train on, none held out{NONE_HELD_OUT}."
    assert report.require_ready() and not report.all_findings
    assert report.statistics["width"] == {"min": 400, "mean": 400.0, "max": 400}
    assert report.statistics["trigger_coverage"] == 1.0
    assert snapshot(good) == before


ALIKE = {
    "copy": (lambda image: image, "exact-duplicate"),
    "mirrored": (ImageOps.mirror, "near-duplicate"),
    "smaller": (lambda image: image.resize((250, 250)), "near-duplicate"),
    "cropped": (lambda image: image.crop((30, 20, 370, 340)), "near-duplicate"),
    "corner": (lambda image: image.crop((0, 0, 330, 340)), "near-duplicate"),
    "mirrored-crop": (lambda image: ImageOps.mirror(image.crop((40, 0, 400, 360))), "near-duplicate"),
    "darker": (lambda image: image.point(lambda value: value * 0.8), "near-duplicate"),
}


@pytest.mark.parametrize("name", ALIKE)
def test_twins_are_found(good, name):
    change, code = ALIKE[name]
    put(good, 50, change(scene(3)), name=f"{name}.png")
    report = check(good)
    assert codes(report) == {(f"{name}.png", code)}
    (found,) = report.all_findings
    assert "003.png" in found.message and report.verdict.level == "ready with warnings"


def test_saving_again_is_found_and_unlike_pictures_are_not(tmp_path):
    for number in range(40):
        put(tmp_path / "set", number, scene(number))
    put(tmp_path / "set", 7, scene(7), format="JPEG", caption=f"{TRIGGER}, again")
    assert codes(check(tmp_path / "set")) == {("007.png", "near-duplicate")}


def test_a_trigger_that_no_caption_has_is_told_with_the_word_that_may_be_meant(good):
    report = validate(scan(good), 128, "somebody_else", workers=0)
    (told,) = [each for each in report.all_findings if each.code == "trigger-nowhere"]
    assert told is report.all_findings[0] and TRIGGER in told.message and "--trigger-token" in told.cure
    assert not [each for each in check(good).all_findings if each.code == "trigger-nowhere"]


def test_a_trained_run_is_not_given_other_pictures(good, tmp_path):
    run = tmp_path / "outputs" / "run"
    check(good).write(run)
    (run / "checkpoints" / "checkpoint-5").mkdir(parents=True)
    before = (run / "dataset_manifest.json").read_bytes()
    check(good).write(run)  # the same pictures
    put(good, 60, scene(60))
    with pytest.raises(UserError, match="take another run name"):
        check(good).write(run)
    with pytest.raises(UserError, match="take another run name"):
        validate(scan(good), 128, "somebody_else", workers=0).write(run)
    assert (run / "dataset_manifest.json").read_bytes() == before


def test_pictures_are_hashed_as_imagehash_does():
    for seed in range(20):
        grey = scene(seed).convert("L").resize((duplicates.SIDE, duplicates.SIDE), Image.Resampling.BOX)
        ours = duplicates.hashes(np.asarray(grey, np.float32))
        for place, picture in ((0, grey), (-1, ImageOps.mirror(grey))):
            assert (int(ours[place]) ^ int(str(imagehash.phash(picture)), 16)).bit_count() <= 4


def test_the_search_is_linear_when_all_pictures_are_alike():
    """A thousand like pictures: a bounded number of comparisons each."""
    signed = duplicates.signature(scene(1).convert("L"))
    search = duplicates.TwinSearch(1000)
    for index in range(1000):
        search.add(index, signed)
    _, _, asking = duplicates._candidates(search.windows, search.asked)
    assert 1000 <= len(asking) <= duplicates.CHECKED * 2000  # each asks upright and mirrored


def test_the_first_look_at_all_candidates_is_pillows():
    """Every window of one picture against crops of it and against another picture, upright and mirrored."""
    whole = scene(1).convert("L").resize((duplicates.SIDE,) * 2)
    parts = [whole.crop((0, 26, 38, 64)).resize(whole.size), scene(2).convert("L").resize(whole.size)]
    grey = np.stack([np.asarray(picture, np.uint8) for picture in (whole, *parts)])
    window, b, mirrored = (axis.ravel() for axis in np.meshgrid(np.arange(len(duplicates.WINDOWS)), [1, 2], [0, 1]))
    seen = duplicates._hopeful(grey, np.zeros(len(b), int), window, b, mirrored)
    agreed = 0
    for answer, one, place, flip in zip(seen, window, b, mirrored, strict=True):
        part = ImageOps.mirror(parts[place - 1]) if flip else parts[place - 1]
        looks = (duplicates._normalised(whole, duplicates.WINDOWS[one], 16), duplicates._normalised(part, (0, 0, 1, 1), 16))
        difference = np.abs(looks[0] - looks[1]).mean()
        agreed += answer == (difference <= duplicates.HOPELESS) or abs(difference - duplicates.HOPELESS) < 0.01
    assert agreed == len(seen) and 0 < seen.sum() < len(seen)


def test_a_twin_on_the_other_side_of_the_split_is_told(good):
    for name in ("images", "reference"):
        (good / name).mkdir()
    for path in list(good.glob("*.*")):
        path.rename(good / "images" / path.name)
    put(good / "reference" / "images", 3, ImageOps.mirror(scene(3)))
    assert codes(check(good)) == {("reference/images/003.png", "held-out-twin")}


def test_held_out_pictures_keep_their_twins_with_them(good):
    for number in range(10):
        put(good, 100 + number, ImageOps.mirror(scene(number)))
    for seed in range(5):
        report = check(good, held_out_share=0.3, seed=seed)
        held_out = {picture.image_path for picture in report.pictures if picture.record.split == "held_out"}
        assert len(held_out) == 6
        assert {f"1{name[1:]}" if name[0] == "0" else f"0{name[1:]}" for name in held_out} == held_out
    assert held_out == {
        picture.image_path
        for picture in check(good, held_out_share=0.3, seed=4).pictures
        if picture.record.split == "held_out"
    }


def test_one_that_dominates_equal_captions_and_few(tmp_path):
    for number in range(5):
        put(
            tmp_path / "set" / f"{20 if number == 0 else 1}_man{number}",
            number,
            scene(number),
            caption=f"{TRIGGER} alone",
        )
    found = codes(check(tmp_path / "set"))
    assert ("20_man0/000.png", "dominating") in found and ("", "few-pictures") in found
    assert sum(code == "same-caption" for _, code in found) == 4


def test_verdicts(good):
    put(good, 0, scene(0, (60, 60)), name="small.png")
    assert check(good).verdict.level == "ready with warnings"
    write_pair(good, "bad.png", b"", b"hero")
    report = check(good)
    assert report.verdict.level == "not ready" and "bad.png has no content" in str(report.verdict)
    with pytest.raises(UserError, match="LEAVE_OUT_ERRORS"):
        report.require_ready()
    assert check(good, leave_out_errors=True).verdict.level == "ready with warnings"
    excluded = check(good, exclusions={"bad.png": "broken", "small.png": "small"})
    assert excluded.verdict.level == "ready" and "2 left out" in str(excluded.verdict)
    assert {each.image_path: each.reason for each in excluded.manifest(good).excluded} == {
        "bad.png": "broken",
        "small.png": "small",
    }
    nothing = validate(scan(good), 128, workers=0, exclusions={record.image_path: "no" for record in scan(good)})
    assert not nothing.ready and "none of 12 pictures" in str(nothing.verdict)
    assert ("gone.png", "exclusion-without-picture") in codes(check(good, exclusions={"gone.png": ""}))


def test_no_captions_is_one_sentence(tmp_path):
    for number in range(3):
        write_pair(tmp_path, f"{number}.png", encoded(scene(number), "PNG"), None)
    assert str(check(tmp_path).verdict).startswith(
        "Not ready: none of 3 pictures can be trained on. Missing caption for: 0.png. Write 0.txt"
    )


def test_pages(good):
    for number in range(60):
        put(good, number, scene(1, (70, 70)), caption="no word", name=f"x{number}.png")
    table = check(good).table(page=2, page_size=30)
    assert len(table.rows) == 30 and "page 2 of" in str(table) and "page 2 of" in table._repr_html_()


def test_cmyk_goes_through_its_profile(tmp_path):
    """A profile for CMYK cannot be made here, so one is taken from the system where there is one."""
    from pathlib import Path

    profiles = [path for path in Path("/usr/share/color/icc").rglob("*.icc") if path.read_bytes()[16:20] == b"CMYK"]
    if not profiles:
        pytest.skip("no CMYK profile on this machine")
    data = encoded(Image.new("CMYK", (64, 64), (0, 255, 255, 0)), "JPEG", icc_profile=profiles[0].read_bytes())
    image, _, notices = decode(data)
    assert image.mode == "RGB" and notices == [("profile-converted", {"mode": "CMYK"})]
    red, green, blue = image.getpixel((32, 32))
    assert red > 180 and max(green, blue) < 80


def test_sixteen_bits_are_scaled_and_alpha_is_put_on_white():
    ramp = np.linspace(0, 65535, 64 * 64, dtype=np.uint16).reshape(64, 64)
    image, _, notices = decode(encoded(Image.fromarray(ramp), "PNG"))
    assert ("sixteen-bit", {}) in notices
    assert np.abs(np.asarray(image)[..., 0].astype(float) - ramp / 257).max() <= 0.51
    clear = Image.new("RGBA", (64, 64), (0, 255, 0, 0))
    image, _, notices = decode(encoded(clear, "PNG"))
    assert notices == [("transparent", {})] and image.getpixel((5, 5)) == (255, 255, 255)


def test_every_threshold_lies_between_what_it_separates():
    assert judge.TOO_SMALL < judge.FAR_TOO_SMALL and duplicates.PATCH > 0.34


@pytest.mark.parametrize("option", [[], ["--json"]])
def test_terminal(good, capsys, option):
    command = [str(good), "--resolution", "128", "--trigger-token", TRIGGER, "--workers", "0", *option]
    assert main(command) == 0
    said = capsys.readouterr().out
    if option:
        assert json.loads(said)["verdict"] == "ready"
    else:
        assert said.rstrip().endswith(f"Ready: 10 pictures to train on, none held out{NONE_HELD_OUT}.")
    write_pair(good, "bad.png", b"", b"x")
    assert main(command) == 1
    assert "bad.png has no content" in capsys.readouterr().out


def test_terminal_writes_only_when_asked(good, tmp_path, capsys):
    command = [str(good), "--resolution", "128", "--workers", "0", "--output", str(tmp_path / "out")]
    assert main([*command, "--resize"]) == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "dataset_manifest.json", "dataset_manifest_processed.json", "processed_images",
    ]  # fmt: skip
    first = hashlib.sha256((tmp_path / "out/dataset_manifest_processed.json").read_bytes()).hexdigest()
    assert main([*command, "--resize"]) == 0
    assert hashlib.sha256((tmp_path / "out/dataset_manifest_processed.json").read_bytes()).hexdigest() == first


def test_terminal_wrong_usage(tmp_path, capsys):
    assert (
        main([])
        == main(["--nonsense"])
        == main([str(tmp_path), "--resolution", "3"])
        == main([str(tmp_path / "none")])
        == 2
    )
    assert main([str(tmp_path)]) == 1
    assert "holds no pictures" in capsys.readouterr().out
