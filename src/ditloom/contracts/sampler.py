"""A sampler: a generator over the steps from noise to data, or back. And guidance: named branches made one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Generator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import pairwise
from typing import Any, Protocol

from torch import Tensor

from ditloom.contracts.process import Estimate, Process


class Evaluate(Protocol):
    """One guided model evaluation at (x, t); `told` is the level the network hears where it is not that of x."""

    def __call__(self, x: Any, t: float, *, step: int, evaluation: int = 0, told: float | None = None) -> Estimate: ...


class Noise(Protocol):
    """One draw of the process per image, reproducible from (seed, image index, step, evaluation)."""

    def __call__(self, step: int, evaluation: int = 0) -> Any: ...


class Ask(Protocol):
    """`Evaluate` with the step filled in: what a solver calls."""

    def __call__(self, x: Any, t: float, *, evaluation: int = 0, told: float | None = None) -> Estimate: ...


@dataclass(frozen=True)
class Step:
    """What a sampler yields after each step: x is at t_next; `estimate` is the step's first one, made at t."""

    index: int
    t: float
    t_next: float
    x: Any
    estimate: Estimate


@dataclass(frozen=True)
class Changed:
    """Sent into a sampler by its consumer: go on from this x, and forget the solver's history."""

    x: Any


@dataclass(frozen=True, kw_only=True)
class Sampler(ABC):
    """A solver and its grid of noise levels. One method reads like the solver's equation: `advance`.

    spacing: name of the grid (None: the process's own); shift: the grid moved to ``s t / (1 + (s - 1) t)``;
    clip: clamp every data estimate to [-clip, clip] (for data in [-1, 1], not for latents).
    A grid may also ascend: the same code then carries data to noise (inversion).
    """

    spacing: str | None = None
    shift: float = 1.0
    clip: float | None = None

    def config(self) -> dict[str, Any]:
        """Plain values for records, the registry name under "name"."""
        return {"name": type(self).__registration__.name, **asdict(self)}

    @abstractmethod
    def grid(self, process: Process, steps: int) -> Tensor:
        """Noise levels [steps + 1], float64, descending, ending at 0."""

    def evaluations(self, steps: int) -> int:
        """Model evaluations of a whole run."""
        return steps

    def prepare(self, process: Process, times: Sequence[float]) -> Sequence[Any]:
        """Per step, everything its update needs, as Python floats: no device is waited for while sampling."""
        return list(pairwise(times))

    @abstractmethod
    def advance(self, x: Any, row: Any, ask: Ask, noise: Noise, history: Any) -> tuple[Any, Estimate, Any]:
        """One step: the next x, the step's first estimate, and the history for the next step (None: none).

        `noise(evaluation)` has the step filled in, as `ask` has.
        """

    def sample(
        self, evaluate: Evaluate, x: Any, grid: Tensor, process: Process, noise: Noise
    ) -> Generator[Step, Changed | None, None]:
        """Carry x along the grid, one `Step` per step; `send(Changed(x))` replaces x before the next one."""
        times = grid.tolist()
        history = None
        for index, row in enumerate(self.prepare(process, times)):
            ask = partial(self._evaluate, evaluate, step=index)
            x, estimate, history = self.advance(x, row, ask, partial(noise, index), history)
            sent = yield Step(index, times[index], times[index + 1], x, estimate)
            if sent is not None:
                x, history = sent.x, None

    def _evaluate(self, evaluate: Evaluate, x: Any, t: float, **where: Any) -> Estimate:
        estimate = evaluate(x, t, **where)
        return estimate if self.clip is None else estimate.clipped(self.clip)


@dataclass(frozen=True)
class Moment:
    """Where an evaluation stands: the latent, its level, step of steps, the evaluation within it, the process."""

    x: Any
    t: float
    step: int
    steps: int
    process: Process
    evaluation: int = 0


@dataclass(frozen=True, kw_only=True)
class Guidance(ABC):
    """A rule that makes one estimate of the predictions of named branches ("cond", "uncond", "weak", ...)."""

    def config(self) -> dict[str, Any]:
        """Plain values for records, the registry name under "name"."""
        return {"name": type(self).__registration__.name, **asdict(self)}

    @property
    @abstractmethod
    def needs(self) -> tuple[str, ...]:
        """Every branch a run may ask for; "cond" first."""

    def branches(self, moment: Moment) -> tuple[str, ...]:
        """The branches needed at this moment: those not named are not computed."""
        return self.needs

    @abstractmethod
    def combine(self, predictions: Mapping[str, Any], moment: Moment, memory: dict[str, Any]) -> Estimate:
        """One estimate of the branches' raw predictions; `memory` lives as long as the run."""
