"""Draw a character's data set: `python tools/draw_dataset.py aldar_kose_man data/aldar_kose`.

Training pictures lie in images/ with captions/*.txt, held-out ones in reference/images and reference/captions.
"""

import argparse
import random
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
from drawn_world import BACKGROUNDS, CHARACTERS, EXPRESSIONS, FRAMINGS, caption, draw, random_setting  # noqa: E402

SIZES = ((640, 640), (560, 720), (720, 560), (512, 512), (600, 800), (900, 680), (768, 768), (448, 576), (864, 672), (420, 420))


def settings(number, rng):
    """`number` settings in which backgrounds, framings and expressions all come up about equally often."""
    columns = []
    for values in (BACKGROUNDS, tuple(FRAMINGS), EXPRESSIONS):
        column = [values[i % len(values)] for i in range(number)]
        rng.shuffle(column)
        columns.append(column)
    for background, framing, expression in zip(*columns, strict=True):
        yield dict(random_setting(rng), background=background, framing=framing, expression=expression)


def draw_folder(folder, name, number, rng):
    """`number` pictures of CHARACTERS[name] with captions; JPEG and PNG by turns."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    (folder / "captions").mkdir(parents=True, exist_ok=True)
    for i, setting in enumerate(settings(number, rng)):
        scene = replace(CHARACTERS[name], **setting)
        image = draw(scene, *SIZES[i % len(SIZES)], supersample=2)
        stem = f"{name.split('_')[0]}_{i + 1:03d}"
        if i % 3 == 2:
            image.save(folder / "images" / f"{stem}.png", optimize=True)
        else:
            image.save(folder / "images" / f"{stem}.jpg", quality=92)
        (folder / "captions" / f"{stem}.txt").write_text(caption(scene, rng) + "\n", encoding="utf-8")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("character", choices=sorted(CHARACTERS))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--pictures", type=int, default=32)
    parser.add_argument("--references", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    draw_folder(options.folder, options.character, options.pictures, random.Random(options.seed))
    draw_folder(options.folder / "reference", options.character, options.references, random.Random(options.seed + 1))
    print(f"{options.pictures} pictures and {options.references} references in {options.folder}")


if __name__ == "__main__":
    main()
