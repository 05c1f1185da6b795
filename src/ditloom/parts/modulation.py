"""Adaptive layer norm: shifts, scales and gates from the conditioning vector."""

from __future__ import annotations

from torch import Tensor, nn

from ditloom.parts import cost


class AdaLN(nn.Module):
    """linear(SiLU(c)) cut into `chunks`: c [B, G, D] to `chunks` tensors [B, G, D] (Peebles & Xie 2023, adaLN-Zero)."""

    def __init__(self, width: int, chunks: int, inputs: int | None = None):
        super().__init__()
        self.chunks = chunks
        self.linear = nn.Linear(inputs or width, chunks * width)

    def forward(self, c: Tensor) -> tuple[Tensor, ...]:
        return self.linear(nn.functional.silu(c)).chunk(self.chunks, dim=-1)

    def macs(self, groups: int) -> int:
        return cost.linear(self.linear, groups)


class LinearAdaLN(AdaLN):
    """linear(c): of a conditioning that has been through SiLU already."""

    def forward(self, c: Tensor) -> tuple[Tensor, ...]:
        return self.linear(c).chunk(self.chunks, dim=-1)
