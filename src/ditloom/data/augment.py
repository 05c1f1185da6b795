"""Mirroring, moves and zooms of a picture, from four uniform numbers drawn for its global image index."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ditloom.contracts.errors import UserError

DRAWS = 4


@dataclass(frozen=True, kw_only=True)
class Augment:
    """Random changes of a picture that keep its caption true; all off by default.

    flip: probability of a left-right mirror.  shift: largest move, as a share of the side.
    scale: largest zoom s, log-uniform in [1 / (1 + s), 1 + s].  fill: grey of what a move uncovers, 0 to 255.
    """

    flip: float = 0.0
    shift: float = 0.0
    scale: float = 0.0
    fill: int = 255

    def __post_init__(self) -> None:
        if not (0 <= self.flip <= 1 and 0 <= self.shift <= 1 and 0 <= self.scale <= 4 and 0 <= self.fill <= 255):
            raise UserError(f"{self} is out of range: flip and shift lie in [0, 1], scale in [0, 4], fill in [0, 255].")

    @property
    def moves(self) -> bool:
        return self.shift > 0 or self.scale > 0

    def __call__(self, image: NDArray[np.uint8], draws: NDArray[np.float64], size: int | None) -> NDArray[np.uint8]:
        """uint8 [H, W, C] and `DRAWS` numbers in [0, 1) to uint8 [size, size, C]; None keeps H and W."""
        if draws[0] < self.flip:
            image = image[:, ::-1]
        if size is not None:
            image = _centre_square(image)
        height, width = (image.shape[0], image.shape[1]) if size is None else (size, size)
        if not self.moves and image.shape[:2] == (height, width):
            return np.ascontiguousarray(image)
        return _resampled(*self._box(image, draws), height, width)

    def _box(
        self, image: NDArray[np.uint8], draws: NDArray[np.float64]
    ) -> tuple[NDArray[np.uint8], tuple[float, float, float, float]]:
        """The window to resample, and the picture padded so that the window lies inside."""
        high, wide = image.shape[:2]
        zoom = math.exp((2 * draws[1] - 1) * math.log1p(self.scale))
        left = wide / 2 - wide / zoom / 2 + (2 * draws[2] - 1) * self.shift * wide
        top = high / 2 - high / zoom / 2 + (2 * draws[3] - 1) * self.shift * high
        right, bottom = left + wide / zoom, top + high / zoom
        margin = max(0, math.ceil(max(-left, -top, right - wide, bottom - high)))
        padded = np.pad(image, ((margin, margin), (margin, margin), (0, 0)), constant_values=self.fill)
        return padded, (left + margin, top + margin, right + margin, bottom + margin)


def _centre_square(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    high, wide = image.shape[:2]
    side = min(high, wide)
    top, left = (high - side) // 2, (wide - side) // 2
    return image[top : top + side, left : left + side]


def _resampled(
    image: NDArray[np.uint8], box: tuple[float, float, float, float], height: int, width: int
) -> NDArray[np.uint8]:
    """Lanczos with antialiasing, in one step from the original pixels."""
    picture = Image.fromarray(image[:, :, 0] if image.shape[2] == 1 else np.ascontiguousarray(image))
    right, bottom = min(box[2], picture.width), min(box[3], picture.height)
    small = picture.resize((width, height), Image.Resampling.LANCZOS, box=(box[0], box[1], right, bottom))
    return np.asarray(small).reshape(height, width, image.shape[2])
