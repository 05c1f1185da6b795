"""The stochastic Heun method on the reverse SDE of a flow."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from ditloom.contracts.registry import register
from ditloom.contracts.sampler import Ask
from ditloom.samplers.sde import SDE, Row, drift


@register("sde-heun", paper="SiT: Scalable Interpolant Transformers", order=2)
@dataclass(frozen=True, kw_only=True)
class SDEHeun(SDE):
    """Noise first, then a second-order deterministic step from the noised x; the last step as in `SDE`."""

    def evaluations(self, steps: int) -> int:
        """Two a step, one for the last."""
        return 2 * steps - (self.last != "none")

    def advance(self, x: Any, row: Row, ask: Ask, noise: Any, history: Any) -> tuple[Any, Any, Any]:
        t, t_next, w, w_next = row
        if t_next == 0:
            estimate: Any = ask(x, t)
            return self._finish(estimate, w), estimate, None
        h = t_next - t
        x = x + math.sqrt(-2 * w * h) * noise()
        estimate = ask(x, t)
        first = drift(estimate, w)
        second: Any = ask(x + h * first, t_next, evaluation=1)
        return x + 0.5 * h * (first + drift(second, w_next)), estimate, None
