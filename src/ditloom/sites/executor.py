"""One forward under a step's program: blocks, ranges of blocks, taps, long skips, added segments."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ditloom.contracts.clock import Clock, Rows
from ditloom.contracts.method import Probe
from ditloom.contracts.plan import Action, BlockPlan, Edit
from ditloom.contracts.streams import Context, Memory, Streams
from ditloom.sites.codecs import zip_map
from ditloom.sites.edits import EDITS
from ditloom.sites.program import Placed, Planned, StepProgram
from ditloom.sites.segments import AddedSegments

if TYPE_CHECKING:
    from ditloom.sites.run import Run

SOURCES = (Action.REUSE, Action.ROWS, Action.MIX)


class Forward:
    """The executor of one forward. It lives as long as the call."""

    def __init__(self, run: Run, program: StepProgram, clock: Clock, rows: Rows, reuse: bool = True):
        self.run, self.program, self.clock, self.rows = run, program, clock, rows
        self.reuse = reuse and clock.may_reuse
        self.entered: dict[int, Streams] = {}
        self.waiting: dict[int, Streams] = {}
        self.open: list[tuple[int, Planned, Streams]] = []
        self.made_of: Hashable = None
        self.executed = 0

    def __call__(self, x: Tensor, time: Tensor, memory: Memory, until: int | None = None) -> Tensor | None:
        """The prediction; with `until`, None after that block (its captures are delivered)."""
        backbone = self.run.backbone
        added = AddedSegments(self.run, self.clock, self.rows)
        streams, context = backbone.embed(x, time, memory, added.segments)
        context = added.ruled(streams.layout, context)
        self.surface = self.run.surface_of(streams.layout)
        self.made_of = self.run.made_of(streams, self.clock)
        self.added = added
        if self.program.idle and added.idle and until is None:
            streams = backbone.run(streams, context)
            self.executed = sum(sum(c.values()) for c in self.surface.costs)
        else:
            streams = self._blocks(streams, context, until)
        self._account(until)
        return None if until is not None else backbone.head(streams, context)

    def _account(self, until: int | None) -> None:
        ends = self.surface.backbone.end_macs(self.surface.layout)
        executed = self.executed + ends["embed"] + (ends["head"] if until is None else 0)
        report = self.run.report
        report.macs += executed * self.rows.total
        report.full_macs += self.surface.total * self.rows.total
        report.forwards += len(self.rows.branches)

    def _blocks(self, streams: Streams, context: Context, until: int | None) -> Streams:
        blocks, index_of = self.run.backbone.blocks, {p: i for i, p in enumerate(self.surface.flat)}
        position = 0
        while position < len(blocks):
            index = index_of.get(position)
            if index is not None:
                self._enter(index, position, streams)
                reused = self._ranges(index, streams, context)
                if reused is not None:
                    streams, position = reused
                    continue
            streams = self._call(position, index, streams, context)
            if until is not None and index == until:
                return streams
            position += 1
        self._enter(self.surface.blocks, position, streams)
        return streams

    def _enter(self, index: int, position: int, streams: Streams) -> None:
        """What enters block `index` is known: probes may look at it, and ranges that end here are stored."""
        if index in self.program.watched:
            self.entered[index] = streams
        for end, planned, at_start in self.open:
            if end == position:
                self._push(planned, planned.control.codec.encode(at_start.tokens, streams.tokens))
        self.open = [item for item in self.open if item[0] != position]

    def _ranges(self, index: int, streams: Streams, context: Context) -> tuple[Streams, int] | None:
        for planned in self.program.ranges.get(index, ()):
            i, j = planned.site.span or (0, 0)
            action = self._resolve(planned, streams, context)
            if action is Action.COMPUTE:
                if planned.stores and self.reuse:
                    self.open.append((self.surface.position(j), planned, streams))
                continue
            self._mark(i, j, 1.0)
            end = self.surface.position(j)
            if action is Action.SKIP:
                return streams, end
            tokens = planned.control.codec.decode(streams.tokens, self._predicted(planned))
            return Streams(tokens, self.surface.layouts[end]), end
        return None

    def _call(self, position: int, index: int | None, streams: Streams, context: Context) -> Streams:
        backbone = self.run.backbone
        given: dict[str, Any] = {}
        if position in backbone.skips:
            given["skip"] = self.waiting[backbone.skips[position]].tokens
        taps = self.program.taps.get(index, ()) if index is not None else ()
        streams = self._edges("block_in", taps, streams)
        plan, stored = self._plan(index, streams, context, given) if index is not None else (None, [])
        streams, kept = backbone.call(backbone.blocks[position], streams, context, plan, given)
        self._keep(stored, taps, kept)
        if index is not None:
            self.added.store(index, kept, self.made_of)
        streams = self._edges("block_out", taps, streams)
        if position in self.run.skip_sources:
            self.waiting[position] = streams
        cost = self.surface.costs[position]
        self.executed += sum(cost.values()) - (self._saved(index, streams) if index is not None else 0)
        return streams

    def _plan(
        self, index: int, streams: Streams, context: Context, given: dict[str, Any]
    ) -> tuple[BlockPlan | None, list[Planned]]:
        """The plan of one block call; what it uses is put into `given`."""
        actions, keep, edits, stored = [], self.added.keep(index, given), [], []
        self.actions: dict[str, tuple[Planned, Action]] = {}
        for planned in self.program.inner.get(index, ()):
            action = self._resolve(planned, streams, context)
            self.actions[planned.site.inner] = planned, action
            if action is not Action.COMPUTE:
                actions.append((planned.site.inner, action))
            if action in SOURCES:
                self._give(planned, action, given)
            if self._stores(planned, action):
                keep.append(planned.site.inner)
                stored.append(planned)
        for placed in self.program.taps.get(index, ()):
            tap = placed.tap
            if tap.stage in ("block_in", "block_out"):
                continue
            if tap.op == "capture":
                keep.append(_name(placed))
            else:
                edits.append(Edit(tap.stage, tap.op, placed.key, tap.stream, tap.segment, tap.number))
                given[placed.key] = placed.handler.provide(tap, self.clock, self.rows)
                if tap.branches is not None:
                    given[f"{placed.key}.rows"] = self._row_mask(tap.branches, streams)
        if not (actions or keep or edits):
            return None, stored
        return BlockPlan(tuple(actions), tuple(dict.fromkeys(keep)), tuple(edits)), stored

    def _stores(self, planned: Planned, action: Action) -> bool:
        if not (planned.stores and self.reuse) or action in (Action.REUSE, Action.SKIP):
            return False
        return action is not Action.MIX or planned.handler.keeps_mixed(planned.site, self.clock)

    def _give(self, planned: Planned, action: Action, given: dict[str, Any]) -> None:
        name = planned.site.inner
        given[name] = self._predicted(planned)
        if action is Action.ROWS:
            memo = self.run.memo(planned.handler)
            given[f"{name}.rows"] = planned.handler.rows(planned.site, self.clock, self.rows, memo)
            self.row_share = given[f"{name}.rows"].shape[1]
        elif action is Action.MIX:
            given[f"{name}.mix"] = planned.handler.mix(planned.site, self.clock)

    def _keep(self, stored: list[Planned], taps: Any, kept: Mapping[str, Any]) -> None:
        for planned in stored:
            self._push(planned, kept[planned.site.inner])
        for placed in taps:
            if placed.tap.op == "capture" and placed.tap.stage not in ("block_in", "block_out"):
                self._deliver(placed, kept[_name(placed)])

    def _edges(self, stage: str, taps: Any, streams: Streams) -> Streams:
        """Taps at a block's border, outside the compiled block."""
        for placed in taps:
            tap = placed.tap
            if tap.stage != stage:
                continue
            x = streams[tap.stream] if tap.segment is None else streams.segment(tap.segment)
            if tap.op == "capture":
                self._deliver(placed, x)
                continue
            y = EDITS[tap.op](x, placed.handler.provide(tap, self.clock, self.rows), tap.number)
            if tap.branches is not None:
                y = torch.where(self._row_mask(tap.branches, streams)[:, None, None], y, x)
            if tap.segment is not None:
                at, whole = streams.layout.slice(tap.segment), streams[tap.stream]
                y = torch.cat([whole[:, : at.start], y, whole[:, at.stop :]], dim=1)
            streams = streams.updated(**{tap.stream: y})
        return streams

    def _deliver(self, placed: Placed, value: Any) -> None:
        tap = placed.tap
        if tap.branches is not None:
            at = [i for b in tap.branches if b in self.rows.branches for i in range(*_bounds(self.rows, b))]
            value = zip_map(lambda t: t[at], value)
        if not tap.gradient:
            value = zip_map(torch.Tensor.detach, value)
        placed.handler.captured(tap, value, self.clock, self.rows)

    def _row_mask(self, branches: tuple[str, ...], streams: Streams) -> Tensor:
        mask = [b in branches for b in self.rows.branches for _ in range(self.rows.samples)]
        return torch.tensor(mask, device=next(iter(streams.tokens.values())).device)

    def _resolve(self, planned: Planned, streams: Streams, context: Context) -> Action:
        """The action here and now: guards beat plans, a deferred one is decided once per step for all branches."""
        if not self.reuse:
            return Action.COMPUTE
        ready = self.run.store.ready(
            planned.handler.key, planned.site, self.rows, planned.control.predictor.depth, self.made_of
        )
        action = planned.action
        if action is Action.DEFER:
            action = self.run.decide(planned, self.clock, ready, lambda p: self._look(p, streams, context))
        if action in SOURCES and not ready:
            action = Action.COMPUTE
        self.run.report.visit(planned.site, action, len(self.rows.branches))
        return action

    def _look(self, probe: Probe, streams: Streams, context: Context) -> Tensor:
        """A probe of the leading branch's rows."""
        if probe.kind == "time_embedding":
            assert context.time is not None
            return context.time[self.rows.slice(self.rows.leading)]
        if probe.kind == "modulated_in":
            value = self.surface.block(probe.block).modulated_in(streams, context)
        elif probe.kind == "residual":
            i, j = probe.span
            value = self.entered[j]["image"] - self.entered[i]["image"]
        else:
            value = self.entered[probe.block]["image"]
        return value[self.rows.slice(self.rows.leading)]

    def _predicted(self, planned: Planned) -> Any:
        control = planned.control
        return self.run.store.predict(
            planned.handler.key, control.site, self.rows, control.predictor, self.clock.step, self.made_of
        )

    def _push(self, planned: Planned, value: Any) -> None:
        depth = planned.control.predictor.depth
        key = planned.handler.key
        self.run.store.push(key, planned.site, self.rows, self.clock.step, value, depth, self.made_of)

    def _saved(self, index: int, streams: Streams) -> int:
        """MACs per row that this block call did not execute."""
        saved = 0
        for planned, action in getattr(self, "actions", {}).values():
            if planned.site.block != index:
                continue
            if action in (Action.REUSE, Action.SKIP):
                saved += planned.site.cost
            elif action is Action.ROWS:
                saved += planned.site.cost - planned.site.cost * self.row_share // streams.layout.length("image")
        total = sum(self.surface.costs[self.surface.flat[index]].values())
        self.run.report.cells[self.clock.step, index] = saved / total if total else 0.0
        return saved

    def _mark(self, i: int, j: int, share: float) -> None:
        for block in range(i, j):
            self.run.report.cells[self.clock.step, block] = share


def _name(placed: Placed) -> str:
    """What a capture asks a block to keep: the stage, or one stream of it."""
    tap = placed.tap
    return tap.stage if tap.stage == "logits" else f"{tap.stage}@{tap.stream}"


def _bounds(rows: Rows, branch: str) -> tuple[int, int]:
    at = rows.slice(branch)
    return at.start, at.stop
