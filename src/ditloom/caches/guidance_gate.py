"""The guidance gate: late in a run, the unconditional branch is the conditional one plus a stored difference."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ditloom.caches.amounts import Amount, at_least, check_amount, count_of
from ditloom.caches.static import Reuse, StaticCache
from ditloom.contracts.clock import Schedule
from ditloom.contracts.method import Assets, Handler, Method, Touch
from ditloom.contracts.registry import register
from ditloom.contracts.site import Site
from ditloom.sites.codecs import DELTA
from ditloom.sites.surface import Surface


@register(
    "guidance-gate",
    paper="FastVideo's guidance gate, after Adaptive Guidance: Training-free Acceleration, arXiv 2312.12487",
    family="caches",
    plain="Late in the run, computes only the half with the prompt and keeps its last difference to the half without.",
)
@dataclass(frozen=True, kw_only=True)
class GuidanceGate(Method):
    """Both branches up to `start`; from there the conditional one alone, with ``uncond = cond + (uncond - cond)``.

    The difference is the last computed one. FastVideo's default is never to gate; half the run is the choice here.

    start: the first gated step (20: that step; 0.5: that share of them). interval: from there on every so many-th step
    of the run computes both branches again (0: none does).
    """

    start: Amount = 0.5
    interval: int = 0

    def __post_init__(self) -> None:
        check_amount("start", self.start)
        at_least(0, interval=self.interval)

    @classmethod
    def touches(cls) -> Sequence[Touch]:
        return (Touch("branch", "around"),)

    def gated(self, schedule: Schedule) -> Iterable[int]:
        """The steps on which the conditional branch runs alone."""
        first = max(count_of(self.start, schedule.steps), 1)
        return [s for s in range(first, schedule.steps) if self.interval == 0 or (s + 1) % self.interval]

    def bind(self, surface: Surface, assets: Assets | None = None) -> Handler:
        return StaticCache("guidance-gate", [Reuse(unconditional, self.gated, DELTA)])


def unconditional(surface: Surface) -> Sequence[Site]:
    """The branch without the condition."""
    return [surface.branch("uncond")]
