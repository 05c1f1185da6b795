"""The function a sampler calls: branches, network, guidance, estimate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from ditloom.contracts.errors import UserError
from ditloom.contracts.process import Estimate, Process
from ditloom.contracts.sampler import Guidance, Moment


class Predict(Protocol):
    """The network's raw predictions of the named branches at (x, t), x scaled and t as the backbone hears it."""

    def __call__(self, x: Any, t: Any, branches: Sequence[str], *, step: int, evaluation: int) -> Mapping[str, Any]: ...


class Guided:
    """`Evaluate` made of a network, a process and a guidance rule, for one run of `steps` steps.

    evaluations counts the calls of the network, branch_evaluations those of its branches.
    """

    def __init__(self, predict: Predict, process: Process, guidance: Guidance, steps: int):
        self.predict, self.process, self.guidance, self.steps = predict, process, guidance, steps
        self.memory: dict[str, Any] = {}
        self.evaluations = 0
        self.branch_evaluations = 0

    def reset(self) -> None:
        """Forget what guidance remembers of the steps before (after x was changed)."""
        self.memory.clear()

    def __call__(self, x: Any, t: float, *, step: int, evaluation: int = 0, told: float | None = None) -> Estimate:
        moment = Moment(x, t, step, self.steps, self.process, evaluation)
        branches = self.guidance.branches(moment)
        predictions: Mapping[str, Any] = {}
        if branches:
            time = self.process.network_time(t if told is None else told)
            scaled = self.process.scale_input(x, t)
            predictions = self.predict(scaled, time, branches, step=step, evaluation=evaluation)
            self._count(branches, predictions)
        return self.guidance.combine(predictions, moment, self.memory)

    def _count(self, branches: Sequence[str], predictions: Mapping[str, Any]) -> None:
        missing = [name for name in branches if name not in predictions]
        if missing:
            raise UserError(f"guidance needs the branch {missing[0]!r}, and the model gives {sorted(predictions)}")
        self.evaluations += 1
        self.branch_evaluations += len(branches)
