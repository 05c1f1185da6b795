"""The explicit midpoint method on dx/dt = v."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ditloom.contracts.registry import register
from ditloom.contracts.sampler import Ask
from ditloom.samplers.solver import Solver, along


@register("midpoint", paper="Taming Rectified Flow for Inversion and Editing", order=2)
@dataclass(frozen=True, kw_only=True)
class Midpoint(Solver):
    """``x <- x + (t_next - t) v(x_mid, t_mid)``, second order, two evaluations a step.

    RF-Solver's Taylor step with a half-step derivative is this method in exact arithmetic.
    """

    def evaluations(self, steps: int) -> int:
        """Two a step."""
        return 2 * steps

    def advance(self, x: Any, row: Any, ask: Ask, noise: Any, history: Any) -> tuple[Any, Any, Any]:
        t, t_next = row
        middle = (t + t_next) / 2
        estimate = ask(x, t)
        second = ask(along(estimate, middle), middle, evaluation=1)
        return x + (t_next - t) * second.v, estimate, None
