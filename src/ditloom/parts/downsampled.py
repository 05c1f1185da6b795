"""Attention with token downsampling and a cosine instead of a dot product (U-DiT, Tian et al., arXiv 2405.02730)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ditloom.parts import cost
from ditloom.parts.attention import Projections, kernel
from ditloom.parts.grids import depthwise, over_grid
from ditloom.sites.visit import BARE, BareVisit, Visit

LARGEST_LOG_SCALE = 4.6052


class UnitNorm(nn.Module):
    """x / |x| over the last axis, in float32."""

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(x.to(torch.float32), dim=-1).to(x.dtype)


class CosineScale(nn.Module):
    """Queries [B, n, h, d] of unit length times min(exp(logit_scale), 100) sqrt(d).

    With unit keys, q k / sqrt(d) is then the cosine times a learned scale per head, which starts at 10.
    """

    def __init__(self, heads: int, head_dim: int):
        super().__init__()
        self.root = math.sqrt(head_dim)
        self.logit_scale = nn.Parameter(torch.full((heads, 1), math.log(10.0)))

    def forward(self, x: Tensor) -> Tensor:
        scale = self.logit_scale.to(torch.float32).clamp(max=LARGEST_LOG_SCALE).exp() * self.root
        return (F.normalize(x.to(torch.float32), dim=-1) * scale).to(x.dtype)


class DownsampledAttention(nn.Module):
    """z = x + DW5x5(x), cut into factor^2 sub-grids z[i::f, j::f], each of which attends within itself.

    All sub-grids share one set of projections; their outputs are put back where they came from, so that no token is
    lost and the attention costs N^2 / f^2. Tokens stay row-major on axis 1 at every stage.
    """

    def __init__(self, width: int, heads: int, factor: int = 2):
        super().__init__()
        self.factor = factor
        self.conv = depthwise(width, 5)
        self.projections = Projections(width, heads)
        self.projections.q_norm = CosineScale(heads, width // heads)
        self.projections.k_norm = UnitNorm()

    def forward(
        self, x: Tensor, grid: tuple[int, ...], rotary: tuple[Tensor, Tensor], at: Visit | BareVisit = BARE
    ) -> Tensor:
        z = x + over_grid(self.conv, x, grid)
        q, k, v = (self.split(t, grid) for t in self.projections.heads_of(z, rotary, at))
        return self.projections.out(self.merge(kernel(q, k, v), grid).flatten(2), at)

    def split(self, x: Tensor, grid: tuple[int, ...]) -> Tensor:
        """[B, N, h, d] to [B * f * f, N / f^2, h, d], sub-grids (i, j) in row-major order."""
        f = self.factor
        cells = x.reshape(x.shape[0], grid[0] // f, f, grid[1] // f, f, *x.shape[2:])
        return cells.permute(0, 2, 4, 1, 3, 5, 6).reshape(x.shape[0] * f * f, -1, *x.shape[2:])

    def merge(self, x: Tensor, grid: tuple[int, ...]) -> Tensor:
        """The inverse of `split`."""
        f = self.factor
        cells = x.reshape(-1, f, f, grid[0] // f, grid[1] // f, *x.shape[2:])
        return cells.permute(0, 3, 1, 4, 2, 5, 6).reshape(-1, grid[0] * grid[1], *x.shape[2:])

    def macs(self, tokens: int) -> int:
        width = self.projections.qkv.in_features
        pairs = cost.attention(tokens, tokens, width) // self.factor**2
        return cost.convolution(self.conv, tokens) + self.projections.macs(tokens) + pairs
