"""Heun's method on dx/dt = v."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ditloom.contracts.registry import register
from ditloom.contracts.sampler import Ask
from ditloom.samplers.solver import Solver, along


@register("heun", paper="SiT: Scalable Interpolant Transformers", order=2)
@dataclass(frozen=True, kw_only=True)
class Heun(Solver):
    """The trapezoid over an Euler guess, second order; at the step that touches t = 0 the guess alone."""

    def evaluations(self, steps: int) -> int:
        """Two a step, one for the last."""
        return 2 * steps - 1

    def advance(self, x: Any, row: Any, ask: Ask, noise: Any, history: Any) -> tuple[Any, Any, Any]:
        t, t_next = row
        estimate = ask(x, t)
        guess = along(estimate, t_next)
        if 0 in (t, t_next):
            return guess, estimate, None
        second = ask(guess, t_next, evaluation=1)
        return x + 0.5 * (t_next - t) * (estimate.v + second.v), estimate, None
