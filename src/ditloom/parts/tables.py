"""Position tables that are stored with a model: learned ones, and the large frozen one that SD3 crops."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ditloom.contracts.errors import UserError
from ditloom.parts.positions import grid_positions, sincos_1d


class CroppedTable(nn.Module):
    """A frozen size x size sine-cosine table, of which the centred height x width part is added (SD3).

    Coordinates run from 0 to `span`, the number of tokens along a side that the model was trained on: token i of the
    table stands at i * span / size. The table is a buffer, saved with the weights.
    """

    table: Tensor

    def __init__(self, size: int, span: int, width: int):
        super().__init__()
        self.size = size
        # the spacing is rounded to float32 before it enters the float64 angles, as where the published tables come from
        line = sincos_1d(torch.arange(size, dtype=torch.float32) / (size / span), width // 2).to(torch.float32)
        columns, rows = line[None].expand(size, -1, -1), line[:, None].expand(-1, size, -1)
        self.register_buffer("table", torch.cat([columns, rows], dim=-1))

    def forward(self, tokens: Tensor, grid: tuple[int, int], positions: Tensor | None = None) -> Tensor:
        """tokens [B, n, D] with the table added; positions [n, 2] count from the corner of the image's own crop."""
        height, width = grid
        if max(height, width) > self.size:
            raise UserError(f"the position table covers {self.size}x{self.size} tokens; got {height}x{width}")
        top, left = (self.size - height) // 2, (self.size - width) // 2
        if positions is None:
            part = self.table[top : top + height, left : left + width].flatten(0, 1)
        else:
            part = interpolated(self.table, positions + torch.tensor([top, left]).to(positions))
        return tokens + part.to(tokens.dtype)


def interpolated(table: Tensor, positions: Tensor) -> Tensor:
    """A table [h, w, D] at (row, column) positions [n, 2]: exact on tokens, bilinear between them."""
    positions = positions.to(torch.float64).cpu()
    limits = torch.tensor(table.shape[:2], dtype=torch.float64) - 1
    if bool(((positions < 0) | (positions > limits)).any()):
        rows, columns = (int(n) for n in table.shape[:2])
        raise UserError(f"segment positions leave the model's position table of {rows}x{columns} tokens")
    low = positions.floor()
    high = torch.minimum(low + 1, limits)
    share = (positions - low).to(table)
    (top, left), (bottom, right) = low.long().unbind(1), high.long().unbind(1)
    down, across = share[:, :1], share[:, 1:]
    above = table[top, left] * (1 - across) + table[top, right] * across
    below = table[bottom, left] * (1 - across) + table[bottom, right] * across
    return above * (1 - down) + below * down


def add_learned(table: Tensor, tokens: Tensor, grid: tuple[int, int], positions: Tensor | None = None) -> Tensor:
    """tokens [B, n, D] plus a learned table [side * side, D]: of its own grid, or at (row, column) positions [n, 2]."""
    side = round(len(table) ** 0.5)
    if positions is None and grid == (side, side):
        return tokens + table
    places = positions if positions is not None else grid_positions(*grid)
    return tokens + interpolated(table.unflatten(0, (side, side)), places)
