"""Differential attention, and the integral that makes its rows sum to one again.

DIFF: Differential Transformer (Ye et al., arXiv 2410.05258). DINT: DINT Transformer (Cang et al., arXiv 2501.17486),
here in its bidirectional form; the scale of its head norm is from the paper's formula, as there is no official code.
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor, nn

from ditloom.contracts.errors import UserError
from ditloom.contracts.layout import Layout
from ditloom.contracts.streams import Context
from ditloom.parts import cost
from ditloom.parts.attention import STAGES, SelfAttention, ruled
from ditloom.parts.norms import RMSNorm
from ditloom.sites.rules import Padding, Rule, Settled
from ditloom.sites.visit import BARE, BareVisit, Visit


class DiffAttention(SelfAttention):
    """(A1 - lambda A2) v: two softmax maps per pair of heads, whose common noise cancels. The kind "diff".

    `heads` counts heads of queries and keys, d features each; neighbours 2j and 2j + 1 share one value head of 2d, so
    that there are as many weights as in softmax attention, and besides them 4d for lambda and 2d for the head norm.
    lambda = exp(<q1, k1>) - exp(<q2, k2>) + lambda_0, in float32, with lambda_0 = 0.8 - 0.6 exp(-0.3 layer).
    Negative weights occur: there is no map of logits to look at.
    """

    stages: ClassVar[tuple[str, ...]] = tuple(stage for stage in STAGES if stage != "logits")

    def __init__(
        self, width: int, heads: int, qkv_bias: bool = True, qk_norm: str | None = None, *, layer: int = 0
    ) -> None:
        if heads % 2:
            raise UserError(f"differential attention pairs its heads: their number must be even, got {heads}")
        super().__init__(width, heads, qkv_bias, qk_norm)
        size = width // heads
        self.initial = 0.8 - 0.6 * math.exp(-0.3 * layer)
        self.lambda_q1, self.lambda_k1, self.lambda_q2, self.lambda_k2 = (
            nn.Parameter(0.1 * torch.randn(size)) for _ in range(4)
        )
        self.head_norm = RMSNorm(2 * size, eps=1e-5)

    def strength(self) -> Tensor:
        """lambda, one number, float32."""
        first = (self.lambda_q1.float() * self.lambda_k1.float()).sum().exp()
        second = (self.lambda_q2.float() * self.lambda_k2.float()).sum().exp()
        return first - second + self.initial

    def forward(self, x: Tensor, layout: Layout, context: Context, at: Visit | BareVisit = BARE) -> Tensor:
        q, k, v = self.heads_of(x, context.rotary.get("image"), at)
        first, second = (
            ruled(q[:, :, i::2], k[:, :, i::2], paired(v), layout, context.rule, context.gates, _half(at.extra_keys, i))
            for i in range(2)
        )
        heads = self.combine(first, second, context, layout).unflatten(-1, (self.heads // 2, -1))
        return self.out((self.head_norm(heads) * self.scale).flatten(2), at)

    @property
    def scale(self) -> float:
        """What normed heads are multiplied by."""
        return 1 - self.initial

    def combine(self, first: Tensor, second: Tensor, context: Context, layout: Layout) -> Tensor:
        """A1 v and A2 v, each [B, N, D], to the differential attention's heads."""
        return first - self.strength().to(first.dtype) * second

    def site_macs(self, layout: Layout) -> int:
        n, width = layout.length(), self.qkv.in_features
        return self.macs(n) + cost.attention(n, n, width // 2) + cost.attention(n, n, width)


class DintAttention(DiffAttention):
    """(A1 - lambda A2 + lambda 1 g) v with g the column means of A1: every row sums to one. The kind "dint".

    1 g v is the mean of A1 v over the queries, so no map is needed. Padding is left out of the mean; under any other
    rule the mean would carry what a query may not see, and is refused.
    """

    @property
    def scale(self) -> float:
        return 1.0

    def combine(self, first: Tensor, second: Tensor, context: Context, layout: Layout) -> Tensor:
        strength = self.strength().to(first.dtype)
        return first - strength * second + strength * mean_of_queries(first, context, layout)


def paired(v: Tensor) -> Tensor:
    """Value heads [B, n, h, d] two by two: [B, n, h / 2, 2 d]."""
    return v.unflatten(2, (-1, 2)).flatten(3)


def _half(extra: tuple[Tensor, Tensor] | None, i: int) -> tuple[Tensor, Tensor] | None:
    return None if extra is None else (extra[0][:, :, i::2], paired(extra[1]))


def mean_of_queries(x: Tensor, context: Context, layout: Layout) -> Tensor:
    """The mean [B, 1, D] over all tokens that are no padding."""
    rule = context.rule.rule if isinstance(context.rule, Settled) else context.rule
    if rule is None:
        return x.mean(1, keepdim=True)
    real = _real(rule, context, layout, x).to(x.dtype)[..., None]
    return (real * x).sum(1, keepdim=True) / real.sum(1, keepdim=True)


def _real(rule: Rule, context: Context, layout: Layout, x: Tensor) -> Tensor:
    """Which tokens are no padding [B, N]."""
    real = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
    masks = [mask for term in rule.terms for mask in term.masks]
    if len(rule.terms) > 1 or not all(isinstance(mask, Padding) for mask in masks):
        raise UserError(
            "dint attention adds the mean over all tokens, which attention rules other than padding do not allow: "
            "take the kind 'diff'"
        )
    for mask in masks:
        assert isinstance(mask, Padding)
        real[:, layout.joint_slice(mask.segment)] &= context.gates[mask.gate].bool()
    return real
