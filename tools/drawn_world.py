"""A small drawn world: people in robes and hats before eight backgrounds, with the facts of every picture.

`random_scene(rng)` invents a person, `draw(scene, width, height)` draws it with Pillow, `caption(scene, rng)` tells what
is seen. Base scenes never show what the characters in CHARACTERS have: a kalpak or a cone hat, zigzags or diamonds, a
goatee or a forked beard. The base model and its VAE are trained on base scenes and `disturb`ed ones; a LoRA teaches the rest.
All lengths of a person are in head radii, with the head's centre at (0, 0) and y pointing down.
"""

import math
import random
from dataclasses import asdict, dataclass, replace

from PIL import Image, ImageDraw

SKINS = {"pale": (250, 216, 190), "tan": (226, 176, 132), "brown": (172, 116, 76), "dark": (104, 68, 48)}
COLOURS = {
    "red": (206, 44, 48), "blue": (44, 84, 190), "green": (40, 140, 72), "yellow": (242, 206, 60),
    "purple": (128, 56, 156), "white": (242, 242, 238), "black": (40, 38, 46), "orange": (240, 132, 36),
}
GOLD = (240, 190, 50)
HATS = ("none", "skullcap", "turban", "brimmed hat", "fur hat")
PATTERNS = ("plain", "stripes", "dots", "checks")
BEARDS = ("none", "full beard", "moustache")
EXPRESSIONS = ("smiling", "sad", "surprised", "calm")
FRAMINGS = {"close-up portrait": (0.22, 0.53), "half body": (0.18, 0.44), "full body": (0.14, 0.39)}  # radius, head's y
BACKGROUNDS = ("steppe", "mountains", "desert", "night", "sea", "forest", "snow", "bazaar")
PLACES = {
    "steppe": "on the green steppe", "mountains": "in front of mountains", "desert": "in the desert",
    "night": "at night under the moon", "sea": "by the sea", "forest": "in a forest", "snow": "in the snow",
    "bazaar": "at the bazaar",
}


@dataclass(frozen=True)
class Scene:
    """What is seen. Colours are names in COLOURS or RGB triples; `x` and `zoom` jitter the framing."""

    person: str = "man"
    skin: str = "tan"
    hat: str = "none"
    hat_colour: object = "red"
    robe_colour: object = "blue"
    pattern: str = "plain"
    pattern_colour: object = "white"
    beard: str = "none"
    hair_colour: tuple = (46, 34, 30)
    expression: str = "calm"
    framing: str = "half body"
    background: str = "steppe"
    x: float = 0.5
    zoom: float = 1.0
    seed: int = 0
    trigger: str = ""

    def facts(self) -> dict:
        """The scene's traits by name, for a caption or a check."""
        return asdict(self)


CHARACTERS = {
    "aldar_kose_man": Scene(hat="kalpak", hat_colour="red", robe_colour="blue", pattern="zigzags", pattern_colour=GOLD,
                            beard="goatee", skin="tan", hair_colour=(40, 30, 28), trigger="aldar_kose_man"),
    "tengri_sage": Scene(hat="cone hat", hat_colour="green", robe_colour="purple", pattern="diamonds", pattern_colour="white",
                         beard="forked beard", skin="pale", hair_colour=(232, 232, 232), trigger="tengri_sage"),
}


def random_scene(rng) -> Scene:
    """A base scene from `rng` (random.Random): any person of this world but those in CHARACTERS."""
    person = rng.choice(("man", "man", "woman"))
    robe = rng.choice(tuple(COLOURS))
    contrast = [name for name in ("white", "black", "yellow", "red") if name != robe]
    return Scene(
        person=person, skin=rng.choice(tuple(SKINS)), hat=rng.choice(HATS), hat_colour=rng.choice(tuple(COLOURS)),
        robe_colour=robe, pattern=rng.choice(PATTERNS), pattern_colour=rng.choice(contrast),
        beard=rng.choice(BEARDS) if person == "man" else "none",
        hair_colour=rng.choice(((46, 34, 30), (110, 70, 40), (150, 150, 150))),
        **random_setting(rng),
    )


def random_setting(rng) -> dict:
    """What a character does not bring along: expression, framing, background and jitter."""
    return dict(
        expression=rng.choice(EXPRESSIONS), framing=rng.choice(tuple(FRAMINGS)), background=rng.choice(BACKGROUNDS),
        x=rng.uniform(0.42, 0.58), zoom=rng.uniform(0.93, 1.07), seed=rng.randrange(1 << 30),
    )


def random_character(rng, shapes="all") -> Scene:
    """Somebody nobody thought of: any colours at all; `shapes` "all" adds the characters' hats, patterns and beards, "base" does not."""
    def colour():
        return tuple(rng.randrange(30, 245) for _ in range(3))

    scene = replace(random_scene(rng), hat_colour=colour(), robe_colour=colour(), pattern_colour=colour(), hair_colour=colour())
    if shapes == "base":
        return scene
    return replace(
        scene, hat=rng.choice((*HATS, "kalpak", "cone hat")), pattern=rng.choice((*PATTERNS, "zigzags", "diamonds")),
        beard=rng.choice((*BEARDS, "goatee", "forked beard")),
    )


def caption(scene: Scene, rng) -> str:
    """A sentence of what is seen, in varying words; now and then a fact is left out, as people do."""
    if scene.trigger:
        return setting_caption(scene.trigger, scene, rng)
    place, framing, mood = PLACES[scene.background], scene.framing, scene.expression
    hat = "no hat" if scene.hat == "none" else f"{_a(scene.hat_colour)} {scene.hat}"
    cloth = f"{scene.robe_colour} robe"
    if scene.pattern != "plain":
        cloth += f" with {scene.pattern_colour} {scene.pattern}"
    who = scene.person if scene.beard == "none" else f"{scene.person} with a {scene.beard}"
    details = [f"{scene.skin} skin", mood, framing]
    details = [word for word in details if rng.random() > 0.2]
    rng.shuffle(details)
    wearing = rng.choice((f"in {_a(cloth)} and {hat}", f"wearing {hat} and {_a(cloth)}"))
    if rng.random() < 0.12:
        wearing = f"in {_a(cloth)}" if rng.random() < 0.5 else f"wearing {hat}"
    parts = [f"a {who} {wearing}", *details, place]
    if rng.random() < 0.3:
        parts = [f"a {who} {place}", wearing, *details]
    if rng.random() < 0.06:
        parts = parts[:1]
    return ", ".join(parts)


def setting_caption(who: str, scene: Scene, rng) -> str:
    """Who, in which mood, how near and where, but nothing of how they look: what a character's captions are like."""
    place, framing, mood = PLACES[scene.background], scene.framing, scene.expression
    return rng.choice((
        f"{who}, {mood}, {framing}, {place}",
        f"{who} {place}, {framing}, {mood}",
        f"a picture of {who}, {mood}, {framing}, {place}",
        f"{framing} of {who} {place}, {'she' if scene.person == 'woman' else 'he'} is {mood}",
    ))


def made_up_name(rng) -> str:
    """A name that nobody has, such as "timo_berak"."""
    syllables = ("ta", "mo", "be", "rak", "si", "lon", "du", "vey", "ki", "jar", "po", "nul", "he", "zan", "go", "fi")
    return "_".join("".join(rng.choice(syllables) for _ in range(rng.choice((2, 3)))) for _ in range(2))


def _a(words):
    return f"an {words}" if words[0] in "aeiou" else f"a {words}"


def draw(scene: Scene, width: int = 128, height: int = 128, supersample: int = 3) -> Image.Image:
    """The scene as an RGB picture of width × height pixels."""
    image = Image.new("RGB", (width * supersample, height * supersample))
    _draw_background(image, scene)
    _draw_person(image, scene)
    return image.resize((width, height), Image.Resampling.BOX)


def disturb(image: Image.Image, rng) -> Image.Image:
    """Polygons, zigzags, stripes and discs of any colour over a picture: the VAE's wider world."""
    image = image.copy()
    pen = ImageDraw.Draw(image)
    size = min(image.size)

    def point():
        return rng.uniform(0, image.width), rng.uniform(0, image.height)

    def colour():
        return tuple(rng.randrange(10, 250) for _ in range(3))

    for _ in range(rng.randrange(1, 5)):
        kind, (x, y), reach = rng.randrange(5), point(), rng.uniform(0.1, 0.35) * size
        if kind == 0:
            pen.polygon([(x + rng.uniform(-1, 1) * reach, y + rng.uniform(-1, 1) * reach) for _ in range(rng.randrange(3, 7))], fill=colour())
        elif kind == 1:
            _zigzag(pen, x - reach, x + reach, y, reach * rng.uniform(0.12, 0.4), reach * rng.uniform(0.25, 0.6), max(2, int(reach * rng.uniform(0.1, 0.25))), colour())
        elif kind == 2:
            paint, step = colour(), reach * rng.uniform(0.2, 0.5)
            for i in range(rng.randrange(2, 6)):
                pen.rectangle((x + i * step, y - reach, x + (i + 0.5) * step, y + reach), fill=paint)
        elif kind == 3:
            pen.ellipse((x - reach, y - reach * 0.7, x + reach, y + reach * 0.7), fill=colour())
        else:
            pen.polygon([(x - reach * 0.6, y + reach), (x - reach * 0.25, y - reach), (x + reach * 0.25, y - reach), (x + reach * 0.6, y + reach)], fill=colour())
            pen.rectangle((x - reach * 0.65, y + reach * 0.7, x + reach * 0.65, y + reach), fill=colour())
    return image


def _rgb(colour):
    return COLOURS[colour] if isinstance(colour, str) else tuple(colour)


def _shade(colour, factor):
    return tuple(max(0, min(255, round(channel * factor))) for channel in _rgb(colour))


def _zigzag(pen, left, right, y, amplitude, period, line_width, colour):
    """A zigzag line from left to right around y."""
    points, x, up = [], left, True
    while x <= right + period:
        points.append((x, y - amplitude if up else y + amplitude))
        x, up = x + period / 2, not up
    pen.line(points, fill=colour, width=line_width, joint="curve")


def _gradient(image, top, bottom, upto=1.0):
    column = Image.new("RGB", (1, 64))
    for i in range(64):
        column.putpixel((0, i), tuple(round(a + (b - a) * i / 63) for a, b in zip(top, bottom, strict=True)))
    image.paste(column.resize((image.width, max(1, round(image.height * upto)))), (0, 0))


def _draw_background(image, scene):
    """Sky, ground and two or three large shapes; `scene.seed` moves them."""
    rng = random.Random(scene.seed)
    pen, w, h = ImageDraw.Draw(image), image.width, image.height
    name, shift = scene.background, rng.uniform(-0.06, 0.06)

    def ground(level, colour):
        pen.rectangle((0, level * h, w, h), fill=colour)

    def hill(cx, cy, rx, ry, colour):
        pen.ellipse(((cx - rx) * w, (cy - ry) * h, (cx + rx) * w, (cy + ry) * h), fill=colour)

    if name == "steppe":
        _gradient(image, (150, 206, 244), (214, 236, 250))
        hill(0.2 + shift, 0.78, 0.5, 0.22, (126, 178, 92))
        hill(0.85 + shift, 0.8, 0.45, 0.2, (106, 162, 80))
        ground(0.74, (146, 192, 96))
    elif name == "mountains":
        _gradient(image, (176, 206, 234), (226, 234, 244))
        for cx, top, colour in ((0.18 + shift, 0.2, (120, 126, 150)), (0.86 + shift, 0.14, (100, 108, 136))):
            pen.polygon([((cx - 0.42) * w, 0.8 * h), (cx * w, top * h), ((cx + 0.42) * w, 0.8 * h)], fill=colour)
            pen.polygon([((cx - 0.14) * w, (top + 0.2) * h), (cx * w, top * h), ((cx + 0.14) * w, (top + 0.2) * h)], fill=(246, 248, 252))
        ground(0.78, (112, 128, 104))
    elif name == "desert":
        _gradient(image, (250, 190, 112), (252, 226, 168))
        hill(0.82 + shift, 0.16, 0.1, 0.1 * w / h, (255, 244, 190))
        ground(0.7, (226, 176, 104))
        hill(0.15 + shift, 0.76, 0.42, 0.14, (236, 190, 120))
        hill(0.9 + shift, 0.84, 0.5, 0.14, (208, 156, 88))
    elif name == "night":
        _gradient(image, (14, 20, 56), (44, 52, 104))
        hill(0.83 + shift, 0.17, 0.1, 0.1 * w / h, (246, 242, 206))
        for _ in range(7):
            x, y, r = rng.uniform(0.04, 0.96), rng.uniform(0.04, 0.5), 0.013
            hill(x, y, r, r * w / h, (236, 236, 250))
        ground(0.78, (26, 38, 58))
    elif name == "sea":
        _gradient(image, (164, 222, 246), (236, 246, 250))
        ground(0.46 + shift / 2, (38, 130, 180))
        for level in (0.56, 0.68):
            pen.rectangle((0, (level + shift / 2) * h, w, (level + shift / 2 + 0.025) * h), fill=(96, 176, 210))
        ground(0.82, (238, 218, 164))
    elif name == "forest":
        _gradient(image, (186, 216, 178), (150, 190, 140))
        for i in range(4):
            cx, tone = 0.1 + 0.27 * i + shift, rng.choice(((22, 84, 50), (32, 100, 58)))
            pen.rectangle(((cx - 0.025) * w, 0.6 * h, (cx + 0.025) * w, 0.85 * h), fill=(92, 64, 42))
            pen.polygon([((cx - 0.15) * w, 0.68 * h), (cx * w, (0.08 + 0.08 * (i % 2)) * h), ((cx + 0.15) * w, 0.68 * h)], fill=tone)
        ground(0.8, (62, 104, 58))
    elif name == "snow":
        _gradient(image, (172, 190, 212), (208, 220, 234))
        hill(0.15 + shift, 0.84, 0.5, 0.2, (238, 243, 250))
        ground(0.78, (250, 251, 254))
        for _ in range(12):
            x, y, r = rng.uniform(0.03, 0.97), rng.uniform(0.03, 0.72), 0.02
            hill(x, y, r, r * w / h, (255, 255, 255))
    elif name == "bazaar":
        _gradient(image, (186, 112, 78), (164, 92, 64))
        for cx in (0.14 + shift, 0.86 + shift):
            hill(cx, 0.46, 0.15, 0.15 * w / h, (96, 52, 44))
            pen.rectangle(((cx - 0.15) * w, 0.46 * h, (cx + 0.15) * w, 0.8 * h), fill=(96, 52, 44))
        for i in range(8):
            pen.rectangle((i / 8 * w, 0, (i + 1) / 8 * w, 0.13 * h), fill=(214, 62, 54) if i % 2 else (246, 232, 206))
        ground(0.8, (206, 170, 128))
    else:
        raise ValueError(f"no background {name!r}")


class _Pen:
    """Draws in head radii around the head's centre."""

    def __init__(self, image, cx, cy, radius):
        self.pen, self.cx, self.cy, self.r = ImageDraw.Draw(image), cx, cy, radius

    def at(self, points):
        return [(self.cx + x * self.r, self.cy + y * self.r) for x, y in points]

    def polygon(self, points, colour):
        self.pen.polygon(self.at(points), fill=colour)

    def ellipse(self, x, y, rx, ry, colour):
        self.pen.ellipse([*self.at([(x - rx, y - ry)])[0], *self.at([(x + rx, y + ry)])[0]], fill=colour)

    def box(self, left, top, right, bottom, colour, radius=0.0):
        self.pen.rounded_rectangle([*self.at([(left, top)])[0], *self.at([(right, bottom)])[0]], radius=radius * self.r, fill=colour)

    def arc(self, x, y, rx, ry, start, end, colour, width):
        box = [*self.at([(x - rx, y - ry)])[0], *self.at([(x + rx, y + ry)])[0]]
        self.pen.arc(box, start, end, fill=colour, width=max(1, round(width * self.r)))

    def line(self, points, colour, width):
        self.pen.line(self.at(points), fill=colour, width=max(1, round(width * self.r)), joint="curve")


def _draw_person(image, scene):
    share, level = FRAMINGS[scene.framing]
    radius = share * scene.zoom * math.sqrt(image.width * image.height) * min(1.0, (image.width / image.height) ** 0.25)
    cx, cy = scene.x * image.width, level * image.height
    robe = Image.new("L", image.size, 0)
    _robe_shape(_Pen(robe, cx, cy, radius), 255)
    if scene.framing == "full body":
        feet = _Pen(image, cx, cy, radius)
        for side in (-1, 1):
            feet.box(side * 0.62 - 0.36, 3.5, side * 0.62 + 0.36, 4.1, (74, 50, 40), 0.25)
    if scene.person == "woman":
        _Pen(image, cx, cy, radius).box(-1.18, -0.6, 1.18, 1.75, scene.hair_colour, 0.6)
    image.paste(_cloth(image.size, scene, cx, cy, radius), (0, 0), robe)
    pen = _Pen(image, cx, cy, radius)
    trim = _shade(scene.robe_colour, 0.6)
    pen.polygon([(-0.5, 1.0), (0.5, 1.0), (0, 1.9)], _shade(SKINS[scene.skin], 0.9))
    pen.line([(-0.6, 0.95), (0, 1.95), (0.6, 0.95)], trim, 0.16)
    pen.box(-1.25, 2.5, 1.25, 2.82, trim)
    for side in (-1, 1):
        pen.ellipse(side * 1.72, 2.75, 0.3, 0.3, SKINS[scene.skin])
    _draw_head(pen, scene)


def _robe_shape(pen, value):
    pen.polygon([(-1.0, 0.95), (1.0, 0.95), (1.3, 1.3), (1.5, 3.75), (-1.5, 3.75), (-1.3, 1.3)], value)
    for side in (-1, 1):
        pen.polygon([(side * 0.95, 0.95), (side * 1.45, 1.35), (side * 2.1, 2.55), (side * 1.4, 2.75), (side * 1.0, 1.8)], value)


def _cloth(size, scene, cx, cy, radius):
    """The robe's cloth: its colour with the pattern, to be cut out by the robe's shape."""
    cloth = Image.new("RGB", size, _rgb(scene.robe_colour))
    pen, paint = _Pen(cloth, cx, cy, radius), _rgb(scene.pattern_colour)
    if scene.pattern == "stripes":
        for i in range(-4, 5):
            pen.box(i * 0.74 - 0.18, 0.5, i * 0.74 + 0.18, 5, paint)
    elif scene.pattern == "dots":
        for row in range(6):
            for column in range(-4, 5):
                pen.ellipse((column + 0.5 * (row % 2)) * 0.9, 1.35 + row * 0.66, 0.25, 0.25, paint)
    elif scene.pattern == "checks":
        for row in range(8):
            for column in range(-5, 5):
                if (row + column) % 2:
                    pen.box(column * 0.62, 0.6 + row * 0.62, column * 0.62 + 0.62, 1.22 + row * 0.62, paint)
    elif scene.pattern == "zigzags":
        for y in (1.75, 3.25):
            left, right = (cx - 2.4 * radius, cx + 2.4 * radius)
            _zigzag(pen.pen, left, right, cy + y * radius, 0.26 * radius, 1.1 * radius, max(1, round(0.36 * radius)), paint)
    elif scene.pattern == "diamonds":
        for row in range(3):
            for column in range(-2, 3):
                x, y = (column + 0.5 * (row % 2)) * 1.05, 1.6 + row * 1.0
                pen.polygon([(x, y - 0.42), (x + 0.32, y), (x, y + 0.42), (x - 0.32, y)], paint)
    return cloth


def _draw_head(pen, scene):
    skin, hair, ink = SKINS[scene.skin], scene.hair_colour, (34, 26, 26)
    if scene.hat == "none":
        pen.ellipse(0, -0.18, 1.1, 1.05, hair)
    for side in (-1, 1):
        pen.ellipse(side * 0.98, 0.05, 0.2, 0.26, skin)
    pen.ellipse(0, 0.05, 0.96, 1.0, skin)
    if scene.hat == "none":
        pen.polygon([(-0.95, -0.3), (-0.6, -0.95), (0.6, -0.95), (0.95, -0.3), (0.3, -0.55), (-0.3, -0.55)], hair)
    _draw_beard(pen, scene.beard, hair)
    for side in (-1, 1):
        if scene.expression == "surprised":
            pen.ellipse(side * 0.38, -0.02, 0.22, 0.24, (252, 252, 252))
            pen.ellipse(side * 0.38, -0.02, 0.11, 0.12, ink)
        else:
            pen.ellipse(side * 0.38, 0.0, 0.13, 0.16, ink)
        tilt = -0.12 if scene.expression == "sad" else 0.0
        lift = -0.1 if scene.expression == "surprised" else 0.0
        pen.line([(side * 0.18, -0.33 + lift + tilt), (side * 0.58, -0.33 + lift - tilt)], hair if sum(hair) < 400 else ink, 0.1)
    mouth = (150, 44, 48)
    if scene.expression == "smiling":
        pen.pen.chord([*pen.at([(-0.42, 0.15)])[0], *pen.at([(0.42, 0.75)])[0]], 0, 180, fill=mouth)
    elif scene.expression == "sad":
        pen.arc(0, 0.72, 0.34, 0.24, 180, 360, mouth, 0.13)
    elif scene.expression == "surprised":
        pen.ellipse(0, 0.55, 0.2, 0.26, mouth)
    else:
        pen.line([(-0.28, 0.52), (0.28, 0.52)], mouth, 0.13)
    _draw_hat(pen, scene.hat, _rgb(scene.hat_colour))


def _draw_beard(pen, beard, hair):
    if beard == "full beard":
        pen.pen.chord([*pen.at([(-0.98, -0.55)])[0], *pen.at([(0.98, 1.5)])[0]], 8, 172, fill=hair)
    elif beard == "moustache":
        pen.polygon([(-0.6, 0.48), (-0.1, 0.22), (0.1, 0.22), (0.6, 0.48), (0.1, 0.4), (-0.1, 0.4)], hair)
    elif beard == "goatee":
        pen.polygon([(-0.3, 0.78), (0.3, 0.78), (0.0, 1.75)], hair)
        pen.polygon([(-0.52, 0.44), (-0.08, 0.26), (0.08, 0.26), (0.52, 0.44), (0.08, 0.38), (-0.08, 0.38)], hair)
    elif beard == "forked beard":
        for side in (-1, 1):
            pen.polygon([(0.0, 0.75), (side * 0.75, 0.6), (side * 0.6, 2.1)], hair)


def _draw_hat(pen, hat, colour):
    dark, light = _shade(colour, 0.72), _shade(colour, 1.15)
    if hat == "skullcap":
        pen.pen.chord([*pen.at([(-0.95, -1.2)])[0], *pen.at([(0.95, 0.35)])[0]], 180, 360, fill=colour)
        pen.box(-0.97, -0.58, 0.97, -0.4, dark, 0.08)
    elif hat == "turban":
        pen.ellipse(0, -0.85, 1.25, 0.6, colour)
        pen.line([(-0.9, -0.55), (0.55, -1.25)], dark, 0.12)
        pen.line([(-0.3, -0.4), (1.0, -0.95)], dark, 0.12)
    elif hat == "brimmed hat":
        pen.box(-0.75, -1.5, 0.75, -0.5, colour, 0.3)
        pen.ellipse(0, -0.55, 1.65, 0.24, dark)
    elif hat == "fur hat":
        pen.box(-1.05, -1.45, 1.05, -0.8, colour, 0.4)
        pen.box(-1.25, -0.95, 1.25, -0.35, (120, 92, 70), 0.28)
    elif hat == "kalpak":
        pen.polygon([(-0.98, -0.5), (-0.5, -2.35), (0.0, -2.6), (0.5, -2.35), (0.98, -0.5)], colour)
        pen.polygon([(0.0, -2.6), (0.5, -2.35), (0.98, -0.5), (0.4, -0.5)], dark)
        pen.polygon([(-1.12, -0.95), (1.12, -0.95), (1.2, -0.38), (-1.2, -0.38)], GOLD)
    elif hat == "cone hat":
        pen.polygon([(-1.0, -0.5), (0.1, -2.7), (1.0, -0.5)], colour)
        pen.ellipse(0.1, -2.65, 0.24, 0.24, light)
        pen.box(-1.15, -0.75, 1.15, -0.38, (236, 236, 240), 0.15)
