"""The midpoint method with the last midpoint's velocity in place of a fresh one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ditloom.contracts.registry import register
from ditloom.contracts.sampler import Ask
from ditloom.samplers.solver import Solver, along

PAPER = "FireFlow: Fast Inversion of Rectified Flow for Image Semantic Editing"


@register("fireflow", paper=PAPER, order=2)
@dataclass(frozen=True, kw_only=True)
class FireFlow(Solver):
    """Second order at one evaluation a step, and one more at the start or after x was changed."""

    def evaluations(self, steps: int) -> int:
        """One a step and one to begin with."""
        return steps + 1

    def advance(self, x: Any, row: Any, ask: Ask, noise: Any, history: Any) -> tuple[Any, Any, Any]:
        t, t_next = row
        middle = (t + t_next) / 2
        if history is None:
            estimate = ask(x, t)
            second = ask(along(estimate, middle), middle, evaluation=1)
        else:
            estimate = second = ask(x + (middle - t) * history, middle)
        return x + (t_next - t) * second.v, estimate, second.v
