"""One softmax over several streams, each with its own projections (MMDiT, Esser et al. 2024)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from ditloom.contracts.layout import Layout
from ditloom.contracts.streams import Context
from ditloom.parts import cost
from ditloom.parts.attention import Projections, attend
from ditloom.sites.rules import Gates, Padding, Plan, Settled
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


def within(context: Context, layout: Layout, stream: str) -> Context:
    """The context for an attention among the tokens of one stream: the same rule, cut down to that stream."""
    settled = context.rule
    if not isinstance(settled, Settled):
        return context  # a rule that is not settled is worked out for the layout it meets
    at, gates = layout.stream_slice(stream), dict(context.gates)
    names = [span.name for span in layout.of(stream)]
    plans = []
    for n, plan in enumerate(settled.plans):
        elsewhere = all(isinstance(m, Padding) and m.segment not in names for m in settled.rule.terms[n].masks)
        kind: Literal["none", "dense"] = "none" if plan.kind == "none" or elsewhere else "dense"
        if kind == "dense":
            gates[f"mask.{n}"] = _mask(n, plan, layout, context.gates)[:, at, at]
        if isinstance(plan.weight, str) and gates[plan.weight].shape[-1] == layout.length():
            gates[plan.weight] = gates[plan.weight][..., at]
        plans.append(Plan(kind, plan.weight))
    return replace(context, rule=Settled(settled.rule, layout, tuple(plans)), gates=gates)


def _mask(n: int, plan: Plan, layout: Layout, gates: Gates) -> Tensor:
    """The boolean matrix [B or 1, N, N] of a dense or split plan."""
    if plan.kind == "dense":
        return gates[f"mask.{n}"]
    mask = torch.zeros(1, layout.length(), layout.length(), dtype=torch.bool, device=gates[f"keys.{n}.0"].device)
    for g in range(plan.groups):
        queries, keys = gates[f"queries.{n}.{g}"], gates[f"keys.{n}.{g}"]
        mask[:, queries[:, None], keys[None]] = True
    return mask
