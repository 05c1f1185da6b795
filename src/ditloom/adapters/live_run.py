"""A run whose forwards are asked for by somebody else's loop, together for all branches or one after the other."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence

import torch
from torch import Tensor

from ditloom.adapters.call import Arguments, Call, Constants
from ditloom.adapters.known import Known
from ditloom.adapters.view import View
from ditloom.contracts.clock import Clock, Rows, Schedule
from ditloom.contracts.condition import Condition
from ditloom.contracts.errors import UserError
from ditloom.contracts.method import Handler
from ditloom.contracts.streams import Memory
from ditloom.sites.fingerprint import MadeOf
from ditloom.sites.program import Program, overriding
from ditloom.sites.report import Report
from ditloom.sites.run import Run
from ditloom.sites.surface import Surface

NOT_HERE = {
    "segments": "adds token segments, which an adapted model cannot take",
    "rule": "sets an attention rule, and the attention of an adapted model is its own library's",
    "latent": "changes the latent between steps, and the loop of an adapted model is its own pipeline's",
}


class LiveRun(Run):
    """One trajectory of a foreign loop. Every call says which branches it holds (`Call.rows`).

    Where branches come in calls of their own, a step is what all of them are asked for: decisions are taken once,
    observers learn when the last has come, and a branch may be predicted beside one that was computed before it.
    """

    call: Call

    def __init__(
        self,
        view: View,
        handlers: Sequence[Handler],
        schedule: Schedule,
        report: Report,
        known: Known,
        memory_limit: int | None = None,
    ):
        refuse_unsupported(handlers)
        conditions = {branch: Condition() for branch in schedule.branches}
        super().__init__(view, handlers, schedule=schedule, conditions=conditions, memory_limit=memory_limit)
        self.report, self._known = report, known
        self._surfaces, self._weights = known.surfaces(schedule.branches), known.weights
        self._weights.forget()
        self._told: dict[str, Hashable] = {}
        self._constants = Constants()
        self._moment: tuple[int, int] | None = None
        self._learned: tuple[Clock, dict[str, Tensor]] | None = None
        self._others: tuple[str, ...] = schedule.branches

    def answer(self, call: Call, clock: Clock) -> Tensor:
        """The prediction for a call, its rows in the order in which they came."""
        names, adapter = call.rows.branches, self._view.adapter
        self.call = call
        self._turn(clock, names)
        told = {k: v for k, v in call.values.items() if k not in (adapter.sample, adapter.timestep)}
        mark = self._constants.mark(names, told)
        self._told |= dict.fromkeys(names, (names, mark))
        x = call[adapter.sample] if len(names) == 1 else call[adapter.sample][: call.rows.samples]
        found = self.predict(x, clock, names)
        self.earlier |= found
        return found[names[0]] if len(names) == 1 else torch.cat([found[name] for name in names])

    def _turn(self, clock: Clock, names: tuple[str, ...]) -> None:
        """Where a new evaluation begins: what belonged to the last one ends."""
        if self._moment != (clock.step, clock.evaluation):
            if self._learned is not None:
                self._hand_over()
            if self._moment is not None:
                self._others = tuple(self.earlier)
            self._moment, self.earlier = (clock.step, clock.evaluation), {}
            self._settled.clear()
        unknown = [name for name in names if name not in self.conditions]
        if unknown:
            self._join(unknown)
        if len(names) < len(self.conditions) and overriding(self.handlers, "velocity"):
            key = overriding(self.handlers, "velocity")[0].key
            raise UserError(f"{key} changes predictions of all branches at once, and this loop asks for them apart")

    def _join(self, names: Iterable[str]) -> None:
        """A branch that nobody had announced: planned for from here on."""
        self.conditions |= {name: Condition() for name in names}
        self._others = tuple(self.conditions)
        self.program = None
        self._surfaces = {}

    def begin(self, clock: Clock, names: tuple[str, ...]) -> None:
        self.asked = self.expected(names)

    def expected(self, names: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(dict.fromkeys((*names, *self.earlier, *self._others)))

    def learn(self, clock: Clock, found: dict[str, Tensor]) -> None:
        assert self.program is not None
        if not self.program.observers:
            return
        before = self._learned[1] if self._learned is not None else {}
        self._learned = (clock, {**before, **found})
        seen = {*self.earlier, *self.call.rows.branches}
        if seen >= {*self._others}:
            self._hand_over()

    def _hand_over(self) -> None:
        assert self._learned is not None
        super().learn(*self._learned)
        self._learned = None

    def inputs(self, x: Tensor, clock: Clock, names: Sequence[str]) -> tuple[Tensor, Tensor]:
        return x, x

    def _memory(self, rows: Rows, clock: Clock) -> Memory:
        return Arguments(call=self.call.of(rows.branches))

    def made_of(self, branches: Iterable[str], clock: Clock, *what: Hashable) -> MadeOf:
        weights = self._weights.version(clock.step)
        return {b: self._marks(weights, self._told.get(b, b), *what) for b in branches}

    def planned(self, surface: Surface) -> Program:
        return self._known.program(self.handlers, self.schedule, surface)

    @property
    def _view(self) -> View:
        assert isinstance(self.backbone, View)
        return self.backbone


def refuse_unsupported(handlers: Sequence[Handler]) -> None:
    """One sentence where a handler needs what only a native model has."""
    for name, reason in NOT_HERE.items():
        for handler in overriding(handlers, name):
            raise UserError(f"{handler.key} {reason}")
