"""Haar bands on the grid they came from, and the orders in which they are scanned."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ditloom.parts.wavelet import HAAR, from_bands, to_bands, transposed, unwindowed, windowed

GRIDS = [(8, 8), (8, 12), (4, 4)]


def tokens(grid: tuple[int, int], channels: int = 32) -> Tensor:
    return torch.randn(2, grid[0] * grid[1], channels, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("grid", GRIDS)
def test_there_and_back_and_the_energy_between(grid: tuple[int, int]) -> None:
    x = tokens(grid)
    bands = to_bands(x, grid)
    torch.testing.assert_close(from_bands(bands, grid), x, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(16 * bands.square().sum(), x.square().sum(), rtol=1e-5, atol=0)


def test_bands_are_those_of_two_levels_of_filters() -> None:
    grid, x = (8, 12), tokens((8, 12), 16)
    filters = torch.tensor(HAAR, dtype=torch.float32).reshape(4, 1, 2, 2) / 2
    image = x.mT.unflatten(2, grid)
    first = torch.nn.functional.conv2d(image.flatten(0, 1)[:, None], filters, stride=2)  # [B C, s1, h, w]
    both = torch.nn.functional.conv2d(first.flatten(0, 1)[:, None], filters, stride=2)  # [B C s1, s2, h, w]
    bands = both.reshape(2, 16, 16, 2, 3) / 4  # [B, C, 4 s1 + s2, cells]
    expected = bands.permute(0, 3, 4, 2, 1).flatten(3)  # every cell: band after band, its channels
    found = to_bands(x, grid).unflatten(1, (2, 4, 3, 4)).permute(0, 1, 3, 5, 2, 4).flatten(3)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_a_constant_image_is_in_the_lowest_band_alone() -> None:
    bands = to_bands(torch.ones(1, 64, 16), (8, 8)).unflatten(1, (2, 4, 2, 4)).permute(0, 1, 3, 5, 2, 4).flatten(3)
    assert torch.equal(bands[..., :16], torch.ones(1, 2, 2, 16))
    assert not bands[..., 16:].any()


@pytest.mark.parametrize("columns_first", [True, False])
@pytest.mark.parametrize("grid", GRIDS)
def test_orders_and_their_inverses(grid: tuple[int, int], columns_first: bool) -> None:
    x = tokens(grid)
    assert torch.equal(unwindowed(windowed(x, grid, columns_first), grid, columns_first), x)
    assert torch.equal(transposed(transposed(x, grid), grid[::-1]), x)


def test_a_window_is_scanned_along_rows_or_columns() -> None:
    numbers = torch.arange(64.0)[None, :, None]
    assert windowed(numbers, (8, 8), False)[0, :8, 0].tolist() == [0, 1, 8, 9, 2, 3, 10, 11]
    assert windowed(numbers, (8, 8), True)[0, :8, 0].tolist() == [0, 8, 1, 9, 16, 24, 17, 25]
