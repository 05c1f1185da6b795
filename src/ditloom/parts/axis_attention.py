"""Attention along some axes of a video: within each frame, or along time at each place.

Queries, keys and values are made, tapped and normed for all tokens [B, N, h, d] as in any attention; only the softmax
runs in groups. A rule among all tokens is cut down to the groups.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from ditloom.contracts.errors import UserError
from ditloom.contracts.layout import Layout
from ditloom.contracts.streams import Context
from ditloom.parts import cost
from ditloom.parts.attention import BARE, STAGES, SelfAttention, kernel
from ditloom.sites.rules import Plan, Rule, settle
from ditloom.sites.visit import BareVisit, Visit


class AxisAttention(SelfAttention):
    """The base: `table` names the rotary table of the context, if there is one."""

    stages: ClassVar[tuple[str, ...]] = tuple(stage for stage in STAGES if stage != "logits")
    table: ClassVar[str] = "image"

    @abstractmethod
    def split(self, x: Tensor, grid: tuple[int, ...]) -> Tensor:
        """Tokens [B, N, ...] in groups [B * groups, tokens of one, ...]."""

    @abstractmethod
    def merge(self, x: Tensor, grid: tuple[int, ...]) -> Tensor:
        """The inverse of `split`."""

    @abstractmethod
    def diagonal(self, mask: Tensor, grid: tuple[int, ...]) -> Tensor:
        """Of a mask [B, N, N] the parts inside groups: [B, groups, n, n]."""

    @abstractmethod
    def groups(self, grid: tuple[int, ...]) -> int:
        """Number of groups."""

    def forward(self, x: Tensor, layout: Layout, context: Context, at: Visit | BareVisit = BARE) -> Tensor:
        q, k, v = self.heads_of(x, context.rotary.get(self.table), at)
        return self.out(self.attend(q, k, v, layout, context, at), at)

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, layout: Layout, context: Context, at: Visit | BareVisit = BARE
    ) -> Tensor:
        """q, k, v [B, N, h, d] to merged heads [B, N, D]; appended keys are seen in every group."""
        grid, rule, gates = layout.grid, context.rule, context.gates
        q, k, v = (self.split(part, grid) for part in (q, k, v))
        tokens = k.shape[1]
        if at.extra_keys is not None:
            spread = (part.to(k.dtype).repeat_interleave(self.groups(grid), 0) for part in at.extra_keys)
            k, v = (torch.cat(pair, dim=1) for pair in zip((k, v), spread, strict=True))
        if rule is None:
            return self.merge(kernel(q, k, v), grid).flatten(2)
        if isinstance(rule, Rule):
            rule, made = settle(rule, layout, gates, q.device)
            gates = dict(made)
        out = torch.zeros_like(q[:1])
        for n, plan in enumerate(rule.plans):
            mask = self._mask(plan, gates.get(f"mask.{n}"), grid, len(q), k.shape[1] - tokens)
            part = self.merge(kernel(q, k, v, mask), grid).flatten(2)
            weight = gates[plan.weight][..., None].to(part.dtype) if isinstance(plan.weight, str) else plan.weight
            out = weight * part if n == 0 else out + weight * part
        return out

    def _mask(self, plan: Plan, mask: Tensor | None, grid: tuple[int, ...], rows: int, extra: int) -> Tensor | None:
        if plan.kind == "none":
            return None
        if mask is None:
            raise UserError("attention within frames or along time runs on one grid, without groups of segments")
        inside = self.diagonal(mask, grid)
        if not torch.compiler.is_compiling() and not inside.is_meta and not bool(inside.any(-1).all()):
            raise UserError("the attention rule leaves tokens nothing to attend to within their frame or place")
        inside = inside.expand(rows // self.groups(grid), -1, -1, -1).flatten(0, 1)
        return F.pad(inside, (0, extra), value=True)[:, None]

    def site_macs(self, layout: Layout) -> int:
        n = layout.length()
        return self.macs(n) + cost.attention(n, n, self.qkv.in_features) // self.groups(layout.grid)


class SpatialAttention(AxisAttention):
    """Every token attends to the tokens of its own frame."""

    def split(self, x: Tensor, grid: tuple[int, ...]) -> Tensor:
        return x.unflatten(1, (grid[0], -1)).flatten(0, 1)

    def merge(self, x: Tensor, grid: tuple[int, ...]) -> Tensor:
        return x.unflatten(0, (-1, grid[0])).flatten(1, 2)

    def diagonal(self, mask: Tensor, grid: tuple[int, ...]) -> Tensor:
        within = mask.unflatten(2, (grid[0], -1)).unflatten(1, (grid[0], -1))
        return within.diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2)

    def groups(self, grid: tuple[int, ...]) -> int:
        return grid[0]


class TemporalAttention(AxisAttention):
    """Every token attends to the tokens at its own place in all frames."""

    table = "temporal"

    def split(self, x: Tensor, grid: tuple[int, ...]) -> Tensor:
        return x.unflatten(1, (grid[0], -1)).transpose(1, 2).flatten(0, 1)

    def merge(self, x: Tensor, grid: tuple[int, ...]) -> Tensor:
        return x.unflatten(0, (-1, self.groups(grid))).transpose(1, 2).flatten(1, 2)

    def diagonal(self, mask: Tensor, grid: tuple[int, ...]) -> Tensor:
        within = mask.unflatten(2, (grid[0], -1)).unflatten(1, (grid[0], -1))
        return within.diagonal(dim1=2, dim2=4).permute(0, 3, 1, 2)

    def groups(self, grid: tuple[int, ...]) -> int:
        return grid[1] * grid[2]
