"""TaoCache: Structure-Maintained Video Generation Acceleration (arXiv 2508.08978), a reconstruction.

The paper says what is measured (cosines and norm ratios of consecutive changes of the output) and that late steps are
skipped; the predictor is the least-squares rule which these two numbers determine.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod, sqrt
from typing import Any

import torch
from torch import Tensor

from ditloom.caches.amounts import at_least
from ditloom.caches.guards import Guards
from ditloom.caches.predictors import Linear, Weights
from ditloom.caches.trace import Trace
from ditloom.contracts.clock import Schedule
from ditloom.contracts.errors import UnknownName, UserError
from ditloom.contracts.method import Assets, Calibrated, Control, Handler, Steps, Touch
from ditloom.contracts.plan import Action
from ditloom.contracts.registry import register
from ditloom.contracts.site import OUTPUT
from ditloom.sites.codecs import VALUE
from ditloom.sites.surface import Surface

TABLE = ("cosine", "ratio", "size")


@register(
    "taocache",
    paper="TaoCache, arXiv 2508.08978 (reconstruction)",
    family="caches",
    plain="Late in the run, skips the whole network and predicts its output from the last two, by a table.",
)
@dataclass(frozen=True, kw_only=True)
class TaoCache(Guards, Calibrated):
    """Skip the whole network late: ``e_s = e_{s-1} + d_s`` with ``d_s = alpha_s d_{s-1}`` and e its output.

    From `ditloom calibrate`: c_s = cos(d_s, d_{s-1}) and rho_s = |d_s| / |d_{s-1}|. alpha "ls" is c rho, which leaves
    the least error, "norm" is rho, which keeps the norm; a number needs no calibration (0 holds, 1 extrapolates
    linearly). From the share `start` of the steps on, `computed` steps and then `max_consecutive` skipped ones; with a
    budget, as many as keep ``sum |d_s| sqrt(1 - c_s^2) / |e_s|`` below it. Reconstruction: rule, start and mask.
    """

    start: float = 0.5
    computed: int = 2
    max_consecutive: int = 2
    budget: float = 0.0
    alpha: str | float = "ls"

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(2, computed=self.computed)
        if isinstance(self.alpha, str) and self.alpha not in ("ls", "norm"):
            raise UnknownName("alpha", self.alpha, ("ls", "norm"))
        if self.budget < 0:
            raise UserError(f"the error budget is at least 0; got {self.budget}")

    @classmethod
    def touches(cls) -> Sequence[Touch]:
        return (Touch("output", "around"),)

    @property
    def needs_calibration(self) -> bool:
        return isinstance(self.alpha, str) or self.budget > 0

    def bind(self, surface: Surface, assets: Assets | None = None) -> Handler:
        learned = self.learned(assets) if self.needs_calibration else None
        table = {name: learned.tensors[name].tolist() for name in TABLE} if learned is not None else {}
        return Outputs(self, table, int(getattr(surface.backbone.preset, "channels", 0)))

    def factors(self, table: Mapping[str, Sequence[float]], steps: int) -> tuple[float, ...]:
        """alpha of every step."""
        if not isinstance(self.alpha, str):
            return (float(self.alpha),) * steps
        cosines = table["cosine"] if self.alpha == "ls" else (1.0,) * steps
        return tuple(c * r for c, r in zip(cosines, table["ratio"], strict=True))

    @classmethod
    def from_trace(cls, trace: Trace) -> Mapping[str, Tensor]:
        """c, rho and |d| / |e| of every step, over all pictures and branches; 0 where there are none."""
        found = {name: getattr(trace, name).nanmean(0).nan_to_num(0.0) for name in TABLE}
        return found if trace.steps > 2 else {}

    @classmethod
    def advice(cls, trace: Trace, fitted: Mapping[str, Tensor]) -> Sequence[tuple[str, str]]:
        half = trace.steps // 2
        c, rho = (fitted[name][half:].mean().item() for name in TABLE[:2])
        return [("taocache", f"skips every other two of the late steps; there c = {c:.2f} and rho = {rho:.2f}")]


@dataclass(frozen=True)
class ScalarDelta(Linear):
    """``e + d (alpha_{s+1} + alpha_{s+1} alpha_{s+2} + ...)`` with d the change at the last computed step s.

    Where the computed step before lies further back, d is what the same rule makes of the change over that gap.
    channels: only so many are predicted, the others (a learned variance) are held; 0 is all.
    """

    alphas: Weights
    channels: int = 0
    depth: int = 2

    def weights(self, steps: tuple[int, ...], step: int) -> Weights:
        before, last = steps
        grown = self._products(before + 1, last)
        total = 1 + sum(grown)
        share = (grown[-1] if grown else 1.0) / total if abs(total) > 1e-6 else 0.0
        ahead = share * sum(self._products(last, step))
        return (-ahead, 1 + ahead)

    def _products(self, after: int, until: int) -> list[float]:
        """alpha_{after+1}, alpha_{after+1} alpha_{after+2}, ... up to alpha_until."""
        return [prod(self.alphas[after + 1 : k + 1]) for k in range(after + 1, until + 1)]

    def __call__(self, history: Sequence[tuple[int, Any]], step: int) -> Any:
        found, newest = super().__call__(history, step), history[-1][1]
        if not self.channels or not isinstance(newest, Tensor) or newest.shape[1] <= self.channels:
            return found
        return torch.cat([found[:, : self.channels], newest[:, self.channels :]], dim=1)


class Outputs(Handler):
    """The plan: which late steps are skipped, and the predictor of their outputs."""

    key = "taocache"

    def __init__(self, settings: TaoCache, table: Mapping[str, Sequence[float]], channels: int):
        self.settings, self.table, self.channels = settings, table, channels

    def controls(self, surface: Surface) -> Sequence[Control]:
        return [Control(OUTPUT, VALUE, self.predictor)]

    @property
    def predictor(self) -> ScalarDelta:
        """With a table, of its number of steps; with a number, of any."""
        steps = len(self.table["ratio"]) if self.table else 10_000
        return ScalarDelta(self.settings.factors(self.table, steps), self.channels)

    def plan(self, schedule: Schedule, surface: Surface) -> Steps:
        if self.table and len(self.table["ratio"]) != schedule.steps:
            raise UserError(
                f"taocache has a table of {len(self.table['ratio'])} steps and this run has {schedule.steps}: "
                f"calibrate for {schedule.steps} steps"
            )
        return [{OUTPUT: Action.REUSE} if skip else {} for skip in self.skipped(schedule)]

    def skipped(self, schedule: Schedule) -> list[bool]:
        """For every step whether it is skipped: after two real ones at least, within the guards and the budget."""
        mask: list[bool] = []
        real = in_a_row = 0
        spent = 0.0
        for step, may in enumerate(self.settings.allowed(schedule)):
            spent += self._error(step)
            begins = not in_a_row and real >= self.settings.computed
            skip = may and (begins or in_a_row > 0) and self._within(in_a_row, sum(mask), spent)
            real, in_a_row = (0, in_a_row + 1) if skip else (real + 1, 0)
            spent = spent if skip else 0.0
            mask.append(skip)
        return mask

    def _within(self, in_a_row: int, in_all: int, spent: float) -> bool:
        most, total, budget = self.settings.max_consecutive, self.settings.max_total, self.settings.budget
        if total and in_all >= total:
            return False
        return spent < budget if budget else not most or in_a_row < most

    def _error(self, step: int) -> float:
        """The relative error that predicting a step leaves, by the table."""
        if not self.settings.budget:
            return 0.0
        cosine, size = self.table["cosine"][step], self.table["size"][step]
        return size * sqrt(max(1 - cosine * cosine, 0.0))
