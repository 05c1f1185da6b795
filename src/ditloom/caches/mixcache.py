"""MixCache: Mixture-of-Cache for Video Diffusion Transformer Acceleration (arXiv 2508.12691), a reconstruction.

The paper says what there is: caches of a whole step, of a guidance branch and of a range of blocks, a trigger that
looks at how the sample itself moves, and a decision which of the three is used on each cached step. Every formula is
this project's own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from statistics import median
from typing import Any

from torch import Tensor

from ditloom.caches.amounts import Amount, at_least
from ditloom.caches.deciding import between
from ditloom.caches.guards import Guards
from ditloom.contracts.clock import Clock, Rows, Schedule
from ditloom.contracts.errors import UnknownName
from ditloom.contracts.method import Assets, Control, Handler, Method, Steps, Tap, Touch, mean_change
from ditloom.contracts.plan import Action
from ditloom.contracts.registry import register
from ditloom.contracts.site import Site
from ditloom.sites.codecs import DELTA, HOLD
from ditloom.sites.surface import Surface

STEP, CFG, BLOCK, FULL = "step", "cfg", "block", ""
GRAINS = (STEP, CFG, BLOCK)
LEFT = "left"
LEAST_WARMUP = 3
FORGIVEN, MOST = 1.5, 4.0
"""How much a grain's penalty grows by use and shrinks by the use of another, and its limit."""


@register(
    "mixcache",
    paper="MixCache, arXiv 2508.12691 (reconstruction)",
    family="caches",
    plain="Once the picture has settled, skips on each step what harms least: the step, the guidance or some blocks.",
)
@dataclass(frozen=True, kw_only=True)
class MixCache(Guards, Method):
    """One computed step, then up to interval - 1 cached ones, each by the grain that is expected to do least harm.

    Trigger: caching begins once the guided output has moved less than tau for `stable` computed steps in a row, and
    ends when it moves more than 2 tau; tau is kappa times the median over the warm-up unless it is given (0: never).
    Grains: "step" reuses the change of the whole stack, "cfg" the gap between the branches, "block" the change of the
    blocks between the first and the last ones. Impact of a grain: how far what it stores moved between the last two
    computed steps, for one step, in units of what it goes into. Chosen is the least impact times penalty over the share
    of MACs saved; a grain's penalty grows by half when it is used and shrinks when another is. grains: which may be
    used, with slashes between. worst: compute fully where every impact is above it (0: off). scale: of
    guidance, where a run does not tell its own, as that of a bare transformer (0: the run's).
    Reconstruction: all but the three grains, the trigger and the choice as such.
    """

    interval: int = 3
    grains: str = "step/cfg/block"
    warmup: Amount = 0.1
    tail: Amount = 1
    stable: int = 2
    kappa: float = 1.0
    tau: float = -1.0
    first: int = 1
    last: int = 0
    worst: float = 0.0
    scale: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(1, interval=self.interval, stable=self.stable, first=self.first)
        at_least(0, last=self.last)
        for grain in self.grains.split("/"):
            if grain not in GRAINS:
                raise UnknownName("grain", grain, GRAINS)

    @classmethod
    def touches(cls) -> Sequence[Touch]:
        return (Touch("branch", "around"), Touch("range", "around"), Touch("block_out", "capture"))

    def bind(self, surface: Surface, assets: Assets | None = None) -> Handler:
        between(surface, "mixcache", self.first, self.last, "mixcache")
        return Mixing(self, surface)

    def warm(self, steps: int) -> int:
        """Steps of warm-up, three at least."""
        return max(LEAST_WARMUP, self.warmup if isinstance(self.warmup, int) else ceil(self.warmup * steps))


class Mixing(Handler):
    """Keeps all caches warm on computed steps and uses one of them at a time on the others."""

    key = "mixcache"

    def __init__(self, settings: MixCache, surface: Surface):
        self.settings, sites = settings, self.sites_of(settings, surface)
        costs = {grain: sites[grain].cost / surface.total for grain in (STEP, BLOCK) if grain in sites}
        self.gains = {**({CFG: 0.5} if CFG in sites else {}), **costs}

    @staticmethod
    def sites_of(settings: MixCache, surface: Surface) -> dict[str, Site]:
        """The site of every grain that is allowed and possible here."""
        middle = surface.range(settings.first, surface.blocks - settings.last)
        found = {STEP: surface.range(0, surface.blocks), BLOCK: middle}
        if {"cond", "uncond"} <= {*surface.branches}:
            found[CFG] = surface.branch("uncond")
        return {grain: found[grain] for grain in GRAINS if grain in found and grain in settings.grains.split("/")}

    def controls(self, surface: Surface) -> Sequence[Control]:
        return [Control(site, DELTA, HOLD, pure=True) for site in self.sites_of(self.settings, surface).values()]

    def plan(self, schedule: Schedule, surface: Surface) -> Steps:
        sites = self.sites_of(self.settings, surface).values()
        return [dict.fromkeys(sites, Action.DEFER) if may else {} for may in self._allowed(schedule)]

    def _allowed(self, schedule: Schedule) -> list[bool]:
        allowed, off = self.settings.allowed(schedule), self.settings.tau == 0
        warm = self.settings.warm(schedule.steps)
        return [may and s >= warm and not off for s, may in enumerate(allowed)]

    def taps(self, schedule: Schedule, surface: Surface) -> Sequence[Sequence[Tap]]:
        """What enters and leaves the stack and its middle, as long as a decision may follow."""
        leading = ("cond" if "cond" in schedule.branches else schedule.branches[0],)
        first, end = self.settings.first, surface.blocks - self.settings.last - 1
        places = dict.fromkeys(
            [("block_in", 0), ("block_in", first), ("block_out", end), ("block_out", surface.blocks - 1)]
        )
        taps, allowed = [Tap(stage, block, branches=leading) for stage, block in places], self._allowed(schedule)
        return [taps if any(allowed[s:]) else [] for s in range(schedule.steps)]

    def noted(self, tap: Tap, value: Tensor, clock: Clock, rows: Rows, memo: dict[str, Any]) -> None:
        if clock.may_reuse and _chosen(clock, memo) == FULL:
            memo.setdefault("seen", {})[tap.stage, tap.block] = value

    def observe(self, clock: Clock, outputs: Mapping[str, Tensor], memo: dict[str, Any]) -> None:
        """After a computed step: how far everything has moved since the last one, and whether caching is on."""
        seen = memo.pop("seen", None)
        if not seen or _chosen(clock, memo) != FULL:
            return
        scale = self.settings.scale or clock.guidance_scale
        now, before = self._values(outputs, seen, scale), memo.get("values")
        if before is not None:
            steps = clock.step - memo["full"]
            memo["impacts"] = {grain: v / steps for grain, v in _impacts(now, before, scale).items()}
            self._trigger(float(mean_change(now["guided"], before["guided"])) / steps, clock, memo)
        memo["values"], memo["full"] = {name: value for name, value in now.items() if name != LEFT}, clock.step

    def _values(self, outputs: Mapping[str, Tensor], seen: Mapping[Any, Tensor], scale: float) -> dict[str, Tensor]:
        left = [value for (stage, _), value in seen.items() if stage == "block_out"]
        found = {
            STEP: left[-1] - seen["block_in", 0],
            BLOCK: left[0] - seen["block_in", self.settings.first],
            LEFT: left[-1],
        }
        guided = outputs.get("cond", next(iter(outputs.values())))
        if {"cond", "uncond"} <= outputs.keys():
            found[CFG] = outputs["uncond"] - guided
            guided = guided - (scale - 1) * found[CFG]
        return {**found, "guided": guided}

    def _trigger(self, moved: float, clock: Clock, memo: dict[str, Any]) -> None:
        early: list[float] = memo.setdefault("early", [])
        if clock.step < self.settings.warm(clock.steps):
            early.append(moved)
        tau = self.settings.tau if self.settings.tau >= 0 else self.settings.kappa * median(early or [moved])
        memo["calm"] = memo.get("calm", 0) + 1 if moved < tau else 0
        memo["on"] = memo["calm"] >= self.settings.stable or (memo.get("on", False) and moved <= 2 * tau)
        memo.setdefault("moved", []).append(moved)

    def decide(
        self, site: Site, probes: Mapping[Any, Tensor], clock: Clock, ready: bool, memo: dict[str, Any]
    ) -> Action:
        """The first site of a step to be asked settles the grain; a grain of which nothing is stored is not used."""
        grain = _grain(site)
        if memo.get("choice", (-1, FULL))[0] != clock.step:
            memo["choice"] = clock.step, self._choose(clock, memo, grain == CFG)
        if _chosen(clock, memo) != grain:
            return Action.COMPUTE
        if not ready:
            memo["choice"] = clock.step, FULL
            return Action.COMPUTE
        self._use(grain, memo)
        return Action.REUSE

    def at_most(self, site: Site, clock: Clock, ready: bool, memo: dict[str, Any]) -> Action:
        """The grain that saves most, on every step between computed ones."""
        if _grain(site) != max(self.gains, key=lambda grain: self.gains[grain]):
            return Action.COMPUTE
        within = memo.get("in_a_row", 0) < self.settings.interval - 1
        may = ready and within and self.settings.verdict(clock, memo) is not Action.COMPUTE
        action = Action.REUSE if may else Action.COMPUTE
        self.settings.count(action, memo)
        return action

    def _choose(self, clock: Clock, memo: dict[str, Any], branch: bool) -> str:
        """The grain of this step, or FULL."""
        age, impacts = clock.step - memo.get("full", clock.step), memo.get("impacts", {})
        on = memo.get("on", False) and 0 < age < self.settings.interval
        if not on or self.settings.verdict(clock, memo) is Action.COMPUTE:
            return self._full(memo)
        asked = self.settings.grains.split("/")
        possible = [g for g in GRAINS if g in impacts and g in asked and (g != CFG or branch)]
        if not possible or (self.settings.worst and min(impacts[g] * age for g in possible) > self.settings.worst):
            return self._full(memo)
        penalties = memo.setdefault("penalties", dict.fromkeys(GRAINS, 1.0))
        return min(possible, key=lambda g: impacts[g] * penalties[g] / self.gains[g])

    def _full(self, memo: dict[str, Any]) -> str:
        self.settings.count(Action.COMPUTE, memo)
        return FULL

    def _use(self, grain: str, memo: dict[str, Any]) -> None:
        self.settings.count(Action.REUSE, memo)
        memo.setdefault("used", []).append(grain)
        for g, penalty in memo["penalties"].items():
            memo["penalties"][g] = min(penalty * FORGIVEN, MOST) if g == grain else max(1.0, penalty / FORGIVEN)

    def remarks(self, memo: dict[str, Any]) -> Sequence[str]:
        moved = memo.get("moved", [])
        if self.settings.tau == 0 or memo.get("used"):
            return []
        if not moved:
            return ["mixcache computed every step: the run was over before its trigger could fire"]
        span = f"{min(moved):.3g} to {max(moved):.3g}"
        moves = f"from one computed step to the next the output moved {span}"
        return [f"mixcache computed every step: its trigger never fired; {moves}"]


def _grain(site: Site) -> str:
    """What reusing a site is."""
    return CFG if site.branch is not None else STEP if site.span and site.span[0] == 0 else BLOCK


def _chosen(clock: Clock, memo: Mapping[str, Any]) -> str:
    step, grain = memo.get("choice", (-1, FULL))
    return str(grain) if step == clock.step else FULL


def _impacts(now: Mapping[str, Tensor], before: Mapping[str, Tensor], scale: float) -> dict[str, float]:
    """What reusing the stored value of each grain would have changed, in units of what it goes into."""
    found = {STEP: float(mean_change(now[STEP], before[STEP]))}
    share = float(now[BLOCK].float().abs().mean() / now[LEFT].float().abs().mean())
    found[BLOCK] = float(mean_change(now[BLOCK], before[BLOCK])) * share
    if CFG in now and CFG in before:
        moved = (now[CFG].float() - before[CFG].float()).abs().mean()
        found[CFG] = float(abs(scale - 1) * moved / now["guided"].float().abs().mean())
    return found
