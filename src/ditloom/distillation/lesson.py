"""A drawing in which a student with gates learns from the same network without them, evaluation by evaluation."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ditloom.contracts.process import Estimate
from ditloom.samplers.drawing import Drawing
from ditloom.samplers.guided import Guided
from ditloom.sites.run import Run

Teach = Callable[[int, Tensor, Tensor], None]
"""Learn from step s: the student's guided prediction, with its graph, and the teacher's."""


@dataclass
class Lesson(Drawing):
    """The student's predictions carry the trajectory; before each is used, `teach` has learned from it.

    lessons: the steps on which there is something to learn; on others, and at a solver's later stages, the student
    is run as in a drawing.
    """

    teach: Teach | None = None
    lessons: frozenset[int] = frozenset()

    def begin(self, grid: Tensor) -> None:
        """A new run along the noise levels of `grid`: nothing is stored."""
        self._start(grid)
        self.student = self.evaluate
        self.learner = Guided(self.predictions, self.process, self.guidance, self.schedule.steps)
        self.plain = Run(self.backbone, schedule=self.schedule, conditions=self.run.conditions, batched=self.batched)
        self.teacher = Guided(self._taught, self.process, self.guidance, self.schedule.steps)

    def __call__(self, x: Any, t: float, *, step: int, evaluation: int = 0, told: float | None = None) -> Estimate:
        """The student's estimate, after learning from it."""
        if self.teach is None or step not in self.lessons or evaluation:
            return self.student(x, t, step=step, evaluation=evaluation, told=told)
        target = self.teacher(x, t, step=step, told=told)
        with torch.enable_grad():
            out = self.learner(x, t, step=step, told=told)
            self.teach(step, out.prediction, target.prediction)
        return self.process.estimate(x, t, out.prediction.detach())

    def draw(self, shape: Sequence[int], grid: Tensor) -> Tensor:
        """A whole trajectory from noise; the latent at its end."""
        self.begin(grid)
        x = self.prior(shape, float(grid[0]))
        for step in self.sampler.sample(self, x, grid, self.process, self._noise_like(x)):
            x = step.x
        return x

    @torch.no_grad()
    def _taught(
        self, x: Tensor, t: Any, branches: Sequence[str], *, step: int, evaluation: int
    ) -> Mapping[str, Tensor]:
        """The teacher's predictions: the plain network at the student's x."""
        return {name: p.to(x.dtype) for name, p in self.plain.predict(x, self._clock(step), branches).items()}
