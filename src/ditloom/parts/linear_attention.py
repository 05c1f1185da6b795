"""ReLU linear attention: every token reads one small matrix per head, so that cost is linear in tokens (SANA)."""

from __future__ import annotations

import torch
from torch import Tensor

from ditloom.parts import cost
from ditloom.parts.attention import Projections
from ditloom.parts.norms import AcrossHeads, RMSNorm
from ditloom.sites.visit import BARE, BareVisit, Visit

EPS = 1e-15
STAGES = ("q_proj", "k_proj", "v_proj", "q_norm", "k_norm", "q_rope", "k_rope", "attn_heads", "attn_out")


def linear_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """relu(q) (relu(k)^T v) / relu(q) sum(relu(k)) for [B, N, h, d], in float32: sums over many tokens need it.

    The same as relu(q) relu(k)^T with rows scaled to sum 1, times v. What keeps a row without any weight finite, 1e-15,
    is the released code's default (1e-8 in its training recipe).
    """
    dtype = v.dtype
    q, k, v = (t.transpose(1, 2).to(torch.promote_types(dtype, torch.float32)) for t in (q.relu(), k.relu(), v))
    weights = q @ k.sum(2).unsqueeze(-1)
    return ((q @ (k.mT @ v)) / (weights + EPS)).transpose(1, 2).to(dtype)


class LinearAttention(Projections):
    """Projections without bias, ReLU linear attention, output projection; `qk_norm`: RMS over the full width."""

    def __init__(self, width: int, heads: int, qk_norm: bool = False):
        super().__init__(width, heads, qkv_bias=False)
        if qk_norm:
            self.q_norm, self.k_norm = (AcrossHeads(RMSNorm(width, eps=1e-5)) for _ in range(2))

    def forward(self, x: Tensor, at: Visit | BareVisit = BARE) -> Tensor:
        """x [B, N, D], normed and modulated, to the attention's output [B, N, D]."""
        return self.out(linear_attention(*self.heads_of(x, None, at)).flatten(2), at)

    def macs(self, tokens: int) -> int:
        width = self.proj.in_features
        return cost.linears(self, tokens) + tokens * width * (2 * width // self.heads + 1)
