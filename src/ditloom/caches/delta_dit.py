"""Δ-DiT: A Training-Free Acceleration Method Tailored for Diffusion Transformers (arXiv 2406.01125)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ditloom.caches.amounts import Amount, at_least, check_amount, count_of
from ditloom.caches.static import Reuse, StaticCache, window
from ditloom.contracts.clock import Schedule
from ditloom.contracts.errors import UserError
from ditloom.contracts.method import Assets, Handler, Method, Touch
from ditloom.contracts.registry import register
from ditloom.sites.codecs import DELTA
from ditloom.sites.surface import Surface


@register(
    "delta-dit",
    paper="Δ-DiT: Training-Free Acceleration of Diffusion Transformers, arXiv 2406.01125",
    family="caches",
    plain="Every other step skips a range of blocks, first late and then early ones, and adds their last change.",
)
@dataclass(frozen=True, kw_only=True)
class DeltaDiT(Method):
    """Every `interval`-th step is computed; on the others a range of blocks adds the change it made then.

    Early steps draw outlines, made by front blocks: they reuse the rear range. Late steps draw details: they reuse
    the front range. What is stored is h_j - h_i, added to the current h_i, so that what x_t knows is kept.

    blocks: how many consecutive blocks are reused (21: so many; 0.75: that share). boundary: the first late step (a
    step, or a share of them). A computed step keeps the change of whatever range the steps up to the next one reuse,
    both around the boundary (the paper leaves that open). start, end: the share of the steps that may reuse.
    No code was published; the defaults are the ones that give the published 1.6x on 28 blocks.
    """

    interval: int = 2
    blocks: Amount = 0.75
    boundary: Amount = 0.6
    start: float = 0.0
    end: float = 1.0

    def __post_init__(self) -> None:
        at_least(1, interval=self.interval)
        check_amount("blocks", self.blocks)
        check_amount("boundary", self.boundary)
        window(self.start, self.end)

    @classmethod
    def touches(cls) -> Sequence[Touch]:
        return (Touch("range", "around"),)

    def early(self, schedule: Schedule) -> Iterable[int]:
        """The steps that reuse the rear range."""
        return [s for s in self.reused(schedule) if s < count_of(self.boundary, schedule.steps)]

    def late(self, schedule: Schedule) -> Iterable[int]:
        """The steps that reuse the front range."""
        return [s for s in self.reused(schedule) if s >= count_of(self.boundary, schedule.steps)]

    def reused(self, schedule: Schedule) -> Iterable[int]:
        """All steps that are not computed in full."""
        inside = window(self.start, self.end)
        return [s for s in range(schedule.steps) if s % self.interval and inside.contains(schedule.clock(s))]

    def bind(self, surface: Surface, assets: Assets | None = None) -> Handler:
        count, total = count_of(self.blocks, surface.blocks), surface.blocks
        if not 1 <= count <= total:
            raise UserError(
                f"delta-dit reuses {count} consecutive blocks, and this model has {total}: take 1 to {total}"
            )
        rear, front = surface.range(total - count, total), surface.range(0, count)
        if rear == front:
            return StaticCache("delta-dit", [Reuse(lambda s: [s.range(0, count)], self.reused, DELTA)])
        parts = [
            Reuse(lambda s: [s.range(total - count, total)], self.early, DELTA),
            Reuse(lambda s: [s.range(0, count)], self.late, DELTA),
        ]
        return StaticCache("delta-dit", parts)
