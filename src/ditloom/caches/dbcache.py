"""DBCache: the first blocks tell whether those in the middle are reused; the last ones are computed again.

Dual block cache of vipshop/cache-dit (no paper); with one first block and no last one it is FBCache.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ditloom.caches.amounts import at_least
from ditloom.caches.deciding import Deciding, between
from ditloom.caches.guards import Amount, Guards
from ditloom.caches.predictors import predictor
from ditloom.contracts.clock import Clock
from ditloom.contracts.method import Assets, Handler, Method, Probe, Touch, mean_change
from ditloom.contracts.plan import Action
from ditloom.contracts.registry import register
from ditloom.contracts.site import Site
from ditloom.sites.surface import Surface


@register(
    "dbcache",
    paper="Cache-DiT: dual block cache",
    family="caches",
    plain="Runs the first few blocks, and skips the middle ones while the first change their input as they did before.",
)
@dataclass(frozen=True, kw_only=True)
class DBCache(Guards, Method):
    """Reuse ``R = h_{L-B} - h_F`` while ``relL1(r, r*) < threshold``, with r = h_F - h_0 and r* its last computed one.

    first, last: F and B, the blocks that always run. threshold: 0 never reuses, 1 and above always. predictor: how R
    is carried on (hold, taylor:order=1, newton:order=1, foca, dmd). max_accumulated: compute once the differences of a
    run add up to it (0: no limit). Defaults are cache-dit's for FLUX (57 blocks): F8B0, 8 steps of warm-up, 0.08.
    """

    first: int = 8
    last: int = 0
    threshold: float = 0.08
    warmup: Amount = 8
    predictor: str = "hold"
    max_accumulated: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(1, first=self.first)
        at_least(0, last=self.last)
        predictor(self.predictor)

    @classmethod
    def touches(cls) -> Sequence[Touch]:
        return (Touch("range", "around"),)

    def bind(self, surface: Surface, assets: Assets | None = None) -> Handler:
        threshold = math.inf if self.threshold >= 1 else self.threshold
        return FirstBlocks(self, surface, self.first, self.last, threshold, self.predictor, self.max_accumulated)


class FirstBlocks(Deciding):
    """The decision by the change that the first blocks make, against the last step on which all were computed."""

    def __init__(
        self,
        guards: Guards,
        surface: Surface,
        first: int,
        last: int,
        threshold: float,
        forecast: str,
        most: float = 0.0,
        channels: int = 1,
    ):
        span = between(surface, type(guards).__registration__.name, first, last, "dbcache")
        super().__init__(guards, [span], threshold, predictor(forecast))
        self.most, self.channels = most, channels
        self.looks = (Probe("residual", span=(0, first)),)

    def probes(self, site: Site) -> Sequence[Probe]:
        return self.looks

    def verdict(self, clock: Clock, memo: Mapping[str, Any]) -> Action | None:
        full = self.most and sum(d.difference for d in memo.get("measured", ())) >= self.most
        return super().verdict(clock, memo) or (Action.COMPUTE if full else None)

    def difference(self, probes: Mapping[Probe, Tensor], clock: Clock, memo: dict[str, Any]) -> float:
        return float(mean_change(self._seen(probes), memo["reference"]))

    def learn(self, probes: Mapping[Probe, Tensor], action: Action, memo: dict[str, Any]) -> None:
        if action is Action.COMPUTE:
            memo["reference"] = self._seen(probes)

    def _seen(self, probes: Mapping[Probe, Tensor]) -> Tensor:
        """Every k-th channel of the first blocks' change."""
        (change,) = probes.values()
        return change if self.channels == 1 else change[..., :: self.channels].contiguous()
