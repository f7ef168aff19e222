"""From the facts of a data set to findings: one picture's fitness and caption, and what only all of them together show."""

from collections import defaultdict
from dataclasses import replace

from .buckets import cut_off, drawn_place, enlargement, nearest_bucket
from .captions import Trigger, find_trigger, frequent_words, measure
from .duplicates import groups
from .findings import Finding, finding, printable
from .images import ENDINGS
from .layouts import Record
from .report import Picture
from .workers import Failure

TOO_SMALL, FAR_TOO_SMALL = 1.02, 4.0  # times enlarged
EXTREME_ASPECT = 2.5  # long side over short
MUCH_CUT = 0.2  # share of the area
BLURRED = 0.6  # images.blur
UNIFORM = 4.0  # grey levels of 255, standard deviation
FRONT = 4  # words before a trigger that still stands at the front: "a picture of NAME"
DOMINATES = 0.25  # share of an epoch, in sets of at least five pictures
FEW = 8  # pictures


def judge(record: Record, found: dict | Failure | None, sizes, trigger: str | None, tokenizers=()) -> Picture:
    """One picture with everything that can be said of it alone.

    found: what images.inspect told, how its worker failed, or None where the file was not opened. sizes: the buckets.
    """
    length = measure(record.caption, tokenizers) if record.caption else None
    picture = Picture(record, record.findings, tokens=length.tokens if length else 0)
    if record.caption:
        picture = add(picture, _words(record, length, trigger))
    if isinstance(found, Failure):
        code = {"crashed": "decoder-crashed", "hung": "decoder-hung"}.get(found.kind, "damaged")
        return add(picture, [finding(code, record.image_path, reason=found.detail)])
    if found is None:
        return picture
    picture = add(picture, [finding(code, record.image_path, **facts) for code, facts in found["notices"]])
    if found["bad"]:
        return add(picture, [finding(found["bad"][0], record.image_path, **found["bad"][1])])
    known = {name: found[name] for name in ("width", "height", "format", "sha256")}
    picture = replace(picture, bucket=nearest_bucket(found["width"], found["height"], sizes), **known)
    return add(picture, _fitness(picture, found["blur"], found["contrast"], sizes))


def add(picture: Picture, findings) -> Picture:
    """The picture with further findings."""
    return replace(picture, findings=picture.findings + tuple(findings))


def _fitness(picture, blur, contrast, sizes):
    name, width, height = picture.image_path, picture.width, picture.height
    bucket = f"{picture.bucket[0]}x{picture.bucket[1]}"
    scale, lost = enlargement(width, height, picture.bucket), cut_off(width, height, picture.bucket)
    aspect = max(width, height) / min(width, height)
    if not name.lower().endswith(ENDINGS[picture.format]):
        yield finding("wrong-ending", name, format=picture.format, expected=ENDINGS[picture.format][0])
    if scale > TOO_SMALL:
        code = "far-too-small" if scale > FAR_TOO_SMALL else "too-small"
        yield finding(code, name, width=width, height=height, scale=scale, bucket=bucket)
    if aspect > EXTREME_ASPECT:
        yield finding("extreme-aspect", name, width=width, height=height, ratio=aspect)
    if lost > MUCH_CUT:
        yield finding("crop-cuts", name, bucket=bucket, share=lost)
    if contrast < UNIFORM:
        yield finding("uniform", name)
    elif blur > BLURRED and scale <= TOO_SMALL:  # a picture that is too small has been told so
        yield finding("blurred", name, resolution=round((sizes[0][0] * sizes[0][1]) ** 0.5))


def _words(record, length, trigger):
    name, caption = record.image_path, record.caption
    if length.tail:
        how = "about" if length.estimated else "exactly"
        yield finding("caption-too-long", name, how=how, tokens=length.tokens, tail=printable(length.tail, 90))
    if not trigger:
        return
    place = find_trigger(caption, trigger)
    if place.spelled:
        yield finding("trigger-spelling", name, trigger=trigger, found=place.spelled)
    elif place.words_before is None:
        yield finding("trigger-missing", name, trigger=trigger)
    elif place.words_before > FRONT:
        yield finding("trigger-not-first", name, words=place.words_before)


def trigger_nowhere(pictures: list[Picture], trigger: str | None) -> list[Finding]:
    """A trigger that no caption has, with the word that may have been meant: the commonest, best one that is no plain word."""
    captions = [each.record.caption for each in pictures if each.record.caption]
    if not trigger or any(find_trigger(caption, trigger) != Trigger(None, None) for caption in captions):
        return []
    common = frequent_words(captions)
    if not common:
        return []
    word, count = max(common, key=lambda pair: (pair[1], not pair[0].isalpha()))
    return [finding("trigger-nowhere", "", trigger=trigger, word=word, count=count, total=len(captions))]


def compare(pictures: list[Picture], twins) -> tuple[list[Picture], list[Finding]]:
    """What shows only among pictures: twins, one that dominates, equal captions, too few. twins: duplicates.Twins.

    Returns the pictures with these findings and their group of twins, and the findings about the whole set.
    """
    extra = defaultdict(list)
    same_file = _same_file(pictures)
    for first, second in same_file:
        extra[second].append(finding("exact-duplicate", pictures[second].image_path, other=pictures[first].image_path))
    for pair in _nearest(pictures, _unlike_files(pictures, twins)):
        _tell_twins(pictures, pair, extra)
    group_of = groups([*same_file, *((pair.first, pair.second) for pair in twins)], len(pictures))
    _tell_dominating(pictures, group_of, extra)
    _tell_same_captions(pictures, extra)
    told = [replace(add(each, extra[index]), twins=group_of[index]) for index, each in enumerate(pictures)]
    train = sum(each.usable and each.record.split == "train" for each in told)
    return told, [finding("few-pictures", "", count=train)] if 0 < train < FEW else []


def _same_file(pictures) -> list[tuple[int, int]]:
    """(first, later) of every file whose bytes were there before."""
    first = {}
    for index, picture in enumerate(pictures):
        first.setdefault(picture.sha256, index)
    return [
        (first[each.sha256], index)
        for index, each in enumerate(pictures)
        if each.sha256 and first[each.sha256] != index
    ]


def _unlike_files(pictures, twins):
    """Twins but for copies of one file on one side of the split, which are told as such."""
    return [
        pair
        for pair in twins
        if pictures[pair.first].sha256 != pictures[pair.second].sha256
        or pictures[pair.first].record.split != pictures[pair.second].record.split
    ]


def _nearest(pictures, twins):
    """One pair for every later picture: the twin that it is most like, a twin on the other side of the split first."""
    best = {}
    for pair in twins:
        across = pictures[pair.first].record.split == pictures[pair.second].record.split
        rank = (across, pair.difference, pair.first)
        if pair.second not in best or rank < best[pair.second][0]:
            best[pair.second] = (rank, pair)
    return [pair for _, pair in sorted(best.values(), key=lambda each: each[1].second)]


def _tell_twins(pictures, pair, extra):
    splits = {pictures[index].record.split: index for index in (pair.first, pair.second)}
    if len(splits) == 2:
        name, other = (pictures[splits[split]].image_path for split in ("held_out", "train"))
        extra[splits["held_out"]].append(finding("held-out-twin", name, other=other, how=pair.how))
        return
    name, other = pictures[pair.second].image_path, pictures[pair.first].image_path
    extra[pair.second].append(finding("near-duplicate", name, other=other, how=pair.how))


def _tell_dominating(pictures, group_of, extra):
    drawn = defaultdict(int)
    for index, picture in enumerate(pictures):
        if picture.usable and picture.record.split == "train":
            drawn[group_of[index]] += picture.record.repeats
    total = sum(drawn.values())
    for index, repeats in drawn.items():
        if len(drawn) >= 5 and repeats > DOMINATES * total:
            extra[index].append(finding("dominating", pictures[index].image_path, share=repeats / total))


def _tell_same_captions(pictures, extra):
    said = defaultdict(list)
    for index, picture in enumerate(pictures):
        if picture.record.caption and picture.record.split == "train":
            said[picture.record.caption].append(index)
    for indices in said.values():
        for index in indices[1:]:
            name, other = pictures[index].image_path, pictures[indices[0]].image_path
            extra[index].append(finding("same-caption", name, other=other, count=len(indices)))


def set_apart(pictures: list[Picture], share: float, seed: int = 0) -> list[Picture]:
    """Hold out about `share` of the usable pictures for evaluation, twins always together.

    Groups are drawn by a hash of the seed and their first picture's content, so the choice does not move when other
    pictures come or go. Pictures that the folder holds out already stay where they are.
    """
    members = defaultdict(list)
    for index, picture in enumerate(pictures):
        if picture.usable and picture.record.split == "train":
            members[picture.twins].append(index)
    wanted, held_out = round(share * sum(map(len, members.values()))), set()
    for group in sorted(
        members.values(), key=lambda group: drawn_place(seed, min(pictures[index].sha256 for index in group))
    ):
        if len(held_out) + len(group) <= wanted:
            held_out.update(group)
    return [
        replace(picture, record=replace(picture.record, split="held_out")) if index in held_out else picture
        for index, picture in enumerate(pictures)
    ]
