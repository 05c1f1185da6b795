"""Attention between two densities of tokens, and attention that is a mean (SparseDiT, arXiv 2412.06028)."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn
from torch.nn import functional as F

from ditloom.contracts.errors import UserError
from ditloom.contracts.layout import Layout
from ditloom.contracts.streams import Context
from ditloom.parts import cost
from ditloom.parts.attention import kernel
from ditloom.parts.grids import to_map, to_tokens
from ditloom.sites.visit import BARE, BareVisit, Visit


class MeanAttention(nn.Module):
    """Attention with equal weights: proj(v(mean of x)), the same for every token; there are no queries and keys."""

    stages: ClassVar[tuple[str, ...]] = ("attn_heads", "attn_out")

    def __init__(self, width: int):
        super().__init__()
        self.v, self.proj = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: Tensor, layout: Layout, context: Context, at: Visit | BareVisit = BARE) -> Tensor:
        """x [B, n, D] to [B, n, D]. The mean is taken first, which is 1 / n of the cost of values for all tokens."""
        if context.rule is not None:
            raise UserError("mean attention weighs all tokens alike and takes no attention rule")
        heads = at.tap("attn_heads", self.v(x.mean(1, keepdim=True)))
        return at.tap("attn_out", self.proj(heads)).expand(-1, x.shape[1], -1)

    def site_macs(self, layout: Layout) -> int:
        return cost.linears(self, 1)


class TokenCrossAttention(nn.Module):
    """Queries of some tokens [B, n, D], keys and values of others [B, m, D], all of one width."""

    stages: ClassVar[tuple[str, ...]] = ("q_proj", "k_proj", "v_proj", "attn_heads", "attn_out")

    def __init__(self, width: int, heads: int):
        super().__init__()
        if width % heads:
            raise UserError(f"width {width} is not a multiple of {heads} heads")
        self.heads = heads
        self.q, self.kv = nn.Linear(width, width), nn.Linear(width, 2 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, others: Tensor, at: Visit | BareVisit = BARE) -> Tensor:
        q = at.tap("q_proj", self.q(x).unflatten(-1, (self.heads, -1)))
        k, v = self.kv(others).unflatten(-1, (2, self.heads, -1)).unbind(2)
        merged = kernel(q, at.tap("k_proj", k), at.tap("v_proj", v)).flatten(2)
        return at.tap("attn_out", self.proj(at.tap("attn_heads", merged)))

    def macs(self, queries: int, keys: int) -> int:
        """Multiply-accumulates of projections and products."""
        projections = cost.linear(self.q, queries) + cost.linear(self.proj, queries) + cost.linear(self.kv, keys)
        return projections + cost.attention(queries, keys, self.q.out_features)


def pooled(tokens: Tensor, grid: tuple[int, ...], side: int) -> Tensor:
    """Tokens [B, H * W, D] averaged over a grid of side x side: [B, side^2, D]."""
    return to_tokens(F.adaptive_avg_pool2d(to_map(tokens, grid), side))


def repeated(tokens: Tensor, grid: tuple[int, ...], onto: tuple[int, ...]) -> Tensor:
    """Tokens of a coarse grid repeated over a fine one, each cell taking its nearest."""
    return to_tokens(F.interpolate(to_map(tokens, grid), size=onto, mode="nearest"))
