"""Caches that decide on every step whether the change of a range of blocks is reused or computed afresh."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from ditloom.caches.guards import Guards
from ditloom.contracts.clock import Clock, Schedule
from ditloom.contracts.method import Control, Handler, Predictor, Probe, Steps
from ditloom.contracts.plan import Action
from ditloom.contracts.site import Site
from ditloom.sites.codecs import DELTA, HOLD
from ditloom.sites.surface import Surface


class Deciding(Handler):
    """One decision a step, for the range of blocks `span`; a rule says what is looked at and what is alike.

    looks: what a decision sees. threshold: below it a difference is small; told with the differences that were
    measured when a whole run fell on one side of it.
    """

    looks: tuple[Probe, ...] = ()

    def __init__(self, guards: Guards, span: tuple[int, int], threshold: float, predictor: Predictor = HOLD):
        self.key = type(guards).__registration__.name
        self.guards, self.span, self.threshold, self.predictor = guards, span, threshold, predictor

    @abstractmethod
    def difference(self, probes: Mapping[Probe, Tensor], clock: Clock, memo: dict[str, Any]) -> float:
        """How far this step is from what is stored. Waits for the device; asked only where no guard has decided."""

    def verdict(self, clock: Clock, memo: Mapping[str, Any]) -> Action | None:
        """What guards decide, or None."""
        return self.guards.verdict(clock, memo)

    def learn(self, probes: Mapping[Probe, Tensor], action: Action, memo: dict[str, Any]) -> None:
        """Note what the next decision compares with; called on every step."""

    def controls(self, surface: Surface) -> Sequence[Control]:
        return [Control(surface.range(*self.span), DELTA, self.predictor)]

    def plan(self, schedule: Schedule, surface: Surface) -> Steps:
        """Deferred up to the last step that may be reused: what is computed before it must be looked at.

        Threshold 0 is off and costs nothing.
        """
        allowed, site = self.guards.allowed(schedule), surface.range(*self.span)
        if self.threshold <= 0:
            return [{} for _ in range(schedule.steps)]
        return [{site: Action.DEFER} if any(allowed[s:]) else {} for s in range(schedule.steps)]

    def probes(self, site: Site) -> Sequence[Probe]:
        return self.looks

    def decide(
        self, site: Site, probes: Mapping[Probe, Tensor], clock: Clock, ready: bool, memo: dict[str, Any]
    ) -> Action:
        action = self.verdict(clock, memo) if ready else Action.COMPUTE
        if action is None:
            difference = self.difference(probes, clock, memo)
            action = Action.REUSE if difference < self.threshold else Action.COMPUTE
            memo.setdefault("measured", []).append((difference, action))
        self.learn(probes, action, memo)
        self.guards.count(action, memo)
        return action

    def remarks(self, memo: dict[str, Any]) -> Sequence[str]:
        if self.threshold > 0 and not memo.get("measured") and not memo.get("in_all"):
            return [f"{self.key} computed every step: its guards left it nothing to decide"]
        return one_sided(self.key, self.threshold, memo.get("measured", ()))


def one_sided(key: str, threshold: float, measured: Sequence[tuple[float, Action]]) -> list[str]:
    """A sentence where every decision of a run came out the same, with the range of what was measured."""
    found = {action for _, action in measured}
    if len(found) != 1:
        return []
    least, most = min(d for d, _ in measured), max(d for d, _ in measured)
    span = f"the differences it measured lay in {least:.3g} to {most:.3g}"
    if Action.REUSE in found:
        return [f"{key} reused whenever it could: threshold {threshold:g} is above every difference; {span}"]
    return [f"{key} never reused: threshold {threshold:g} is below every difference; {span}"]
