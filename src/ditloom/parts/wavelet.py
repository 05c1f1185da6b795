"""A two-level Haar transform of a grid of tokens, and the orders in which bands are scanned (DiMSUM, 2411.04168)."""

from __future__ import annotations

import torch
from torch import Tensor

CELL = 4
HAAR = ((1, 1, 1, 1), (1, 1, -1, -1), (1, -1, 1, -1), (1, -1, -1, 1))
"""Twice the orthonormal filters of one level [band][2 row + column]: low-low, high along rows, columns, both."""


def to_bands(x: Tensor, grid: tuple[int, ...]) -> Tensor:
    """Tokens [B, N, C] of a grid of multiples of 4 to their 16 bands, over 4, on the same grid.

    Bands of a level: low-low, then high along rows, along columns, along both; first level before second. As released,
    a cell's 16 C values, band after band, are cut into C channels of 16 places: a token of a cell holds every band, of
    every 16th channel.
    """
    height, width = grid
    cells = _butterflies(x.unflatten(1, (height // CELL, 2, 2, width // CELL, 2, 2))) / (CELL * CELL)
    bands = cells.permute(0, 1, 4, 6, 3, 5, 2, 7).flatten(3)
    return bands.unflatten(3, (-1, CELL, CELL)).permute(0, 1, 4, 2, 5, 3).reshape(x.shape)


def from_bands(x: Tensor, grid: tuple[int, ...]) -> Tensor:
    """The inverse of `to_bands`."""
    height, width = grid
    places = x.unflatten(1, (height // CELL, CELL, width // CELL, CELL))
    bands = places.permute(0, 1, 3, 5, 2, 4).flatten(3).unflatten(3, (2, 2, 2, 2, -1))
    return _butterflies(bands.permute(0, 1, 6, 4, 2, 5, 3, 7)).reshape(x.shape)


def _butterflies(cells: Tensor) -> Tensor:
    """(a + b, a - b) along every bit of a place in a cell [B, h, row bits 2, 2, w, column bits 2, 2, C]."""
    for bit in (2, 3, 5, 6):
        low, high = cells.unbind(bit)
        cells = torch.stack([low + high, low - high], dim=bit)
    return cells


def transposed(x: Tensor, grid: tuple[int, ...]) -> Tensor:
    """Row-major tokens [B, N, C] in column-major order; with the grid reversed, back."""
    return x.unflatten(1, grid).transpose(1, 2).flatten(1, 2)


def windowed(x: Tensor, grid: tuple[int, ...], columns_first: bool) -> Tensor:
    """Tokens window by window, of a quarter of the grid's sides each; in a window along rows, or along columns."""
    (height, width), order = grid, (0, 3, 1, 4, 2, 5) if columns_first else (0, 1, 3, 2, 4, 5)
    x = x.unflatten(1, (CELL, height // CELL, CELL, width // CELL))
    return x.permute(order).flatten(1, 4)


def unwindowed(x: Tensor, grid: tuple[int, ...], columns_first: bool) -> Tensor:
    """The inverse of `windowed`."""
    height, width = grid[0] // CELL, grid[1] // CELL
    if columns_first:
        return x.unflatten(1, (CELL, CELL, width, height)).permute(0, 2, 4, 1, 3, 5).flatten(1, 4)
    return x.unflatten(1, (CELL, CELL, height, width)).permute(0, 1, 3, 2, 4, 5).flatten(1, 4)
