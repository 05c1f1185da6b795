"""All steps of a run, planned before it starts: what acts where, what must be stored, how much it will take."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from ditloom.contracts.clock import Schedule
from ditloom.contracts.method import Control, Handler, Steps, Tap
from ditloom.contracts.plan import Action
from ditloom.contracts.site import Site
from ditloom.sites.combine import LEVELS, canonical, check, check_sites, check_taps, rivals
from ditloom.sites.edits import canonical_rank
from ditloom.sites.fates import Fate, Outer, effect, fates, needed_later
from ditloom.sites.store import Place
from ditloom.sites.surface import Surface

USING = frozenset({Action.REUSE, Action.ROWS, Action.MIX})
KEEPING = frozenset({Action.COMPUTE, Action.DEFER, Action.ROWS, Action.MIX})
IDLE = frozenset({Action.COMPUTE})
TWOFOLD = frozenset({Action.DEFER, Action.ROWS})
Controls = Mapping[str, Sequence[Control]]
Plans = Mapping[str, Steps]


@dataclass(frozen=True, eq=False)
class Planned:
    """One controlled site on one step; `stores`: a value computed now can be used by a later step."""

    handler: Handler
    control: Control
    action: Action
    stores: bool
    place: Place

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
    """What happens on one step, by place. Taps of the run, of no block, are at -1.

    plain: controlled sites that are computed and not stored. drops: what no later step can use any more.
    """

    outer: list[Planned] = field(default_factory=list)
    ranges: dict[int, list[Planned]] = field(default_factory=dict)
    inner: dict[int, list[Planned]] = field(default_factory=dict)
    taps: dict[int, list[Placed]] = field(default_factory=dict)
    watched: set[int] = field(default_factory=set)
    plain: list[Site] = field(default_factory=list)
    drops: list[Place] = field(default_factory=list)
    _stops: dict[Surface, list[int]] = field(default_factory=dict)

    def stops(self, surface: Surface) -> list[int]:
        """For every flat position, the first one from there on at which something is to do; blocks before it run."""
        if surface not in self._stops:
            self._stops[surface] = next_of(self._busy(surface), len(surface.flat_blocks))
        return self._stops[surface]

    def _busy(self, surface: Surface) -> set[int]:
        """Flat positions where something acts, looks, starts or ends, or a tapped long skip arrives."""
        ends = {surface.end(*p.site.span) for ranges in self.ranges.values() for p in ranges if p.site.span}
        skips = {user for user, source in surface.backbone.skips.items() if surface.index_at[source] in self.taps}
        blocks = {*self.ranges, *self.watched, *self.inner, *self.taps} - {-1}
        return {surface.position(block) for block in blocks} | ends | skips

    @cached_property
    def plain_inside(self) -> tuple[str, ...]:
        """Labels of the plain sites that a forward passes."""
        return tuple(site.label for site in self.plain if site.level != "run")

    def planned(self) -> Iterator[Planned]:
        """Everything planned on this step."""
        yield from self.outer
        for group in (self.ranges, self.inner):
            for planned in group.values():
                yield from planned


@dataclass
class Program:
    """The programs of all steps and the handlers in canonical order."""

    handlers: list[Handler]
    steps: list[StepProgram]
    surface: Surface

    @cached_property
    def observers(self) -> list[Handler]:
        """Handlers that learn after a step."""
        return overriding(self.handlers, "observe")

    @cached_property
    def steering(self) -> list[Handler]:
        """Handlers that change predictions before guidance."""
        return overriding(self.handlers, "velocity")

    @cached_property
    def segmenters(self) -> list[Handler]:
        """Handlers that add segments."""
        return overriding(self.handlers, "segments")

    @cached_property
    def rulers(self) -> list[Handler]:
        """Handlers with attention rules."""
        return overriding(self.handlers, "rule")

    @cached_property
    def unused(self) -> tuple[str, ...]:
        """Keys of handlers that control sites and are planned to use what is stored, or to decide on it, on no step;
        but for those that remark on their runs themselves.
        """
        acting = {p.handler.key for step in self.steps for p in step.planned() if p.action not in IDLE}
        silent = (h for h in overriding(self.handlers, "controls") if h not in overriding(self.handlers, "remarks"))
        return tuple(handler.key for handler in silent if handler.key not in acting)

    def static_plans(self) -> int:
        """At most how many distinct plans a block is called with: graphs per block kind for a compiler.

        A deferred site is reused or computed; of one of which some rows are computed, a single row is compiled apart.
        """
        shapes = set()
        for step in self.steps:
            for block in {*step.inner, *step.taps, -1}:
                planned = step.inner.get(block, ())
                actions = tuple((p.site.inner, p.action, p.stores and p.action in KEEPING) for p in planned)
                taps = tuple((p.key, p.tap.stage, p.tap.op, p.tap.number) for p in step.taps.get(block, ()))
                shapes.add((actions, taps))
        segments = 2 if self.segmenters else 1
        return segments * sum(2 ** sum(a in TWOFOLD for _, a, _ in actions) for actions, _ in shapes)

    def bytes_needed(self, rows: int, itemsize: int, tokens: int, width: int, latent: int = 0) -> int:
        """An upper bound of what stored tensors will hold, remembered probes among them.

        latent: bytes of the predictions of all branches.
        """
        depth = {p.place: p.control.predictor.depth for step in self.steps for p in step.planned() if p.stores}
        outer = {p.place for step in self.steps for p in step.outer}
        inside = sum(d for place, d in depth.items() if place not in outer) + len(self._remembered())
        return inside * rows * tokens * width * itemsize + latent * sum(depth[p] for p in outer if p in depth)

    def _remembered(self) -> set[Hashable]:
        """Token tensors that decisions may compare with later ones: probes, and captures that are noted in a memo."""
        planned = [p for step in self.steps for p in step.planned() if p.action is Action.DEFER]
        probed = {(p.handler.key, q) for p in planned for q in p.handler.probes(p.site) if q.kind != "time_embedding"}
        noting = {handler.key for handler in overriding(self.handlers, "noted")}
        taps = (placed for step in self.steps for listed in step.taps.values() for placed in listed)
        return {*probed, *((p.handler.key, p.tap) for p in taps if p.handler.key in noting)}


def next_of(positions: Collection[int], end: int) -> list[int]:
    """For every position up to `end`, the first of `positions` from there on; `end` after the last."""
    found = [end] * (end + 1)
    for position in reversed(range(end)):
        found[position] = position if position in positions else found[position + 1]
    return found


def overriding(handlers: Sequence[Handler], name: str) -> list[Handler]:
    """The handlers that implement a part of the contract."""
    return [h for h in handlers if getattr(type(h), name) is not getattr(Handler, name)]


def build(handlers: Sequence[Handler], schedule: Schedule, surface: Surface) -> Program:
    """Plan every step; refuse an illegal set before anything runs."""
    ordered = canonical(handlers)
    controls = {h.key: tuple(_on(schedule, control) for control in h.controls(surface)) for h in ordered}
    plans = {h.key: h.plan(schedule, surface) for h in ordered}
    taps = {h.key: h.taps(schedule, surface) for h in ordered}
    for what in (plans, taps):
        for key, listed in what.items():
            if len(listed) != schedule.steps:
                raise ValueError(f"{key} planned {len(listed)} steps of a run with {schedule.steps}")
    check_sites(controls, surface)
    check_taps(taps, surface)
    check(ordered, controls, plans, taps)
    steps = [StepProgram() for _ in range(schedule.steps)]
    by_key = {h.key: h for h in ordered}
    for key, control, found in _fates(controls, plans):
        _place_control(by_key[key], control, plans[key], found, steps)
    for handler in ordered:
        for step, placed in zip(steps, taps[handler.key], strict=True):
            _place_taps(handler, placed, step)
    for step in steps:
        for planned in step.ranges.values():
            planned.sort(key=lambda p: p.site.span[0] - p.site.span[1])  # type: ignore[index]
        for placed_taps in step.taps.values():
            placed_taps.sort(key=lambda p: canonical_rank(p.tap.op))
        step.outer.sort(key=lambda p: p.site.kind != "output")
    return Program(ordered, steps, surface)


def _on(schedule: Schedule, control: Control) -> Control:
    """A control whose predictor knows the steps of the run, where it asks to."""
    on = getattr(control.predictor, "on", None)
    return control if on is None else replace(control, predictor=on(schedule))


def _fates(controls: Controls, plans: Plans) -> list[tuple[str, Control, list[Fate]]]:
    """The fate of every controlled site on every step, from the outside in: what encloses a site comes before it."""
    listed = [(key, control) for key, several in controls.items() for control in several]
    listed.sort(key=lambda item: _depth(item[1].site))
    found: list[tuple[str, Control, list[Fate]]] = []
    for key, control in listed:
        site = control.site
        around = [
            [effect(fate, c.site.branch is not None, key == other) for fate in theirs]
            for other, c, theirs in found
            if c.site.encloses(site) or (c.site.branch is not None and site.level != "run")
        ]
        around += [_beside(c.site, plans[other]) for other, c in listed if _overlap(c.site, site)]
        actions = [step.get(site, Action.COMPUTE) for step in plans[key]]
        free = [Outer.FREE] * len(actions)
        outer = [max(effects, key=lambda o: o.value) for effects in zip(free, *around, strict=True)]
        found.append((key, control, fates(actions, outer, control.predictor)))
    return found


def _overlap(a: Site, b: Site) -> bool:
    """Ranges of which neither lies inside the other."""
    return a.span is not None and b.span is not None and rivals(a, b) and not (a.encloses(b) or b.encloses(a) or a == b)


def _beside(site: Site, plan: Steps) -> list[Outer]:
    """What a range does to one that it overlaps: while it is jumped over, the other may not reach its end."""
    return [Outer.FREE if step.get(site, Action.COMPUTE) is Action.COMPUTE else Outer.PERHAPS for step in plan]


def _depth(site: Site) -> tuple[int, int]:
    span = site.span or (0, 0)
    return LEVELS[site.level], span[0] - span[1] if site.span else 0


def _place_control(
    handler: Handler, control: Control, plan: Steps, found: Sequence[Fate], steps: Sequence[StepProgram]
) -> None:
    site, depth, place = control.site, control.predictor.depth, (handler.key, control.site.label)
    held = False
    for s, step in enumerate(steps):
        action = plan[s].get(site, Action.COMPUTE)
        if action in USING and found[s] is Fate.SURE:
            action = Action.COMPUTE
        stores = action is not Action.SKIP and needed_later(found, s, depth)
        if held and not (stores or needed_later(found, s - 1, depth)):
            step.drops.append(place)
            held = False
        held = held or stores
        if action is Action.COMPUTE and not stores:
            step.plain.append(site)
        else:
            _place_planned(Planned(handler, control, action, stores, place), step)


def _place_planned(planned: Planned, step: StepProgram) -> None:
    site = planned.site
    if planned.action is Action.DEFER:
        for probe in planned.handler.probes(site):
            step.watched |= set(probe.span) if probe.kind == "residual" else {probe.block}
    if site.level == "run":
        step.outer.append(planned)
    elif site.span is not None:
        step.ranges.setdefault(site.span[0], []).append(planned)
    else:
        step.inner.setdefault(site.block or 0, []).append(planned)


def _place_taps(handler: Handler, taps: Sequence[Tap], step: StepProgram) -> None:
    """Keys count per block, so that the same taps on several blocks are one plan to a compiler."""
    count: dict[int, int] = {}
    for tap in taps:
        block = -1 if tap.block is None else tap.block
        count[block] = count.get(block, -1) + 1
        step.taps.setdefault(block, []).append(Placed(handler, tap, f"{handler.key}:{count[block]}"))
