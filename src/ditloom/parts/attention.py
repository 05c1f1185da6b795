"""Softmax attention: the projections of one stream, the kernel, and attention under a rule."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ditloom.contracts.errors import UserError
from ditloom.contracts.layout import Layout
from ditloom.contracts.streams import Context
from ditloom.parts import cost
from ditloom.parts.norms import head_norm
from ditloom.parts.positions import rotate
from ditloom.sites.rules import Gates, Plan, Rule, Settled, settle
from ditloom.sites.visit import BARE, BareVisit, Visit

STAGES = ("q_proj", "k_proj", "v_proj", "q_norm", "k_norm", "q_rope", "k_rope", "logits", "attn_heads", "attn_out")
EXPLICIT_LIMIT = 1 << 20


class Projections(nn.Module):
    """q, k, v of one stream with optional per-head norms and rotary embedding, and the output projection.

    `qk_norm`: None, "rms" or "layer" over the head dimension, "rms-full" over the whole width. `project_out=False` for
    a stream whose attention output is dropped (the last text block of MMDiT). Tensors are [B, n, h, d], as are stages.
    """

    def __init__(
        self, width: int, heads: int, qkv_bias: bool = True, qk_norm: str | None = None, project_out: bool = True
    ):
        super().__init__()
        if width % heads:
            raise UserError(f"width {width} is not a multiple of {heads} heads")
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=qkv_bias)
        self.q_norm, self.k_norm = (head_norm(qk_norm, width, heads) for _ in range(2))
        if project_out:
            self.proj = nn.Linear(width, width)

    def heads_of(
        self, x: Tensor, rotary: tuple[Tensor, Tensor] | None, at: Visit | BareVisit = BARE, stream: str = "image"
    ) -> tuple[Tensor, Tensor, Tensor]:
        """x [B, n, D] to q, k, v, each [B, n, h, d]; order: projection, norm, rotary embedding."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).unbind(2)
        q, k, v = at.tap("q_proj", q, stream), at.tap("k_proj", k, stream), at.tap("v_proj", v, stream)
        q, k = at.tap("q_norm", self.q_norm(q), stream), at.tap("k_norm", self.k_norm(k), stream)
        if rotary is not None:
            q, k = rotate(q, rotary), rotate(k, rotary)
        return at.tap("q_rope", q, stream), at.tap("k_rope", k, stream), v

    def out(self, heads: Tensor, at: Visit | BareVisit = BARE, stream: str = "image") -> Tensor:
        """Merged heads [B, n, D] through the output projection."""
        return at.tap("attn_out", self.proj(at.tap("attn_heads", heads, stream)), stream)

    def macs(self, tokens: int) -> int:
        return cost.linears(self, tokens)


class SelfAttention(Projections):
    """Softmax attention among all tokens of one stream: projections, kernel, output. Other kinds are subclasses."""

    stages: ClassVar[tuple[str, ...]] = STAGES

    def forward(self, x: Tensor, layout: Layout, context: Context, at: Visit | BareVisit = BARE) -> Tensor:
        """x [B, n, D], normed and modulated, to the attention's output [B, n, D] under the context's rule."""
        q, k, v = self.heads_of(x, context.rotary.get("image"), at)
        return self.out(attend(q, k, v, layout, context.rule, context.gates, at), at)

    def site_macs(self, layout: Layout) -> int:
        """Multiply-accumulates of the whole attention: projections and the products over all pairs of tokens."""
        n = layout.length()
        return self.macs(n) + cost.attention(n, n, self.qkv.out_features // 3)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: Layout,
    rule: Settled | Rule | None = None,
    gates: Gates | None = None,
    at: Visit | BareVisit = BARE,
) -> Tensor:
    """Attention of the joint sequence [B, N, h, d] under a rule, to merged heads [B, N, h * d].

    Stored keys and values (`at.extra_keys`) are appended; every query may see them.
    """
    if at.wants("logits"):
        at.keep("logits", logits(q, k))
    return ruled(q, k, v, layout, rule, gates, at.extra_keys)


def ruled(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: Layout,
    rule: Settled | Rule | None = None,
    gates: Gates | None = None,
    extra: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """`attend` without its stages: `extra` keys and values are appended; v may have another head size than q and k."""
    if rule is None:
        return kernel(q, *_append(k, v, extra)).flatten(2)
    gates = gates or {}
    if isinstance(rule, Rule):
        rule, gates = settle(rule, layout, gates, q.device)
    outs = [_weighted(_planned(q, k, v, n, plan, gates, extra), plan, gates) for n, plan in enumerate(rule.plans)]
    return sum(outs[1:], outs[0])


def _weighted(out: Tensor, plan: Plan, gates: Gates) -> Tensor:
    if isinstance(plan.weight, str):
        return gates[plan.weight][..., None].to(out.dtype) * out
    return out if plan.weight == 1.0 else plan.weight * out


def _planned(q: Tensor, k: Tensor, v: Tensor, n: int, plan: Plan, gates: Gates, extra: Any) -> Tensor:
    if plan.kind == "none":
        return kernel(q, *_append(k, v, extra)).flatten(2)
    if plan.kind == "dense":
        keys, values = _append(k, v, extra)
        mask = F.pad(gates[f"mask.{n}"], (0, keys.shape[1] - k.shape[1]), value=True)
        return kernel(q, keys, values, mask[:, None]).flatten(2)
    out = q.new_empty(*q.shape[:3], v.shape[-1])
    for g in range(plan.groups):
        at_q, at_k = gates[f"queries.{n}.{g}"], gates[f"keys.{n}.{g}"]
        out = out.index_copy(1, at_q, kernel(q[:, at_q], *_append(k[:, at_k], v[:, at_k], extra)))
    return out.flatten(2)


def _append(k: Tensor, v: Tensor, extra: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor]:
    if extra is None:
        return k, v
    return torch.cat([k, extra[0].to(k.dtype)], dim=1), torch.cat([v, extra[1].to(v.dtype)], dim=1)


def kernel(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """softmax(q k^T / sqrt(d)) v for [B, n, h, d]; mask [B, 1, Nq, Nk] is True where allowed.

    On CPUs in bf16 the explicit products are faster than the fused kernel for short sequences.
    """
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    if q.device.type == "cpu" and q.dtype is torch.bfloat16 and q.shape[-2] * k.shape[-2] <= EXPLICIT_LIMIT:
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
        if mask is not None:
            scores = scores.masked_fill(~mask, -math.inf)
        return (scores.softmax(dim=-1) @ v).transpose(1, 2)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)


def logits(q: Tensor, k: Tensor) -> Tensor:
    """q k^T / sqrt(d): [B, h, Nq, Nk]."""
    return (q * q.shape[-1] ** -0.5).transpose(1, 2) @ k.permute(0, 2, 3, 1)
