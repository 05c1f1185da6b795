"""adaLN-single: one modulation for all blocks, to which each adds a learned table (PixArt-alpha, arXiv 2310.00426)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ditloom.contracts.streams import Context, Streams
from ditloom.parts import cost
from ditloom.parts.norms import LayerNorm, modulate
from ditloom.parts.segments import main_modulation


class AdaLNSingle(nn.Module):
    """linear(SiLU(c)), once per forward: c [B, G, D] to [B, G, chunks * D]. Against a linear in every block it saves
    (L - 1)(chunks D^2 + chunks D) - chunks L D parameters."""

    def __init__(self, width: int, chunks: int = 6):
        super().__init__()
        self.linear = nn.Linear(width, chunks * width)

    def forward(self, c: Tensor) -> Tensor:
        return self.linear(nn.functional.silu(c))

    def macs(self, groups: int) -> int:
        return cost.linear(self.linear, groups)


class ModulationTable(nn.Module):
    """A learned table [chunks, D], N(0, 1) / sqrt(D) at the start, added to what all blocks share."""

    def __init__(self, width: int, chunks: int = 6):
        super().__init__()
        self.table = nn.Parameter(torch.randn(chunks, width) / width**0.5)

    def forward(self, shared: Tensor) -> tuple[Tensor, ...]:
        """shared [B, G, chunks * D], or [B, G, D] for all chunks alike, to `chunks` tensors [B, G, D]."""
        return (self.table + shared.unflatten(-1, (-1, self.table.shape[1]))).unbind(-2)


class TableHead(nn.Module):
    """linear(mod(norm x)) with shift and scale = table + c, c [B, G, D] being the embedded time itself."""

    def __init__(self, width: int, outputs: int):
        super().__init__()
        self.norm = LayerNorm(width)
        self.modulation = ModulationTable(width, 2)
        self.linear = nn.Linear(width, outputs)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale = self.modulation(c)
        return self.linear(modulate(self.norm(x), shift, scale))

    def macs(self, tokens: int) -> int:
        return cost.linear(self.linear, tokens)


HEAD = "head"


def single_modulation(single: AdaLNSingle, c: Tensor) -> dict[str, Tensor]:
    """`Context.modulation` of a family with adaLN-single: what blocks share, and c itself for the head."""
    return {"image": single(c), HEAD: c}


def head_modulation(streams: Streams, context: Context) -> Tensor:
    """c of the segment "image" alone: [B, 1, D] or per token."""
    return main_modulation(streams, context, key=HEAD)
