"""What an evaluation draws: prompts with the trigger, what each of them asks for, prompts without it, seeds."""

import re
from collections import Counter
from dataclasses import asdict, dataclass

from lora_nb.errors import UserError

STANDARD = (
    "{trigger}, close-up portrait, smiling", "{trigger}, half body, in a forest", "{trigger}, full body, by the sea",
    "{trigger}, close-up portrait, at night", "{trigger}, half body, in the snow", "{trigger}, full body, in the mountains",
)  # fmt: skip
LITTLE_WORDS = frozenset("a an and at by for from he her his in is it of on or she the their they to under with".split())
COMMON = 0.8  # a word in so many of the captions is the character's, not the prompt's


@dataclass(frozen=True)
class Plan:
    """prompts call the character; texts say what each asks for besides him; quiet_prompts do not call him."""

    prompts: tuple[str, ...]
    texts: tuple[str, ...]
    quiet_prompts: tuple[str, ...]
    seeds: tuple[int, ...]

    def as_dict(self) -> dict:
        return asdict(self)


def make_plan(
    trigger: str, train_captions, held_out_captions=(), *, prompts=(), quiet_prompts=(), number=6, seeds=(42, 123), class_word="man",
) -> Plan:  # fmt: skip
    """`prompts`, else captions of held-out pictures, else standard ones, `number` of them.

    `class_word` is what the trigger is one of; in texts and quiet prompts it stands for the trigger. Words in nearly
    every training caption are left out of the texts: they are the character's. Raises UserError without prompts or seeds.
    """
    given = list(dict.fromkeys(prompts or [caption for caption in held_out_captions if _calls(trigger, caption)]))
    known = set(train_captions)
    given = sorted(given, key=lambda prompt: prompt in known) if not prompts else given  # new combinations first
    given = given if prompts else (given or [prompt.format(trigger=trigger) for prompt in STANDARD])[:number]
    if not given or not seeds:
        raise UserError("An evaluation needs at least one prompt and one seed: raise NUM_PROMPTS and NUM_SEEDS.")
    texts = [without_traits(prompt, trigger, train_captions, class_word) for prompt in given]
    somebody = [replace_trigger(prompt, trigger, class_word) for prompt in given]
    others = [replace_trigger(prompt, trigger, "woman") for prompt in given]
    quiet = list(quiet_prompts) or [somebody[0], others[len(others) // 2], somebody[-1], ""]
    return Plan(tuple(given), tuple(texts), tuple(dict.fromkeys(quiet)), tuple(seeds))


def replace_trigger(prompt: str, trigger: str, class_word: str) -> str:
    """The prompt about anybody: "aldar_kose_man, smiling" -> "a man, smiling"."""
    somebody = f"{'an' if class_word[:1] in 'aeiou' else 'a'} {class_word}" if class_word else ""
    return _tidy(re.sub(rf"\b(?:an?\s+|the\s+)?{re.escape(trigger)}\b", somebody, prompt, flags=re.IGNORECASE))


def without_traits(prompt: str, trigger: str, captions, class_word: str) -> str:
    """What the prompt asks for besides the character: his words are gone, so that their absence cannot cost adherence."""
    seen = Counter(word for caption in captions for word in set(_words(replace_trigger(caption, trigger, ""))))
    common = {word for word, times in seen.items() if times >= COMMON * len(captions)} - LITTLE_WORDS - set(_words(trigger))
    kept = [word for word in re.split(r"(\W+)", prompt) if word.lower() not in common]
    return replace_trigger("".join(kept), trigger, class_word)


def parse_list(text: str, name: str, kind=int, separator: str = ",") -> list:
    """ "42, 123" -> [42, 123], "" -> []: a list in one plain parameter. Raises UserError that names the parameter."""
    try:
        return [kind(part.strip()) for part in text.split(separator) if part.strip()]
    except ValueError:
        raise UserError(f"{name} is {text!r}: write {kind.__name__} values with {separator!r} between them.") from None


def _calls(trigger: str, caption: str) -> bool:
    return trigger.lower() in caption.lower()


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def _tidy(text: str) -> str:
    """No doubled or leading commas and spaces."""
    text = re.sub(r"\s*,(?:\s*,)+", ",", re.sub(r"\s+", " ", text))
    return text.strip(" ,")
