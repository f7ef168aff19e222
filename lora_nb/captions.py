"""Captions: read whatever encoding they come in, count their words and tokens, and see what the trigger will absorb."""

import difflib
import json
import math
import re
import unicodedata
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

SDXL_TOKENIZER = Path(__file__).parent / "presets" / "sdxl" / "tokenizer"
MAX_BYTES = 64 << 10
MAX_TOKENS = 75  # CLIP's 77 less its start and end
_JOINERS = "\u200c\u200d"  # invisible, but letters of Persian and Hindi, and of composed emoji
_WORD = re.compile(r"[^\W_]+(?:['’_-][^\W_]+)*")
_CLIP_PIECE = re.compile(r"'(?:s|t|re|ve|m|ll|d)\b|[^\W\d_]+|\d|[^\w\s]+|_+", re.IGNORECASE)
_STOP_WORDS = frozenset(
    "a an and are as at be by for from has have he her his in is it its of on or she that the their they this to was "
    "were which who with".split()
)


def decode_caption(data: bytes) -> tuple[str | None, list[tuple[str, dict]]]:
    """The caption in a file's bytes, on one line, and what was noticed; None where it is no text.

    UTF-8, else UTF-16, else Latin-1. A notice is (code, facts) of findings.CODES.
    """
    if len(data) > MAX_BYTES:
        return None, [("caption-too-large", {"size": len(data)})]
    notices = []
    text = _decode(data, notices)
    if text is None:
        return None, [("caption-binary", {})]
    return clean(text, notices), notices


def _decode(data, notices):
    if data.startswith((b"\xff\xfe", b"\xfe\xff")) or (len(data) > 3 and data[1::2].count(0) > len(data) // 4):
        codec = "utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-16-le"
        try:
            text = data.decode(codec)
        except UnicodeDecodeError:
            return None
        notices.append(("caption-utf16", {}))
        return None if "\0" in text else text
    if b"\0" in data:
        return None
    if data.startswith(b"\xef\xbb\xbf"):
        data = data[3:]
        notices.append(("caption-bom", {}))
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        text = data.decode("latin-1")
    if sum(unicodedata.category(char) == "Cc" and not char.isspace() for char in text) > len(text) / 20:
        return None  # a picture or a program renamed to .txt
    notices.append(("caption-latin1", {"caption": " ".join(text.split())}))
    return text


def clean(text: str, notices: list) -> str:
    """`text` on one line with single spaces and no invisible characters; tells `notices` what it changed."""
    lines = [line for line in text.splitlines() if line.strip()]
    if len(lines) > 1:
        notices.append(("caption-several-lines", {"lines": len(lines)}))
    kept = "".join(char for char in text if char.isspace() or not _invisible(char))
    if len(kept) < len(text):
        notices.append(("caption-odd-characters", {}))
    return " ".join(kept.split())


def _invisible(char) -> bool:
    return char not in _JOINERS and unicodedata.category(char) in ("Cc", "Cf", "Cs")


def words(caption: str) -> list[str]:
    """The caption's words in lower case; `aldar_kose_man` and `half-body` are one each."""
    return _WORD.findall(caption.lower())


@dataclass(frozen=True)
class Trigger:
    """Where a caption has the trigger token. words_before: None where it is missing; spelled: another spelling of it."""

    words_before: int | None
    spelled: str | None


def find_trigger(caption: str, trigger: str) -> Trigger:
    """Look for `trigger` as a whole word. Case does not matter, because CLIP lowers it; joints and letters do."""
    match = re.search(rf"(?<!\w){re.escape(trigger)}(?!\w)", caption, re.IGNORECASE)
    if match:
        return Trigger(len(words(caption[: match.start()])), None)
    parts = [re.escape(part) for part in re.split(r"[\s_-]+", trigger) if part]
    joint = r"[\s_-]*"
    variant = parts and re.search(rf"(?<!\w){joint.join(parts)}(?!\w)", caption, re.IGNORECASE)
    if variant:
        return Trigger(None, variant.group())
    near = difflib.get_close_matches(trigger.lower(), words(caption), n=1, cutoff=0.85) if len(trigger) > 4 else []
    return Trigger(None, near[0] if near else None)


def estimate_tokens(caption: str) -> list[tuple[str, int]]:
    """(piece, its tokens) by rule of thumb, where no tokenizer is at hand: common words are one token, rare ones more."""
    return [(piece, _piece_tokens(piece)) for piece in _CLIP_PIECE.findall(caption.lower())]


def _piece_tokens(piece):
    if not piece.isascii():
        return max(1, math.ceil(len(piece.encode()) / 2))
    return 1 if len(piece) <= 7 else math.ceil(len(piece) / 7)


@dataclass(frozen=True)
class Length:
    """A caption's length in CLIP tokens. tail: the words after the 75th token, "" where all fit."""

    tokens: int
    tail: str
    estimated: bool


def measure(caption: str, tokenizers=()) -> Length:
    """The longest count over `tokenizers` (each str -> list of (start, end) characters a token), else an estimate."""
    counts = [tokenizer(caption) for tokenizer in tokenizers]
    if not counts:
        spans, position = [], 0
        for piece, count in estimate_tokens(caption):
            start = caption.lower().find(piece, position)
            position = start + len(piece)
            spans += [(start, position)] * count
        counts = [spans]
    spans = max(counts, key=len)
    tail = caption[spans[MAX_TOKENS][0] :].strip() if len(spans) > MAX_TOKENS else ""
    return Length(len(spans), tail, estimated=not tokenizers)


def clip_tokenizers(base_model) -> list:
    """The tokenizers of a diffusers folder as functions for `measure`; SDXL's own where there is no such folder.

    Built from the vocabulary files, so no model library is loaded.
    """
    folders = [folder for name in ("tokenizer", "tokenizer_2") if (folder := Path(base_model) / name).is_dir()]
    return [_clip_tokenizer(folder) for folder in folders or [SDXL_TOKENIZER] if (folder / "vocab.json").is_file()]


def _clip_tokenizer(folder):
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers

    vocabulary = json.loads((folder / "vocab.json").read_text("utf-8"))
    lines = (folder / "merges.txt").read_text("utf-8").splitlines()
    merges = [tuple(line.split(" ")) for line in lines if line and not line.startswith("#version")]
    bpe = models.BPE(
        vocabulary, merges, unk_token="<|endoftext|>", continuing_subword_prefix="", end_of_word_suffix="</w>"
    )
    tokenizer = Tokenizer(bpe)
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    pieces = Regex(r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(pieces, "removed", invert=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    return lambda caption: tokenizer.encode(caption).offsets


@dataclass(frozen=True)
class Absorption:
    """What a LoRA will tie to its trigger. Each is a list of (word, share of the captions with the trigger)."""

    captions: int
    absorbed: list[tuple[str, float]]
    promptable: list[tuple[str, float]]

    def __str__(self):
        return (
            f"In {self.captions} captions with the trigger\n"
            f"  nearly always said, so absorbed by it: {_shares(self.absorbed)}\n"
            f"  sometimes said, so still yours to prompt: {_shares(self.promptable)}\n"
            "  never said but always in the picture: absorbed too."
        )


def _shares(pairs):
    return ", ".join(f"{word} {share:.0%}" for word, share in pairs[:15]) or "nothing"


def absorption(captions, trigger: str, nearly_always=0.9, rarely=0.05) -> Absorption:
    """Words by the share of trigger captions that hold them: above `nearly_always` absorbed, below it promptable.

    Words in fewer than `rarely` of the captions, or in one only, are left out: nothing can be learned of them.
    """
    with_trigger = [caption for caption in captions if find_trigger(caption, trigger).words_before is not None]
    parts = {*words(trigger), trigger.lower()}
    counts = Counter(word for caption in with_trigger for word in set(words(caption)) - _STOP_WORDS - parts)
    total = len(with_trigger)
    shares = sorted(
        ((word, count / total) for word, count in counts.items() if count > 1), key=lambda pair: (-pair[1], pair[0])
    )
    absorbed = [pair for pair in shares if pair[1] >= nearly_always]
    return Absorption(total, absorbed, [pair for pair in shares if rarely <= pair[1] < nearly_always])


def frequent_words(captions, trigger: str | None = None, most: int = 30) -> list[tuple[str, int]]:
    """(word, captions that hold it), without stop words and the trigger's own, commonest first."""
    skip = _STOP_WORDS | ({*words(trigger), trigger.lower()} if trigger else set())
    counts = Counter(word for caption in captions for word in set(words(caption)) - skip)
    return sorted(counts.items(), key=lambda pair: (-pair[1], pair[0]))[:most]
