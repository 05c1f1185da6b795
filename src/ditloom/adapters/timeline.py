"""The steps of a run, found again by the time that a transformer is called with."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from itertools import pairwise

import torch
from torch import Tensor

from ditloom.contracts.clock import Schedule
from ditloom.contracts.errors import UserError
from ditloom.contracts.time import TimeInput


class Timeline:
    """All times of a run [K] in the order of its evaluations, as they are given to the transformer.

    order: evaluations per step, for a scheduler whose solver has more than one stage. With one, a time that comes
    twice in a row is evaluated a second time.
    """

    def __init__(self, times: Tensor, order: int = 1):
        self.times, self.order = times.detach().to("cpu", torch.float64), order
        self.last = -1
        self._again = {k + 1 for k, (time, after) in enumerate(pairwise(self.times.tolist())) if time == after}
        self._visits: dict[tuple[int, str], int] = {}
        self._rounded: dict[torch.dtype, tuple[list[float], list[int]]] = {}

    @property
    def steps(self) -> int:
        """Steps S."""
        return -(-len(self.times) // self.order)

    def schedule(self, time: TimeInput, branches: tuple[str, ...], guidance_scale: float = 1.0) -> Schedule:
        """The schedule that methods plan by."""
        native = self.times[:: self.order]
        levels = time.noise_level(native).clamp(0, 1).tolist()
        return Schedule((*levels, 0.0), tuple(native.tolist()), branches, guidance_scale)

    def place(self, given: Tensor, branches: tuple[str, ...], hint: int | None = None) -> int:
        """The position of a call's time [B] (its last value counts); `hint` is where the scheduler says it stands."""
        value = float(given if given.numel() == 1 else given.flatten()[-1])
        found = self._candidates(value, given.dtype)
        if not found:
            near = float(self.times[(self.times - value).abs().argmin()])
            raise UserError(
                f"the transformer was called at time {value:g}, which is not among the {len(self.times)} times of the "
                f"run (the nearest is {near:g})"
            )
        if hint in found:
            return int(hint)  # type: ignore[arg-type]
        fresh = [k for k in found if k >= self.last and not self._seen(k, branches)]
        return fresh[0] if fresh else found[-1] if found[-1] <= self.last else found[0]

    def visit(self, position: int, branches: tuple[str, ...]) -> tuple[int, int]:
        """(step, evaluation) of a call at a position; one that comes again for the same branch is a further one."""
        again = max(self._visits.get((position, branch), 0) for branch in branches)
        for branch in branches:
            self._visits[position, branch] = again + 1
        self.last = position
        step, stage = divmod(position, self.order)
        if self.order == 1 and position in self._again:
            stage = 1
        return step, stage + again

    def _seen(self, position: int, branches: tuple[str, ...]) -> bool:
        return any((position, branch) in self._visits for branch in branches)

    def _candidates(self, value: float, dtype: torch.dtype) -> list[int]:
        """Where the run has this time, as far as the dtype in which it is given can tell."""
        if dtype not in self._rounded:
            rounded = self.times.to(dtype).double().sort(stable=True)
            self._rounded[dtype] = rounded.values.tolist(), rounded.indices.tolist()
        values, order = self._rounded[dtype]
        precision = torch.finfo(dtype).eps if dtype.is_floating_point else 0.0
        margin = max(2 * precision * abs(value), 1e-9)
        return sorted(order[bisect_left(values, value - margin) : bisect_right(values, value + margin)])
