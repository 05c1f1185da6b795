"""Feed-forward networks; `ff_hidden` is their inner stage."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from ditloom.parts import cost
from ditloom.sites.visit import BARE, BareVisit, Visit


class MLP(nn.Module):
    """linear -> GELU (tanh approximation unless `exact`) -> linear, the last without a bias where `out_bias` is off."""

    def __init__(self, width: int, hidden: int, exact: bool = False, out_bias: bool = True):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width, bias=out_bias)
        self.approximate = "none" if exact else "tanh"

    def forward(self, x: Tensor, at: Visit | BareVisit = BARE, stream: str = "image") -> Tensor:
        hidden = F.gelu(self.fc1(x), approximate=self.approximate)
        return self.fc2(at.tap("ff_hidden", hidden, stream))

    def macs(self, tokens: int) -> int:
        return cost.linears(self, tokens)


class SwiGLU(nn.Module):
    """w3(silu(a) * b) with (a, b) = halves of w12(x)."""

    def __init__(self, width: int, hidden: int, bias: bool = True):
        super().__init__()
        self.w12, self.w3 = nn.Linear(width, 2 * hidden, bias=bias), nn.Linear(hidden, width, bias=bias)

    def forward(self, x: Tensor, at: Visit | BareVisit = BARE, stream: str = "image") -> Tensor:
        gate, value = self.w12(x).chunk(2, dim=-1)
        return self.w3(at.tap("ff_hidden", F.silu(gate) * value, stream))

    def macs(self, tokens: int) -> int:
        return cost.linears(self, tokens)


class GEGLU(SwiGLU):
    """w3(gelu(a) * b) with (a, b) = halves of w12(x), in the tanh approximation."""

    def forward(self, x: Tensor, at: Visit | BareVisit = BARE, stream: str = "image") -> Tensor:
        gate, value = self.w12(x).chunk(2, dim=-1)
        return self.w3(at.tap("ff_hidden", F.gelu(gate, approximate="tanh") * value, stream))
