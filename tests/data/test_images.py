"""Modes, transparency, orientation, crops."""

from __future__ import annotations

import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from ditloom.data.images import CorruptImage, centre_crop, decode, on_white, shrink, to_array


def encoded(picture: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    data = io.BytesIO()
    picture.save(data, kind, **options)
    return data.getvalue()


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16", "F"])
@pytest.mark.parametrize("channels", [1, 3])
def test_every_mode_becomes_bytes(mode: str, channels: int) -> None:
    array = to_array(Image.new(mode, (5, 4)), channels)
    assert array.shape == (4, 5, channels) and array.dtype == np.uint8


def test_half_transparent_black_on_white_is_grey() -> None:
    assert np.asarray(on_white(Image.new("RGBA", (1, 1), (0, 0, 0, 128)))).tolist() == [[[127, 127, 127]]]


def test_transparent_palette_colour_is_white() -> None:
    picture = Image.new("P", (2, 1))
    picture.putpalette([255, 0, 0, 0, 255, 0])
    picture.putpixel((1, 0), 1)
    read = decode(encoded(picture, transparency=0), "x")
    assert np.asarray(on_white(read)).tolist() == [[[255, 255, 255], [0, 255, 0]]]


def test_sixteen_bit_grey_keeps_its_range() -> None:
    picture = Image.fromarray(np.array([[0, 32768, 65535]], dtype=np.uint16))
    assert to_array(decode(encoded(picture), "x"), 1)[0, :, 0].tolist() == [0, 128, 255]


def test_exif_orientation_is_applied() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    assert decode(encoded(Image.new("RGB", (8, 4)), "JPEG", exif=exif), "x").size == (4, 8)


@pytest.mark.parametrize("data", [b"", b"not a picture", b"\x89PNG\r\n\x1a\n" + bytes(40)])
def test_bad_bytes_name_the_file(data: bytes) -> None:
    with pytest.raises(CorruptImage, match="dir/bad.png"):
        decode(data, "dir/bad.png")


def test_truncated_image_is_corrupt() -> None:
    whole = encoded(Image.fromarray(np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8)))
    with pytest.raises(CorruptImage):
        decode(whole[: len(whole) // 2], "x")


@settings(max_examples=60)
@given(st.integers(1, 90), st.integers(1, 90), st.integers(1, 40))
def test_crop_has_the_size(width: int, height: int, size: int) -> None:
    assert centre_crop(Image.new("RGB", (width, height)), size).size == (size, size)


def test_crop_by_powers_of_two_is_the_box_mean() -> None:
    """Two halvings in 8 bits round four times, half a step each at most."""
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    mean = pixels.reshape(8, 4, 8, 4, 3).mean((1, 3))
    assert np.abs(np.asarray(centre_crop(Image.fromarray(pixels), 8), dtype=float) - mean).max() <= 2


def test_crop_keeps_the_centre() -> None:
    pixels = np.zeros((8, 14, 3), dtype=np.uint8)
    pixels[:, 3:11] = 200
    assert (np.asarray(centre_crop(Image.fromarray(pixels), 8)) == 200).all()


def test_shrink_leaves_equal_sizes_alone() -> None:
    picture = Image.new("RGB", (6, 6))
    assert shrink(picture, 6) is picture and shrink(picture, 3).size == (3, 3)
