"""A gated feed-forward network with a depthwise convolution in it, through which tokens learn where they are (SANA)."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from ditloom.parts import cost
from ditloom.parts.grids import depthwise, to_map, to_tokens
from ditloom.sites.visit import BARE, BareVisit, Visit


class MixFFN(nn.Module):
    """fc2(a SiLU(gate)) with (a, gate) = halves of DW3x3(SiLU(fc1 x)); fc2 has no bias (GLUMBConv)."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, 2 * hidden), nn.Linear(hidden, width, bias=False)
        self.conv = depthwise(2 * hidden, 3)

    def forward(self, x: Tensor, grid: tuple[int, ...], at: Visit | BareVisit = BARE, stream: str = "image") -> Tensor:
        value, gate = to_tokens(self.conv(to_map(F.silu(self.fc1(x)), grid))).chunk(2, dim=-1)
        return self.fc2(at.tap("ff_hidden", value * F.silu(gate), stream))

    def macs(self, tokens: int) -> int:
        return cost.linears(self, tokens) + cost.convolution(self.conv, tokens)
