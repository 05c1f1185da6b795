"""What turns tokens into patches of the prediction."""

from __future__ import annotations

from torch import Tensor, nn

from ditloom.parts import cost
from ditloom.parts.grids import convolution, to_map
from ditloom.parts.modulation import AdaLN
from ditloom.parts.norms import LayerNorm, modulate


class Head(nn.Module):
    """linear(mod(norm x)) with shift and scale from c, tokens to patches [B, N, p * p * C_out]."""

    def __init__(self, width: int, patch: int, out_channels: int, norm: nn.Module | None = None):
        super().__init__()
        self.norm = norm or LayerNorm(width)
        self.modulation = AdaLN(width, 2)
        self.linear = nn.Linear(width, patch * patch * out_channels)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale = self.modulation(c)
        return self.linear(modulate(self.norm(x), shift, scale))

    def macs(self, tokens: int) -> int:
        return cost.linear(self.linear, tokens) + self.modulation.macs(1)


class GridHead(nn.Module):
    """conv3x3(mod(LN x)) with shift and scale from c: a token per position to the prediction [B, C_out, H, W]."""

    def __init__(self, width: int, out_channels: int):
        super().__init__()
        self.norm = LayerNorm(width)
        self.modulation = AdaLN(width, 2)
        self.proj = convolution(width, out_channels)

    def forward(self, x: Tensor, c: Tensor, grid: tuple[int, ...]) -> Tensor:
        shift, scale = self.modulation(c)
        return self.proj(to_map(modulate(self.norm(x), shift, scale), grid))

    def macs(self, tokens: int) -> int:
        return cost.convolution(self.proj, tokens) + self.modulation.macs(1)
