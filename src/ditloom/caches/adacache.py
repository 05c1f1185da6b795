"""AdaCache: Adaptive Caching for Faster Video Generation with Diffusion Transformers (arXiv 2411.02397)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ditloom.caches.guards import Guards
from ditloom.caches.predictors import predictor
from ditloom.contracts.clock import Clock, Rows, Schedule
from ditloom.contracts.errors import UserError
from ditloom.contracts.method import Assets, Control, Handler, Method, Steps, Tap, Touch, mean_change
from ditloom.contracts.plan import Action
from ditloom.contracts.registry import register
from ditloom.contracts.site import Site
from ditloom.sites.codecs import DELTA
from ditloom.sites.surface import Surface

CODEBOOK = ((0.03, 12), (0.05, 10), (0.07, 8), (0.09, 6), (0.11, 4), (1.0, 3))


@register(
    "adacache",
    paper="Adaptive Caching, arXiv 2411.02397",
    family="caches",
    plain="Looks after each full step how fast things change, and skips more steps the slower they do.",
)
@dataclass(frozen=True, kw_only=True)
class AdaCache(Guards, Method):
    """After a computed step, a codebook says how far the next one is: its rate r reuses the r - 1 steps in between.

    The distance is relL1 of the middle block's attention output to that of the computed step before, divided by the
    steps between them; the first rate whose bound is above it counts, the last one beyond all bounds. The original
    takes the output after its gate, here it is taken before it, as sites are. codebook: (bound, rate) pairs, those of
    the Wan code of ModelTC/LightX2V. scale: multiplies the distance; the motion term of the paper, which is about
    video, is not computed.
    """

    codebook: tuple[tuple[float, int], ...] = CODEBOOK
    scale: float = 1.0
    predictor: str = "hold"

    def __post_init__(self) -> None:
        super().__post_init__()
        predictor(self.predictor)
        bounds = [bound for bound, _ in self.codebook]
        if not bounds or bounds != sorted(bounds) or any(rate < 1 for _, rate in self.codebook):
            raise UserError(f"a codebook has ascending bounds and rates of at least 1; got {self.codebook}")

    @classmethod
    def touches(cls) -> Sequence[Touch]:
        return (Touch("range", "around"), Touch("attn", "capture"))

    def bind(self, surface: Surface, assets: Assets | None = None) -> Handler:
        surface.require("attn", "adacache")
        surface.range(0, surface.blocks)
        return Adapting(self)

    def rate(self, distance: float) -> int:
        """Steps to the next computed one."""
        return next((rate for bound, rate in self.codebook if distance < bound), self.codebook[-1][1])


class Adapting(Handler):
    """Counts down the steps that the last computed one has granted."""

    key = "adacache"

    def __init__(self, settings: AdaCache):
        self.settings = settings

    def controls(self, surface: Surface) -> Sequence[Control]:
        return [Control(surface.range(0, surface.blocks), DELTA, predictor(self.settings.predictor))]

    def plan(self, schedule: Schedule, surface: Surface) -> Steps:
        site, allowed = surface.range(0, surface.blocks), self.settings.allowed(schedule)
        return [{site: Action.DEFER} if any(allowed[s:]) else {} for s in range(schedule.steps)]

    def taps(self, schedule: Schedule, surface: Surface) -> Sequence[Sequence[Tap]]:
        """The middle block's attention, until no step is left to reuse."""
        leading = "cond" if "cond" in schedule.branches else schedule.branches[0]
        middle = min(surface.sites("attn"), key=lambda site: abs((site.block or 0) - surface.blocks // 2))
        tap, allowed = Tap(middle.inner, middle.block, branches=(leading,)), self.settings.allowed(schedule)
        return [[tap] if any(allowed[s + 1 :]) else [] for s in range(schedule.steps)]

    def noted(self, tap: Tap, value: Tensor, clock: Clock, rows: Rows, memo: dict[str, Any]) -> None:
        if not clock.may_reuse:
            return
        rate = 1
        if "reference" in memo:
            step, reference = memo["reference"]
            distance = self.settings.scale * float(mean_change(value, reference)) / (clock.step - step)
            rate = self.settings.rate(distance)
            memo.setdefault("measured", []).append(distance)
        memo["reference"], memo["until"] = (clock.step, value), clock.step + rate

    def decide(
        self, site: Site, probes: Mapping[Any, Tensor], clock: Clock, ready: bool, memo: dict[str, Any]
    ) -> Action:
        action = self.settings.verdict(clock, memo) if ready else Action.COMPUTE
        if action is None:
            action = Action.REUSE if clock.step < memo["until"] else Action.COMPUTE
        self.settings.count(action, memo)
        return action

    def at_most(self, site: Site, clock: Clock, ready: bool, memo: dict[str, Any]) -> Action:
        """The longest rate of the codebook, as soon as two computed steps have told a distance."""
        longest = max(rate for _, rate in self.settings.codebook)
        granted = memo.get("computed", 0) > 1 and memo.get("in_a_row", 0) < longest - 1
        action = (self.settings.verdict(clock, memo) or Action.REUSE) if ready and granted else Action.COMPUTE
        self.settings.count(action, memo)
        memo["computed"] = memo.get("computed", 0) + (action is Action.COMPUTE)
        return action

    def remarks(self, memo: dict[str, Any]) -> Sequence[str]:
        measured, bounds = memo.get("measured", []), [bound for bound, _ in self.settings.codebook]
        if measured and min(measured) >= bounds[-1]:
            span = f"{min(measured):.3g} to {max(measured):.3g}"
            return [f"adacache: every distance, {span}, is beyond its codebook, which ends at {bounds[-1]:g}"]
        return []
