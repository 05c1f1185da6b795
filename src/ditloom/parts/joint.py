"""One softmax over several streams, each with its own projections (MMDiT, Esser et al. 2024)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ditloom.contracts.layout import Layout
from ditloom.contracts.streams import Context
from ditloom.parts import cost
from ditloom.parts.attention import Projections, attend
from ditloom.sites.visit import BARE, BareVisit, Visit


def joint_attention(
    projections: Mapping[str, Projections],
    h: Mapping[str, Tensor],
    layout: Layout,
    context: Context,
    at: Visit | BareVisit = BARE,
    outputs: Sequence[str] = (),
) -> dict[str, Tensor]:
    """h[stream] [B, n, D] to each stream's attention output; joint order is the layout's.

    outputs: the streams whose output is projected and returned (default: all).
    """
    heads = [projections[s].heads_of(h[s], context.rotary.get(s), at, s) for s in layout.streams]
    q, k, v = (torch.cat(parts, dim=1) for parts in zip(*heads, strict=True))
    merged = attend(q, k, v, layout, context.rule, context.gates, at)
    return {s: projections[s].out(merged[:, layout.stream_slice(s)], at, s) for s in outputs or layout.streams}


def joint_macs(projections: Mapping[str, Projections], layout: Layout) -> int:
    """Multiply-accumulates of all projections and of the joint softmax."""
    tokens = layout.length()
    width = next(iter(projections.values())).qkv.in_features
    return sum(projections[s].macs(layout.length(s)) for s in layout.streams) + cost.attention(tokens, tokens, width)
