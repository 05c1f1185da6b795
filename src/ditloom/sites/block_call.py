"""One block call: its plan, what it is given, what is done with what it keeps, and what it costs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ditloom.contracts.errors import UserError
from ditloom.contracts.layout import Layout
from ditloom.contracts.plan import Action, BlockPlan, Edit
from ditloom.contracts.streams import Context, Streams
from ditloom.sites.codecs import zip_map
from ditloom.sites.program import Placed, Planned
from ditloom.sites.segments import joined

if TYPE_CHECKING:
    from ditloom.sites.executor import Forward

EDGES = ("block_in", "block_out", "skip")
SOURCES = (Action.REUSE, Action.ROWS, Action.MIX)


class BlockCall:
    """Gathers what a step's program asks of one block."""

    def __init__(self, forward: Forward, index: int, position: int, given: Mapping[str, Any]):
        self.forward, self.index, self.position = forward, index, position
        self.given: dict[str, Any] = dict(given)
        self.kept_for_segments = forward.added.keep(index, self.given, forward.surface.layouts[position])
        self.actions: list[tuple[Planned, Action]] = []
        self.stored: list[Planned] = []
        self.captures: list[Placed] = []
        self.edits: list[Edit] = []

    def plan_sites(self, streams: Streams, context: Context) -> None:
        """Settle the action at every controlled site."""
        for planned in self.forward.program.inner.get(self.index, ()):
            action = self.forward.settle(planned, streams, context)
            self.actions.append((planned, action))
            if action in SOURCES:
                self._give(planned, action)
            if self._stores(planned, action):
                self.stored.append(planned)

    def _give(self, planned: Planned, action: Action) -> None:
        name, forward, handler = planned.site.inner, self.forward, planned.handler
        self.given[name] = planned.control.codec.decode(None, forward.predicted(planned))
        if action is Action.ROWS:
            index = handler.rows(planned.site, forward.clock, forward.rows, forward.run.memo(handler))
            self.given[f"{name}.rows"] = of_any_length(index)
        elif action is Action.MIX:
            self.given[f"{name}.mix"] = handler.mix(planned.site, forward.clock)

    def _stores(self, planned: Planned, action: Action) -> bool:
        if not (planned.stores and self.forward.reuse) or action in (Action.REUSE, Action.SKIP):
            return False
        return action is not Action.MIX or planned.handler.keeps_mixed(planned.site, self.forward.clock)

    def plan_taps(self, streams: Streams) -> None:
        """Note what is captured, edited and appended at the block's stages."""
        appended = []
        for placed in self.forward.program.taps.get(self.index, ()):
            tap = placed.tap
            if tap.stage in EDGES:
                continue
            if tap.op == "capture":
                self.captures.append(placed)
                continue
            value = placed.handler.provide(tap, self.forward.clock, self.forward.rows)
            if tap.op == "append":
                appended.append(value)
                continue
            self._edit(placed, value)
        if appended:
            already = [self.given["extra_keys"]] if "extra_keys" in self.given else []
            self.given["extra_keys"] = joined([*already, *appended])

    def _edit(self, placed: Placed, value: Any) -> None:
        tap, mask = placed.tap, self.forward.row_mask(placed)
        self.edits.append(Edit(tap.stage, tap.op, placed.key, tap.stream, tap.segment, tap.number))
        self.given[placed.key] = value
        if mask is not None:
            self.given[f"{placed.key}.rows"] = mask

    @property
    def plan(self) -> BlockPlan | None:
        """The block's plan; None where nothing is asked of it."""
        actions = tuple((p.site.inner, action) for p, action in self.actions if action is not Action.COMPUTE)
        keep = [*self.kept_for_segments, *(p.site.inner for p in self.stored), *(_name(c) for c in self.captures)]
        if not (actions or keep or self.edits):
            return None
        return BlockPlan(actions, tuple(dict.fromkeys(keep)), tuple(self.edits))

    def keep(self, kept: Mapping[str, Any], layout: Layout) -> None:
        """Store and deliver what the block handed out."""
        forward = self.forward
        for planned in self.stored:
            forward.push(planned, planned.control.codec.encode(None, kept[planned.site.inner]))
        for placed in self.captures:
            if not self._left_out(placed, kept):
                forward.deliver(placed, self._captured(placed, kept, layout))
        forward.added.store(self.index, kept, layout)

    def _left_out(self, placed: Placed, kept: Mapping[str, Any]) -> bool:
        """Whether a stage was not come by, because it lies in a site that was not computed."""
        return _name(placed) not in kept and any(action in (Action.REUSE, Action.SKIP) for _, action in self.actions)

    def _captured(self, placed: Placed, kept: Mapping[str, Any], layout: Layout) -> Any:
        tap, name = placed.tap, _name(placed)
        if name not in kept:
            where = f"{tap.stage} of block {self.index}"
            raise UserError(f"{placed.handler.key} cannot capture {where}: it has no stream {tap.stream!r}")
        if tap.segment is None:
            return kept[name]
        at = layout.slice(tap.segment)
        return zip_map(lambda t: t[:, at], kept[name])

    def macs(self) -> int:
        """MACs per batch row of this call; the report's map learns which share was not executed."""
        forward, surface = self.forward, self.forward.surface
        costs, extra = dict(surface.costs[self.position]), self.given.get("extra_keys")
        for name, more in forward.rule_macs(self.position, extra[0].shape[1] if extra else 0).items():
            costs[name] += more
        full = sum(costs.values())
        for planned, action in self.actions:
            name = planned.site.inner
            costs[name] = self._executed(name, action, costs.get(name, 0))
        executed = sum(costs.values())
        if executed < full:
            forward.run.report.cells[forward.clock.step, self.index] = 1 - executed / full
        return executed + self._logits()

    def _executed(self, name: str, action: Action, cost: int) -> int:
        if action in (Action.REUSE, Action.SKIP):
            return 0
        if action is Action.ROWS:
            tokens = self.forward.surface.layouts[self.position].length("image")
            return cost * self.given[f"{name}.rows"].shape[1] // tokens
        return cost

    def _logits(self) -> int:
        """Attention logits are products of their own; those of text are made for the tokens that read it now."""
        asked, surface = {c.tap.stage for c in self.captures}, self.forward.surface
        total = 0
        if "logits" in asked:
            total += surface.per_pair[self.position]["attn"] // 2 * surface.layouts[self.position].length() ** 2
        if "cross_logits" in asked:
            action = next((a for planned, a in self.actions if planned.site.inner == "cross"), Action.COMPUTE)
            total += self._executed("cross", action, surface.text_logits(self.position))
        return total


def of_any_length(index: Tensor) -> Tensor:
    """Row indices [B, k] of which a compiler takes k as open: their number changes from step to step."""
    torch._dynamo.maybe_mark_dynamic(index, 1)
    return index


def _name(placed: Placed) -> str:
    """What a capture asks a block to keep: the stage, or one stream of it."""
    tap = placed.tap
    return tap.stage if tap.stage == "logits" else f"{tap.stage}@{tap.stream}"
