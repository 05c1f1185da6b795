"""Euler-Maruyama on the reverse SDE of a flow, with a diffusion coefficient chosen at sampling time."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ditloom.contracts.errors import UnknownName, UserError
from ditloom.contracts.process import Process
from ditloom.contracts.registry import register
from ditloom.contracts.sampler import Ask
from ditloom.processes.gaussian import GaussianEstimate, require_gaussian
from ditloom.processes.shift import shift
from ditloom.processes.targets import Coefficients
from ditloom.processes.weights import diffusion
from ditloom.samplers.solver import Solver, descending_only

Form = Callable[[Coefficients, float, float], float]

FORMS: dict[str, Form] = {
    "constant": lambda c, t, norm: norm,
    "sbdm": lambda c, t, norm: norm * diffusion(c),
    "sigma": lambda c, t, norm: norm * c.sigma,
    "linear": lambda c, t, norm: norm * t,
    "decreasing": lambda c, t, norm: 0.25 * (1 - norm * math.cos(math.pi * t)) ** 2,
    "increasing-decreasing": lambda c, t, norm: norm * math.sin(math.pi * t) ** 2,
}

Last = Callable[[GaussianEstimate, float], Tensor]

LAST_STEPS: dict[str, Last] = {
    "mean": lambda e, w: e.x - e.t * (e.v - w * e.score),
    "tweedie": lambda e, w: e.x0,
    "euler": lambda e, w: e.x - e.t * e.v,
}


class Row(NamedTuple):
    """One step: levels, and the diffusion w at both."""

    t: float
    t_next: float
    w: float
    w_next: float


@register("sde", paper="SiT: Scalable Interpolant Transformers", order=1)
@dataclass(frozen=True, kw_only=True)
class SDE(Solver):
    """``dx = (v - w score) dt + sqrt(2 w |dt|) z`` from noise to data; every w(t) has the same marginals (SiT).

    diffusion: "constant", "sbdm", "sigma" (SiT's and REPA's default), "linear", "decreasing" or
    "increasing-decreasing", scaled by norm. Equal steps lead from noise to `last_size`; from there one `last` step:
    "mean" (drift only), "tweedie" (the data estimate), "euler" (the ODE), or "none" (the grid ends near 0).
    """

    diffusion: str = "sigma"
    norm: float = 1.0
    last: str = "mean"
    last_size: float = 0.04

    def __post_init__(self) -> None:
        if self.diffusion not in FORMS:
            raise UnknownName("diffusion form", self.diffusion, FORMS)
        if self.last not in (*LAST_STEPS, "none"):
            raise UnknownName("last step", self.last, (*LAST_STEPS, "none"))

    def grid(self, process: Process, steps: int) -> Tensor:
        """Noise levels [steps + 1]: equal steps to `last_size`, then 0; to 1e-3 with the last step "none"."""
        if steps < 2:
            raise UserError(f"the sde sampler needs at least 2 steps, got {steps}")
        start = process.span[1]
        if self.diffusion == "sbdm" and require_gaussian(process, "sde").at(start).alpha == 0:
            start = 1 - 1e-3
        if self.last == "none":
            return shift(torch.linspace(start, 1e-3, steps + 1, dtype=torch.float64), self.shift)
        levels = shift(torch.linspace(start, self.last_size, steps, dtype=torch.float64), self.shift)
        return torch.cat([levels, levels.new_zeros(1)])

    def prepare(self, process: Process, times: Sequence[float]) -> Sequence[Row]:
        path = require_gaussian(process, "sde")
        descending_only(times, "sde")
        w = [self._w(c, t) if t else 0.0 for c, t in zip(path.table(times), times, strict=True)]
        return [Row(*levels, *ends) for levels, ends in zip(pairwise(times), pairwise(w), strict=True)]

    def _w(self, c: Coefficients, t: float) -> float:
        try:
            return FORMS[self.diffusion](c, t, self.norm)
        except ZeroDivisionError:
            raise UserError(f"the diffusion form {self.diffusion!r} is infinite at noise level {t}") from None

    def advance(self, x: Any, row: Row, ask: Ask, noise: Any, history: Any) -> tuple[Any, Any, Any]:
        estimate: Any = ask(x, row.t)
        if row.t_next == 0:
            return self._finish(estimate, row.w), estimate, None
        h = row.t_next - row.t
        return x + h * drift(estimate, row.w) + math.sqrt(-2 * row.w * h) * noise(), estimate, None

    def _finish(self, estimate: GaussianEstimate, w: float) -> Tensor:
        return LAST_STEPS["tweedie" if self.last == "none" else self.last](estimate, w)


def drift(estimate: GaussianEstimate, w: float) -> Tensor:
    """``v - w score``: the SDE's drift in noise-level time."""
    return estimate.v - w * estimate.score
