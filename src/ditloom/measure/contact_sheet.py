"""A labelled grid of pictures: what to look at before any number."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ditloom.contracts.errors import UserError
from ditloom.measure.drawing import as_picture
from ditloom.measure.evidence import Pictures
from ditloom.training.durable import explained, replace_file

PAPER, INK, GREY = (255, 255, 255), (32, 32, 32), (110, 110, 110)


@dataclass(frozen=True, kw_only=True)
class Sheet:
    """Layout in pixels: pictures enlarged by a whole factor, up to `lines` lines of title under each."""

    columns: int = 10
    scale: int = 1
    gap: int = 8
    font_size: int = 11
    lines: int = 2

    def __post_init__(self) -> None:
        if min(self.columns, self.scale, self.font_size) < 1 or min(self.gap, self.lines) < 0:
            raise UserError(f"a sheet needs at least one column, scale 1 and font size 1, got {self}")


def contact_sheet(
    images: Sequence[Pictures], titles: Sequence[str], heading: str = "", sheet: Sheet | None = None
) -> Image.Image:
    """Pictures uint8 [H, W, 1 or 3] of one size, row by row in their order, each over its title; RGB."""
    sheet = sheet or Sheet()
    if len(images) != len(titles) or not len(images):
        raise UserError(f"a sheet needs a title for each picture, got {len(images)} pictures, {len(titles)} titles")
    height, width = (side * sheet.scale for side in images[0].shape[:2])
    font = ImageFont.load_default(sheet.font_size)
    line = round(sheet.font_size * 1.3)
    cell = (width + sheet.gap, height + sheet.lines * line + sheet.gap)
    columns = min(sheet.columns, len(images))
    rows = -(-len(images) // columns)
    top = (line + 2 * sheet.gap) if heading else sheet.gap
    page = Image.new("RGB", (columns * cell[0] + sheet.gap, top + rows * cell[1]), PAPER)
    pen = ImageDraw.Draw(page)
    pen.text((sheet.gap, sheet.gap), heading, INK, ImageFont.load_default(sheet.font_size + 1))
    for place, (image, title) in enumerate(zip(images, titles, strict=True)):
        row, column = divmod(place, columns)
        left, upper = sheet.gap + column * cell[0], top + row * cell[1]
        picture = as_picture(image).convert("RGB").resize((width, height), Image.Resampling.NEAREST)
        page.paste(picture, (left, upper))
        for number, text in enumerate(wrapped(title, font, width, sheet.lines)):
            pen.text((left, upper + height + number * line), text, GREY, font)
    return page


def wrapped(text: str, font: ImageFont.ImageFont | ImageFont.FreeTypeFont, width: int, lines: int) -> list[str]:
    """Words laid into at most `lines` lines of `width` pixels; what does not fit ends in an ellipsis."""
    laid: list[str] = []
    words = text.split()
    while words and len(laid) < lines:
        count = 1
        while count < len(words) and font.getlength(" ".join(words[: count + 1])) <= width:
            count += 1
        laid.append(" ".join(words[:count]))
        words = words[count:]
    if laid and words:
        laid[-1] += " ..."
    return [_cut(line, font, width) for line in laid]


def _cut(line: str, font: ImageFont.ImageFont | ImageFont.FreeTypeFont, width: int) -> str:
    if font.getlength(line) <= width:
        return line
    kept = line.removesuffix(" ...")
    while kept and font.getlength(kept.rstrip() + "...") > width:
        kept = kept[:-1]
    return kept.rstrip() + "..."


def beside(*images: Pictures) -> Pictures:
    """Pictures of equal height side by side, to be compared in one cell of a sheet."""
    return np.concatenate(images, axis=1)


def save_png(picture: Image.Image, path: Path) -> None:
    """Write beside, then rename; equal pictures give equal files."""
    packed = io.BytesIO()
    picture.save(packed, "PNG", optimize=True)
    with explained("write to", path):
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, [packed.getvalue()])
