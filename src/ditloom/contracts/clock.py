"""When: one trajectory's clock, its rows, and the schedule known before it starts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ditloom.contracts.errors import UserError

Purpose = Literal["sample", "optimise", "teacher", "search"]


@dataclass(frozen=True)
class Clock:
    """One evaluation: step s of `steps`, evaluation within the step, noise level t and its next, native time.

    guidance_scale: that of the run.
    """

    step: int
    steps: int
    t: float = 0.0
    t_next: float = 0.0
    native: float = 0.0
    evaluation: int = 0
    purpose: Purpose = "sample"
    guidance_scale: float = 1.0

    @property
    def may_reuse(self) -> bool:
        """Reuse and writes happen while sampling, at a solver's first stage."""
        return self.purpose == "sample" and self.evaluation == 0


@dataclass(frozen=True)
class Rows:
    """For each batch row its branch and sample; rows of one branch are contiguous."""

    branches: tuple[str, ...]
    samples: int

    def slice(self, name: str) -> slice:
        """The rows of one branch."""
        start = self.branches.index(name) * self.samples
        return slice(start, start + self.samples)

    @property
    def total(self) -> int:
        """Rows in all."""
        return len(self.branches) * self.samples

    @property
    def leading(self) -> str:
        """The branch from which a decision for all branches is taken."""
        return "cond" if "cond" in self.branches else self.branches[0]


@dataclass(frozen=True)
class Schedule:
    """All steps of a run, before it starts: noise levels [S + 1] descending and native times."""

    times: tuple[float, ...]
    native: tuple[float, ...]
    branches: tuple[str, ...] = ("cond",)
    guidance_scale: float = 1.0

    @property
    def steps(self) -> int:
        """Number of steps S."""
        return len(self.times) - 1

    def clock(self, step: int, evaluation: int = 0, purpose: Purpose = "sample") -> Clock:
        """The clock of one evaluation."""
        native = self.native[step] if step < len(self.native) else 0.0
        t_next = self.times[min(step + 1, self.steps)]
        return Clock(step, self.steps, self.times[step], t_next, native, evaluation, purpose, self.guidance_scale)


@dataclass(frozen=True)
class Window:
    """Half-open part of a schedule [start, end): by step index, by fraction of the steps, or by noise level.

    A fraction f of S steps means the steps s < int(f S). For `noise` a step is inside when end < t <= start is
    read as noise levels: start is the noisier bound (1, 0 is everything).
    """

    start: float = 0.0
    end: float = 1.0
    unit: Literal["index", "fraction", "noise"] = "fraction"

    def __post_init__(self) -> None:
        first, last = (self.end, self.start) if self.unit == "noise" else (self.start, self.end)
        if first > last:
            order = "the noisier bound comes first" if self.unit == "noise" else "the start comes first"
            raise UserError(f"window {self.start:g} to {self.end:g} by {self.unit} is empty: {order}")

    def contains(self, clock: Clock) -> bool:
        """Whether the step of this clock lies inside."""
        if self.unit == "index":
            return self.start <= clock.step < self.end
        if self.unit == "noise":
            return self.end < clock.t <= self.start
        return int(self.start * clock.steps) <= clock.step < int(self.end * clock.steps)
