"""First-Block Cache: one block tells whether all the others are reused (ParaAttention; diffusers; no paper)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ditloom.caches.amounts import at_least
from ditloom.caches.dbcache import FirstBlocks
from ditloom.caches.guards import Guards
from ditloom.caches.predictors import predictor
from ditloom.contracts.method import Assets, Handler, Method, Touch
from ditloom.contracts.registry import register
from ditloom.sites.surface import Surface


@register(
    "fbcache",
    paper="ParaAttention: First-Block Cache",
    family="caches",
    plain="Runs the first block, and skips all others while that one changes its input as when they last ran.",
)
@dataclass(frozen=True, kw_only=True)
class FBCache(Guards, Method):
    """Reuse ``R = h_L - h_1`` while ``mean|r* - r| / mean|r*| < threshold``, with r = h_1 - h_0.

    r* is that of the last step on which all blocks were computed, so that slow drift adds up until it shows.
    threshold: 0.08 for FLUX, 0.06 for HunyuanVideo; quantised models need more; 0 never reuses. predictor: how R is
    carried on (hold, taylor:order=2, foca, dmd). channels: compare every k-th channel only.
    """

    threshold: float = 0.08
    predictor: str = "hold"
    channels: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(1, channels=self.channels)
        predictor(self.predictor)

    @classmethod
    def touches(cls) -> Sequence[Touch]:
        return (Touch("range", "around"),)

    def bind(self, surface: Surface, assets: Assets | None = None) -> Handler:
        return FirstBlocks(self, surface, 1, 0, self.threshold, self.predictor, channels=self.channels)
