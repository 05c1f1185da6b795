"""The two-step Adams-Bashforth method on dx/dt = v."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ditloom.contracts.registry import register
from ditloom.contracts.sampler import Ask
from ditloom.samplers.solver import Solver, along


@register("adams-bashforth", order=2)
@dataclass(frozen=True, kw_only=True)
class AdamsBashforth(Solver):
    """``x <- x + h ((1 + h / 2h') v - (h / 2h') v')``, second order at one evaluation a step.

    h is this step and h' the one before, v' its velocity; with equal steps the factors are 3/2 and 1/2. The first
    step, and any that touches t = 0, is Euler's.
    """

    def advance(self, x: Any, row: Any, ask: Ask, noise: Any, history: Any) -> tuple[Any, Any, Any]:
        t, t_next = row
        h = t_next - t
        estimate = ask(x, t)
        if 0 in (t, t_next):
            return along(estimate, t_next), estimate, None
        if history is None:
            return along(estimate, t_next), estimate, (h, estimate.v)
        before, v_before = history
        blend = 0.5 * h / before
        return x + h * ((1 + blend) * estimate.v - blend * v_before), estimate, (h, estimate.v)
