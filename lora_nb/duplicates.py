"""Near duplicates, mirrored and cropped ones too, in time that grows with the number of pictures and not its square.

A picture B that is a crop of A looks like a window of A. So A is filed under the perceptual hash (pHash) of many
windows, and B asks with the hash of its whole and of its mirror image. Whoever shares enough bits is laid over the
other, moved until it fits best, and compared pixel by pixel.
"""

import base64
import math
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageOps

SIDE = 64  # pictures are compared as grey squares of this many pixels
SCALES = (1.0, 0.9, 0.8, 0.7, 0.6)  # of a window's sides
TABLES = 12  # of the search, see _candidates
MAX_BITS = 14  # of 64 may differ between candidates
BUCKET = 24  # neighbours looked at in one bucket: keeps the search linear where thousands share a key
BLOCK = 1 << 15  # windows at a time, so that they stay in the processor's cache
CHECKED = 4  # candidates of one picture that are compared pixel by pixel
# Mean difference of normalised pixels (standard deviations), and the largest mean over a 5 x 5 patch of 48 x 48.
# Measured on 40 drawn scenes of one character: crops, rescaled and saved again, stay below 0.34 in every patch;
# different pictures with the same pose and background begin at 0.45.
HOPELESS, ROUGHLY, PATCH = 0.5, 0.25, 0.40


def _spans():
    for scale in SCALES:
        for start in sorted({0.0, (1 - scale) / 2, 1 - scale}):
            yield start, start + scale


SPANS = tuple(_spans())  # (start, end) along one side; a window is one of them down and one across
WINDOWS = tuple((across[0], down[0], across[1], down[1]) for down in SPANS for across in SPANS)


def _frequencies(start, end):
    """[8, SIDE]: the lowest DCT-II frequencies of a span resampled to 32 points, which is what imagehash.phash takes."""
    width = (end - start) * SIDE / 32
    points = start * SIDE + (np.arange(32) + 0.5) * width
    pixels = np.arange(SIDE)
    overlap = np.minimum(points[:, None] + width / 2, pixels + 1) - np.maximum(points[:, None] - width / 2, pixels)
    resample = np.clip(overlap, 0, None) / width
    cosines = np.cos(np.pi * np.arange(8)[:, None] * (2 * np.arange(32) + 1) / 64)
    return (cosines @ resample).astype(np.float32)


_ALL_FREQUENCIES = np.concatenate([_frequencies(*span) for span in SPANS])  # [spans * 8, SIDE]


def hashes(grey: np.ndarray) -> np.ndarray:
    """uint64 [windows + 1]: the pHash of every window of a float32 [SIDE, SIDE] picture, then of its mirror image.

    Two matrix products give the frequencies of all windows; WINDOWS[0] is the whole picture. In the mirror image its
    waves from left to right that are odd about the middle change their sign.
    """
    count = len(SPANS)
    waves = (_ALL_FREQUENCIES @ grey @ _ALL_FREQUENCIES.T).reshape(count, 8, count, 8)
    waves = waves.transpose(0, 2, 1, 3).reshape(count * count, 8, 8)
    waves = np.concatenate([waves, waves[:1] * (-1) ** np.arange(8)]).reshape(-1, 64)
    middle = np.partition(waves, (31, 32), axis=1)[:, 31:33].mean(axis=1, keepdims=True)
    return np.packbits(waves > middle, axis=1).view(">u8").astype(np.uint64).ravel()


def signature(image: Image.Image) -> dict:
    """What the search needs of a picture: its `hashes`, and the small grey square they are of.

    Strings only, so that it travels as JSON.
    """
    grey = image.resize((SIDE, SIDE), Image.Resampling.BOX, reducing_gap=2.0).convert("L")
    return {
        "hashes": base64.b64encode(hashes(np.asarray(grey, dtype=np.float32)).tobytes()).decode(),
        "grey": base64.b64encode(grey.tobytes()).decode(),
    }


def contrast(signed: dict) -> float:
    """Standard deviation of a signature's grey square, in grey levels: 0 for one colour only."""
    return round(float(np.frombuffer(base64.b64decode(signed["grey"]), np.uint8).std()), 2)


@dataclass(frozen=True)
class Twins:
    """Pictures `first` < `second` are nearly the same; `how`: what must be done to one to get the other."""

    first: int
    second: int
    how: str
    difference: float  # of the worst patch, in standard deviations


class TwinSearch:
    """Collects signatures in flat arrays (5.5 kB a picture), then finds the twins among them."""

    def __init__(self, count: int):
        self.windows = np.zeros((count, len(WINDOWS)), np.uint64)
        self.asked = np.zeros((2, count), np.uint64)  # upright, mirrored
        self.grey = np.zeros((count, SIDE, SIDE), np.uint8)
        self.present = np.zeros(count, bool)

    def add(self, index: int, signed: dict) -> None:
        """File picture `index` under its `signature`."""
        own = np.frombuffer(base64.b64decode(signed["hashes"]), np.uint64)
        self.windows[index], self.asked[:, index] = own[:-1], own[[0, -1]]
        self.grey[index] = np.frombuffer(base64.b64decode(signed["grey"]), np.uint8).reshape(SIDE, SIDE)
        self.present[index] = True

    def pairs(self) -> list[Twins]:
        """Each pair of twins once, in the order of the pictures."""
        best = {}
        there = np.flatnonzero(self.present)
        a, window, asking = _candidates(self.windows[there], self.asked[:, there])
        mirrored, b = np.divmod(asking, max(1, len(there)))
        a, b = there[a], there[b]
        hopeful = _hopeful(self.grey, a, window, b, mirrored)
        for one in zip(*(column[hopeful].tolist() for column in (a, window, b, mirrored)), strict=True):
            self._compare(*one, best)
        return [best[pair] for pair in sorted(best)]

    def _compare(self, a, window, b, mirrored, best):
        pair = (min(a, b), max(a, b))
        whole, part = Image.fromarray(self.grey[a]), Image.fromarray(self.grey[b])
        difference, box = _lay_over(whole, WINDOWS[window], ImageOps.mirror(part) if mirrored else part)
        if difference < PATCH and (pair not in best or difference < best[pair].difference):
            cropped = (box[2] - box[0]) * (box[3] - box[1]) < 0.9
            how = " and ".join(["mirrored"] * mirrored + ["cropped"] * cropped) or "the same picture saved again"
            best[pair] = Twins(*pair, how, difference)


def _candidates(windows: np.ndarray, asked: np.ndarray):
    """(a, window, question) as arrays: for every question the CHECKED pictures a with a window whose hash is nearest.

    windows: uint64 [N, W]; asked: uint64 [2, N], the pictures and their mirror images; question: a place in it, flat.
    Each table files all windows under some of the 64 bits, drawn by chance: as many as leave a dozen entries to a
    bucket. In a small set nothing is missed; among 20,000 pictures 18 bits are compared, and hashes 6 bits apart meet
    in one of 12 tables with 80 %. A picture has many windows that may meet.
    """
    count, width = windows.shape
    key_bits = min(18, max(6, round(math.log2(max(1, count * width / 12)))))
    random = np.random.default_rng(0)
    flat, questions, found = windows.ravel(), asked.ravel(), [np.zeros((3, 0), np.int32)]
    for _ in range(TABLES if count > 1 else 0):
        asking, entry = _same_bucket(flat, questions, random.choice(64, key_bits, replace=False), width)
        distance = np.bitwise_count(flat[entry] ^ questions[asking])
        near = (distance <= MAX_BITS) & (entry // width != asking % count)
        found.append(np.stack([asking[near], distance[near], entry[near]]).astype(np.int32))
    asking, distance, entries = np.concatenate(found, axis=1)
    order = np.lexsort((entries, distance, asking))
    asking, entries = asking[order], entries[order]
    nearest = np.sort(np.unique(asking.astype(np.int64) * count + entries // width, return_index=True)[1])  # one window a picture
    asking, entries = asking[nearest], entries[nearest]
    few = np.arange(len(asking)) - np.searchsorted(asking, asking) < CHECKED
    return entries[few] // width, entries[few] % width, asking[few]


def _key(hashes, bits):
    keys = np.zeros(len(hashes), np.uint64)
    for bit in bits:
        keys <<= np.uint64(1)
        keys |= (hashes >> np.uint64(bit)) & np.uint64(1)
    return keys.astype(np.int64)


def _same_bucket(flat, questions, bits, width):
    """(question, entry) for up to BUCKET entries of `flat` with the question's key, those of nearby files first.

    Key and entry in one number: sorted, a bucket's entries lie together in the order of the pictures.
    """
    count, shift = len(flat) // width, len(flat).bit_length()
    filed = np.empty(len(flat), np.int64)
    for start in range(0, len(flat), BLOCK):
        block = flat[start : start + BLOCK]
        filed[start : start + BLOCK] = _key(block, bits) << shift | np.arange(start, start + len(block))
    filed.sort()
    bucket = _key(questions, bits) << shift
    here = bucket + np.arange(len(questions)) % count * width
    first, last = np.searchsorted(filed, bucket), np.searchsorted(filed, bucket + (1 << shift))
    start = np.clip(np.searchsorted(filed, here) - BUCKET // 2, first, np.maximum(first, last - BUCKET))
    many = np.minimum(last - start, BUCKET)
    asking = np.repeat(np.arange(len(questions)), many)
    within = np.arange(len(asking)) - np.repeat(np.cumsum(many) - many, many)
    return asking, filed[np.repeat(start, many) + within] & ((1 << shift) - 1)


POINTS = 16  # to a side, of the first look


def _hopeful(grey, a, window, b, mirrored) -> np.ndarray:
    """bool [candidates]: which windows of a look so much like b (or its mirror image) that a closer look is worth it.

    The first look of `_lay_over` at all candidates at once, as among thousands of pictures nearly all end there.
    """
    spans = np.stack([_bilinear(*span) for span in SPANS])
    down, across = np.divmod(window, len(SPANS))
    hopeful = [np.zeros(0, bool)]
    for some in np.split(np.arange(len(a)), range(1024, len(a), 1024)):
        whole = spans[down[some]] @ grey[a[some]].astype(np.float32) @ spans[across[some]].transpose(0, 2, 1)
        part = spans[0] @ grey[b[some]].astype(np.float32) @ spans[0].T
        part = np.where(mirrored[some, None, None] == 1, part[:, :, ::-1], part)
        hopeful.append(np.abs(_standard(whole) - _standard(part)).mean(axis=(-1, -2)) <= HOPELESS)
    return np.concatenate(hopeful)


def _bilinear(start, end) -> np.ndarray:
    """[POINTS, SIDE]: a span resampled as Pillow's BILINEAR does."""
    scale = (end - start) * SIDE / POINTS
    centres = start * SIDE + (np.arange(POINTS) + 0.5) * scale
    weights = np.maximum(0, 1 - np.abs(np.arange(SIDE) + 0.5 - centres[:, None]) / max(scale, 1))
    return (weights / weights.sum(axis=1, keepdims=True)).astype(np.float32)


def _lay_over(whole, box, part) -> tuple[float, tuple]:
    """(the worst patch's difference, the best box): move `box` over `whole` until it shows what `part` shows."""
    for points, step, finest in ((POINTS, 0.06, 0.012), (48, 0.02, 0.002)):
        target = _normalised(part, (0, 0, 1, 1), points)
        best = np.abs(_normalised(whole, box, points) - target).mean()
        if best > HOPELESS:
            break
        while step > finest:
            moved = [(np.abs(_normalised(whole, each, points) - target).mean(), each) for each in _moved(box, step)]
            nearest = min(moved, default=(best, box))
            if nearest[0] < best - 1e-4:
                best, box = nearest
            else:
                step /= 2
        if best > ROUGHLY:
            return float("inf"), box
    patches = np.lib.stride_tricks.sliding_window_view(np.abs(_normalised(whole, box, points) - target), (5, 5))
    return float(patches.mean(axis=(-1, -2)).max()), box


def _moved(box, step):
    """`box` with one edge moved by `step` in or out, at least half the picture wide and high."""
    for edge in range(4):
        for shift in (-step, step):
            new = list(box)
            new[edge] = min(1.0, max(0.0, new[edge] + shift))
            if new[2] - new[0] >= 0.5 and new[3] - new[1] >= 0.5:
                yield tuple(new)


def _normalised(grey, box, points) -> np.ndarray:
    pixels = grey.resize((points, points), Image.Resampling.BILINEAR, box=tuple(SIDE * edge for edge in box))
    return _standard(np.asarray(pixels, dtype=np.float32))


def _standard(pixels) -> np.ndarray:
    """Pictures [..., H, W] with mean 0 and deviation 1; less where there is little to see."""
    axes = (-1, -2)
    return (pixels - pixels.mean(axes, keepdims=True)) / np.maximum(pixels.std(axes, keepdims=True), 4.0)


def groups(pairs, count: int) -> list[int]:
    """For each of `count` pictures the lowest index among all that (first, second) `pairs` tie together."""
    leader = list(range(count))

    def find(index):
        while leader[index] != index:
            leader[index] = leader[leader[index]]
            index = leader[index]
        return index

    for first, second in pairs:
        low, high = sorted((find(first), find(second)))
        leader[high] = low
    return [find(index) for index in range(count)]
