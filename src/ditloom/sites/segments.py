"""Segments that handlers add to a forward; a static one's keys and values are computed once and kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ditloom.contracts.clock import Clock, Rows
from ditloom.contracts.errors import UserError
from ditloom.contracts.layout import Layout, Segment
from ditloom.contracts.method import Handler
from ditloom.contracts.streams import Context
from ditloom.sites.codecs import HOLD
from ditloom.sites.fingerprint import MadeOf, Same
from ditloom.sites.rules import Isolate, Rule, Settled, both, is_open, rule, settle
from ditloom.sites.store import Place

if TYPE_CHECKING:
    from ditloom.sites.run import Run
    from ditloom.sites.surface import Surface

KEPT = ("k_rope", "v_proj")


class AddedSegments:
    """What handlers add to one forward: segments to run, kept keys and values instead of them, attention rules.

    held: static segments whose keys and values are stored and used; fresh: those computed now, to be stored.
    """

    def __init__(self, run: Run, segmenters: Sequence[Handler], rulers: Sequence[Handler], clock: Clock, rows: Rows):
        self.run, self.rulers, self.clock, self.rows = run, rulers, clock, rows
        asked = [s for h in segmenters for s in h.segments(clock, rows)]
        _check_names(asked)
        self.made_of = {s.name: self._made_of(s) for s in asked if s.static and clock.purpose == "sample"}
        self.held = self._open([s for s in asked if s.name in self.made_of and self._is_held(s)])
        running = [s for s in asked if s not in Identical(self.held)]
        self.fresh = [s for s in running if s.name in self.made_of]
        self.segments = [_spread(s, rows) for s in running]

    @property
    def acts(self) -> bool:
        """Whether there are stored keys to hand in or to keep."""
        return bool(self.held or self.fresh)

    def ruled(self, layout: Layout, context: Context) -> Context:
        """The context with the handlers' rules, and static segments isolated from everything else."""
        own = context.rule.rule if isinstance(context.rule, Settled) else context.rule
        combined, gates = self._rules(layout, own, dict(context.gates))
        self.fresh = [s for s in self.fresh if is_open(combined, s.name, layout) and self._is_complete(s, layout)]
        static = [s for s in self.segments if s.static]
        if static:
            self._check_times(static, context)
            self.run.seen_layout = layout
            combined = both(combined, rule(Isolate(tuple(s.name for s in static))))
        if combined is own or combined is None:
            return context
        settled, gates = settle(combined, layout, gates, self.run.backbone.device)
        return replace(context, rule=settled, gates=dict(gates))

    def _rules(self, layout: Layout, combined: Rule | None, gates: dict[str, Tensor]) -> tuple[Rule | None, Any]:
        for handler in self.rulers:
            given = handler.rule(layout, self.clock, self.rows)
            if given is not None:
                combined, gates = both(combined, given[0]), {**gates, **given[1]}
        return combined, gates

    def _open(self, held: list[Segment]) -> list[Segment]:
        """Stored keys are seen by every token: a rule that hides some from a segment makes it run instead."""
        layout = self.run.seen_layout
        if not (held and self.rulers and layout is not None):
            return held
        combined, _ = self._rules(layout, None, {})
        return [s for s in held if is_open(combined, s.name, layout)]

    def _is_complete(self, segment: Segment, layout: Layout) -> bool:
        """Whether the joint attention is all that reads its keys: a second one among its stream has keys of its own."""
        others = {site for per_pair in self.run.surface_of(layout).per_pair for site in per_pair} - {"attn"}
        return not others or segment.weights != layout.streams[0]

    def keep(self, block: int, given: dict[str, Any], layout: Layout) -> list[str]:
        """Names a block entered in `layout` must keep for fresh static segments; held ones' keys go into `given`."""
        if self.held:
            pairs = [
                self.run.keys.predict(_place(s, block), self.rows, HOLD, self.clock.step, self.made_of[s.name])
                for s in self.held
            ]
            given["extra_keys"] = joined(pairs)
        return [f"{stage}@{layout.span(s.name).stream}" for s in self.fresh for stage in KEPT]

    def store(self, block: int, kept: Mapping[str, Any], layout: Layout) -> None:
        """Keep the keys and values of fresh static segments, for as long as they are made of the same things."""
        for s in self.fresh:
            at, stream = layout.slice(s.name), layout.span(s.name).stream
            pair = tuple(kept[f"{stage}@{stream}"][:, at] for stage in KEPT)
            self.run.keys.push(_place(s, block), self.rows, self.clock.step, pair, 1, self.made_of[s.name])

    def bytes_needed(self, layout: Layout, tokens: Tensor) -> int:
        """What the stored keys and values of fresh segments will take, for the rows of this forward."""
        length = sum(layout.span(s.name).length for s in self.fresh)
        return len(KEPT) * self.run.blocks * len(tokens) * length * tokens.shape[-1] * tokens.element_size()

    def embed_macs(self, surface: Surface) -> int:
        """MACs per batch row of embedding the segments that run: their patches, and times that are not the run's."""
        ends, layout = surface.ends, surface.layout
        longer = surface.backbone.end_macs(_with_one_more(layout))
        per_token = longer["embed"] - ends["embed"]
        patches = sum(layout.span(s.name).length for s in self.segments if s.tokens.ndim != 3)
        return patches * per_token + _own_times(self.segments) * ends.get("time", 0)

    def _is_held(self, segment: Segment) -> bool:
        branches, made_of = self.rows.branches, self.made_of[segment.name]
        return all(self.run.keys.ready(_place(segment, b), branches, 1, made_of) for b in range(self.run.blocks))

    def _made_of(self, s: Segment) -> MadeOf:
        tensors = tuple(Same(t) for t in (s.tokens, s.positions, s.time) if t is not None)
        base = self.run.made_of(self.rows.branches, self.clock, "segment", s.modulation, s.weights, self.rows.samples)
        return {branch: (mark, tensors) for branch, mark in base.items()}

    def _check_times(self, static: Sequence[Segment], context: Context) -> None:
        for s in static:
            if s.modulation == "t" and s.weights in context.modulation:
                raise UserError(
                    f"segment {s.name!r} is static but is modulated by the run's time; "
                    "give it modulation 'zero' or 'own', or make it not static"
                )


class NothingAdded:
    """A forward to which nothing is added."""

    acts = False
    segments: tuple[Segment, ...] = ()
    held: tuple[Segment, ...] = ()
    fresh: tuple[Segment, ...] = ()

    def ruled(self, layout: Layout, context: Context) -> Context:
        """The context as it is."""
        return context

    def embed_macs(self, surface: Surface) -> int:
        """Nothing to embed."""
        return 0

    def bytes_needed(self, layout: Layout, tokens: Tensor) -> int:
        """Nothing to store."""
        return 0

    def keep(self, block: int, given: dict[str, Any], layout: Layout) -> list[str]:
        """Nothing to keep."""
        return []

    def store(self, block: int, kept: Mapping[str, Any], layout: Layout) -> None:
        """Nothing to store."""


NOTHING_ADDED = NothingAdded()


class Identical(list[Segment]):
    """A list that contains the very same objects only."""

    def __contains__(self, item: object) -> bool:
        return any(item is own for own in self)


def joined(pairs: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Several (keys, values) as one."""
    if len(pairs) == 1:
        return pairs[0]
    return torch.cat([k for k, _ in pairs], dim=1), torch.cat([v for _, v in pairs], dim=1)


def _spread(segment: Segment, rows: Rows) -> Segment:
    """The segment for every row: its tokens (and its time) may be given once, per sample, or per row."""
    spread: dict[str, Any] = {
        name: _for_every_row(tensor, segment.name, rows)
        for name, tensor in (("tokens", segment.tokens), ("time", segment.time))
        if tensor is not None and len(tensor) != rows.total
    }
    return replace(segment, **spread) if spread else segment


def _for_every_row(tensor: Tensor, name: str, rows: Rows) -> Tensor:
    given = len(tensor)
    if given not in (1, rows.samples):
        raise UserError(
            f"segment {name!r} has {given} rows; give 1, one per sample ({rows.samples}), or one per row ({rows.total})"
        )
    return torch.cat([tensor] * (rows.total if given == 1 else len(rows.branches)))


def _with_one_more(layout: Layout) -> Layout:
    spans = (replace(s, length=s.length + 1) if s.name == "image" else s for s in layout.spans)
    return replace(layout, spans=tuple(spans))


def _own_times(segments: Sequence[Segment]) -> int:
    """Times embedded for segments: one per run of segments of a stream that share it."""
    last: dict[str, str] = {}
    count = 0
    for s in segments:
        count += s.modulation != "t" and (s.modulation == "own" or last.get(s.weights, "t") != s.modulation)
        last[s.weights] = s.modulation
    return count


def _check_names(segments: Sequence[Segment]) -> None:
    names = [s.name for s in segments]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise UserError(f"two segments are named {twice!r}; give each a name of its own")


def _place(segment: Segment, block: int) -> Place:
    return segment.name, f"segment({block})"
