"""Where tokens are: sine-cosine tables and rotary embeddings."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from ditloom.contracts.errors import UserError
from ditloom.parts.precision import wide


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
def grid_positions(*sizes: int) -> Tensor:
    """The coordinates of every token of a grid, the last axis moving fastest: [tokens, axes], float64, on the CPU.

    Of (height, width): (row, column) in row-major order; of (frames, height, width): (frame, row, column).
    """
    axes = torch.meshgrid(*(torch.arange(n, device="cpu") for n in sizes), indexing="ij")
    return torch.stack([axis.reshape(-1) for axis in axes], dim=1).to(torch.float64)


@lru_cache(maxsize=64)
def stretched_grid(
    height: int, width: int, span: float, channels: int, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Sine-cosine positions of a grid whose coordinates run from 0 to `span` along both axes: [height * width, D].

    As PixArt has them: every size and aspect ratio is stretched to the range of the training size.
    """
    # in float32, as where the published weights were trained
    rows, columns = (torch.arange(n, dtype=torch.float32, device="cpu") / (n / span) for n in (height, width))
    places = torch.stack([rows.repeat_interleave(width), columns.repeat(height)], dim=1)
    return sincos_at(places, channels).to(device=device, dtype=dtype)


def with_axes(positions: Tensor, axes: int) -> Tensor:
    """Coordinates [n, k] as [n, axes]: those that come before the given ones are 0."""
    n, given = positions.shape
    if given > axes:
        raise UserError(f"this model has {axes} position axes; got positions of {given}")
    return positions if given == axes else torch.cat([positions.new_zeros(n, axes - given), positions], dim=1)


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
def rotary_grid(*sizes: int, axes: tuple[int, ...], theta: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """The rotary table of a whole grid, the last axis moving fastest; further axes in front stand at 0."""
    cos, sin = rotary(with_axes(grid_positions(*sizes), len(axes)), axes, theta)
    return cos.to(device), sin.to(device)


def check_axes(axes: tuple[int, ...], head_dim: int) -> None:
    """One sentence where a split of a head over rotary axes does not add up; every axis turns pairs of features."""
    if sum(axes) != head_dim or any(a % 2 for a in axes):
        raise UserError(
            f"the rotary axes {list(axes)} must be even and add up to the head dimension, {head_dim}; "
            f"they add up to {sum(axes)}"
        )


def axial_axes(head_dim: int, axes: int = 2) -> tuple[int, ...]:
    """Split a head evenly over the axes; every axis needs an even number of features."""
    if head_dim % (2 * axes):
        raise UserError(
            f"head dimension {head_dim} cannot be split over {axes} rotary axes: it must be a multiple of {2 * axes}"
        )
    return (head_dim // axes,) * axes


def rotate(x: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate adjacent pairs of x [B, n, h, d] by (cos, sin) [n, d] or [B, n, d]; the dtype of x is kept.

    Both features of a pair have one angle. Uncompiled as products of complex numbers, which pass over x only once.
    """
    if torch.compiler.is_compiling():
        cos, sin = (t.unsqueeze(-2) for t in table)
        pairs = x.unflatten(-1, (-1, 2))
        turned = torch.stack([-pairs[..., 1], pairs[..., 0]], dim=-1).flatten(-2)
        return (x * cos + turned * sin).to(x.dtype)
    by = torch.complex(*(t[..., ::2].unsqueeze(-2).contiguous() for t in table))
    numbers = torch.view_as_complex(wide(x).unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(numbers * by).flatten(-2).to(x.dtype)


def interleaved(table: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """A table [n, d] of two equal axes, one after the other, with their pairs taking turns: first, second, first."""
    cos, sin = (t.unflatten(-1, (2, -1, 2)).transpose(-3, -2).flatten(-3) for t in table)
    return cos, sin
