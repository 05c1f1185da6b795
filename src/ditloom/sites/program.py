"""All steps of a run, planned before it starts: what acts where, what must be stored, how much it will take."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from ditloom.contracts.clock import Schedule
from ditloom.contracts.method import Control, Handler, Steps, Tap
from ditloom.contracts.plan import Action
from ditloom.contracts.site import Site
from ditloom.sites.combine import canonical, check
from ditloom.sites.surface import Surface

USES = frozenset({Action.REUSE, Action.DEFER, Action.ROWS, Action.MIX})


@dataclass(frozen=True)
class Planned:
    """One controlled site on one step; `stores`: a value computed now is used by a later step."""

    handler: Handler
    control: Control
    action: Action
    stores: bool

    @property
    def site(self) -> Site:
        """The controlled site."""
        return self.control.site


@dataclass(frozen=True)
class Placed:
    """A tap of a handler on one step, with the key under which its tensor is given."""

    handler: Handler
    tap: Tap
    key: str


@dataclass
class StepProgram:
    """What happens on one step, by place."""

    outer: list[Planned] = field(default_factory=list)
    ranges: dict[int, list[Planned]] = field(default_factory=dict)
    inner: dict[int, list[Planned]] = field(default_factory=dict)
    taps: dict[int, list[Placed]] = field(default_factory=dict)
    watched: set[int] = field(default_factory=set)

    @property
    def idle(self) -> bool:
        """Nothing acts inside the backbone."""
        return not (self.ranges or self.inner or self.taps)


@dataclass
class Program:
    """The programs of all steps and the handlers in canonical order."""

    handlers: list[Handler]
    steps: list[StepProgram]

    def static_plans(self) -> int:
        """Number of distinct in-block plans: how many graphs per block kind a compiler will be asked for."""
        shapes = set()
        for step in self.steps:
            blocks = set(step.inner) | set(step.taps) | {-1}
            for block in blocks:
                actions = tuple((p.site.inner, p.action, p.stores) for p in step.inner.get(block, ()))
                taps = tuple(placed.tap for placed in step.taps.get(block, ()))
                deferred = sum(action is Action.DEFER for _, action, _ in actions)
                shapes.add((actions, tuple((t.stage, t.op, t.stream, t.segment) for t in taps), deferred))
        return sum(2**deferred for _, _, deferred in shapes)

    def bytes_needed(self, rows: int, itemsize: int, tokens: int, width: int) -> int:
        """An upper bound of what the stored token tensors of a run will hold."""
        depth: dict[tuple[str, Site], int] = {}
        for step in self.steps:
            for planned in _all(step):
                if planned.stores and planned.site.level != "run":
                    depth[planned.handler.key, planned.site] = planned.control.predictor.depth
        return sum(depth.values()) * rows * tokens * width * itemsize


def build(handlers: Sequence[Handler], schedule: Schedule, surface: Surface) -> Program:
    """Plan every step; refuse an illegal set before anything runs."""
    ordered = canonical(handlers, surface)
    controls = {h.key: tuple(h.controls(surface)) for h in ordered}
    plans = {h.key: h.plan(schedule, surface) for h in ordered}
    taps = {h.key: h.taps(schedule, surface) for h in ordered}
    for key, plan in plans.items():
        if len(plan) != schedule.steps:
            raise ValueError(f"{key} planned {len(plan)} steps of a run with {schedule.steps}")
    check(ordered, controls, plans, taps)
    steps = [StepProgram() for _ in range(schedule.steps)]
    for handler in ordered:
        for control in controls[handler.key]:
            _place_control(handler, control, plans[handler.key], steps)
        for step, placed in zip(steps, taps[handler.key], strict=True):
            _place_taps(handler, placed, step)
    for step in steps:
        for planned in step.ranges.values():
            planned.sort(key=lambda p: p.site.span[0] - p.site.span[1])  # type: ignore[index]
        step.outer.sort(key=lambda p: p.site.kind != "output")
    return Program(ordered, steps)


def _place_control(handler: Handler, control: Control, plan: Steps, steps: Sequence[StepProgram]) -> None:
    site = control.site
    for s, step in enumerate(steps):
        action = plan[s].get(site, Action.COMPUTE)
        stores = action is not Action.REUSE and needed_later(site, plan, s, control.predictor.depth)
        if action is Action.COMPUTE and not stores:
            continue
        planned = Planned(handler, control, action, stores)
        if action is Action.DEFER:
            step.watched |= {b for probe in handler.probes(site) for b in (probe.block, *probe.span)}
        if site.level == "run":
            step.outer.append(planned)
        elif site.span is not None:
            step.ranges.setdefault(site.span[0], []).append(planned)
        else:
            step.inner.setdefault(site.block or 0, []).append(planned)


def needed_later(site: Site, plan: Steps, step: int, depth: int) -> bool:
    """Whether what a site computes at `step` can still be used: some later use, before `depth` sure computations."""
    computed = 0
    for later in plan[step + 1 :]:
        action = later.get(site, Action.COMPUTE)
        if action in USES:
            return True
        computed += action is Action.COMPUTE
        if computed >= depth:
            return False
    return False


def _place_taps(handler: Handler, taps: Sequence[Tap], step: StepProgram) -> None:
    for index, tap in enumerate(taps):
        placed = Placed(handler, tap, f"{handler.key}:{index}")
        step.taps.setdefault(-1 if tap.block is None else tap.block, []).append(placed)


def _all(step: StepProgram) -> list[Planned]:
    groups: list[Mapping[int, list[Planned]]] = [step.ranges, step.inner]
    return [*step.outer, *(p for group in groups for planned in group.values() for p in planned)]
