"""The best set under a budget of time, above a floor of quality, or both."""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ditloom.contracts.errors import UnknownName, UserError

if TYPE_CHECKING:
    from ditloom.measure.comparison.row import Row

HIGHER_IS_BETTER: Mapping[str, bool] = {"psnr": True, "ssim": True, "lpips": False}
MEANING = {True: (">", operator.ge), False: ("<", operator.le)}
_FLOOR = re.compile(r"\s*([a-zA-Z-]+)\s*(<=|>=|<|>)\s*(\S+)\s*")


@dataclass(frozen=True)
class Budget:
    """At least so many times as fast as the plain run, by the wall time measured here."""

    speedup: float

    @classmethod
    def read(cls, text: str) -> Budget:
        """ "2x" or "2"."""
        value = _number(text.strip().lower().removesuffix("x"))
        if value is None or not 1 < value < 1000:
            raise UserError(f"--budget is a speed-up above 1, such as 2x; got {text!r}")
        return cls(value)

    def __str__(self) -> str:
        return f"at least {self.speedup:g}x as fast"


@dataclass(frozen=True)
class Quality:
    """A metric against the plain run that must be at least (or, for a distance, at most) so much."""

    metric: str
    bound: float

    @classmethod
    def read(cls, text: str) -> Quality:
        """ "psnr>30", "ssim>0.95" or "lpips<0.05"."""
        match = _FLOOR.fullmatch(text)
        value = _number(match[3]) if match else None
        if match is None or value is None:
            raise UserError(f"--quality is written as psnr>30, ssim>0.95 or lpips<0.05; got {text!r}")
        metric = match[1].lower()
        if metric not in HIGHER_IS_BETTER:
            raise UnknownName("quality metric", match[1], HIGHER_IS_BETTER)
        sign, better = MEANING[HIGHER_IS_BETTER[metric]][0], "higher" if HIGHER_IS_BETTER[metric] else "lower"
        if match[2][0] != sign:
            raise UserError(f"{metric} is better when it is {better}: write {metric}{sign}{match[3]}")
        return cls(metric, value)

    def met_by(self, value: float) -> bool:
        """Whether a value is good enough."""
        return bool(MEANING[HIGHER_IS_BETTER[self.metric]][1](value, self.bound))

    def __str__(self) -> str:
        return f"{self.metric} {MEANING[HIGHER_IS_BETTER[self.metric]][0]} {self.bound:g}"


@dataclass(frozen=True)
class Pick:
    """The best set, or None with the nearest one."""

    best: Row | None
    nearest: Row | None
    wanted: str


def better(metric: str) -> Callable[[Row], float]:
    """A key by which the best row of a metric is the largest; rows without it come last."""
    sign = 1.0 if HIGHER_IS_BETTER[metric] else -1.0

    def key(row: Row) -> float:
        value = row.value(metric)
        return -math.inf if value is None else sign * value

    return key


def pick(rows: Sequence[Row], budget: Budget | None, quality: Quality | None, by: str = "psnr") -> Pick:
    """Of the sets within the budget the one of best quality; of those of enough quality the fastest; of both, too.

    The nearest, if none qualifies: of enough quality the fastest, or else the closest in quality; without a floor of
    quality the fastest of all.
    """
    usable = [row for row in rows if row.refused is None and row.methods]
    fast = [row for row in usable if budget is None or row.speedup >= budget.speedup]
    good = [row for row in usable if quality is None or _meets(row, quality)]
    both = [row for row in fast if row in good]
    wanted = " and ".join(str(w) for w in (budget, quality) if w is not None)
    metric = quality.metric if quality is not None else by
    quality_first = lambda row: (better(metric)(row), row.speedup)  # noqa: E731
    speed_first = lambda row: (row.speedup, better(metric)(row))  # noqa: E731
    if both:
        return Pick(max(both, key=quality_first if quality is None else speed_first), None, wanted)
    nearest = max(good, key=speed_first, default=None) if good else max(usable, key=quality_first, default=None)
    return Pick(None, nearest, wanted)


def _meets(row: Row, quality: Quality) -> bool:
    value = row.value(quality.metric)
    return value is not None and quality.met_by(value)


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None
