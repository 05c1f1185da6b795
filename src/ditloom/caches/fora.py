"""FORA: Fast-Forward Caching in Diffusion Transformer Acceleration (arXiv 2407.01425)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ditloom.caches.amounts import at_least
from ditloom.caches.static import Reuse, StaticCache, steps_where, submodules, window
from ditloom.contracts.clock import Clock
from ditloom.contracts.method import Assets, Handler, Method, Touch
from ditloom.contracts.registry import register
from ditloom.sites.surface import Surface


@register(
    "fora",
    paper="FORA: Fast-Forward Caching in Diffusion Transformer Acceleration, arXiv 2407.01425",
    family="caches",
    plain="Computes all attentions and feed-forwards every few steps and repeats their outputs in between.",
)
@dataclass(frozen=True, kw_only=True)
class Fora(Method):
    """Attentions and feed-forwards of all blocks are computed every `interval`-th step and reused on the others.

    Stored before the gate, so that the current gates apply. The interval counts back from the last step, which is
    always computed, as is the first. start, end: the share of the steps outside of which everything is computed.
    """

    interval: int = 3
    start: float = 0.0
    end: float = 1.0

    def __post_init__(self) -> None:
        at_least(1, interval=self.interval)
        window(self.start, self.end)

    @classmethod
    def touches(cls) -> Sequence[Touch]:
        return (Touch("attn", "around"), Touch("mlp", "around"))

    def reuses(self, clock: Clock) -> bool:
        """Whether a step is no full one."""
        to_go = clock.steps - 1 - clock.step
        return clock.step > 0 and to_go % self.interval != 0 and window(self.start, self.end).contains(clock)

    def bind(self, surface: Surface, assets: Assets | None = None) -> Handler:
        return StaticCache("fora", [Reuse(submodules, steps_where(self.reuses))])
