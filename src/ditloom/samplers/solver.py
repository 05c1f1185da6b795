"""What solvers share: the grid by name, and the two first-order steps from one estimate."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ditloom.contracts.errors import UserError
from ditloom.contracts.process import Estimate, Process
from ditloom.contracts.sampler import Sampler
from ditloom.processes.gaussian import GaussianEstimate, affine
from ditloom.processes.grids import grid
from ditloom.processes.targets import Pair


@dataclass(frozen=True, kw_only=True)
class Solver(Sampler):
    """A sampler whose grid is a named spacing with a shift."""

    def grid(self, process: Process, steps: int) -> Tensor:
        """Noise levels [steps + 1], float64, descending to 0; reversed, it inverts."""
        return grid(process, steps, self.spacing, self.shift)


def along(estimate: Estimate, t_next: float) -> Any:
    """Euler's step ``x + (t_next - t) v``.

    At the ends of a path, where v may be infinite, it is the closed form of the same order: the data estimate
    itself at t_next = 0 (on the straight path the same value), and `between` from t = 0.
    """
    if t_next == 0:
        return estimate.x0
    if estimate.t == 0 and isinstance(estimate, GaussianEstimate):
        return between(estimate, t_next)
    return estimate.x + (t_next - estimate.t) * estimate.v


def between(estimate: GaussianEstimate, t_next: float) -> Tensor:
    """``alpha x0 + sigma eps`` at t_next: DDIM's step, exact while x0 and eps do not change."""
    if t_next == 0:
        return estimate.x0
    if estimate.t == 0 and not estimate.path.kind.tells_noise_of_data:
        raise UserError(
            f"inversion cannot start at noise level 0 with a {estimate.path.predicts!r} prediction, which says nothing"
            " about noise there; start the grid a little above 0"
        )
    c = estimate.path.at(t_next)
    return affine(Pair(c.alpha, c.sigma), estimate.x0, estimate.eps)


def descending_only(times: Sequence[float], who: str) -> None:
    """Refuse an ascending grid: a stochastic solver has no inverse."""
    if len(times) > 1 and times[-1] > times[0]:
        raise UserError(f"{who} is stochastic and cannot invert; use a deterministic sampler such as ddim or midpoint")
