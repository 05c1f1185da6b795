"""TeaCache: Timestep Embedding Tells (CVPR 2025, arXiv 2411.19108)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ditloom.caches.deciding import Deciding
from ditloom.caches.guards import Amount, Guards
from ditloom.caches.polynomials import PUBLISHED
from ditloom.caches.predictors import predictor
from ditloom.caches.trace import INDICATORS, Trace
from ditloom.contracts.clock import Clock, Schedule
from ditloom.contracts.errors import UnknownName
from ditloom.contracts.method import Assets, Calibrated, Handler, Probe, Steps, Touch, mean_change
from ditloom.contracts.plan import Action
from ditloom.contracts.registry import register
from ditloom.contracts.site import Site
from ditloom.sites.surface import Surface

IDENTITY = (1.0, 0.0)
DEGREE = 4


@register(
    "teacache",
    paper="Timestep Embedding Tells, arXiv 2411.19108",
    family="caches",
    plain="Skips the whole network while its input has moved little, and adds the change that it made the last time.",
)
@dataclass(frozen=True, kw_only=True)
class TeaCache(Guards, Calibrated):
    """Reuse the change of the whole stack while ``A = sum_s p(relL1(z_s, z_{s-1})) < threshold``.

    z is what the first block reads (indicator "modulated_in") or the "time_embedding"; "auto" is the first of them that
    a model has. A sums since the last computed step, z moves on with every step. p maps the change of z to that of the
    output: fitted by `ditloom calibrate`, one of the published fits (fit=flux, wan2.1-t2v-1.3b, ...), `coefficients`
    with the highest power first, or fit=identity; without a calibration it is the identity, which needs a threshold of
    its own. Where p is negative it counts as 0. threshold 0.25 is FLUX's at 1.5x; the first and last step are computed.
    """

    threshold: float = 0.25
    indicator: str = "auto"
    fit: str = ""
    coefficients: tuple[float, ...] = ()
    warmup: Amount = 1
    tail: Amount = 1
    predictor: str = "hold"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.indicator not in ("auto", *INDICATORS):
            raise UnknownName("indicator", self.indicator, ("auto", *INDICATORS))
        if self.fit not in ("", "identity", *PUBLISHED):
            raise UnknownName("fit", self.fit, ("identity", *PUBLISHED))
        predictor(self.predictor)

    @classmethod
    def touches(cls) -> Sequence[Touch]:
        return (Touch("range", "around"),)

    @property
    def needs_calibration(self) -> bool:
        return False

    def bind(self, surface: Surface, assets: Assets | None = None) -> Handler:
        looked = self.indicator
        if looked == "auto":
            looked = INDICATORS[0] if surface.has_stage(INDICATORS[0], 0) else INDICATORS[1]
        elif looked == INDICATORS[0] and not surface.has_stage(looked, 0):
            surface.require(looked, "teacache")
        return Telling(self, surface, looked, self.learned(assets))

    def polynomial(self, indicator: str, assets: Assets | None) -> tuple[float, ...]:
        """p, highest power first: what is given, published, calibrated, or the identity."""
        if self.coefficients or self.fit:
            return self.coefficients or PUBLISHED.get(self.fit, IDENTITY)
        if assets is not None and indicator in assets.tensors:
            return tuple(assets.tensors[indicator].tolist())
        return IDENTITY

    @classmethod
    def from_trace(cls, trace: Trace) -> Mapping[str, Tensor]:
        """For each indicator the polynomial of least squares over all steps and pictures, and its R^2."""
        found: dict[str, Tensor] = {}
        for name in trace.indicators:
            x, y = (t.numpy() for t in trace.pairs(name))
            degree = min(DEGREE, len(np.unique(x)) - 1)
            if degree >= 0:
                fitted = np.polyfit(x, y, degree)
                rest = ((np.polyval(fitted, x) - y) ** 2).sum() / max(((y - y.mean()) ** 2).sum(), 1e-30)
                found |= {name: torch.from_numpy(fitted), f"{name}.r2": torch.tensor(1 - rest)}
        return found

    @classmethod
    def advice(cls, trace: Trace, fitted: Mapping[str, Tensor]) -> Sequence[tuple[str, str]]:
        name = next((n for n in INDICATORS if n in fitted), None)
        if name is None:
            return []
        telling = [estimate(fitted[name].tolist(), x) for x in trace.indicators[name].nanmean(0)[1:].tolist()]
        told = f"R^2 {float(fitted[f'{name}.r2']):.2f} of {name}; reuses about"
        halves = [(share, threshold_for(telling, share)) for share in (0.3, 0.5)]
        return [(f"teacache:threshold={t:.3g}", f"{told} {share:.0%} of the steps") for share, t in halves]


class Telling(Deciding):
    """The decision by the sum of estimated changes since the last computed step."""

    def __init__(self, settings: TeaCache, surface: Surface, indicator: str, assets: Assets | None):
        super().__init__(settings, [(0, surface.blocks)], settings.threshold, predictor(settings.predictor))
        self.indicator, self.made_for = indicator, assets.made_for if assets else {}
        self.coefficients = settings.polynomial(indicator, assets)
        self.plain = self.coefficients == IDENTITY and not (settings.fit or settings.coefficients)

    def plan(self, schedule: Schedule, surface: Surface) -> Steps:
        if not self.plain and "steps" in self.made_for:
            Assets({}, self.made_for).check(self.key, steps=schedule.steps)
        return super().plan(schedule, surface)

    def probes(self, site: Site) -> Sequence[Probe]:
        return (Probe(self.indicator),)

    def difference(self, probes: Mapping[Probe, Tensor], clock: Clock, memo: dict[str, Any]) -> float:
        (now,) = probes.values()
        memo["sum"] += estimate(self.coefficients, float(mean_change(now, memo["before"])))
        return memo["sum"]

    def learn(self, probes: Mapping[Probe, Tensor], action: Action, memo: dict[str, Any]) -> None:
        (memo["before"],) = probes.values()
        memo["sum"] = 0.0 if action is Action.COMPUTE else memo["sum"]

    def remarks(self, memo: dict[str, Any]) -> Sequence[str]:
        said = "teacache judges by the plain change of its indicator, as there is no calibration for these settings"
        return [*([said] if self.plain else ()), *super().remarks(memo)]


def estimate(coefficients: Sequence[float], change: float) -> float:
    """p(change), highest power first, at least 0."""
    return max(float(np.polyval(coefficients, change)), 0.0)


def threshold_for(changes: Sequence[float], share: float) -> float:
    """The threshold at which steps with these estimated changes are reused in about `share` of all cases."""
    candidates = np.linspace(0.0, sum(changes) + 1e-9, 2000)[1:]
    return float(min(candidates, key=lambda t: abs(reused_at(changes, t) / (len(changes) + 1) - share)))


def reused_at(changes: Sequence[float], threshold: float) -> int:
    """How many steps a threshold reuses, the first and the last left out."""
    total, reused = 0.0, 0
    for change in changes[:-1]:
        total += change
        reused += total < threshold
        total = total if total < threshold else 0.0
    return reused
