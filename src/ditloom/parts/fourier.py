"""Random Fourier features of time."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


class FourierTimeEmbedding(nn.Module):
    """[sin(2 pi t W), cos(2 pi t W)] through a two-layer SiLU MLP: [...] -> [..., D]. W ~ N(0, 1) is drawn once, fixed.

    The features are computed in float32 and W, a buffer saved with the weights, stays float32 in a bfloat16 model.
    """

    W: Tensor

    def __init__(self, width: int, frequencies: int = 256):
        super().__init__()
        self.register_buffer("W", torch.randn(frequencies))
        self.mlp = nn.Sequential(nn.Linear(2 * frequencies, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, time: Tensor) -> Tensor:
        angles = 2 * math.pi * time.to(torch.float32)[..., None] * self.W.to(torch.float32)
        wave = torch.cat([angles.sin(), angles.cos()], dim=-1)
        return self.mlp(wave.to(next(self.mlp.parameters()).dtype))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        exact = self.W
        super()._apply(fn, recurse)
        if not exact.is_meta:
            self.W = exact.to(self.W.device)
        return self
