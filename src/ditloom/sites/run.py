"""A run: one trajectory or one training forward, with its clock, branches, state and report."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from ditloom.contracts.backbone import Backbone
from ditloom.contracts.clock import Clock, Rows, Schedule
from ditloom.contracts.condition import Condition
from ditloom.contracts.errors import UserError
from ditloom.contracts.layout import Layout
from ditloom.contracts.method import Handler, Probe
from ditloom.contracts.plan import Action
from ditloom.contracts.streams import Memory, Streams
from ditloom.sites.block_call import SOURCES
from ditloom.sites.combine import canonical
from ditloom.sites.compiling import announce
from ditloom.sites.executor import Forward
from ditloom.sites.fates import least
from ditloom.sites.fingerprint import MadeOf, Marks, Weights, of_condition
from ditloom.sites.outer import Outside
from ditloom.sites.program import Planned, Program, StepProgram, build, overriding
from ditloom.sites.report import Report
from ditloom.sites.segments import NOTHING_ADDED, AddedSegments, NothingAdded
from ditloom.sites.store import Store
from ditloom.sites.surface import Surface

Look = Callable[[Probe], Tensor]


@dataclass(frozen=True, eq=False)
class Prepared:
    """What the backbone prepared for some branches, and of what, by branch."""

    made_of: dict[str, Hashable]
    rows: Rows
    memory: Memory

    def part(self, branch: str) -> Memory:
        """The rows of one branch."""
        at = self.rows.slice(branch)
        return tree_map(lambda t: t[at], self.memory)


class Run:
    """One trajectory of a backbone under some handlers. Nothing is global: two runs never meet.

    conditions: one `Condition` per guidance branch, each with `samples` rows; texts of unequal length are padded to
    one length, so that a branch looks the same alone and in a batch. batched: branches share a forward.
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
        self.backbone, self.schedule, self.batched = backbone, schedule, batched
        self.conditions = dict(zip(conditions, Condition.aligned(list(conditions.values())), strict=True))
        self.handlers, self.memory_limit = canonical(handlers), memory_limit
        self.report, self.store, self.keys = Report(), Store(), Store()
        self.skip_sources = frozenset(backbone.skips.values())
        self.blocks = sum(not b.is_transition for b in backbone.blocks)
        self.program: Program | None = None
        self._passive = StepProgram()
        self.asked: tuple[str, ...] = tuple(self.conditions)
        self.earlier: dict[str, Tensor] = {}  # predictions of this step that were asked for apart, by branch
        self.seen_layout: Layout | None = None
        self._weights, self._marks = Weights(backbone), Marks()
        self._memories: list[Prepared] = []
        self._surfaces: dict[Layout, Surface] = {}
        self._memos: dict[str, dict[str, Any]] = {}
        self._decisions: dict[tuple[str, str, int], Action] = {}
        self._settled: dict[tuple[str, str], Action] = {}
        self._dropped = -1
        self._needed = 0
        self._prepared_rows = self._plain_rows = 0
        self._seen: set[str] = set()
        self.plain_macs = 0

    def predict(self, x: Tensor, clock: Clock, branches: Sequence[str] | None = None) -> dict[str, Tensor]:
        """The predictions of the branches for x [B, ...] at the clock's time."""
        names = tuple(branches or self.conditions)
        if not self.handlers:
            return self.forwards(x, clock, names, self._passive)
        program = self._programmed(x, clock, names)
        step = program.steps[clock.step]
        self.begin(clock, names)
        self._drop(program, clock)
        predictions = Outside(self, step, x, clock, names).predictions()
        for handler in program.steering:
            predictions = handler.velocity(predictions, clock)
        self.report.bytes_held = max(self.report.bytes_held, self.store.bytes + self.keys.bytes + self._memo_bytes)
        if clock.may_reuse and clock.step + 1 == self.schedule.steps:
            self._remark(program)
        return predictions

    def begin(self, clock: Clock, names: tuple[str, ...]) -> None:
        """A prediction starts: actions are settled anew, for the branches it asks for."""
        self.asked = names
        self._settled.clear()

    def expected(self, names: tuple[str, ...]) -> tuple[str, ...]:
        """The branches of a step: those asked for, unless others are known to be asked for apart from them."""
        return names

    def learn(self, clock: Clock, found: dict[str, Tensor]) -> None:
        """Hand the predictions that were really computed to those who observe."""
        assert self.program is not None
        for handler in self.program.observers:
            handler.observe(clock, dict(found), self.memo(handler))

    def inputs(self, x: Tensor, clock: Clock, names: Sequence[str]) -> tuple[Tensor, Tensor]:
        """x for every branch, and its native time."""
        batch = torch.cat([x] * len(names)) if len(names) > 1 else x
        return batch, torch.full((len(batch),), clock.native, dtype=torch.float64, device=x.device)

    def until(self, x: Tensor, clock: Clock, block: int, branches: Sequence[str] | None = None) -> None:
        """Run up to and including a block: taps deliver what they capture; nothing is predicted, used or stored."""
        names = tuple(branches or self.conditions)
        step = self._programmed(x, clock, names).steps[clock.step]
        self.forward(x, clock, names, step, reuse=False, until=block)

    def changed(self) -> None:
        """The latent was changed from outside: what was stored and noted no longer belongs to the trajectory.

        Handlers that control sites lose their memo; static segments, which do not depend on the latent, keep theirs.
        """
        self.store.clear()
        self._decisions.clear()
        for handler in overriding(self.handlers, "controls"):
            self._memos.pop(handler.key, None)

    def memo(self, handler: Handler) -> dict[str, Any]:
        """A handler's own notes of this run."""
        return self._memos.setdefault(handler.key, {})

    @property
    def _memo_bytes(self) -> int:
        return _tensor_bytes(self._memos)

    def _remark(self, program: Program) -> None:
        for key in program.unused:
            self.report.note(f"{key} changed nothing: on none of the {self.schedule.steps} steps it may reuse anything")
        for handler in overriding(program.handlers, "remarks"):
            for sentence in handler.remarks(self.memo(handler)):
                self.report.note(sentence)

    def settle(self, planned: Planned, clock: Clock, branches: Sequence[str], made_of: MadeOf, look: Look) -> Action:
        """The action at a site, one for all forwards of a call. Guards beat plans: what is not stored is computed."""
        if planned.place not in self._settled:
            ready = self.store.ready(planned.place, branches, least(planned.control.predictor), made_of)
            action = planned.action
            if action is Action.DEFER:
                action = self._decide(planned, clock, ready, look)
            self._settled[planned.place] = Action.COMPUTE if action in SOURCES and not ready else action
        return self._settled[planned.place]

    def storable(self, planned: Planned) -> bool:
        """Whether what is computed at a site now may be stored: not if pure, and its handler has reused something."""
        mine = (action for (key, _), action in self._settled.items() if key == planned.handler.key)
        return not planned.control.pure or all(action is Action.COMPUTE for action in mine)

    def _decide(self, planned: Planned, clock: Clock, ready: bool, look: Look) -> Action:
        """The decision of a deferred site: asked once per step, of the leading branch, obeyed by all."""
        key = (*planned.place, clock.step)
        if key not in self._decisions:
            probes = {p: look(p) for p in planned.handler.probes(planned.site)}
            memo = self.memo(planned.handler)
            self._decisions[key] = planned.handler.decide(planned.site, probes, clock, ready, memo)
        return self._decisions[key]

    def forwards(
        self,
        x: Tensor,
        clock: Clock,
        names: tuple[str, ...],
        program: StepProgram,
        gated: frozenset[str] = frozenset(),
    ) -> dict[str, Tensor]:
        """The predictions of some branches, computed together or one after the other ("cond" first)."""
        groups = [names] if self.batched else [(name,) for name in sorted(names, key=lambda n: n != "cond")]
        predictions: dict[str, Tensor] = {}
        for group in groups:
            out = self.forward(x, clock, group, program, gated=gated)
            assert out is not None
            predictions |= dict(zip(group, out.chunk(len(group)), strict=True)) if len(group) > 1 else {group[0]: out}
        return predictions

    def forward(
        self,
        x: Tensor,
        clock: Clock,
        names: tuple[str, ...],
        program: StepProgram,
        reuse: bool = True,
        gated: frozenset[str] = frozenset(),
        until: int | None = None,
    ) -> Tensor | None:
        """One forward of the branches `names`."""
        rows = Rows(names, len(x))
        batch, time = self.inputs(x, clock, names)
        return Forward(self, program, clock, rows, reuse, gated)(batch, time, self._memory(rows, clock), until)

    def added(self, clock: Clock, rows: Rows) -> AddedSegments | NothingAdded:
        """What handlers add to a forward."""
        program = self.program
        if program is None or not (program.segmenters or program.rulers):
            return NOTHING_ADDED
        return AddedSegments(self, program.segmenters, program.rulers, clock, rows)

    def _memory(self, rows: Rows, clock: Clock) -> Memory:
        """What is prepared for some branches: for each once, and again when its condition or the weights change.

        What gradients flow through is prepared for every prediction, as each has a graph of its own.
        """
        if torch.is_grad_enabled() and self._learns(rows):
            return self._prepare(rows)
        weights = self._weights.version(clock.step)
        made_of: dict[str, Hashable] = {b: (weights, of_condition(self.conditions[b])) for b in rows.branches}
        held = [h for h in self._memories if all(made_of.get(b, mark) == mark for b, mark in h.made_of.items())]
        missing = Rows(tuple(b for b in rows.branches if not any(b in h.made_of for h in held)), rows.samples)
        if missing.branches:
            held.append(Prepared({b: made_of[b] for b in missing.branches}, missing, self._prepare(missing)))
        if not any(h.rows == rows for h in held):
            found = [next(h.part(b) for h in held if b in h.made_of) for b in rows.branches]
            memory = found[0] if len(found) == 1 else tree_map(lambda *t: torch.cat(t), *found)
            held.append(Prepared(made_of, rows, memory))
        self._memories = held
        return next(h.memory for h in held if h.rows == rows)

    def _prepare(self, rows: Rows) -> Memory:
        parts = [self.conditions[b] for b in rows.branches]
        self._prepared_rows += rows.total
        self._plain_rows += rows.samples * len({*rows.branches} - self._seen)
        self._seen |= {*rows.branches}
        return self.backbone.prepare(Condition.cat(parts) if len(parts) > 1 else parts[0])

    def _learns(self, rows: Rows) -> bool:
        """Whether gradients flow through what is prepared."""
        given = (t for b in rows.branches for t in self.conditions[b].tensors().values())
        return any(t.requires_grad for t in (*given, *self.backbone.parameters()))

    def prepared(self, surface: Surface) -> int:
        """MACs of what was prepared since last asked; a plain run prepares every branch once."""
        rows, plain = self._prepared_rows, self._plain_rows
        self._prepared_rows = self._plain_rows = 0
        self.report.full_macs += plain * surface.ends["prepare"]
        return rows * surface.ends["prepare"]

    def _programmed(self, x: Tensor, clock: Clock, names: tuple[str, ...]) -> Program:
        """The program, planned at the first call from the layout of the first forward."""
        if self.program is None:
            group = names if self.batched else names[:1]
            batch, time = self.inputs(x, clock, group)
            with torch.no_grad():
                memory = self._memory(Rows(group, len(x)), clock)
                streams, _ = self.backbone.embed(batch, time, memory)
            surface = self.surface_of(streams.layout)
            self.report.macs += surface.entry * len(batch)
            self.plain_macs = surface.total
            self.program = self.planned(surface)
            self._check_memory(streams, x)
            announce(self.backbone, self.program.static_plans())
        return self.program

    def planned(self, surface: Surface) -> Program:
        """The plan of all steps."""
        return build(self.handlers, self.schedule, surface)

    def _check_memory(self, streams: Streams, x: Tensor) -> None:
        assert self.program is not None
        tokens = next(iter(streams.tokens.values()))
        rows, latent = len(self.conditions) * len(x), 2 * len(self.conditions) * x.nbytes
        size, width = tokens.element_size(), tokens.shape[-1]
        self.allow(self.program.bytes_needed(rows, size, streams.layout.length(), width, latent))

    def allow(self, more: int) -> None:
        """Refuse to store `more` bytes at most where that exceeds the limit."""
        self._needed += more
        if self.memory_limit is not None and self._needed > self.memory_limit:
            keys = ", ".join(h.key for h in self.handlers)
            raise UserError(
                f"{keys} would hold up to {_readable(self._needed)}; the limit is {_readable(self.memory_limit)}"
            )

    def _drop(self, program: Program, clock: Clock) -> None:
        """Free what no step from here on can use."""
        for step in range(self._dropped + 1, clock.step + 1):
            for place in program.steps[step].drops:
                self.store.drop(place)
        self._dropped = max(self._dropped, clock.step)

    def surface_of(self, layout: Layout) -> Surface:
        """The surface at a layout."""
        if layout not in self._surfaces:
            self._surfaces[layout] = Surface(self.backbone, layout, tuple(self.conditions))
        return self._surfaces[layout]

    def made_of(self, branches: Iterable[str], clock: Clock, *what: Hashable) -> MadeOf:
        """By branch, a mark of everything a stored value depends on: `what`, the weights and the branch's condition."""
        weights = self._weights.version(clock.step)
        return {b: self._marks(weights, of_condition(self.conditions[b]), *what) for b in branches}


def _tensor_bytes(value: Any) -> int:
    """Bytes of the tensors in nested containers."""
    if isinstance(value, Tensor):
        return value.nbytes
    if isinstance(value, dict):
        return sum(map(_tensor_bytes, value.values()))
    return sum(map(_tensor_bytes, value)) if isinstance(value, (list, tuple, deque)) else 0


def _readable(size: int) -> str:
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= factor:
            return f"{size / factor:.3g} {unit}"
    return f"{size} bytes"
