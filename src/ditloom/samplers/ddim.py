"""DDIM, deterministic to ancestral, and its inversion."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

from ditloom.contracts.errors import UserError
from ditloom.contracts.process import Process
from ditloom.contracts.registry import register
from ditloom.contracts.sampler import Ask
from ditloom.processes.gaussian import require_gaussian
from ditloom.processes.targets import Coefficients
from ditloom.samplers.solver import Solver, between


class Row(NamedTuple):
    """One step: levels, alpha_next, the factor of eps, and that of fresh noise."""

    t: float
    t_next: float
    alpha: float
    eps: float
    fresh: float


@register("ddim", paper="Denoising Diffusion Implicit Models", order=1)
@dataclass(frozen=True, kw_only=True)
class DDIM(Solver):
    """``x <- alpha x0 + sqrt(sigma^2 - s^2) eps + s z`` at the next level (Song et al. 2021, eq. 12).

    eta scales s: 0 is deterministic, 1 has the variance of ancestral sampling. On the straight path eta = 0 is
    Euler's method. On an ascending grid the step inverts; `told_next` then tells the network the level it goes to,
    as diffusers and D3HR do, not that of x.
    """

    eta: float = 0.0
    told_next: bool = True

    def prepare(self, process: Process, times: Sequence[float]) -> Sequence[Row]:
        path = require_gaussian(process, "ddim")
        if self.eta and times[-1] > times[0]:
            raise UserError(f"inversion is deterministic: eta must be 0, got {self.eta}")
        steps = zip(pairwise(times), pairwise(path.table(times)), strict=True)
        return [self._row(*levels, *coefficients) for levels, coefficients in steps]

    def _row(self, t: float, t_next: float, c: Coefficients, s: Coefficients) -> Row:
        fresh = 0.0
        if self.eta and t_next:
            step = max(c.sigma**2 - (c.alpha / s.alpha * s.sigma) ** 2, 0.0)
            fresh = self.eta * s.sigma / c.sigma * math.sqrt(step)
        return Row(t, t_next, s.alpha, math.sqrt(max(s.sigma**2 - fresh**2, 0.0)), fresh)

    def advance(self, x: Any, row: Row, ask: Ask, noise: Any, history: Any) -> tuple[Any, Any, Any]:
        inverting = row.t_next > row.t
        estimate: Any = ask(x, row.t, told=row.t_next if inverting and self.told_next else None)
        if not row.fresh:
            return between(estimate, row.t_next), estimate, None
        return row.alpha * estimate.x0 + row.eps * estimate.eps + row.fresh * noise(), estimate, None
