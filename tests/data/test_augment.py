"""Augmentation: off is identity, moves are exact where they can be."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ditloom.contracts.errors import UserError
from ditloom.data.augment import Augment

PIXELS = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
MIDDLE = np.full(4, 0.5)


def test_off_is_identity() -> None:
    assert np.array_equal(Augment()(PIXELS, np.zeros(4), None), PIXELS)


def test_flip_mirrors() -> None:
    draws = np.array([0.3, 0.5, 0.5, 0.5])
    assert np.array_equal(Augment(flip=0.31)(PIXELS, draws, None), PIXELS[:, ::-1])
    assert np.array_equal(Augment(flip=0.29)(PIXELS, draws, None), PIXELS)


@pytest.mark.parametrize("channels", [1, 3])
def test_a_move_by_whole_pixels_is_exact(channels: int) -> None:
    image = PIXELS[:, :, :channels]
    moved = Augment(shift=0.25, fill=9)(image, np.array([0.5, 0.5, 1.0, 0.25]), None)
    expected = np.full_like(image, 9)
    expected[2:, :12] = image[:14, 4:]
    assert np.array_equal(moved, expected)


def test_the_middle_draw_moves_nothing() -> None:
    assert np.array_equal(Augment(shift=0.3, scale=0.3)(PIXELS, MIDDLE, None), PIXELS)


def test_zoom_in_shows_the_centre() -> None:
    image = np.full((16, 16, 1), 255, dtype=np.uint8)
    image[2:14, 2:14] = 40
    zoomed = Augment(scale=1.0)(image, np.array([0.5, 1.0, 0.5, 0.5]), None)
    assert zoomed[1:-1, 1:-1].max() == 40


@settings(max_examples=60)
@given(
    st.lists(st.floats(0, 1, exclude_max=True), min_size=4, max_size=4),
    st.integers(1, 40), st.integers(1, 40), st.sampled_from([None, 1, 7, 24]), st.floats(0, 1), st.floats(0, 4),
)  # fmt: skip
def test_any_draw_keeps_a_flat_picture_flat(
    draws: list[float], height: int, width: int, size: int | None, shift: float, scale: float
) -> None:
    image = np.full((height, width, 3), 77, dtype=np.uint8)
    out = Augment(flip=0.5, shift=shift, scale=scale, fill=77)(image, np.array(draws), size)
    assert out.shape == ((height, width, 3) if size is None else (size, size, 3))
    assert (out == 77).all()


def test_an_oblong_picture_is_cropped_not_squeezed() -> None:
    image = np.zeros((8, 20, 3), dtype=np.uint8)
    image[:, 6:14] = 255
    assert (Augment()(image, MIDDLE, 4) == 255).all()


@pytest.mark.parametrize("bad", [{"flip": 1.5}, {"shift": -0.1}, {"scale": 9}, {"fill": 300}])
def test_out_of_range_is_refused(bad: dict[str, float]) -> None:
    with pytest.raises(UserError, match="out of range"):
        Augment(**bad)  # type: ignore[arg-type]
