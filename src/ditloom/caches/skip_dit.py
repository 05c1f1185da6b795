"""Skip-Cache: Accelerating Vision Diffusion Transformers with Skip Branches (arXiv 2411.17616)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ditloom.caches.amounts import at_least
from ditloom.caches.static import Reuse, StaticCache, between
from ditloom.contracts.clock import Schedule
from ditloom.contracts.errors import UserError
from ditloom.contracts.method import Assets, Handler, Method, Touch
from ditloom.contracts.registry import register
from ditloom.sites.surface import Surface


@register(
    "skip-dit",
    paper="Accelerating Vision Diffusion Transformers with Skip Branches, arXiv 2411.17616",
    family="caches",
    plain="On most steps runs only the outermost blocks of a network with long skips, and keeps the inner result.",
)
@dataclass(frozen=True, kw_only=True)
class SkipCache(Method):
    """On a backbone with long skips: every `interval`-th step in full; the others run the outer blocks only.

    What enters the last `blocks` blocks, before the skip is merged, is reused as it was; the first `blocks` blocks
    run on the current input, which reaches the last ones through the skips.

    low, high: noise levels strictly between which it happens. Steps are counted from the first one of the run.
    """

    interval: int = 2
    blocks: int = 1
    low: float = 0.05
    high: float = 0.7

    def __post_init__(self) -> None:
        at_least(1, interval=self.interval, blocks=self.blocks)
        between(self.low, self.high)

    @classmethod
    def touches(cls) -> Sequence[Touch]:
        return (Touch("range", "around"), Touch("skip", "around"))

    def cached(self, schedule: Schedule) -> Iterable[int]:
        """The steps that run the outer blocks only."""
        inside = between(self.low, self.high)
        return [s for s in range(schedule.steps) if s % self.interval and inside(schedule.clock(s))]

    def bind(self, surface: Surface, assets: Assets | None = None) -> Handler:
        backbone, k = surface.backbone, self.blocks
        if not backbone.skips:
            reason = backbone.missing.get("skip", f"{backbone.preset.family} has no long skips")
            raise UserError(f"skip-dit brings the current input to the last blocks through long skips: {reason}")
        if 2 * k >= surface.blocks:
            raise UserError(
                f"skip-dit runs {k} blocks at either end, and this model has {surface.blocks}: nothing is left to reuse"
            )
        surface.range(k, surface.blocks - k)
        return StaticCache("skip-dit", [Reuse(lambda s: [s.range(k, s.blocks - k)], self.cached)])
