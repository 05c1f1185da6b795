"""Sample grids while training: always the same inputs and seed, so that one sees them form."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ditloom.contracts.backbone import Backbone

if TYPE_CHECKING:
    from PIL.Image import Image

    from ditloom.model import Model


@dataclass(frozen=True)
class SampleGrid:
    """Draws `inputs` with the model whose backbone is being trained; the PNG of the grid, row by row."""

    model: Model
    inputs: Sequence[Any]
    settings: dict[str, Any] = field(default_factory=dict)
    columns: int | None = None

    def __call__(self, network: Backbone, images: int) -> bytes:
        result = self.model.generate(list(self.inputs), **self.settings)
        return png(tiled(result.images, self.columns), {"images": str(images)})


def tiled(pictures: Sequence[Image], columns: int | None = None, gap: int = 2) -> Image:
    """Pictures of one size in a grid, nearly square unless `columns` is given, on white."""
    from PIL import Image

    across = columns or math.ceil(math.sqrt(len(pictures)))
    down = -(-len(pictures) // across)
    width, height = (side + gap for side in pictures[0].size)
    page = Image.new(pictures[0].mode, (across * width + gap, down * height + gap), "white")
    for place, picture in enumerate(pictures):
        row, column = divmod(place, across)
        page.paste(picture, (gap + column * width, gap + row * height))
    return page


def png(picture: Image, notes: dict[str, str] | None = None) -> bytes:
    """The PNG file of a picture with text notes."""
    from PIL.PngImagePlugin import PngInfo

    info, buffer = PngInfo(), io.BytesIO()
    for key, value in (notes or {}).items():
        info.add_text(key, value)
    picture.save(buffer, "PNG", pnginfo=info)
    return buffer.getvalue()
