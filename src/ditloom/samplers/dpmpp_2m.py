"""DPM-Solver++(2M): the data estimate, extrapolated from two steps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

from ditloom.contracts.process import Process
from ditloom.contracts.registry import register
from ditloom.contracts.sampler import Ask
from ditloom.processes.gaussian import require_gaussian
from ditloom.processes.targets import Coefficients
from ditloom.samplers.solver import Solver, between

PAPER = "DPM-Solver++: Fast Solver for Guided Sampling of Diffusion Probabilistic Models"


class Row(NamedTuple):
    """One step: levels, the factors of x, of the data estimate and of fresh noise, and how far to extrapolate."""

    t: float
    t_next: float
    keep: float
    take: float
    fresh: float
    blend: float


@register("dpmpp-2m", paper=PAPER, order=2)
@dataclass(frozen=True, kw_only=True)
class DPMpp2M(Solver):
    """``x <- (sigma_next / sigma) x - alpha_next (e^-h - 1) D``, ``D = (1 + 1/2r) x0 - (1/2r) x0_before``.

    h is the step in lambda = log(alpha / sigma) and r = h_before / h. Since ``alpha_next e^-h = sigma_next alpha /
    sigma``, no factor needs lambda itself, and the ends (alpha = 0 or sigma = 0) are exact. First order: the first
    step, those that touch an infinite lambda, and the last one of fewer than 15 (Lu et al. 2022, appendix).
    """

    lower_order_final: bool = True

    def prepare(self, process: Process, times: Sequence[float]) -> Sequence[Row]:
        path = require_gaussian(process, "dpmpp-2m")
        table, widths = path.table(times), [b - a for a, b in pairwise(path.lambdas(times))]
        rows = []
        for i, (c, s) in enumerate(pairwise(table)):
            last = i == len(widths) - 1 and len(widths) < 15 and self.lower_order_final
            blend = 0.0 if i == 0 or last else _half_ratio(widths[i], widths[i - 1])
            rows.append(Row(times[i], times[i + 1], *self.factors(c, s), blend))
        return rows

    def factors(self, c: Coefficients, s: Coefficients) -> tuple[float, float, float]:
        """Of x, of the data estimate, of fresh noise; from data (sigma = 0) the step is `between`."""
        if c.sigma == 0:
            return 0.0, 0.0, 0.0
        return s.sigma / c.sigma, s.alpha - c.alpha * s.sigma / c.sigma, 0.0

    def advance(self, x: Any, row: Row, ask: Ask, noise: Any, history: Any) -> tuple[Any, Any, Any]:
        estimate: Any = ask(x, row.t)
        data = estimate.x0
        if 0 in (row.t, row.t_next):
            return between(estimate, row.t_next), estimate, data
        if history is not None and row.blend:
            data = (1 + row.blend) * data - row.blend * history
        x = row.keep * x + row.take * data
        return x + row.fresh * noise() if row.fresh else x, estimate, estimate.x0


def _half_ratio(h: float, before: float) -> float:
    """1 / 2r = h / (2 h_before): 0, which is first order, where either is infinite."""
    return 0.5 * h / before if math.isfinite(h) and math.isfinite(before) else 0.0
