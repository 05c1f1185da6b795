"""SDE-DPM-Solver++(2M): the same with fresh noise at every step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ditloom.contracts.process import Process
from ditloom.contracts.registry import register
from ditloom.processes.targets import Coefficients
from ditloom.samplers.dpmpp_2m import PAPER, DPMpp2M, Row
from ditloom.samplers.solver import descending_only


@register("dpmpp-2m-sde", paper=PAPER, order=2)
@dataclass(frozen=True, kw_only=True)
class DPMpp2MSDE(DPMpp2M):
    """``x <- (sigma_next / sigma) e^-h x + alpha_next (1 - e^-2h) D + sigma_next sqrt(1 - e^-2h) z``."""

    def prepare(self, process: Process, times: Sequence[float]) -> Sequence[Row]:
        descending_only(times, "dpmpp-2m-sde")
        return super().prepare(process, times)

    def factors(self, c: Coefficients, s: Coefficients) -> tuple[float, float, float]:
        """Of x, of the data estimate, of fresh noise."""
        decay = c.alpha * s.sigma / (c.sigma * s.alpha)  # e^-h
        fresh = 1 - decay**2
        return s.sigma / c.sigma * decay, s.alpha * fresh, s.sigma * math.sqrt(max(fresh, 0.0))
