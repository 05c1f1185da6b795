"""Where tokens are: sine-cosine tables and rotary embeddings."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from ditloom.contracts.errors import UserError


def sincos_1d(positions: Tensor, width: int) -> Tensor:
    """[n] coordinates to [n, width]: all sines first, then all cosines; float64.

    omega_k = 10000^(-k / (width/2)), k < width/2.
    """
    steps = torch.arange(width // 2, dtype=torch.float64, device=positions.device)
    omega = 10000.0 ** (-steps / (width / 2))
    angles = torch.outer(positions.to(torch.float64), omega)
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def sincos_at(positions: Tensor, channels: int) -> Tensor:
    """(row, column) coordinates [n, 2] to [n, channels], float64; the column fills the first half (as in DiT)."""
    if channels % 4:
        raise UserError(f"a 2-D sine-cosine table needs a width that is a multiple of 4; got {channels}")
    return torch.cat([sincos_1d(positions[:, axis], channels // 2) for axis in (1, 0)], dim=1)


@lru_cache(maxsize=64)
def sincos_grid(height: int, width: int, channels: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The frozen DiT table [height * width, channels] of a whole grid, in row-major order."""
    return sincos_at(grid_positions(height, width), channels).to(device=device, dtype=dtype)


@lru_cache(maxsize=64)
def grid_positions(height: int, width: int) -> Tensor:
    """(row, column) of every token in row-major order: [height * width, 2], float64, on the CPU."""
    rows, columns = torch.meshgrid(*(torch.arange(n, device="cpu") for n in (height, width)), indexing="ij")
    return torch.stack([rows.reshape(-1), columns.reshape(-1)], dim=1).to(torch.float64)


def rotary(positions: Tensor, axes: tuple[int, ...], theta: float = 10000.0) -> tuple[Tensor, Tensor]:
    """(cos, sin), each [n, sum(axes)] float32, for rotating adjacent pairs.

    positions [n, len(axes)]; axes: how many features of a head each coordinate rotates (even numbers).
    Per axis of a features: frequencies theta^(-2k / a), k < a/2, each repeated for its pair.
    """
    parts = []
    for column, features in enumerate(axes):
        frequencies = theta ** (-torch.arange(0, features, 2, dtype=torch.float64, device=positions.device) / features)
        angles = torch.outer(positions[:, column].to(torch.float64), frequencies)
        parts.append(angles.repeat_interleave(2, dim=1))
    angles = torch.cat(parts, dim=1)
    return angles.cos().to(torch.float32), angles.sin().to(torch.float32)


@lru_cache(maxsize=64)
def rotary_grid(
    height: int, width: int, axes: tuple[int, ...], theta: float, device: torch.device
) -> tuple[Tensor, Tensor]:
    """The rotary table of a whole grid in row-major order, (row, column) as coordinates."""
    cos, sin = rotary(grid_positions(height, width), axes, theta)
    return cos.to(device), sin.to(device)


def axial_axes(head_dim: int, axes: int = 2) -> tuple[int, ...]:
    """Split a head evenly over the axes; every axis needs an even number of features."""
    if head_dim % (2 * axes):
        raise UserError(
            f"head dimension {head_dim} cannot be split over {axes} rotary axes: it must be a multiple of {2 * axes}"
        )
    return (head_dim // axes,) * axes


def rotate(x: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate adjacent pairs of x [B, n, h, d] by (cos, sin) [n, d] or [B, n, d]; the dtype of x is kept."""
    cos, sin = (t.unsqueeze(-2) for t in table)
    pairs = x.unflatten(-1, (-1, 2))
    turned = torch.stack([-pairs[..., 1], pairs[..., 0]], dim=-1).flatten(-2)
    return (x * cos + turned * sin).to(x.dtype)
