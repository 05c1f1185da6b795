"""The grid of a run's first pictures, each over what it should show."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from PIL import Image

from ditloom.cli.run_folder import RunFolder
from ditloom.cli.show import json_text
from ditloom.contracts.errors import UserError
from ditloom.measure.contact_sheet import Sheet, contact_sheet
from ditloom.measure.drawing import as_array
from ditloom.training.durable import explained, replace_file
from ditloom.training.samples import png

CELL = 128


def check_columns(columns: int | None) -> None:
    """Refuse what is no number of columns."""
    if columns is not None and columns < 0:
        raise UserError(f"--grid is a number of columns, or 0 for no grid; got {columns}")


def write_grid(folder: RunFolder, titles: Sequence[str], columns: int | None, settings: Any) -> None:
    """Pictures 0 to len(titles) - 1 of a folder, small ones enlarged by a whole factor."""
    images = [as_array(Image.open(folder.picture(number))) for number in range(len(titles))]
    scale = max(1, CELL // max(images[0].shape[:2]))
    sheet = Sheet(columns=columns or squarest(len(images)), scale=scale, lines=2 if any(titles) else 0)
    page = contact_sheet(images, titles, sheet=sheet)
    with explained("write", folder.grid):
        replace_file(folder.grid, [png(page, {"ditloom": json_text(settings)})])


def squarest(count: int) -> int:
    """The fewest columns that leave no hole, unless the grid would be more than twice as wide as high."""
    square = math.ceil(math.sqrt(count))
    return next((wide for wide in range(square, math.isqrt(2 * count) + 1) if count % wide == 0), square)
