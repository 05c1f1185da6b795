"""Sites of a whole run's step: outputs and guidance branches that are predicted instead of computed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from ditloom.contracts.clock import Clock, Rows
from ditloom.contracts.method import Probe
from ditloom.contracts.plan import Action
from ditloom.sites.fingerprint import MadeOf, of_latent
from ditloom.sites.program import Planned, StepProgram

if TYPE_CHECKING:
    from ditloom.sites.run import Run


class Outside:
    """One prediction of some branches under a step's program. It lives as long as the call.

    What a codec is given as a site's input: the latent x for an output; for a branch, the prediction of the leading
    branch ("cond", or the first that is computed).
    """

    made_of: MadeOf

    def __init__(self, run: Run, program: StepProgram, x: Tensor, clock: Clock, names: tuple[str, ...]):
        self.run, self.program, self.x, self.clock, self.names = run, program, x, clock, names
        self.expected = run.expected(names)
        self.acting = [p for p in program.outer if clock.may_reuse and self._branches(p)]
        if self.acting:
            self.made_of = run.made_of(self.expected, clock, "outer", of_latent(x))

    def predictions(self) -> dict[str, Tensor]:
        """The predictions of all branches, in the order they were asked for."""
        storing: list[Planned] = []
        gated: dict[str | None, Planned] = {}
        for planned in self.acting:
            action = self._settle(planned, len(gated))
            if action is Action.REUSE and planned.site.branch is None:
                return {name: self._reused(planned, name, self.x) for name in self.names}
            if action is Action.REUSE:
                gated[planned.site.branch] = planned
            elif planned.stores:
                storing.append(planned)
        computing = tuple(name for name in self.names if name not in gated)
        handlers = frozenset(p.handler.key for p in gated.values())
        found = self.run.forwards(self.x, self.clock, computing, self.program, handlers) if computing else {}
        self._learn(storing, found)
        if gated:
            leading = self._leading(found)
            found |= {name: self._reused(gated[name], name, leading) for name in self.names if name in gated}
        return {name: found[name] for name in self.names}

    def _branches(self, planned: Planned) -> tuple[str, ...]:
        """The branches of this step that a site stands for."""
        branch = planned.site.branch
        return self.expected if branch is None else tuple(name for name in self.expected if name == branch)

    def _settle(self, planned: Planned, gated: int) -> Action:
        """A branch can only be predicted beside one that is computed."""
        branches = self._branches(planned)
        action = Action.COMPUTE
        if planned.site.branch is None or gated + 1 < len(self.expected):
            action = self.run.settle(planned, self.clock, branches, self.made_of, _nothing_to_look_at)
        asked = [name for name in branches if name in self.names]
        if asked:
            self.run.report.visit(planned.site, action, len(asked))
        return action

    def _learn(self, storing: list[Planned], found: dict[str, Tensor]) -> None:
        """Hand the computed predictions to those who observe, and store what later steps need."""
        if self.clock.may_reuse:
            self.run.learn(self.clock, found)
        for planned in (p for p in storing if self.run.storable(p)):
            for name in (n for n in self._branches(planned) if n in found):
                codec, x = planned.control.codec, self.x if planned.site.branch is None else self._leading(found)
                depth, rows = planned.control.predictor.depth, Rows((name,), len(self.x))
                z = codec.encode(x, found[name])
                self.run.store.push(planned.place, rows, self.clock.step, z, depth, self.made_of)
        self._note_plain()

    def _note_plain(self) -> None:
        if self.clock.purpose != "sample":
            return
        for site in self.program.plain:
            if site.level == "run" and site.branch in (None, *self.names):
                self.run.report.visit(site, Action.COMPUTE, 1 if site.branch else len(self.names))

    def _leading(self, found: dict[str, Tensor]) -> Tensor:
        known = {**found, **self.run.earlier}
        return known.get("cond", next(iter(known.values())))

    def _reused(self, planned: Planned, name: str, x: Tensor) -> Tensor:
        control, report = planned.control, self.run.report
        report.full_macs += self.run.plain_macs * len(self.x)
        if planned.site.branch is None:
            report.cells[self.clock.step, -1] = 1.0
        rows = Rows((name,), len(self.x))
        z = self.run.store.predict(planned.place, rows, control.predictor, self.clock.step, self.made_of)
        return control.codec.decode(x, z)


def _nothing_to_look_at(probe: Probe) -> Any:
    raise ValueError(f"{probe} cannot be seen before the forward")
