"""A run: one trajectory or one training forward, with its clock, branches, state and report."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ditloom.contracts.backbone import Backbone
from ditloom.contracts.clock import Clock, Rows, Schedule
from ditloom.contracts.condition import Condition
from ditloom.contracts.errors import UserError
from ditloom.contracts.layout import Layout
from ditloom.contracts.method import Handler, Probe
from ditloom.contracts.plan import Action
from ditloom.contracts.streams import Memory, Streams
from ditloom.sites.executor import SOURCES, Forward
from ditloom.sites.program import Planned, Program, StepProgram, build
from ditloom.sites.report import Report
from ditloom.sites.store import Store
from ditloom.sites.surface import Surface

PASSIVE = StepProgram()


class Run:
    """One trajectory of a backbone under some handlers. Nothing is global: two runs never meet.

    conditions: one `Condition` per guidance branch, each with `samples` rows. batched: branches share a forward.
    memory_limit: bytes that stored tensors may take; more is refused before the run starts.
    """

    def __init__(
        self,
        backbone: Backbone,
        handlers: Sequence[Handler] = (),
        *,
        schedule: Schedule,
        conditions: Mapping[str, Condition],
        batched: bool = True,
        memory_limit: int | None = None,
    ):
        self.backbone, self.schedule, self.conditions, self.batched = backbone, schedule, dict(conditions), batched
        self.wanted, self.memory_limit = list(handlers), memory_limit
        self.report, self.store, self.keys = Report(), Store(), Store()
        self.skip_sources = frozenset(backbone.skips.values())
        self.program: Program | None = None
        self._memories: dict[tuple[str, ...], Memory] = {}
        self._surfaces: dict[Layout, Surface] = {}
        self._memos: dict[str, dict[str, Any]] = {}
        self._decisions: dict[tuple[str, str, int], Action] = {}
        self._weights: tuple[int, int] = (-1, 0)
        self.blocks = sum(not b.is_transition for b in backbone.blocks)

    @property
    def handlers(self) -> list[Handler]:
        """The handlers in canonical order, once planned."""
        return self.program.handlers if self.program else self.wanted

    def predict(self, x: Tensor, clock: Clock, branches: Sequence[str] | None = None) -> dict[str, Tensor]:
        """The predictions of the branches for x [B, ...] at the clock's time."""
        names = tuple(branches or self.conditions)
        if not self.wanted:
            return self._forwards(x, clock, names, PASSIVE, reuse=False)
        program = self._programmed(x, clock).steps[clock.step]
        predictions = self._outer(x, clock, names, program)
        for handler in self.handlers:
            predictions = handler.velocity(predictions, clock)
        self.report.bytes_held = max(self.report.bytes_held, self.store.bytes + self.keys.bytes)
        return predictions

    def until(self, x: Tensor, clock: Clock, block: int, branches: Sequence[str] | None = None) -> None:
        """Run up to and including a block; taps deliver what they capture, nothing is predicted."""
        names = tuple(branches or self.conditions)
        program = self._programmed(x, clock).steps[clock.step]
        self._forward(x, clock, names, program, reuse=True, until=block)

    def changed(self) -> None:
        """The latent was changed from outside: stored values no longer belong to the trajectory."""
        self.store.clear()

    def memo(self, handler: Handler) -> dict[str, Any]:
        """A handler's own notes of this run."""
        return self._memos.setdefault(handler.key, {})

    def decide(
        self, planned: Planned, clock: Clock, ready: bool, look: Callable[[Probe], Tensor]
    ) -> Action:
        """The decision of a deferred site: asked once per step, of the leading branch, obeyed by all."""
        key = (planned.handler.key, planned.site.label, clock.step)
        if key not in self._decisions:
            probes = {p: look(p) for p in planned.handler.probes(planned.site)}
            memo = self.memo(planned.handler)
            action = planned.handler.decide(planned.site, probes, clock, ready, memo)
            self._decisions[key] = Action.COMPUTE if action in SOURCES and not ready else action
        return self._decisions[key]

    def _outer(self, x: Tensor, clock: Clock, names: tuple[str, ...], program: StepProgram) -> dict[str, Tensor]:
        """Predictions at run level: reuse whole outputs or branches, compute the rest, store what later steps need."""
        acting = program.outer if clock.may_reuse else []
        made_of = (x.shape, x.dtype, x.device)
        actions = [(planned, self._outer_action(planned, clock, made_of)) for planned in acting]
        output = next((p for p, a in actions if p.site.kind == "output" and a is Action.REUSE), None)
        if output is not None:
            return {name: self._stored(output, clock, name, x, made_of) for name in names}
        reused = {p.site.branch: p for p, a in actions if p.site.kind == "branch" and a is Action.REUSE}
        computing = tuple(n for n in names if n not in reused)
        predictions = self._forwards(x, clock, computing, program, reuse=not reused)
        for handler in self.handlers:
            handler.observe(clock, dict(predictions), self.memo(handler))
        leading = predictions.get("cond", next(iter(predictions.values())))
        for planned, action in actions:
            if planned.stores and action is Action.COMPUTE:
                self._push_outer(planned, clock, predictions, leading, made_of)
        for name, planned in reused.items():
            if name in names:
                z = self._stored_value(planned, clock, str(name), x, made_of)
                predictions[str(name)] = planned.control.codec.decode(leading, z)
        return {name: predictions[name] for name in names}

    def _outer_action(self, planned: Planned, clock: Clock, made_of: Hashable) -> Action:
        names = (planned.site.branch,) if planned.site.branch else tuple(self.conditions)
        depth = planned.control.predictor.depth
        ready = all(self.store.ready(planned.handler.key, planned.site, Rows((n,), 1), depth, made_of) for n in names)
        action = planned.action
        if action is Action.DEFER:
            action = self.decide(planned, clock, ready, lambda probe: torch.empty(0))
        if action in SOURCES and not ready:
            action = Action.COMPUTE
        self.report.visit(planned.site, action, len(names))
        return action

    def _push_outer(
        self, planned: Planned, clock: Clock, predictions: Mapping[str, Tensor], leading: Tensor, made_of: Hashable
    ) -> None:
        names = [planned.site.branch] if planned.site.branch else list(predictions)
        for name in names:
            if name in predictions:
                z = planned.control.codec.encode(leading, predictions[name])
                rows = Rows((name,), len(leading))
                depth = planned.control.predictor.depth
                self.store.push(planned.handler.key, planned.site, rows, clock.step, z, depth, made_of)

    def _stored(self, planned: Planned, clock: Clock, name: str, x: Tensor, made_of: Hashable) -> Tensor:
        full = self.surface_of(self.layout_now).total * len(x)
        self.report.full_macs += full
        self.report.cells[clock.step, -1] = 1.0
        return planned.control.codec.decode(None, self._stored_value(planned, clock, name, x, made_of))

    def _stored_value(self, planned: Planned, clock: Clock, name: str, x: Tensor, made_of: Hashable) -> Any:
        rows = Rows((name,), len(x))
        if planned.site.kind == "branch":
            self.report.full_macs += self.surface_of(self.layout_now).total * len(x)
        predictor = planned.control.predictor
        return self.store.predict(planned.handler.key, planned.site, rows, predictor, clock.step, made_of)

    def _forwards(
        self, x: Tensor, clock: Clock, names: tuple[str, ...], program: StepProgram, reuse: bool
    ) -> dict[str, Tensor]:
        groups = [names] if self.batched else [(name,) for name in sorted(names, key=lambda n: n != "cond")]
        predictions: dict[str, Tensor] = {}
        for group in groups:
            out = self._forward(x, clock, group, program, reuse)
            assert out is not None
            predictions |= dict(zip(group, out.chunk(len(group)), strict=True)) if len(group) > 1 else {group[0]: out}
        return predictions

    def _forward(
        self,
        x: Tensor,
        clock: Clock,
        names: tuple[str, ...],
        program: StepProgram,
        reuse: bool,
        until: int | None = None,
    ) -> Tensor | None:
        rows = Rows(names, len(x))
        time = torch.full((rows.total,), clock.native, dtype=torch.float64, device=x.device)
        batch = torch.cat([x] * len(names)) if len(names) > 1 else x
        return Forward(self, program, clock, rows, reuse)(batch, time, self._memory(names), until)

    def _memory(self, names: tuple[str, ...]) -> Memory:
        if names not in self._memories:
            parts = [self.conditions[n] for n in names]
            self._memories[names] = self.backbone.prepare(Condition.cat(parts) if len(parts) > 1 else parts[0])
        return self._memories[names]

    def _programmed(self, x: Tensor, clock: Clock) -> Program:
        if self.program is None:
            names = tuple(self.conditions)[:1]
            time = torch.full((len(x),), clock.native, dtype=torch.float64, device=x.device)
            with torch.no_grad():
                streams, _ = self.backbone.embed(x, time, self._memory(names))
            surface = self.surface_of(streams.layout)
            self.program = build(self.wanted, self.schedule, surface)
            self._check_memory(streams)
        return self.program

    def _check_memory(self, streams: Streams) -> None:
        assert self.program is not None
        tokens = next(iter(streams.tokens.values()))
        rows = len(self.conditions) * len(tokens)
        size = tokens.element_size()
        needed = self.program.bytes_needed(rows, size, streams.layout.length(), tokens.shape[-1])
        if self.memory_limit is not None and needed > self.memory_limit:
            raise UserError(
                f"{', '.join(h.key for h in self.handlers)} would hold up to {needed / 1e6:.0f} MB; "
                f"the limit is {self.memory_limit / 1e6:.0f} MB"
            )

    def surface_of(self, layout: Layout) -> Surface:
        """The surface at a layout."""
        self.layout_now = layout
        if layout not in self._surfaces:
            self._surfaces[layout] = Surface(self.backbone, layout, tuple(self.conditions))
        return self._surfaces[layout]

    def made_of(self, streams: Streams, clock: Clock) -> Hashable:
        """What a stored value depends on: layout, dtype, device, weights."""
        tokens = next(iter(streams.tokens.values()))
        if self._weights[0] != clock.step:
            self._weights = clock.step, sum(p._version for p in self.backbone.parameters())
        return (streams.layout, tokens.dtype, tokens.device, self.weights_now)

    @property
    def weights_now(self) -> int:
        """A number that changes when a weight is written in place."""
        return self._weights[1]
