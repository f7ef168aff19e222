"""Captions in any encoding, the trigger, token counts, and what the trigger absorbs."""

import random
import string

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_nb.captions import (
    MAX_TOKENS,
    SDXL_TOKENIZER,
    absorption,
    clip_tokenizers,
    decode_caption,
    estimate_tokens,
    find_trigger,
    frequent_words,
    measure,
    words,
)
from lora_nb.findings import CODES, finding, printable

QUICK = settings(max_examples=150, deadline=None)


@QUICK
@given(st.binary(max_size=400))
def test_any_bytes_are_a_caption_or_refused(data):
    text, notices = decode_caption(data)
    for code, facts in notices:
        finding(code, "a.png", **facts)
    assert text is None or text == " ".join(text.split())
    if text is not None:
        text.encode("utf-8")
        assert not any(ord(char) < 32 for char in text)


@QUICK
@given(st.text(max_size=200), st.sampled_from(["utf-8", "utf-8-sig", "utf-16"]))
def test_what_was_written_is_read(text, encoding):
    words_in = " ".join("".join(char for char in text if char.isalnum() or char == " ").split())
    assert decode_caption(words_in.encode(encoding))[0] == words_in


@QUICK
@given(st.text(max_size=120), st.text(min_size=1, max_size=12))
def test_nothing_breaks_the_caption_functions(caption, trigger):
    place = find_trigger(caption, trigger)
    assert place.words_before is None or place.spelled is None
    assert measure(caption).tokens == sum(count for _, count in estimate_tokens(caption))
    assert absorption([caption] * 3, trigger).captions in (0, 3)
    frequent_words([caption], trigger)
    printable(caption).encode("utf-8")


@QUICK
@given(st.text(max_size=50))
def test_every_finding_can_say_any_name(name):
    for code in ("missing-caption", "same-stem", "trigger-missing"):
        said = finding(code, name, expected=name, other=name, trigger=name)
        assert "\n" not in said.message and "\n" not in said.cure


def test_every_code_has_a_sentence_and_a_cure():
    assert len(CODES) > 60
    for severity, sentence, cure in CODES.values():
        assert severity in ("error", "warning", "info")
        assert sentence and cure.endswith((".", "there."))


@pytest.mark.parametrize(
    "caption, before, spelled",
    [
        ("aldar_kose_man in a hat", 0, None),
        ("Aldar_Kose_Man in a hat", 0, None),  # CLIP lowers it
        ("a picture of aldar_kose_man's hat", 3, None),
        ("aldar kose man in a hat", None, "aldar kose man"),
        ("aldar-kose-man in a hat", None, "aldar-kose-man"),
        ("aldarkoseman", None, "aldarkoseman"),
        ("aldar_kos_man in a hat", None, "aldar_kos_man"),
        ("aldar_kose_mans in a hat", None, "aldar_kose_mans"),
        ("a man in a hat", None, None),
        ("", None, None),
    ],
)
def test_trigger(caption, before, spelled):
    place = find_trigger(caption, "aldar_kose_man")
    assert (place.words_before, place.spelled) == (before, spelled)


def test_words_keep_their_joints():
    assert words("aldar_kose_man, half-body, don't, ЁЛКА, 阿勒达尔!") == [
        "aldar_kose_man",
        "half-body",
        "don't",
        "ёлка",
        "阿勒达尔",
    ]


def test_tail_is_what_the_encoder_does_not_see():
    caption = " ".join(["cat"] * 74 + ["dog", "bird", "fish"])
    (tokenizer,) = clip_tokenizers("no/such/folder")
    for tokenizers, estimated in (((), True), ([tokenizer], False)):
        length = measure(caption, tokenizers)
        assert (length.tokens, length.tail, length.estimated) == (77, "bird fish", estimated)
    assert measure(" ".join(["cat"] * MAX_TOKENS)).tail == ""


def test_estimate_is_near_the_real_count_and_seldom_below():
    (tokenizer,) = clip_tokenizers("no/such/folder")
    captions = [
        "aldar_kose_man, smiling, full body, at night under the moon",
        "a photograph of an elderly shepherd, three-quarter view, wearing an embroidered blue chapan, golden hour",
        "Close-up portrait; he's surprised. 35mm, f/1.8, bokeh!!",
        "алдар көсе в красной шапке на базаре",
    ]
    for caption in captions:
        real = len(tokenizer(caption))
        assert 0.7 * real <= measure(caption).tokens <= 1.6 * real


def test_our_tokenizer_is_the_libraries():
    transformers = pytest.importorskip("transformers")
    theirs = transformers.CLIPTokenizer.from_pretrained(SDXL_TOKENIZER)
    (ours,) = clip_tokenizers("no/such/folder")
    random.seed(0)
    texts = ["".join(random.choices(string.printable + "éñ阿🧙ёł’—", k=60)) for _ in range(200)]
    for text in ["aldar_kose_man's 1990s café — don't!", *texts]:
        assert len(ours(text)) == len(theirs(text, add_special_tokens=False).input_ids), text


def test_absorption_tells_what_is_always_said_from_what_varies():
    captions = [
        f"hero_x, red hat, {place}, {mood}" for place in ("sea", "steppe", "forest") for mood in ("sad", "calm", "glad")
    ]
    found = absorption([*captions, "another man without the word"], "hero_x")
    assert found.captions == 9
    assert dict(found.absorbed) == {"red": 1.0, "hat": 1.0}
    assert {word for word, _ in found.promptable} == {"sea", "steppe", "forest", "sad", "calm", "glad"}
    assert "hat 100%" in str(found)
