"""Where a long skip enters the residual stream again."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ditloom.parts import cost
from ditloom.parts.norms import LayerNorm


class SkipMerge(nn.Module):
    """linear(LN([x, skip])), 2D features to D; LN affine, eps 1e-6 (Skip-DiT; inside blocks in Hunyuan-DiT)."""

    def __init__(self, width: int):
        super().__init__()
        self.norm = LayerNorm(2 * width, affine=True)
        self.linear = nn.Linear(2 * width, width)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        return self.linear(self.norm(torch.cat([x, skip], dim=-1)))

    def macs(self, tokens: int) -> int:
        return cost.linear(self.linear, tokens)


class ResidualSkipMerge(SkipMerge):
    """x + linear(LN([x, skip])); with a zero linear it changes nothing, whatever the skip holds."""

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        return x + super().forward(x, skip)
