"""How a stored value is carried to a later step: held, extrapolated, or forecast from several computed ones."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from ditloom.caches.dmd import DynamicModes
from ditloom.caches.foca import FoCa
from ditloom.caches.weighing import Linear, Weights
from ditloom.contracts.clock import Schedule
from ditloom.contracts.errors import UserError
from ditloom.contracts.method import Predictor
from ditloom.contracts.settings import named
from ditloom.sites.codecs import Hold


@dataclass(frozen=True)
class Extrapolate(Linear):
    """``z + w (z - z')`` with z, z' the last two computed values, whatever their distance (FasterCache, eq. 4).

    rising: w grows with the steps, from 0 on the first to `weight` on the last one of a run.
    by_step: the weight of every step, in place of the one number; `on` fills it in.
    """

    weight: float = 0.5
    rising: bool = False
    by_step: Weights = ()
    depth: int = 2

    def on(self, schedule: Schedule) -> Extrapolate:
        """With the weights of a run's steps."""
        last = max(schedule.steps - 1, 1)
        weights = tuple(self.weight * s / last for s in range(schedule.steps))
        return replace(self, by_step=weights) if self.rising else self

    def weights(self, steps: tuple[int, ...], step: int) -> Weights:
        w = self.by_step[step] if self.by_step else self.weight
        return (-w, 1 + w)


@dataclass(frozen=True)
class Taylor(Linear):
    """TaylorSeer's forecast of order m (arXiv 2503.06923, eq. 8): ``sum_i D_i x^i / i!``, x steps after the newest.

    D_0 is the newest value, ``D_{i+1} = (D_i(s) - D_i(s')) / (s - s')`` with s' the computed step before s. Exact for
    what is linear in the step at any spacing. order 0 holds; one value stored allows order 0, two order 1, and so on.
    """

    order: int = 1
    least: int = 1

    def __post_init__(self) -> None:
        _check_order(self.order)

    @property
    def depth(self) -> int:
        """Values kept."""
        return self.order + 1

    def weights(self, steps: tuple[int, ...], step: int) -> Weights:
        return taylor_weights(steps, step)


@dataclass(frozen=True)
class Newton(Linear):
    """The polynomial through the last m + 1 computed values, evaluated at the step: exact to degree m."""

    order: int = 1
    least: int = 1

    def __post_init__(self) -> None:
        _check_order(self.order)

    @property
    def depth(self) -> int:
        """Values kept."""
        return self.order + 1

    def weights(self, steps: tuple[int, ...], step: int) -> Weights:
        return newton_weights(steps, step)


def _check_order(order: int) -> None:
    if not 0 <= order <= 8:
        raise UserError(f"the order of a forecast lies in 0..8; got {order}")


@lru_cache(maxsize=1024)
def taylor_weights(steps: tuple[int, ...], step: int) -> Weights:
    """What ``sum_i D_i x^i / i!`` makes of each stored value, for x = step - steps[-1]."""
    count, x = len(steps), step - steps[-1]
    factors = [[float(k == j) for j in range(count)] for k in range(count)]
    total, scale = [0.0] * count, 1.0
    for i in range(count):
        total = [a + scale * d for a, d in zip(total, factors[-1], strict=True)]
        gaps = [b - a for a, b in zip(steps[i:-1], steps[i + 1 :], strict=True)]
        factors = [
            [(b - a) / gap for a, b in zip(before, after, strict=True)]
            for before, after, gap in zip(factors[:-1], factors[1:], gaps, strict=True)
        ]
        scale *= x / (i + 1)
    return tuple(total)


@lru_cache(maxsize=1024)
def newton_weights(steps: tuple[int, ...], step: int) -> Weights:
    """Lagrange's form of the polynomial through the stored values: ``prod_j (x - x_j) / (x_k - x_j)``."""
    weights = []
    for k in steps:
        w = 1.0
        for j in steps:
            w *= (step - j) / (k - j) if j != k else 1.0
        weights.append(w)
    return tuple(weights)


PREDICTORS: Mapping[str, Any] = {
    "hold": Hold,
    "extrapolate": Extrapolate,
    "taylor": Taylor,
    "newton": Newton,
    "foca": FoCa,
    "dmd": DynamicModes,
}


def predictor(spec: str | Predictor) -> Predictor:
    """A predictor from what a user writes: "hold", "taylor:order=2", "extrapolate:weight=0.5"; one ready stays."""
    found: Predictor = named("predictor", PREDICTORS, spec)
    return found
