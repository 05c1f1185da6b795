"""A sequence of tokens as one vector (the pooling of CLIP's image encoder, Radford et al. 2021)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ditloom.parts import cost
from ditloom.parts.attention import kernel
from ditloom.parts.checks import check_heads


class AttentionPool(nn.Module):
    """The mean token, as the only query, attends to itself and all tokens: [B, n, width] to [B, outputs].

    Learned positions [n + 1, width], N(0, 1) / sqrt(width) at the start, are added first. No token is masked.
    """

    def __init__(self, tokens: int, width: int, heads: int, outputs: int):
        super().__init__()
        check_heads(width, heads)
        self.heads = heads
        self.positions = nn.Parameter(torch.randn(tokens + 1, width) / width**0.5)
        self.q, self.k, self.v = (nn.Linear(width, width) for _ in range(3))
        self.proj = nn.Linear(width, outputs)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([x.mean(1, keepdim=True), x], dim=1) + self.positions
        q, k, v = (part.unflatten(-1, (self.heads, -1)) for part in (self.q(x[:, :1]), self.k(x), self.v(x)))
        return self.proj(kernel(q, k, v).flatten(1))

    @property
    def macs(self) -> int:
        """Multiply-accumulates per batch row."""
        tokens, width = self.positions.shape
        once = cost.linear(self.q, 1) + cost.linear(self.proj, 1) + cost.attention(1, tokens, width)
        return once + cost.linear(self.k, tokens) + cost.linear(self.v, tokens)
