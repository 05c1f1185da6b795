"""One forward under a step's program: blocks, ranges of blocks, long skips, taps at the borders, and what it cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ditloom.contracts.clock import Clock, Rows
from ditloom.contracts.method import Probe
from ditloom.contracts.plan import Action
from ditloom.contracts.streams import Context, Memory, Streams
from ditloom.sites.block_call import BlockCall
from ditloom.sites.codecs import zip_map
from ditloom.sites.edits import edited, edited_at
from ditloom.sites.fingerprint import MadeOf, of_tokens
from ditloom.sites.program import Placed, Planned, StepProgram, next_of
from ditloom.sites.rules import Settled, is_costly, pairs
from ditloom.sites.surface import Surface

if TYPE_CHECKING:
    from ditloom.sites.run import Run

NO_HANDLERS: frozenset[str] = frozenset()


class Forward:
    """The executor of one forward. It lives as long as the call.

    reuse: whether stored values may be used and computed ones stored, if the clock allows. gated: handlers that have
    predicted a whole branch on this step; of the others none approximates what is left to compute.
    """

    surface: Surface
    tokens: Tensor

    def __init__(
        self,
        run: Run,
        program: StepProgram,
        clock: Clock,
        rows: Rows,
        reuse: bool = True,
        gated: frozenset[str] = NO_HANDLERS,
    ):
        self.run, self.program, self.clock, self.rows, self.gated = run, program, clock, rows, gated
        self.reuse = reuse and clock.may_reuse
        self.entered: dict[int, Streams] = {}
        self.waiting: dict[int, Streams] = {}
        self.open: list[tuple[int, Planned, Streams]] = []
        self.jumped: list[tuple[int, int]] = []
        self.macs = 0

    def __call__(self, x: Tensor, time: Tensor, memory: Memory, until: int | None = None) -> Tensor | None:
        """The prediction; with `until`, None after that block (its captures are delivered)."""
        backbone, added = self.run.backbone, self.run.added(self.clock, self.rows)
        streams, context = backbone.embed(x, time, memory, added.segments)
        context = added.ruled(streams.layout, context)
        self.added, self.rule, self.costly = added, context.rule, is_costly(context.rule)
        self.surface = self.run.surface_of(streams.layout)
        self.tokens = next(iter(streams.tokens.values()))
        if added.fresh:
            self.run.allow(added.bytes_needed(streams.layout, self.tokens))
        for placed in self.program.taps.get(-1, ()):
            self.deliver(placed, context.time)
        streams = self._blocks(streams, context, until)
        self._account(until)
        return None if until is not None else backbone.head(streams, context)

    @property
    def uses(self) -> bool:
        """Whether stored values may be used: not while the keys of a static segment are being computed."""
        return self.reuse and not self.added.fresh

    @cached_property
    def made_of(self) -> MadeOf:
        """What is stored and used in this forward is made of."""
        branches = dict.fromkeys((*self.run.asked, *self.rows.branches))
        return self.run.made_of(branches, self.clock, self.surface.layout, self.rows.samples, of_tokens(self.tokens))

    def _blocks(self, streams: Streams, context: Context, until: int | None) -> Streams:
        """All blocks up to the end, or up to and including `until`; what nothing is asked of runs as it is."""
        surface, position = self.surface, 0
        end = len(surface.flat_blocks) if until is None else surface.flat[until] + 1
        stops = next_of(range(end), end) if self.added.acts else self.program.stops(surface)
        while position < end:
            stop = min(stops[position], end)
            if position < stop:
                streams, position = self._plain(range(position, stop), streams, context), stop
            else:
                streams, position = self._stop(position, streams, context)
        self._close(position, streams)
        self._enter(surface.blocks, streams)
        return streams

    def _plain(self, over: range, streams: Streams, context: Context) -> Streams:
        """Blocks at which nothing is to do."""
        self.macs += self._plain_macs(over)
        return self.run.backbone.run(streams, context, over, self.waiting)

    def _stop(self, position: int, streams: Streams, context: Context) -> tuple[Streams, int]:
        """Something is to do at a position: the streams after it, and where they have come to."""
        index = self.surface.index_at[position]
        self._close(position, streams)
        if index is not None:
            self._enter(index, streams)
            reused = self._ranges(index, streams, context)
            if reused is not None:
                return reused
        return self._call(position, index, streams, context), position + 1

    def _enter(self, index: int, streams: Streams) -> None:
        """What enters block `index` is known: probes may look at it."""
        if index in self.program.watched:
            self.entered[index] = streams

    def _close(self, position: int, streams: Streams) -> None:
        """What enters a flat position is known: ranges that end there are stored."""
        if self.open:
            for end, planned, at_start in self.open:
                if end == position and self.run.storable(planned):
                    self.push(planned, planned.control.codec.encode(at_start.tokens, streams.tokens))
            self.open = [item for item in self.open if item[0] != position]

    def _ranges(self, index: int, streams: Streams, context: Context) -> tuple[Streams, int] | None:
        for planned in self.program.ranges.get(index, ()):
            i, j = planned.site.span or (0, 0)
            action, end = self.settle(planned, streams, context), self.surface.end(i, j)
            if action is Action.COMPUTE:
                if planned.stores and self.reuse:
                    self.open.append((end, planned, streams))
                continue
            self._jump(i, j)
            if action is Action.SKIP:
                return Streams(streams.tokens, self.surface.layouts[end]), end
            tokens = planned.control.codec.decode(streams.tokens, self.predicted(planned))
            return Streams(tokens, self.surface.layouts[end]), end
        return None

    def _jump(self, i: int, j: int) -> None:
        self.jumped.append((i, j))
        for block in range(i, j):
            self.run.report.cells[self.clock.step, block] = 1.0

    def _call(self, position: int, index: int | None, streams: Streams, context: Context) -> Streams:
        backbone, program = self.run.backbone, self.program
        block, given = self.surface.flat_blocks[position], backbone.handed(position, context)
        if position in backbone.skips:
            given = {**given, "skip": self._skip(backbone.skips[position])}
        if index is None or not (index in program.inner or index in program.taps or self.added.acts):
            streams, _ = backbone.call(block, streams, context, None, given)
            self.macs += self._plain_macs(range(position, position + 1))
        else:
            streams = self._acting(position, index, streams, context, given)
        if position in self.run.skip_sources:
            self.waiting[position] = streams
        return streams

    def _acting(
        self, position: int, index: int, streams: Streams, context: Context, given: Mapping[str, Any]
    ) -> Streams:
        """A block with something to do at its sites, stages or borders."""
        backbone, taps = self.run.backbone, self.program.taps.get(index, ())
        streams = self._edges("block_in", taps, streams)
        call = BlockCall(self, index, position, given)
        call.plan_sites(streams, context)
        call.plan_taps(streams)
        layout = streams.layout
        streams, kept = backbone.call(backbone.blocks[position], streams, context, call.plan, call.given)
        call.keep(kept, layout)
        self.macs += call.macs()
        return self._edges("block_out", taps, streams)

    def _skip(self, source: int) -> dict[str, Tensor]:
        """What a long skip hands over, as taps at its source block see and change it."""
        streams, index = self.waiting[source], self.surface.index_at[source]
        taps = self.program.taps.get(index, ()) if index is not None else ()
        return self._edges("skip", taps, streams).tokens

    def _edges(self, stage: str, taps: Sequence[Placed], streams: Streams) -> Streams:
        """Taps at a block's border, outside the compiled block."""
        for placed in taps:
            tap = placed.tap
            if tap.stage != stage:
                continue
            x = streams[tap.stream]
            if tap.op == "capture":
                self.deliver(placed, x if tap.segment is None else streams.segment(tap.segment))
                continue
            change = (tap.op, x, placed.handler.provide(tap, self.clock, self.rows), tap.number, self.row_mask(placed))
            y = edited(*change) if tap.segment is None else edited_at(streams.layout.slice(tap.segment), *change)
            streams = streams.updated(**{tap.stream: y})
        return streams

    def deliver(self, placed: Placed, value: Any) -> None:
        """Hand a captured value to its handler: of the branches it asked for, without the graph unless it asked."""
        tap = placed.tap
        if tap.branches is not None:
            at = [i for b in tap.branches if b in self.rows.branches for i in _range(self.rows.slice(b))]
            if not at:
                return
            value = zip_map(lambda t: t[at], value)
        if not tap.gradient:
            value = zip_map(torch.Tensor.detach, value)
        placed.handler.noted(tap, value, self.clock, self.rows, self.run.memo(placed.handler))

    def row_mask(self, placed: Placed) -> Tensor | None:
        """For a tap of some branches: the rows it acts on [B]."""
        branches = placed.tap.branches
        if branches is None:
            return None
        mask = [b in branches for b in self.rows.branches for _ in range(self.rows.samples)]
        return torch.tensor(mask, device=self.run.backbone.device)

    def settle(self, planned: Planned, streams: Streams, context: Context) -> Action:
        """The action here and now, noted in the report."""
        action = Action.COMPUTE
        if planned.action is Action.SKIP:
            action = Action.SKIP if self.clock.purpose == "sample" else Action.COMPUTE
        elif self.uses and (not self.gated or planned.handler.key in self.gated):
            look = lambda probe: self._look(probe, context)  # noqa: E731
            action = self.run.settle(planned, self.clock, self.run.asked, self.made_of, look)
        if self.clock.purpose == "sample":
            self.run.report.visit(planned.site, action, len(self.rows.branches))
        return action

    def _look(self, probe: Probe, context: Context) -> Tensor:
        """A probe of the leading branch's rows."""
        if probe.kind == "time_embedding":
            assert context.time is not None
            value = context.time
        elif probe.kind == "modulated_in":
            block = self.surface.block(probe.block)
            value = block.modulated_in(self.entered[probe.block], context)
            self.macs += block.modulated_in_macs(self.entered[probe.block].layout)
        elif probe.kind == "residual":
            after, before = self.entered[probe.span[1]], self.entered[probe.span[0]]
            if after.layout != before.layout:  # of the tokens that both have
                return self._leading(after.segment("image")) - self._leading(before.segment("image"))
            return self._leading(after["image"]) - self._leading(before["image"])
        else:
            value = self.entered[probe.block]["image"]
        return self._leading(value)

    def _leading(self, value: Tensor) -> Tensor:
        """The rows of the leading branch, without their graph."""
        rows = value if len(self.rows.branches) == 1 else value[self.rows.slice(self.rows.leading)]
        return rows.detach()

    def predicted(self, planned: Planned) -> Any:
        """The predicted value of a site."""
        predictor = planned.control.predictor
        return self.run.store.predict(planned.place, self.rows, predictor, self.clock.step, self.made_of)

    def push(self, planned: Planned, value: Any) -> None:
        """Store what was computed at a site."""
        depth = planned.control.predictor.depth
        self.run.store.push(planned.place, self.rows, self.clock.step, value, depth, self.made_of)

    def _plain_macs(self, over: range) -> int:
        """MACs per batch row of blocks of which nothing is asked."""
        before = self.surface.totals_before
        plain = before[over.stop] - before[over.start]
        return plain + sum(sum(self.rule_macs(p).values()) for p in over) if self.costly else plain

    def rule_macs(self, position: int, extra: int = 0) -> dict[str, int]:
        """What an attention rule and `extra` appended keys add to a block's MACs, by site.

        Appended keys are the joint attention's; a further one (attn2) evaluates every term among its own tokens.
        """
        rule, layout = self.rule, self.surface.layouts[position]
        if not (extra or self.costly):
            return {}
        tokens, own = layout.length(), layout.length(layout.spans[0].stream)
        terms, evaluated = 1, tokens * (tokens + extra)
        if isinstance(rule, Settled):
            terms, evaluated = len(rule.plans), pairs(rule, extra)
        more = {"attn": evaluated - tokens * tokens}
        coefficients = self.surface.per_pair[position].items()
        return {site: per_pair * more.get(site, (terms - 1) * own * own) for site, per_pair in coefficients}

    def _account(self, until: int | None) -> None:
        report, surface = self.run.report, self.surface
        executed = self.macs + surface.entry + self.added.embed_macs(surface)
        executed += 0 if until is not None else surface.ends["head"]
        report.macs += executed * self.rows.total + self.run.prepared(surface)
        report.forwards += len(self.rows.branches)
        if self.clock.purpose != "sample":
            return
        if until is None:
            self.run.plain_macs = self._macs_without_added()
            report.full_macs += self.run.plain_macs * self.rows.total
        self._passed(until)

    def _macs_without_added(self) -> int:
        """MACs per batch row of this forward without what handlers have added."""
        if not self.added.segments:
            return self.surface.total
        added, layout = {s.name for s in self.added.segments}, self.surface.layout
        spans = tuple(span for span in layout.spans if span.name not in added)
        return self.run.surface_of(replace(layout, spans=spans)).total

    def _passed(self, until: int | None) -> None:
        """Controlled sites that were computed without storing."""
        if not self.program.plain:
            return
        times = len(self.rows.branches)
        if until is None and not self.jumped:
            self.run.report.passed(self.program.plain_inside, times)
            return
        for site in self.program.plain:
            i, j = site.span or (site.block or 0, (site.block or 0) + 1)
            inside = any(a <= i and j <= b for a, b in self.jumped)
            if site.level != "run" and not inside and (until is None or i <= until):
                self.run.report.visit(site, Action.COMPUTE, times)


def _range(at: slice) -> range:
    return range(at.start, at.stop)
