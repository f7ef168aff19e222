"""Labelled grids of pictures: the same shots in rows and columns, readable when sent around. Pillow only."""

import textwrap

from PIL import Image, ImageDraw, ImageFont

INK, PAPER, GAP = (30, 30, 34), (255, 255, 255), 6


def labelled_grid(rows, row_labels=(), column_labels=(), cell: int = 144, marks=()) -> Image.Image:
    """An RGB picture of `rows` (lists of pictures or paths, None for an empty place), each fitted into cell × cell pixels.

    Labels are wrapped: those of rows stand left, those of columns above. `marks` are (row, column) to frame.
    """
    font = ImageFont.load_default(max(11, cell // 12))
    letter = font.getlength("abcdefghij klmnop") / 17
    above = [textwrap.fill(str(label), max(6, int(cell / letter))) for label in column_labels]
    left = [textwrap.fill(str(label), max(8, int(1.25 * cell / letter))) for label in row_labels]
    pen = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    margin = max((pen.multiline_textbbox((0, 0), text, font)[2] for text in left), default=-GAP) + 2 * GAP
    head = max((pen.multiline_textbbox((0, 0), text, font)[3] for text in above), default=-GAP) + 2 * GAP
    columns, step = max(len(row) for row in rows), cell + GAP
    sheet = Image.new("RGB", (round(margin + columns * step), round(head + len(rows) * step)), PAPER)
    pen = ImageDraw.Draw(sheet)
    for column, text in enumerate(above):
        pen.multiline_text((margin + column * step, GAP), text, INK, font)
    for row, text in enumerate(left):
        pen.multiline_text((GAP, head + row * step), text, INK, font)
    for row, pictures in enumerate(rows):
        for column, picture in enumerate(pictures):
            if picture is not None:
                picture = fitted(picture, cell)
                x, y = margin + column * step + (cell - picture.width) // 2, head + row * step + (cell - picture.height) // 2
                sheet.paste(picture, (round(x), round(y)))
            if (row, column) in marks:
                x, y = round(margin + column * step), round(head + row * step)
                pen.rectangle((x - 3, y - 3, x + cell + 2, y + cell + 2), outline=(208, 60, 40), width=3)
    return sheet


def fitted(picture, side: int) -> Image.Image:
    """A picture or path as RGB whose longer side is `side` pixels."""
    picture = (picture if isinstance(picture, Image.Image) else Image.open(picture)).convert("RGB")
    scale = side / max(picture.size)
    return picture.resize([max(1, round(length * scale)) for length in picture.size], Image.Resampling.LANCZOS)
