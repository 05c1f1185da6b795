"""MagCache: Fast Video Generation with Magnitude-Aware Cache (NeurIPS 2025, arXiv 2506.09045)."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from ditloom.caches.amounts import at_least
from ditloom.caches.guards import Amount, Guards
from ditloom.caches.predictors import predictor
from ditloom.caches.trace import Trace
from ditloom.contracts.clock import Schedule
from ditloom.contracts.errors import UserError
from ditloom.contracts.method import Assets, Calibrated, Control, Handler, Steps, Touch
from ditloom.contracts.plan import Action
from ditloom.contracts.registry import register
from ditloom.sites.codecs import DELTA
from ditloom.sites.surface import Surface

FLUX = (
    *(1.0, 1.21094, 1.11719, 1.07812, 1.0625, 1.03906, 1.03125, 1.03906, 1.02344, 1.03125, 1.02344, 0.98047, 1.01562),
    *(1.00781, 1.0, 1.00781, 1.0, 1.00781, 1.0, 1.0, 0.99609, 0.99609, 0.98047, 0.98828, 0.96484, 0.95703, 0.93359),
    0.89062,
)
"""gamma of FLUX.1-dev for 28 steps, as published by Zehong-Ma/MagCache."""
RATIO = "ratio"
Entry = TypeVar("Entry")


@register(
    "magcache",
    paper="MagCache, arXiv 2506.09045",
    family="caches",
    plain="Skips the whole network on steps where a table made beforehand says that its change hardly differs in size.",
)
@dataclass(frozen=True, kw_only=True)
class MagCache(Guards, Calibrated):
    """Reuse the change R of the whole stack while ``E = sum |1 - prod gamma| < threshold``, known before the run.

    gamma_s = mean over tokens of ``|R_s| / |R_{s-1}|``, from `ditloom calibrate` (or ratios="flux", or numbers). From
    the share `warmup` of the steps on, product and sum run since the last computed step, at most `max_consecutive`
    steps are reused in a row. interpolate: a table of another number of steps may be used, its nearest entries.
    always: entries of the table whose steps are computed whatever they say. Defaults are those of diffusers: 0.06, 3 in
    a row, the first 20 % computed; the original's for FLUX are threshold=0.24, max_consecutive=5, warmup=0.1 and
    always=(11,). The table needs no tensor and holds for all prompts, so the whole decision is a plan.
    """

    threshold: float = 0.06
    max_consecutive: int = 3
    warmup: Amount = 0.2
    ratios: str | tuple[float, ...] = ()
    interpolate: bool = False
    always: tuple[int, ...] = ()
    predictor: str = "hold"

    def __post_init__(self) -> None:
        super().__post_init__()
        predictor(self.predictor)
        at_least(0, **{f"always[{i}]": entry for i, entry in enumerate(self.always)})
        if isinstance(self.ratios, str) and self.ratios not in ("", "flux"):
            raise UserError(f"ratios are numbers or 'flux'; got {self.ratios!r}")

    @classmethod
    def touches(cls) -> Sequence[Touch]:
        return (Touch("range", "around"),)

    @property
    def needs_calibration(self) -> bool:
        return not self.ratios

    @property
    def tolerates(self) -> frozenset[str]:
        return frozenset({"steps"} if self.interpolate else ())

    def bind(self, surface: Surface, assets: Assets | None = None) -> Handler:
        if self.ratios:
            return Magnitudes(self, surface, FLUX if isinstance(self.ratios, str) else self.ratios)
        learned = self.learned(assets)
        assert learned is not None
        return Magnitudes(self, surface, learned.tensors[RATIO].tolist())

    @classmethod
    def from_trace(cls, trace: Trace) -> Mapping[str, Tensor]:
        """gamma [S] over all pictures, 1 on the first step."""
        ratio = trace.growth.nanmean(0)
        return {RATIO: torch.where(ratio.isfinite(), ratio, 1.0)}

    @classmethod
    def advice(cls, trace: Trace, fitted: Mapping[str, Tensor]) -> Sequence[tuple[str, str]]:
        ratios, told = fitted[RATIO].tolist(), "reuses {} of the {} steps"
        settings = [cls(threshold=t, max_consecutive=k) for t, k in ((0.06, 3), (0.12, 2), (0.24, 5))]
        counts = [sum(reused_steps(s, ratios, _plain(len(ratios)))) for s in settings]
        return [
            (f"magcache:threshold={s.threshold:g},max_consecutive={s.max_consecutive}", told.format(n, len(ratios)))
            for s, n in zip(settings, counts, strict=True)
        ]


class Magnitudes(Handler):
    """The plan that a table of magnitudes gives."""

    key = "magcache"

    def __init__(self, settings: MagCache, surface: Surface, ratios: Sequence[float]):
        self.settings, self.ratios = settings, tuple(ratios)
        surface.range(0, surface.blocks)

    def controls(self, surface: Surface) -> Sequence[Control]:
        return [Control(surface.range(0, surface.blocks), DELTA, predictor(self.settings.predictor))]

    def plan(self, schedule: Schedule, surface: Surface) -> Steps:
        steps, site = schedule.steps, surface.range(0, surface.blocks)
        if len(self.ratios) != steps and not self.settings.interpolate:
            raise UserError(
                f"magcache has a table of {len(self.ratios)} steps and this run has {steps}: calibrate for {steps} "
                "steps, or allow its nearest entries with interpolate=True"
            )
        kept = {s for s, entry in enumerate(nearest(range(len(self.ratios)), steps)) if entry in self.settings.always}
        mask = reused_steps(self.settings, nearest(self.ratios, steps), schedule, kept)
        return [{site: Action.REUSE} if reuse else {} for reuse in mask]


def reused_steps(
    settings: MagCache, ratios: Sequence[float], schedule: Schedule, kept: Collection[int] = ()
) -> list[bool]:
    """For every step whether it is reused: the accumulated error of the magnitude, within guards; kept ones never."""
    mask: list[bool] = []
    product, total, in_a_row = 1.0, 0.0, 0
    for step, (ratio, may) in enumerate(zip(ratios, settings.allowed(schedule), strict=True)):
        product, in_a_row = product * ratio, in_a_row + 1
        total += abs(1 - product)
        within = not settings.max_consecutive or in_a_row <= settings.max_consecutive
        left = not settings.max_total or sum(mask) < settings.max_total
        reuse = may and within and left and step not in kept and total < settings.threshold
        if not reuse:
            product, total, in_a_row = 1.0, 0.0, 0
        mask.append(reuse)
    return mask


def nearest(table: Sequence[Entry], steps: int) -> list[Entry]:
    """A table stretched to another number of steps: for each the nearest entry in relative position."""
    scale = (len(table) - 1) / max(steps - 1, 1)
    return [table[round(s * scale)] for s in range(steps)]


def _plain(steps: int) -> Schedule:
    times = tuple(1 - s / steps for s in range(steps + 1))
    return Schedule(times, times)
