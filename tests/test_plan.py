"""What is drawn: prompts from held-out captions, texts without the character, prompts that do not call him."""

import pytest

from lora_nb.errors import UserError
from lora_nb.plan import make_plan, parse_list, replace_trigger, without_traits

TRAIN = ["zed_man in a red hat, smiling", "a photo of zed_man, red hat, in a forest", "zed_man with a red hat by the sea"]


def test_the_trigger_becomes_anybody_with_his_article():
    assert replace_trigger("a photo of zed_man, sad", "zed_man", "elf") == "a photo of an elf, sad"
    assert replace_trigger("the ZED_MAN runs", "zed_man", "man") == "a man runs"
    assert replace_trigger("zed_man, smiling", "zed_man", "") == "smiling"
    assert replace_trigger("zed_manor", "zed_man", "man") == "zed_manor"


def test_texts_leave_out_what_nearly_every_caption_says():
    text = without_traits("zed_man in a red hat, sad, in the snow", "zed_man", TRAIN, "man")
    assert "red" not in text and "hat" not in text
    assert text.startswith("a man") and "sad, in the snow" in text


def test_prompts_come_from_held_out_captions_new_combinations_first():
    plan = make_plan("zed_man", TRAIN, [TRAIN[0], "zed_man in the snow", "somebody else"], number=2)
    assert plan.prompts == ("zed_man in the snow", TRAIN[0])


def test_without_held_out_captions_there_are_standard_prompts():
    plan = make_plan("zed_man", TRAIN, number=3)
    assert len(plan.prompts) == len(plan.texts) == 3 and all("zed_man" in prompt for prompt in plan.prompts)


def test_nothing_in_quiet_prompts_and_texts_calls_the_character():
    plan = make_plan("zed_man", TRAIN)
    assert "" in plan.quiet_prompts and any("woman" in prompt for prompt in plan.quiet_prompts)
    assert not any("zed" in prompt for prompt in plan.quiet_prompts + plan.texts)


def test_the_users_prompts_are_taken_as_they_are():
    assert make_plan("zed_man", TRAIN, prompts=["zed_man flies"] * 2, number=0).prompts == ("zed_man flies",)


@pytest.mark.parametrize("settings", [{"seeds": ()}, {"number": 0}])
def test_an_empty_plan_is_refused(settings):
    with pytest.raises(UserError, match="at least one"):
        make_plan("zed_man", TRAIN, **settings)


def test_lists_in_plain_parameters():
    assert parse_list("42, 123", "SEEDS") == [42, 123] and parse_list("", "SEEDS") == []
    assert parse_list("a, b|c", "PROMPTS", str, "|") == ["a, b", "c"]
    with pytest.raises(UserError, match="SEEDS is 'x'"):
        parse_list("x", "SEEDS")
