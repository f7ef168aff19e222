"""Everything the data set doctor can find: its code, how bad it is, one sentence, and the cure."""

import unicodedata
from dataclasses import dataclass

ERROR, WARNING, INFO = "error", "warning", "info"
COLOURS = {ERROR: "#cf222e", WARNING: "#9a6700", INFO: "#57606a", "ready": "#1a7f37", "excluded": "#57606a"}
SEVERITIES = (ERROR, WARNING, INFO)  # error keeps the picture out, warning lets it in, info only tells

_RESAVE = "Open it in an image editor and save it again as PNG or JPEG, or take another copy."
_REPLACE = "Take another copy of the file, or leave the picture out."
_RENAME = "Rename the file."

# code: (severity, sentence with {facts}, cure). {file} is always there.
CODES = {
    # what lies in the folder
    "broken-link": (ERROR, "{file} is a link to a file that does not exist.", "Put the picture itself there."),
    "link-leaves-folder": (ERROR, "{file} is a link that leads out of the data set.", "Copy what it leads to into the folder, or remove the link."),
    "not-a-file": (ERROR, "{file} is no regular file but a pipe, a socket or a device.", "Remove it from the folder."),
    "folder-unreadable": (ERROR, "The folder {file} cannot be opened ({reason}).", "Give yourself the right to read it."),
    "name-not-unicode": (ERROR, "The name {file} holds bytes that are no UTF-8 text.", _RENAME),
    "name-not-portable": (INFO, "The name {file} does not work on every system ({reason}).", "Rename it before you share the data set."),
    "case-twins": (WARNING, "{file} and {other} differ only in upper and lower case.", "Rename one: Windows and macOS keep only one of them."),
    "unicode-twins": (WARNING, "{file} and {other} look the same but are spelled with other code points.", "Rename one: macOS keeps only one of them."),
    "foreign-format": (ERROR, "{file} is a picture in a format that is not read here ({ending}).", "Save it as PNG or JPEG."),
    "outside-layout": (WARNING, "{file} lies outside images/ and was passed over.", "Move it into images/ if it belongs to the training data."),
    "other-file": (INFO, "{file} is neither picture nor caption and was passed over.", "Nothing to do."),
    "archive-entry-refused": (ERROR, "{file} in the archive was not unpacked ({reason}).", "Make the archive again from plain files below one folder."),
    "archive-entry-damaged": (ERROR, "{file} in the archive cannot be unpacked ({reason}).", "Make the archive again."),
    "metadata-row": (ERROR, "{file}, row {row}, cannot be used ({reason}).", "Mend or remove the row."),
    "metadata-without-picture": (WARNING, "{file}, row {row}, names {other}, which is not there.", "Add the picture or remove the row."),
    "metadata-twice": (WARNING, "{file}, row {row}, names {other} a second time; the first row counts.", "Remove one of the rows."),
    # pictures and captions belong together
    "missing-caption": (ERROR, "Missing caption for: {file}", "Write {expected} with a sentence that begins with the trigger."),
    "empty-caption": (ERROR, "Empty caption for: {file}", "Describe the picture in {expected}, or leave the picture out."),
    "caption-without-picture": (WARNING, "Caption without a picture: {file}", "Add the picture, correct the name, or remove the caption."),
    "same-stem": (WARNING, "{file} and {other} share one caption file.", "Rename one picture and its caption, or remove the one you do not want."),
    "two-captions": (WARNING, "{file} has more than one caption; {used} was read, {other} was not.", "Keep one of them."),
    "caption-other-spelling": (INFO, "{file} was matched to {other}, whose name is spelled otherwise (case or accents).", "Give both the same name."),
    "caption-from-folder": (INFO, "{file} has no caption file and takes its folder's words: {caption}", "Write a caption if you want more than the folder's words."),
    "caption-bom": (WARNING, "The caption of {file} begins with a byte-order mark, which was removed.", "Save it as plain UTF-8."),
    "caption-utf16": (WARNING, "The caption of {file} is UTF-16 and was read as such.", "Save it as UTF-8."),
    "caption-latin1": (WARNING, "The caption of {file} is not UTF-8 and was read as Latin-1: {caption}", "Check the letters and save it as UTF-8."),
    "caption-odd-characters": (WARNING, "The caption of {file} holds invisible or control characters, which were removed.", "Type the caption again as plain text."),
    "caption-several-lines": (INFO, "The caption of {file} has {lines} lines, which were joined.", "Keep a caption on one line."),
    "caption-binary": (ERROR, "The caption of {file} is no text.", "Write the caption as plain text."),
    "caption-unreadable": (ERROR, "The caption of {file} cannot be read ({reason}).", "Check the file and its rights."),
    "caption-too-large": (ERROR, "The caption of {file} has {size:,} bytes.", "A caption is one or two sentences: shorten it."),
    # decoding
    "unreadable": (ERROR, "{file} cannot be read ({reason}).", "Check the file and its rights."),
    "empty-file": (ERROR, "{file} has no content (0 bytes).", _REPLACE),
    "file-too-large": (ERROR, "{file} has {size} MB, more than the {limit} MB that are read.", "Save it smaller."),
    "too-many-pixels": (ERROR, "{file} has {width:,} x {height:,} pixels, more than {limit} million.", "Scale it down; training uses a fraction of that."),
    "not-a-picture": (ERROR, "{file} is named like a picture but holds none that can be recognised.", _REPLACE),
    "damaged-zeros": (ERROR, "{file} begins with nothing but zeros: it was not copied completely.", _REPLACE),
    "damaged-header": (ERROR, "{file} begins like a picture, but its header is damaged or cut off.", _REPLACE),
    "web-page": (ERROR, "{file} is a web page or text, not a picture: the download went wrong.", "Download the picture itself."),
    "truncated": (ERROR, "{file} breaks off before its last pixel ({reason}).", _REPLACE),
    "damaged": (ERROR, "{file} cannot be decoded ({reason}).", _REPLACE),
    "decoder-crashed": (ERROR, "{file} crashes the decoder ({reason}).", _RESAVE),
    "decoder-hung": (ERROR, "{file} was not decoded in time ({reason}).", _RESAVE),
    "changed": (ERROR, "{file} has changed since it was validated.", "Validate the data set again."),
    "several-frames": (ERROR, "{file} has {frames} frames.", "Save the frame you want as a picture of its own."),
    "unsupported-mode": (ERROR, "Unsupported image mode '{mode}': {file}", "Convert it to RGB in an image editor."),
    "wrong-ending": (WARNING, "{file} is in truth a {format} picture.", "Rename it to {expected}."),
    "exif-rotated": (INFO, "{file} was turned upright as its EXIF data says.", "Nothing to do."),
    "exif-damaged": (WARNING, "The EXIF data of {file} cannot be read; it was taken as upright.", "Check which way is up in the contact sheet."),
    "sixteen-bit": (INFO, "{file} has 16 bits a channel, scaled to 8.", "Nothing to do."),
    "greyscale": (INFO, "{file} has no colour.", "Leave it out if the character's colours matter."),
    "transparent": (WARNING, "{file} has transparent pixels, which were put on white.", "Give it a background of your own if white is wrong."),
    "profile-converted": (INFO, "{file} was converted from its colour profile ({mode}) to sRGB.", "Nothing to do."),
    "profile-damaged": (WARNING, "The colour profile of {file} cannot be used; its values were taken as sRGB.", "Check its colours in the contact sheet."),
    # fitness
    "far-too-small": (ERROR, "{file} ({width}x{height}) would be enlarged {scale:.1f} times to {bucket}.", "Use a larger original, or a lower resolution."),
    "too-small": (WARNING, "{file} ({width}x{height}) would be enlarged {scale:.2f} times to {bucket}.", "Use a larger original: training learns the blur of enlarging."),
    "extreme-aspect": (WARNING, "{file} ({width}x{height}) is {ratio:.1f} times as long as it is short.", "Crop it to what matters."),
    "crop-cuts": (WARNING, "The crop to {bucket} cuts {share:.0%} off {file}.", "Crop it yourself, or train with buckets."),
    "blurred": (WARNING, "{file} looks blurred at {resolution} px.", "Use a sharper picture: the LoRA learns the blur too."),
    "uniform": (WARNING, "{file} shows almost nothing but one colour.", "Look at it, and leave it out if it is empty."),
    "exact-duplicate": (WARNING, "{file} is the same file as {other}.", "Leave one out, or mean it: twins count double."),
    "near-duplicate": (WARNING, "{file} is nearly the same picture as {other}: {how}.", "Keep the better one unless both add something."),
    "held-out-twin": (WARNING, "{file} is held out but nearly the same as {other}, which is trained on: {how}.", "Replace it: scores on it would flatter the LoRA."),
    "dominating": (WARNING, "{file} with its repeats and twins makes up {share:.0%} of what training sees.", "Lower its repeats or leave twins out."),
    "few-pictures": (WARNING, "{count} pictures are few for a character.", "10 to 40 varied pictures work best."),
    # words
    "trigger-nowhere": (WARNING, "No caption has the trigger {trigger}; {word} is in {count} of {total}.", "Give the word that your captions have as TRIGGER_TOKEN (--trigger-token), or write {trigger} into them."),
    "trigger-missing": (WARNING, "The caption of {file} lacks the trigger {trigger}.", "Begin it with {trigger}, or the LoRA answers to other words."),
    "trigger-spelling": (WARNING, "The caption of {file} spells the trigger {found}, not {trigger}.", "Spell it {trigger} everywhere."),
    "trigger-not-first": (INFO, "The caption of {file} has the trigger only after {words} words.", "Put it first: early words weigh more."),
    "caption-too-long": (WARNING, "The caption of {file} has {how} {tokens} tokens; after 75 is cut: {tail}", "Shorten it, most important words first."),
    "same-caption": (WARNING, "{file} shares its caption with {other} ({count} pictures in all).", "Say what differs: what no caption says becomes part of the trigger."),
    "exclusion-without-picture": (WARNING, "The exclusion list names {file}, which is not in the data set.", "Remove it from exclusions.json."),
    "override-without-picture": (WARNING, "A caption override names {file}, which is not in the data set.", "Remove it from caption_overrides.json."),
}  # fmt: skip


@dataclass(frozen=True)
class Finding:
    """One thing found about one file ("" for the whole data set)."""

    code: str
    file: str
    message: str
    cure: str

    @property
    def severity(self) -> str:
        return CODES[self.code][0]


def finding(code: str, file: str, **facts) -> Finding:
    """The finding `code` about `file`, its sentence filled with `facts`."""
    _, message, cure = CODES[code]
    shown = {name: printable(fact) if isinstance(fact, str) else fact for name, fact in facts.items()}
    shown["file"] = printable(file)
    return Finding(code, file, message.format(**shown), cure.format(**shown))


def printable(text: str, limit: int = 300) -> str:
    """`text` on one line and encodable: control characters and lone surrogates as escapes."""
    safe = "".join(char.encode("unicode_escape").decode() if _unsafe(char) else char for char in text[: limit + 1])
    return safe if len(safe) <= limit else safe[: limit - 1] + "…"


def _unsafe(char) -> bool:
    return char not in "\u200c\u200d" and unicodedata.category(char) in ("Cc", "Cs", "Cf", "Zl", "Zp")
