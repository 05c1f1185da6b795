"""A drawing: a batch carried by a sampler through a backbone, under guidance and handlers, step by step."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

from ditloom.contracts.backbone import Backbone
from ditloom.contracts.clock import Clock, Purpose, Schedule
from ditloom.contracts.condition import Condition
from ditloom.contracts.layout import Layout
from ditloom.contracts.method import Handler
from ditloom.contracts.process import Process
from ditloom.contracts.sampler import Changed, Guidance, Sampler, Step
from ditloom.samplers.guided import Guided
from ditloom.sites.report import Report
from ditloom.sites.run import Run


@dataclass
class Drawing:
    """A batch of images on their way from noise to data (or back, on an ascending grid).

    conditions: one `Condition` per branch that guidance needs; a branch "weak" runs on the backbone `weak`.
    indices: the global image index of each row, from which all its random numbers follow. batched: whether
    branches share a forward. Iterating yields one `Step` per step; stopping early costs nothing.
    """

    backbone: Backbone
    process: Process
    sampler: Sampler
    guidance: Guidance
    conditions: Mapping[str, Condition]
    handlers: Sequence[Handler] = ()
    seed: int = 0
    indices: Sequence[int] = (0,)
    weak: Backbone | None = None
    batched: bool = True
    purpose: Purpose = "sample"
    memory_limit: int | None = None
    report: Report = field(default_factory=Report)

    def prior(self, shape: Sequence[int], t: float = 1.0) -> Tensor:
        """The starting noise [len(indices), *shape] at level t."""
        noise = self.process.draw(tuple(shape), self.seed, "noise", self.indices)
        return self.process.prior(noise.to(self.backbone.device), t)

    def walk(self, shape: Sequence[int], steps: int) -> Iterator[Step]:
        """From noise to data in `steps` steps of the sampler's own grid."""
        grid = self.sampler.grid(self.process, steps)
        return self.steps(self.prior(shape, float(grid[0])), grid)

    def check(self, layout: Layout, steps: int) -> None:
        """Refuse now what drawing would refuse once it has begun, such as handlers that cannot act together."""
        self._start(self.sampler.grid(self.process, steps))
        self.run.planned(self.run.surface_of(layout))

    def steps(self, x: Tensor, grid: Tensor) -> Iterator[Step]:
        """Walk x [B, ...] along the noise levels of `grid` [S + 1]."""
        self._start(grid)
        x, _ = self._latent(x, self._clock(0), "before")
        walk = self.sampler.sample(self.evaluate, x, grid, self.process, self._noise_like(x))
        answer: Changed | None = None
        for _ in range(len(grid) - 1):
            step = walk.send(answer)
            after, changed = self._after(step)
            answer = Changed(after) if changed else None
            yield Step(step.index, step.t, step.t_next, after, step.estimate) if changed else step

    def _start(self, grid: Tensor) -> None:
        times = tuple(grid.tolist())
        names = tuple(n for n in self.conditions if n != "weak")
        scale = float(getattr(self.guidance, "scale", 1.0))
        self.schedule = Schedule(times, tuple(self._native(t) for t in times), names, scale)
        self.evaluate = Guided(self._predict, self.process, self.guidance, self.schedule.steps)
        self.run = Run(
            self.backbone,
            self.handlers,
            schedule=self.schedule,
            conditions={n: self.conditions[n] for n in names},
            batched=self.batched,
            memory_limit=self.memory_limit,
        )
        self.run.report = self.report
        self.weak_run = self._weak_run()

    def _weak_run(self) -> Run | None:
        if self.weak is None or "weak" not in self.conditions:
            return None
        return Run(self.weak, schedule=self.schedule, conditions={"weak": self.conditions["weak"]})

    def _native(self, t: float) -> float:
        level = torch.as_tensor(self.process.network_time(t), dtype=torch.float64)
        return float(self.backbone.preset.time.native(level))

    def _clock(self, step: int, evaluation: int = 0) -> Clock:
        return self.schedule.clock(step, evaluation, self.purpose)

    @torch.no_grad()
    def _predict(
        self, x: Tensor, t: Any, branches: Sequence[str], *, step: int, evaluation: int
    ) -> Mapping[str, Tensor]:
        return self.predictions(x, t, branches, step=step, evaluation=evaluation)

    def predictions(
        self, x: Tensor, t: Any, branches: Sequence[str], *, step: int, evaluation: int
    ) -> Mapping[str, Tensor]:
        """The predictions of the named branches; x is scaled and t is as the process tells it to a network."""
        native = float(self.backbone.preset.time.native(torch.as_tensor(t, dtype=torch.float64)))
        clock = replace(self._clock(step, evaluation), native=native)
        own = tuple(name for name in branches if name != "weak")
        predictions = self.run.predict(x, clock, own) if own else {}
        if "weak" in branches and self.weak_run is not None:
            predictions |= self.weak_run.predict(x, clock)
        return {name: p.to(x.dtype) for name, p in predictions.items()}

    def _after(self, step: Step) -> tuple[Tensor, bool]:
        x, changed = self._latent(step.x, self._clock(step.index), "after")
        if step.index + 1 < self.schedule.steps:
            x, again = self._latent(x, self._clock(step.index + 1), "before")
            changed = changed or again
        return x, changed

    def _latent(self, x: Tensor, clock: Clock, when: Literal["before", "after"]) -> tuple[Tensor, bool]:
        changed = False
        for handler in self.run.handlers:
            x, did = handler.latent(x, clock, when)
            changed = changed or did
        if changed:
            self.run.changed()
            self.evaluate.reset()
        return x, changed

    def _noise_like(self, x: Tensor) -> Any:
        def noise(step: int, evaluation: int = 0) -> Tensor:
            draws = self.process.draw(tuple(x.shape[1:]), self.seed, "sampler", self.indices, step, evaluation)
            return draws.to(device=x.device, dtype=x.dtype)

        return noise
