"""DBPrune: every block is asked on every step whether its own change is reused (vipshop/cache-dit; no paper)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ditloom.caches.amounts import at_least
from ditloom.caches.deciding import Deciding
from ditloom.caches.guards import Amount, Guards
from ditloom.caches.predictors import predictor
from ditloom.contracts.clock import Clock
from ditloom.contracts.errors import UserError
from ditloom.contracts.method import Assets, Handler, Method, Predictor, Probe, Touch, mean_change
from ditloom.contracts.plan import Action
from ditloom.contracts.registry import register
from ditloom.contracts.site import Site
from ditloom.sites.surface import Surface

RECENT = 5


@register(
    "dbprune",
    paper="Cache-DiT: dynamic block prune",
    family="caches",
    plain="Skips any block whose input is still like the one it last worked on, and adds the change it made then.",
)
@dataclass(frozen=True, kw_only=True)
class DBPrune(Guards, Method):
    """Block l is replaced by its stored change while what enters it is like what entered when it last ran.

    ``relL1(h_l, h_l*) < threshold``. first, last: blocks that always run, as do those at a long skip. relax: where
    above 0, the threshold grows to relax times the mean of the step's first five differences, as long as that is below
    twice the threshold (1.25 in the original). Guards count for every block apart. Two token tensors a block are held.
    """

    first: int = 8
    last: int = 0
    threshold: float = 0.08
    warmup: Amount = 8
    relax: float = 0.0
    predictor: str = "hold"

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(0, first=self.first, last=self.last)
        predictor(self.predictor)

    @classmethod
    def touches(cls) -> Sequence[Touch]:
        return (Touch("range", "around"),)

    def bind(self, surface: Surface, assets: Assets | None = None) -> Handler:
        spans = [(b, b + 1) for b in range(self.first, surface.blocks - self.last) if _alone(b, surface)]
        if not spans:
            raise UserError(
                f"dbprune always computes the first {self.first} and the last {self.last} blocks and those at a long "
                f"skip: of this model's {surface.blocks} none would be left to reuse"
            )
        return Pruning(self, spans, self.threshold, predictor(self.predictor), self.relax)


class Pruning(Deciding):
    """The decision of every block by what enters it."""

    def __init__(
        self, guards: Guards, spans: Sequence[tuple[int, int]], threshold: float, forecast: Predictor, relax: float
    ):
        super().__init__(guards, spans, threshold, forecast)
        self.relax = relax

    def probes(self, site: Site) -> Sequence[Probe]:
        return (Probe("block_in", block=(site.span or (0, 0))[0]),)

    def limit(self, clock: Clock, memo: Mapping[str, Any]) -> float:
        """The threshold, relaxed where the blocks before have moved more and not too much more."""
        told = [d.difference for notes in memo.values() for d in notes.get("measured", ()) if d.step == clock.step][
            :RECENT
        ]
        relaxed = self.relax * sum(told) / len(told) if told else 0.0
        return max(self.threshold, relaxed) if relaxed < 2 * self.threshold else self.threshold

    def difference(self, probes: Mapping[Probe, Tensor], clock: Clock, memo: dict[str, Any]) -> float:
        (entered,) = probes.values()
        return float(mean_change(entered, memo["reference"]))

    def learn(self, probes: Mapping[Probe, Tensor], action: Action, memo: dict[str, Any]) -> None:
        if action is Action.COMPUTE:
            (entered,) = probes.values()
            memo["reference"] = entered.clone()


def _alone(block: int, surface: Surface) -> bool:
    """Whether a block can be reused by itself: no long skip begins or ends at it, and it keeps the layout."""
    try:
        return surface.keeps_layout(surface.range(block, block + 1))
    except UserError:
        return False
