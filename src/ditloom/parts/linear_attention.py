"""ReLU linear attention: every token reads one small matrix per head, so that cost is linear in tokens (SANA)."""

from __future__ import annotations

import torch
from torch import Tensor

from ditloom.parts import cost
from ditloom.parts.attention import Projections
from ditloom.parts.norms import AcrossHeads, RMSNorm
from ditloom.parts.precision import wide
from ditloom.sites.visit import BARE, BareVisit, Visit

EPS = 1e-15
AT_ONCE = 1024
"""Tokens that a processor works on at once, so that they stay in its fast memory."""
STAGES = ("q_proj", "k_proj", "v_proj", "q_norm", "k_norm", "q_rope", "k_rope", "attn_heads", "attn_out")


def linear_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """relu(q) (relu(k)^T v) / relu(q) sum(relu(k)) for [B, N, h, d], in float32: sums over many tokens need it.

    The same as relu(q) relu(k)^T with rows scaled to sum 1, times v. What keeps a row without any weight finite, 1e-15,
    is the released code's default (1e-8 in its training recipe).
    """
    size = AT_ONCE if q.device.type == "cpu" else q.shape[1]
    summed = torch.stack([_summed(*part) for part in zip(k.split(size, 1), v.split(size, 1), strict=True)]).sum(0)
    parts = [_read(part, summed) for part in q.split(size, 1)]
    return (parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)).to(v.dtype)


def _summed(k: Tensor, v: Tensor) -> Tensor:
    """relu(k)^T v, and sum(relu(k)) as one more column: [B, h, d, d + 1]."""
    k, v = wide(k.relu()).transpose(1, 2), wide(v).transpose(1, 2)
    return torch.cat([k.mT @ v, k.sum(2).unsqueeze(-1)], dim=-1)


def _read(q: Tensor, summed: Tensor) -> Tensor:
    """What queries [B, n, h, d] read of the sums."""
    out = wide(q.relu()).transpose(1, 2) @ summed
    return (out[..., :-1] / (out[..., -1:] + EPS)).transpose(1, 2)


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
