"""Where pictures and captions lie: layouts found by looking, without opening a picture."""

import os
import re
import stat
import unicodedata
from collections import defaultdict
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath

from .captions import clean, decode_caption
from .errors import UserError
from .findings import Finding, finding
from .images import FOREIGN_ENDINGS, PICTURE_ENDINGS

CAPTION_ENDINGS = (".txt", ".caption")
METADATA_NAMES = ("metadata.jsonl", "metadata.csv")
HELD_OUT_FOLDER = "reference"
_PASSED_OVER = frozenset({"thumbs.db", "ehthumbs.db", "desktop.ini", "__macosx", "@eadir", "icon\r"})
_KOHYA = re.compile(r"(\d{1,4})_(\S.*)")
_WINDOWS_NAMES = re.compile(r"(?i)(con|prn|aux|nul|com\d|lpt\d)(\..*)?")


@dataclass(frozen=True)
class Record:
    """A picture as it was found, not yet opened. image_path: posix, relative to the data set's folder."""

    image_path: str
    path: Path
    caption: str | None = None
    caption_path: str | None = None  # the file to edit, relative like image_path
    repeats: int = 1
    split: str = "train"
    findings: tuple[Finding, ...] = ()
    readable: bool = True  # False: a link out, a pipe, an unknown format; its findings say which


@dataclass
class Tree:
    """The files below a folder, sorted by name; `problems` maps a file to the (code, facts) that bar it."""

    root: Path
    pictures: list[str] = field(default_factory=list)
    captions: list[str] = field(default_factory=list)
    metadata: list[str] = field(default_factory=list)
    problems: dict[str, tuple[str, dict]] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)


def walk(root: Path) -> Tree:
    """Sort the files below `root` by kind. Hidden files and system leftovers are passed over, links never followed out."""
    tree = Tree(root)
    folders = [""]
    while folders:
        prefix = folders.pop()
        try:
            entries = sorted(os.scandir(root / prefix), key=lambda entry: entry.name)
        except OSError as error:
            tree.findings.append(finding("folder-unreadable", prefix or str(root), reason=error.strerror))
            continue
        for entry in entries:
            if entry.name.startswith(".") or entry.name.lower() in _PASSED_OVER:
                continue
            name = prefix + entry.name
            if entry.is_dir(follow_symlinks=False):
                folders.append(name + "/")
            else:
                _sort_in(tree, name, entry)
    for kind in (tree.pictures, tree.captions, tree.metadata):
        kind.sort()  # by code point, whatever order the file system has
    return tree


def _sort_in(tree, name, entry):
    ending = PurePosixPath(entry.name).suffix.lower()
    problem = _problem(tree.root, name, entry, ending)
    if ending in PICTURE_ENDINGS or ending in FOREIGN_ENDINGS:
        tree.pictures.append(name)
        if problem:
            tree.problems[name] = problem
    elif problem and ending in CAPTION_ENDINGS:
        tree.findings.append(finding(problem[0], name, **problem[1]))
    elif problem:
        led_out = problem[0] == "link-leaves-folder" and entry.is_dir()  # a whole folder of pictures, perhaps
        tree.findings.append(finding(problem[0] if led_out else "other-file", name))
    elif ending in CAPTION_ENDINGS:
        tree.captions.append(name)
    elif entry.name.lower() in METADATA_NAMES:
        tree.metadata.append(name)
    else:
        tree.findings.append(finding("other-file", name))


def _problem(root, name, entry, ending):
    if not _is_unicode(name):
        return "name-not-unicode", {}
    if entry.is_symlink():
        target = Path(os.path.realpath(entry.path))  # Path.resolve raises on a link that leads to itself
        if not os.path.exists(target):
            return "broken-link", {}
        if not target.is_relative_to(root.resolve()):
            return "link-leaves-folder", {}
    try:
        if not stat.S_ISREG(entry.stat().st_mode):  # opening a pipe would wait for ever
            return "not-a-file", {}
    except OSError as error:
        return "unreadable", {"reason": error.strerror}
    return ("foreign-format", {"ending": ending}) if ending in FOREIGN_ENDINGS else None


def _is_unicode(text) -> bool:
    try:
        return bool(text.encode("utf-8")) or True
    except UnicodeEncodeError:
        return False


def describe_layout(tree: Tree) -> str:
    """The layout in the words of the trade."""
    if tree.metadata:
        return f"Hugging Face image folder ({', '.join(tree.metadata)})"
    if any(_top(name) == "images" for name in tree.pictures):
        return "images/ with captions/"
    if any(_kohya(name) for name in tree.pictures):
        return "kohya folders (repeats_words)"
    return "pictures with captions beside them"


def _top(name):
    return name.split("/", 1)[0] if "/" in name else ""


def _kohya(name):
    match = _KOHYA.fullmatch(_top(name))
    return match if match and int(match[1]) > 0 else None


def pair(tree: Tree, rows: dict[str, tuple[str, str]]) -> tuple[list[Record], list[Finding]]:
    """Give every picture its caption: from `rows` (image_path: caption, metadata file), else a file, else a kohya
    folder's words.

    Returns the records and the findings that belong to no picture.
    """
    findings, index, users = [], _CaptionIndex(tree.captions), defaultdict(list)
    only_images = not tree.metadata and any(_top(name) == "images" for name in tree.pictures)
    records = []
    for name in tree.pictures:
        if only_images and _top(name) not in ("images", HELD_OUT_FOLDER):
            findings.append(finding("outside-layout", name))
            continue
        record = _record(tree, name, rows, index)
        if record.caption_path in index.exact:
            users[record.caption_path].append(name)
        records.append(record)
    for caption in tree.captions:
        if caption not in users and caption not in index.passed_over:
            findings.append(finding("caption-without-picture", caption))
    return _with_twins(records, users), findings


def _record(tree, name, rows, index) -> Record:
    record = Record(name, tree.root / name, split="held_out" if _top(name) == HELD_OUT_FOLDER else "train")
    if name in tree.problems:
        code, facts = tree.problems[name]
        return replace(record, findings=(finding(code, name, **facts),), readable=False)
    kohya = None if tree.metadata else _kohya(name)
    if kohya:
        record = replace(record, repeats=int(kohya[1]))
    found = _name_findings(name)
    source, notices = None, []
    file, others, other_spelling = index.find(name)
    if name in rows:
        text, source = rows[name]
        caption = clean(text, notices)
        others = [file, *others] if file else []
        index.passed_over.update(others)
    elif file:
        source = file
        caption, notices = _read_caption(tree.root / source)
        if other_spelling:
            found.append(finding("caption-other-spelling", name, other=source))
    else:
        caption = kohya[2] if kohya else None
        if kohya:
            found.append(finding("caption-from-folder", name, caption=caption))
    found += [finding("two-captions", name, used=source, other=other) for other in others]
    found += [finding(code, name, **facts) for code, facts in notices]
    expected = source or expected_caption(name)
    unread = any(each.code in ("caption-binary", "caption-unreadable", "caption-too-large") for each in found)
    if not caption and not unread:
        found.append(finding("missing-caption" if caption is None else "empty-caption", name, expected=expected))
    return replace(record, caption=caption or None, caption_path=source, findings=tuple(found))


def _read_caption(path):
    try:
        with open(path, "rb") as file:
            return decode_caption(file.read((64 << 10) + 1))
    except OSError as error:
        return None, [("caption-unreadable", {"reason": error.strerror or type(error).__name__})]


def _name_findings(name):
    base = PurePosixPath(name).name
    reason = None
    if any(unicodedata.category(char) == "Cc" for char in name):
        reason = "it holds control characters"
    elif set('<>:"|?*\\') & set(name):
        reason = 'one of <>:"|?*\\ is in it'
    elif _WINDOWS_NAMES.fullmatch(base):
        reason = "Windows keeps it for a device"
    return [finding("name-not-portable", name, reason=reason)] if reason else []


def _caption_names(name: str) -> list[str]:
    """Where the caption of picture `name` may lie, the preferred place first."""
    bases = [base for place in _places(name) for base in (place, _without_ending(place))]
    return [base + ending for base in bases for ending in CAPTION_ENDINGS]


def expected_caption(name: str) -> str:
    """Where the caption of picture `name` should be written."""
    return _without_ending(_places(name)[0]) + CAPTION_ENDINGS[0]


def _places(name):
    """images/a.jpg has its caption at captions/a or beside it; so has reference/images/a.jpg below reference/."""
    parts = name.split("/")
    at = 1 if parts[0] == HELD_OUT_FOLDER else 0
    if len(parts) > at + 1 and parts[at] == "images":
        return ["/".join([*parts[:at], "captions", *parts[at + 1 :]]), name]
    return [name]


def _without_ending(name):
    return name[: len(name) - len(PurePosixPath(name).suffix)]


def _fold(name):
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())


class _CaptionIndex:
    """Caption files by exact name, else by a name that differs in case or Unicode form only."""

    def __init__(self, captions):
        self.exact = set(captions)
        self.folded = defaultdict(list)
        for caption in captions:
            self.folded[_fold(caption)].append(caption)
        self.passed_over = set()

    def find(self, name) -> tuple[str | None, list[str], bool]:
        """(the caption file or None, further ones that were passed over, whether its name is spelled otherwise)."""
        candidates = _caption_names(name)
        found = [candidate for candidate in candidates if candidate in self.exact]
        if found:
            self.passed_over.update(found[1:])
            return found[0], found[1:], False
        for candidate in candidates:
            folded = self.folded.get(_fold(candidate), [])
            if len(folded) == 1:
                return folded[0], [], True
        return None, [], False


def _with_twins(records, users):
    extra = defaultdict(list)
    for names in users.values():
        for name in names[1:]:
            extra[name].append(finding("same-stem", name, other=names[0]))
    for code, key in (("unicode-twins", _nfc), ("case-twins", str.casefold)):
        for group in _groups((record.image_path for record in records), key):
            extra[group[1]].append(finding(code, group[1], other=group[0]))
    return [replace(record, findings=record.findings + tuple(extra[record.image_path])) for record in records]


def _nfc(name):
    return unicodedata.normalize("NFC", name)


def _groups(names, key):
    groups = defaultdict(list)
    for name in names:
        groups[key(name)].append(name)
    return [group for group in groups.values() if len(group) > 1]


def existing_folder(folder) -> Path:
    """`folder` as an absolute path. Raises UserError where there is none."""
    path = Path(folder).expanduser()
    if not path.exists():
        raise UserError(
            f"There is no folder {folder}: check DATASET_PATH (--dataset), or put your pictures there."
        )
    return path.resolve()
