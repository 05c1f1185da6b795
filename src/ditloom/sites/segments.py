"""Segments that handlers add to a forward; a static one's keys and values are computed once and kept."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from ditloom.contracts.clock import Clock, Rows
from ditloom.contracts.layout import Layout, Segment
from ditloom.contracts.method import Handler
from ditloom.contracts.site import Site
from ditloom.contracts.streams import Context
from ditloom.sites.rules import Isolate, Settled, both, rule, settle

if TYPE_CHECKING:
    from ditloom.sites.run import Run

KEPT = ("k_rope", "v_proj")


class AddedSegments:
    """What handlers add to one forward: segments to run, kept keys and values instead of them, attention rules."""

    def __init__(self, run: Run, clock: Clock, rows: Rows):
        self.run, self.clock, self.rows = run, clock, rows
        asked = [s for h in run.handlers if _overrides(h, "segments") for s in h.segments(clock, rows)]
        self.held = [s for s in asked if s.static and self._is_held(s)]
        self.segments = [s for s in asked if all(s is not h for h in self.held)]
        self.fresh = [s for s in self.segments if s.static]
        self.rulers = [h for h in run.handlers if _overrides(h, "rule")]

    @property
    def idle(self) -> bool:
        """No stored keys to hand in or to keep."""
        return not (self.held or self.fresh)

    def ruled(self, layout: Layout, context: Context) -> Context:
        """The context with the handlers' rules, and static segments isolated from everything else."""
        own = context.rule.rule if isinstance(context.rule, Settled) else context.rule
        combined, gates = own, dict(context.gates)
        for handler in self.rulers:
            given = handler.rule(layout, self.clock, self.rows)
            if given is not None:
                combined, gates = both(combined, given[0]), {**gates, **given[1]}
        if self.fresh:
            combined = both(combined, rule(Isolate(tuple(s.name for s in self.fresh))))
        if combined is own:
            return context
        assert combined is not None
        settled, gates = settle(combined, layout, gates, self.run.backbone.device)
        return replace(context, rule=settled, gates=gates)

    def keep(self, index: int, given: dict[str, Any]) -> list[str]:
        """Names a block must keep for fresh static segments; kept keys of held ones go into `given`."""
        if self.held:
            pairs = [self._entry(s, index).whole for s in self.held]
            given["extra_keys"] = tuple(torch.cat([pair[i] for pair in pairs], dim=1) for i in range(2))
        return [f"{stage}@{s.weights}" for s in self.fresh for stage in KEPT]

    def store(self, index: int, kept: Mapping[str, Any], made_of: Hashable) -> None:
        """Keep the keys and values of fresh static segments, for as long as their tokens are the same."""
        for s in self.fresh:
            at = self.run.layout_now.slice(s.name)
            pair = tuple(kept[f"{stage}@{s.weights}"][:, at].detach() for stage in KEPT)
            self.run.keys.push("segment", _place(s, index), self.rows, self.clock.step, pair, 1, self._made_of(s))

    def _is_held(self, segment: Segment) -> bool:
        last = self.run.blocks - 1
        return self.run.keys.ready("segment", _place(segment, last), self.rows, 1, self._made_of(segment))

    def _entry(self, segment: Segment, index: int) -> Any:
        return self.run.keys.last("segment", _place(segment, index), self.rows, self._made_of(segment))

    def _made_of(self, segment: Segment) -> Hashable:
        return (Same(segment.tokens), self.run.weights_now, self.rows)


class Same:
    """Equal only to the very same, unwritten tensor; holding it keeps its identity from being reused."""

    def __init__(self, tensor: torch.Tensor):
        self.tensor, self.version = tensor, tensor._version

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Same) and self.tensor is other.tensor and self.version == other.version

    def __hash__(self) -> int:
        return id(self.tensor)


def _place(segment: Segment, index: int) -> Site:
    return Site("segment", "blocks", block=index, name=segment.name)


def _overrides(handler: Handler, name: str) -> bool:
    return getattr(type(handler), name) is not getattr(Handler, name)
