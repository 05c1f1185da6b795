"""A method to compare with, and a model small enough that a comparison takes a second."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ditloom.contracts.clock import Schedule
from ditloom.contracts.errors import UserError
from ditloom.contracts.method import Assets, Control, Handler, Method, Steps, Touch
from ditloom.contracts.plan import Action
from ditloom.contracts.site import Site
from ditloom.sites.codecs import DELTA, HOLD
from ditloom.sites.surface import Surface


@dataclass(frozen=True, kw_only=True)
class EveryOther(Method):
    """Every n-th step is computed, the others add the change of the blocks from `first` on. A second sentence."""

    n: int = 2
    first: int = 0

    @classmethod
    def touches(cls) -> Sequence[Touch]:
        return (Touch("range", "around"),)

    def bind(self, surface: Surface, assets: Assets | None = None) -> Handler:
        if self.first >= surface.blocks:
            raise UserError(f"every-other begins at block {self.first}, and this model has {surface.blocks}")
        return Skipping(self.n, self.first)


@dataclass
class Skipping(Handler):
    n: int
    first: int
    key: str = "every-other"

    def _site(self, surface: Surface) -> Site:
        return surface.range(self.first, surface.blocks)

    def controls(self, surface: Surface) -> Sequence[Control]:
        return [Control(self._site(surface), DELTA, HOLD)]

    def plan(self, schedule: Schedule, surface: Surface) -> Steps:
        def at(step: int) -> Mapping[Site, Action]:
            return {self._site(surface): Action.REUSE} if step % self.n else {}

        return [at(step) for step in range(schedule.steps)]
