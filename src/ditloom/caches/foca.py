"""FoCa: Forecast then Calibrate, feature caching as an ordinary differential equation (arXiv 2508.16211)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from ditloom.caches.weighing import Linear, Weights
from ditloom.contracts.errors import UserError

HORIZON = 3


@dataclass(frozen=True)
class FoCa(Linear):
    """``z + x/2 (d + d')``, x steps after the newest computed value z (as in vipshop/cache-dit).

    d is the change from the computed value before z, d' the last change there was, predicted values among them: a chain
    of predictions that Heun's rule ties to z. Beyond three steps x becomes ``9 / x``. A change counts as one step,
    however far apart its values are.

    The chain is followed over the last `memory` computed values. It is that of cache-dit, which remembers predictions,
    as long as these reach back to the first one or to two that were computed in a row; else what came before them is
    left out (where every second step is computed, half of its weight with every further value).
    """

    memory: int = 4
    least: int = 1

    def __post_init__(self) -> None:
        if not 2 <= self.memory <= 16:
            raise UserError(f"foca keeps 2 to 16 computed values; got memory={self.memory}")

    @property
    def depth(self) -> int:
        """Values kept."""
        return self.memory

    def weights(self, steps: tuple[int, ...], step: int) -> Weights:
        return foca_weights(steps, step)


@lru_cache(maxsize=4096)
def foca_weights(steps: tuple[int, ...], step: int) -> Weights:
    """What the chain of predictions since the oldest computed value makes of each of them."""
    units = {s: [float(s == other) for other in steps] for s in steps}
    before: list[float] | None = None
    full = last = older = units[steps[0]]
    at = steps[0]
    for s in range(steps[0] + 1, step + 1):
        if s in units:
            older, before, at = last, full, s
            full = last = units[s]
        elif before is not None:
            older, last = last, _heun(full, before, last, older, s - at)
    return tuple(full if before is None else last)


def _heun(
    full: Sequence[float], before: Sequence[float], last: Sequence[float], older: Sequence[float], x: int
) -> list[float]:
    reach = min(x, HORIZON**2 / x) / 2
    return [f + reach * ((f - b) + (n - o)) for f, b, n, o in zip(full, before, last, older, strict=True)]
