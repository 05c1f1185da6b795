"""FasterCache: Training-Free Video Diffusion Model Acceleration with High Quality (ICLR 2025, arXiv 2410.19355)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ditloom.caches.amounts import at_least, check_share
from ditloom.caches.codecs import BandGap, BandScale
from ditloom.caches.predictors import Extrapolate
from ditloom.caches.static import Reuse, StaticCache
from ditloom.contracts.clock import Schedule
from ditloom.contracts.errors import UserError
from ditloom.contracts.method import Assets, Handler, Method, Touch
from ditloom.contracts.registry import register
from ditloom.contracts.site import Site
from ditloom.sites.surface import Surface

KINDS = ("attn", "temporal")


@register(
    "fastercache",
    paper="FasterCache: Training-Free Video Diffusion Model Acceleration, arXiv 2410.19355",
    family="caches",
    plain="Extrapolates attention on every other step, and mostly computes only the half with the prompt.",
)
@dataclass(frozen=True, kw_only=True)
class FasterCache(Method):
    """Attention part: on odd steps ``O + weight (O - O')`` of the last two computed outputs, before the gate.

    Guidance part: only every `interval`-th step computes the unconditional branch; on the others it is the conditional
    one plus the stored difference, whose low frequencies grow by the factor `low` a step, from `switch` on the high
    ones by `high`. A step that computes both branches anew computes their attentions, too.

    attention, guidance: whether each part acts. rising: the weight grows from 0 to `weight` over the run, as in the
    paper; constant, as in the code, by default. attention_start, guidance_start, switch: shares of the steps (15, 17
    and 44 of 50 in the code, counted from 0). Without an unconditional branch only the first part is left.
    """

    attention: bool = True
    guidance: bool = True
    weight: float = 0.5
    rising: bool = False
    attention_start: float = 0.3
    guidance_start: float = 0.34
    interval: int = 5
    low: float = 1.1
    high: float = 1.1
    switch: float = 0.88
    radius: int = 5

    def __post_init__(self) -> None:
        at_least(1, interval=self.interval, radius=self.radius)
        starts = {"attention_start": self.attention_start, "guidance_start": self.guidance_start}
        check_share(switch=self.switch, **starts)
        if not (self.attention or self.guidance):
            raise UserError("fastercache does nothing with attention and guidance both off")

    @classmethod
    def touches(cls) -> Sequence[Touch]:
        return (*(Touch(kind, "around") for kind in KINDS), Touch("branch", "around"))

    def bind(self, surface: Surface, assets: Assets | None = None) -> Handler:
        if self.attention and not attentions(surface):
            surface.require("attn", "fastercache")
        parts = []
        if self.attention:
            parts.append(Reuse(attentions, self.extrapolated, predictor=Extrapolate(self.weight, self.rising)))
        if self.guidance:
            bands = BandScale(self.low, self.high, self.switch)
            parts.append(Reuse(unconditional, self.gated, BandGap(self.radius), bands))
        return StaticCache("fastercache", parts)

    def extrapolated(self, schedule: Schedule) -> Iterable[int]:
        """The steps that reuse attentions: odd ones, but for those that refresh the guidance."""
        first, refreshed = int(self.attention_start * schedule.steps), set(self.refreshed(schedule))
        return [s for s in range(first, schedule.steps) if s % 2 and s not in refreshed]

    def gated(self, schedule: Schedule) -> Iterable[int]:
        """The steps on which the unconditional branch is predicted."""
        return [s for s in self.guided(schedule) if (s + 1) % self.interval]

    def refreshed(self, schedule: Schedule) -> Iterable[int]:
        """The steps among those that compute it again."""
        return [s for s in self.guided(schedule) if (s + 1) % self.interval == 0]

    def guided(self, schedule: Schedule) -> Iterable[int]:
        """The steps of the guidance part."""
        acts = self.guidance and "uncond" in schedule.branches
        return range(max(int(self.guidance_start * schedule.steps), 1), schedule.steps) if acts else ()


def attentions(surface: Surface) -> Sequence[Site]:
    """Attentions among the image's tokens, in space and time."""
    return [site for kind in KINDS for site in surface.sites(kind)]


def unconditional(surface: Surface) -> Sequence[Site]:
    """The branch without the condition, where there is one."""
    return [surface.branch("uncond")] if "uncond" in surface.branches else []
