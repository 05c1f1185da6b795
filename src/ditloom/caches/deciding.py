"""Caches that decide on every step whether the changes of some ranges of blocks are reused or computed afresh."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isinf
from typing import Any

from torch import Tensor

from ditloom.caches.guards import Guards
from ditloom.contracts.clock import Clock, Schedule
from ditloom.contracts.errors import UserError
from ditloom.contracts.method import Control, Handler, Predictor, Probe, Steps
from ditloom.contracts.plan import Action
from ditloom.contracts.site import Site
from ditloom.sites.codecs import DELTA, HOLD
from ditloom.sites.surface import Surface


@dataclass(frozen=True)
class Decision:
    """One difference that was measured, and what came of it."""

    step: int
    difference: float
    action: Action


class Deciding(Handler):
    """One decision a step for each of the ranges `spans`; a rule says what is looked at and what is alike.

    threshold: below it a difference is small; told with the differences that were measured when a whole run fell on
    one side of it. Every range has notes of its own.
    """

    def __init__(self, guards: Guards, spans: Sequence[tuple[int, int]], threshold: float, predictor: Predictor = HOLD):
        self.key = type(guards).__registration__.name
        self.guards, self.spans, self.threshold, self.predictor = guards, spans, threshold, predictor

    @abstractmethod
    def difference(self, probes: Mapping[Probe, Tensor], clock: Clock, memo: dict[str, Any]) -> float:
        """How far this step is from what is stored. Waits for the device; asked only where no guard has decided."""

    def verdict(self, clock: Clock, memo: Mapping[str, Any]) -> Action | None:
        """What guards decide, or None."""
        return self.guards.verdict(clock, memo)

    def limit(self, clock: Clock, memo: Mapping[str, Any]) -> float:
        """The threshold of this step, from the notes of all ranges."""
        return self.threshold

    def learn(self, probes: Mapping[Probe, Tensor], action: Action, memo: dict[str, Any]) -> None:
        """Note what the next decision compares with; called on every step."""

    def controls(self, surface: Surface) -> Sequence[Control]:
        return [Control(surface.range(*span), DELTA, self.predictor) for span in self.spans]

    def plan(self, schedule: Schedule, surface: Surface) -> Steps:
        """Deferred up to the last step that may be reused: what is computed before it must be looked at.

        Threshold 0 is off and costs nothing, unless a mask says what is reused.
        """
        allowed, sites = self.guards.allowed(schedule), [surface.range(*span) for span in self.spans]
        if self.threshold <= 0 and not self.guards.by_mask:
            return [{} for _ in range(schedule.steps)]
        return [dict.fromkeys(sites, Action.DEFER) if any(allowed[s:]) else {} for s in range(schedule.steps)]

    def decide(
        self, site: Site, probes: Mapping[Probe, Tensor], clock: Clock, ready: bool, memo: dict[str, Any]
    ) -> Action:
        notes = memo.setdefault(site.label, {})
        action = self.verdict(clock, notes) if ready else Action.COMPUTE
        if action is None:
            difference = self.difference(probes, clock, notes)
            action = Action.REUSE if difference < self.limit(clock, memo) else Action.COMPUTE
            notes.setdefault("measured", []).append(Decision(clock.step, difference, action))
        self.learn(probes, action, notes)
        self.guards.count(action, notes)
        return action

    def at_most(self, site: Site, clock: Clock, ready: bool, memo: dict[str, Any]) -> Action:
        notes = memo.setdefault(site.label, {})
        action = (self.guards.verdict(clock, notes) or Action.REUSE) if ready else Action.COMPUTE
        self.guards.count(action, notes)
        return action

    def remarks(self, memo: dict[str, Any]) -> Sequence[str]:
        measured = [one for notes in memo.values() for one in notes.get("measured", ())]
        if self.threshold > 0 and not measured and not any(notes["in_all"] for notes in memo.values()):
            return [f"{self.key} computed every step: its guards left it nothing to decide"]
        return [] if isinf(self.threshold) else one_sided(self.key, self.threshold, measured)


def between(surface: Surface, key: str, first: int, last: int, like: str) -> tuple[int, int]:
    """The range that leaves out the first and the last blocks; where it is impossible, what to write instead.

    like: the method that can leave out others, by its settings `first` and `last`.
    """
    if first + last >= surface.blocks:
        raise UserError(
            f"{key} always computes the first {first} and the last {last} blocks, and this model has "
            f"{surface.blocks}: nothing would be left to reuse"
        )
    try:
        surface.range(first, surface.blocks - last)
    except UserError as error:
        both = max(first, last)
        raise UserError(f"{key} cannot act here: {error}; try {like}:first={both},last={both}") from error
    return first, surface.blocks - last


def one_sided(key: str, threshold: float, measured: Sequence[Decision]) -> list[str]:
    """A sentence where every decision of a run came out the same, with the range of what was measured."""
    found = {decision.action for decision in measured}
    if len(found) != 1:
        return []
    differences = [decision.difference for decision in measured]
    least, most = min(differences), max(differences)
    span = f"the differences it measured lay in {least:.3g} to {most:.3g}"
    if Action.REUSE in found:
        return [f"{key} reused whenever it could: threshold {threshold:g} is above every difference; {span}"]
    return [f"{key} never reused: threshold {threshold:g} is below every difference; {span}"]
