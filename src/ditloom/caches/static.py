"""A cache whose plan is known before a run: some sites, how each is stored and carried on, and when it is reused."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from ditloom.contracts.clock import Clock, Schedule, Window
from ditloom.contracts.errors import UserError
from ditloom.contracts.method import Codec, Control, Handler, Predictor, Steps
from ditloom.contracts.plan import Action
from ditloom.contracts.site import Site
from ditloom.sites.codecs import HOLD, VALUE
from ditloom.sites.surface import Surface

Sites = Callable[[Surface], Sequence[Site]]
When = Callable[[Schedule], Iterable[int]]


@dataclass(frozen=True)
class Reuse:
    """Sites that are reused together, on the steps that `when` names of a schedule; on all others they are computed."""

    sites: Sites
    when: When
    codec: Codec = VALUE
    predictor: Predictor = HOLD


@dataclass
class StaticCache(Handler):
    """Reuses its parts when they say so. A site that is not stored yet is computed, whatever the plan."""

    key: str = ""
    parts: Sequence[Reuse] = ()

    def controls(self, surface: Surface) -> Sequence[Control]:
        return [Control(site, part.codec, part.predictor) for part in self.parts for site in part.sites(surface)]

    def plan(self, schedule: Schedule, surface: Surface) -> Steps:
        steps: list[dict[Site, Action]] = [{} for _ in range(schedule.steps)]
        for part in self.parts:
            for step in part.when(schedule):
                steps[step] |= dict.fromkeys(part.sites(surface), Action.REUSE)
        return steps


def steps_where(test: Callable[[Clock], bool]) -> When:
    """The steps whose clock passes a test."""
    return lambda schedule: [s for s in range(schedule.steps) if test(schedule.clock(s))]


def window(start: float, end: float) -> Window:
    """The steps from the share `start` of a run to the share `end`; refused when it can hold none."""
    if not 0 <= start < end <= 1:
        raise UserError(f"the window from {start} to {end} of the steps is empty: it takes 0 <= start < end <= 1")
    return Window(start, end)


def between(low: float, high: float) -> Callable[[Clock], bool]:
    """At noise levels strictly between two; refused when there can be none."""
    if not low < high:
        raise UserError(f"the window between the noise levels {low} and {high} is empty: the lower one comes first")
    return lambda clock: low < clock.t < high


def submodules(surface: Surface) -> Sequence[Site]:
    """Every attention and feed-forward of every block."""
    return surface.submodules


def whole_stack(surface: Surface) -> Sequence[Site]:
    """The range of all blocks."""
    return [surface.range(0, surface.blocks)]
