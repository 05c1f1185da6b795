"""Whole runs: to the end, with every state kept, backwards, and in part."""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ditloom.contracts.errors import UserError
from ditloom.contracts.process import Process
from ditloom.contracts.sampler import Changed, Evaluate, Noise, Sampler, Step

Steps = Generator[Step, Changed | None, None]


def finish(steps: Steps, after: Callable[[Step], Changed | None] | None = None) -> Any:
    """Run a sampler to its end and return the last x; `after` sees every step and may replace x."""
    x, sent = None, None
    while True:
        try:
            step = steps.send(sent)
        except StopIteration:
            return x
        sent = after(step) if after else None
        x = step.x if sent is None else sent.x


@dataclass(frozen=True)
class Trajectory:
    """Every state of a run: `x[i]` at noise level `t[i]`, one more than there were steps."""

    t: tuple[float, ...]
    x: tuple[Any, ...]

    def reversed(self) -> Trajectory:
        """The same states in the other direction: the state an inversion passed at each sampling step."""
        return Trajectory(self.t[::-1], self.x[::-1])


def follow(sampler: Sampler, evaluate: Evaluate, x: Any, grid: Tensor, process: Process, noise: Noise) -> Trajectory:
    """Run a sampler along a grid and keep every state."""
    states = [x, *(step.x for step in sampler.sample(evaluate, x, grid, process, noise))]
    return Trajectory(tuple(grid.tolist()), tuple(states))


def invert(sampler: Sampler, evaluate: Evaluate, x0: Any, grid: Tensor, process: Process) -> Trajectory:
    """Carry data up the reversed grid with the same solver; `reversed()` aligns the states with sampling."""
    return follow(sampler, evaluate, x0, grid.flip(0), process, _no_noise)


def tail(grid: Tensor, strength: float) -> Tensor:
    """The last part of a grid, for starting from noised data (SDEdit): ``min(int(S strength), S)`` of S steps."""
    steps = len(grid) - 1
    kept = min(int(steps * strength), steps)
    if kept < 1:
        raise UserError(f"strength {strength} of {steps} steps leaves none to take; use at least {1 / steps:.3g}")
    return grid[steps - kept :]


def _no_noise(step: int, evaluation: int = 0) -> Any:
    raise UserError("inversion is deterministic: the sampler asked for noise")
