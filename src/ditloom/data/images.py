"""Pictures to arrays: decoding, modes, alpha over white, ADM's resize and centre crop."""

from __future__ import annotations

import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from ditloom.contracts.errors import UserError

Resampling = Image.Resampling
SUFFIXES = frozenset((".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".ppm", ".pgm", ".tif", ".tiff"))


class CorruptImage(UserError):
    """One file of a data set cannot be read or decoded; the loader refuses or skips it as the user chose."""

    def __init__(self, name: str, reason: str):
        super().__init__(f"{name} is not a readable image: {reason}")
        self.name, self.reason = name, reason


def decode(data: bytes, name: str) -> Image.Image:
    """The first frame, upright by its EXIF orientation; whatever a decoder raises becomes `CorruptImage`."""
    try:
        picture = Image.open(io.BytesIO(data))
        picture.load()
        return ImageOps.exif_transpose(picture)
    except Exception as error:  # decoders raise OSError, SyntaxError, ValueError, struct.error, ... on bad bytes
        raise CorruptImage(name, " ".join(str(error).split()) or type(error).__name__) from error


def on_white(picture: Image.Image) -> Image.Image:
    """RGB, with transparency composited over white (palette and grey transparency included)."""
    if picture.mode.startswith(("I", "F")):
        return _deep_grey(picture).convert("RGB")
    if "A" not in picture.getbands() and "transparency" not in picture.info:
        return picture.convert("RGB")
    rgba = picture.convert("RGBA")
    ground = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
    ground.alpha_composite(rgba)
    return ground.convert("RGB")


def to_array(picture: Image.Image, channels: int = 3) -> NDArray[np.uint8]:
    """uint8 [H, W, channels]; one channel is ITU-R 601 luma."""
    rgb = on_white(picture)
    grey = rgb.convert("L") if channels == 1 else rgb
    return np.array(grey, dtype=np.uint8).reshape(rgb.height, rgb.width, channels)


def centre_crop(picture: Image.Image, size: int) -> Image.Image:
    """Shorter side to `size` and the centre kept, as ADM prepares ImageNet (Dhariwal & Nichol 2021, guided-diffusion).

    Halvings by box filter while the shorter side is at least twice `size`, then one bicubic step.
    """
    while min(picture.size) >= 2 * size:
        picture = picture.resize((picture.width // 2, picture.height // 2), Resampling.BOX)
    scale = size / min(picture.size)
    if scale != 1:
        shape = (max(size, round(picture.width * scale)), max(size, round(picture.height * scale)))
        picture = picture.resize(shape, Resampling.BICUBIC)
    left, top = (picture.width - size) // 2, (picture.height - size) // 2
    return picture.crop((left, top, left + size, top + size))


def shrink(picture: Image.Image, size: int) -> Image.Image:
    """A drawing to a square of `size` by Lanczos, which keeps outlines sharper than box; equal sizes stay untouched."""
    if picture.size == (size, size):
        return picture
    return picture.resize((size, size), Resampling.LANCZOS)


def _deep_grey(picture: Image.Image) -> Image.Image:
    """16-bit grey keeps its upper byte (pillow would clip it to white); floats are taken as 0 to 1."""
    values = np.asarray(picture, dtype=np.float64)
    scaled = values * 255 if picture.mode == "F" else values / 257
    return Image.fromarray(np.clip(np.rint(scaled), 0, 255).astype(np.uint8))
