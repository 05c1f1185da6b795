"""Euler's method on dx/dt = v."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ditloom.contracts.registry import register
from ditloom.contracts.sampler import Ask
from ditloom.samplers.solver import Solver, along


@register("euler", paper="Flow Straight and Fast: Learning to Generate and Transfer Data with Rectified Flow", order=1)
@dataclass(frozen=True, kw_only=True)
class Euler(Solver):
    """``x <- x + (t_next - t) v(x, t)``, first order; one evaluation a step."""

    def advance(self, x: Any, row: Any, ask: Ask, noise: Any, history: Any) -> tuple[Any, Any, Any]:
        t, t_next = row
        estimate = ask(x, t)
        return along(estimate, t_next), estimate, None
