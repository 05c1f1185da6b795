"""TaylorSeer: From Reusing to Forecasting (ICCV 2025, arXiv 2503.06923)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ditloom.caches.amounts import at_least
from ditloom.caches.predictors import Newton, Taylor
from ditloom.caches.static import Reuse, StaticCache, submodules, whole_stack, window
from ditloom.contracts.clock import Schedule
from ditloom.contracts.method import Assets, Handler, Method, Touch
from ditloom.contracts.registry import register
from ditloom.sites.surface import Surface


@register(
    "taylorseer",
    paper="From Reusing to Forecasting: TaylorSeers, arXiv 2503.06923",
    family="caches",
    plain="Computes attentions and feed-forwards every few steps and forecasts them in between from how they moved.",
)
@dataclass(frozen=True, kw_only=True)
class TaylorSeer(Method):
    """Attentions and feed-forwards are computed every `interval`-th step and forecast on the others.

    The forecast is a Taylor series of order `order` in the step, its derivatives finite differences of computed
    values. Stored before the gate, so that the current gates apply. The first `warm_up` steps are computed.

    lite: forecast what leaves the last block instead, one feature in place of two a block. newton: the polynomial
    through the computed values, which is exact to its order where the published series is only to the first.
    start, end: the share of the steps outside of which everything is computed. Defaults: DiT-XL/2 at 50 DDIM steps.
    """

    interval: int = 4
    order: int = 4
    warm_up: int = 2
    lite: bool = False
    newton: bool = False
    start: float = 0.0
    end: float = 1.0

    def __post_init__(self) -> None:
        at_least(1, interval=self.interval, warm_up=self.warm_up)
        Taylor(self.order)
        window(self.start, self.end)

    @classmethod
    def touches(cls) -> Sequence[Touch]:
        return (Touch("attn", "around"), Touch("mlp", "around"), Touch("range", "around"))

    def forecast(self, schedule: Schedule) -> Iterable[int]:
        """The steps that are not computed: all but the first ones, and of the rest all but every `interval`-th."""
        inside, first = window(self.start, self.end), self.warm_up
        after = range(first, schedule.steps)
        return [s for s in after if (s - first + 1) % self.interval and inside.contains(schedule.clock(s))]

    def bind(self, surface: Surface, assets: Assets | None = None) -> Handler:
        predictor = Newton(self.order) if self.newton else Taylor(self.order)
        sites = whole_stack if self.lite else submodules
        return StaticCache("taylorseer", [Reuse(sites, self.forecast, predictor=predictor)])
