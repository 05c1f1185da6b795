"""EDM's stochastic sampler: Heun's method in sigma, after raising the noise a little."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ditloom.contracts.errors import UserError
from ditloom.contracts.process import Process
from ditloom.contracts.registry import register
from ditloom.contracts.sampler import Ask
from ditloom.processes.gaussian import GaussianPath, require_gaussian, scaled
from ditloom.processes.grids import grid
from ditloom.samplers.solver import Solver, between


class Row(NamedTuple):
    """One step in the scaled variable y = x / alpha, whose noise is r = sigma / alpha."""

    t: float
    t_hat: float
    t_next: float
    alpha: float
    alpha_hat: float
    alpha_next: float
    r_hat: float
    r_next: float
    lift: float


@register("edm", paper="Elucidating the Design Space of Diffusion-Based Generative Models", order=2)
@dataclass(frozen=True, kw_only=True)
class EDMSampler(Solver):
    """Karras et al. 2022, algorithm 2: churn to a higher noise, Euler, trapezoid (not at the last step).

    churn 0 is deterministic; s_max None is no upper bound. ImageNet-64: churn 40, s_min 0.05, s_max 50, s_noise
    1.003. For paths with alpha below 1 the same runs on x / alpha (their appendix C). The grid is "karras" unless
    told otherwise.
    """

    churn: float = 0.0
    s_min: float = 0.0
    s_max: float | None = None
    s_noise: float = 1.0

    def grid(self, process: Process, steps: int) -> Tensor:
        """Noise levels [steps + 1], float64, descending to 0."""
        return grid(process, steps, self.spacing or "karras", self.shift)

    def evaluations(self, steps: int) -> int:
        """Two a step, one for the last."""
        return 2 * steps - 1

    def prepare(self, process: Process, times: Sequence[float]) -> Sequence[Row]:
        path = require_gaussian(process, "edm")
        if path.at(times[0]).alpha == 0 or path.at(times[-1]).alpha == 0:
            raise UserError("the edm sampler needs some signal at every noise level; use spacing karras or log-snr")
        gamma = min(self.churn / (len(times) - 1), math.sqrt(2) - 1)
        if gamma and times[-1] > times[0]:
            raise UserError(f"inversion is deterministic: churn must be 0, got {self.churn}")
        return [self._row(path, t, t_next, gamma) for t, t_next in zip(times, times[1:], strict=False)]

    def _row(self, path: GaussianPath, t: float, t_next: float, gamma: float) -> Row:
        c, s = path.at(t), path.at(t_next)
        r = c.sigma / c.alpha
        if not (gamma and self.s_min <= r <= (self.s_max or math.inf)):
            return Row(t, t, t_next, c.alpha, c.alpha, s.alpha, r, s.sigma / s.alpha, 0.0)
        r_hat = r * (1 + gamma)
        t_hat = path.level(-torch.tensor(r_hat, dtype=torch.float64).log()).item()
        lift = self.s_noise * math.sqrt(r_hat**2 - r**2)
        return Row(t, t_hat, t_next, c.alpha, path.at(t_hat).alpha, s.alpha, r_hat, s.sigma / s.alpha, lift)

    def advance(self, x: Any, row: Row, ask: Ask, noise: Any, history: Any) -> tuple[Any, Any, Any]:
        y = scaled(1 / row.alpha, x)
        if row.lift:
            y = y + row.lift * noise()
        estimate: Any = ask(scaled(row.alpha_hat, y), row.t_hat)
        if 0 in (row.t, row.t_next):
            return between(estimate, row.t_next), estimate, None
        slope = (y - estimate.x0) / row.r_hat
        guess = y + (row.r_next - row.r_hat) * slope
        second = ask(scaled(row.alpha_next, guess), row.t_next, evaluation=1)
        slope = 0.5 * (slope + (guess - second.x0) / row.r_next)
        return scaled(row.alpha_next, y + (row.r_next - row.r_hat) * slope), estimate, None
