"""Training of HarmoniCa's routers (Huang et al., ICML 2025, arXiv 2410.01723): whole runs, no images.

Step-wise denoising training: the student's gated predictions drive a trajectory along which stored values are carried,
and every step learns to agree with the plain network at the same place. Image error proxy-guided objective: the loss
of step s is weighted by how much of the final image's error the gates of step s add, given those before it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ditloom.caches.routers import SCORES, Gates, costs_of
from ditloom.contracts import rng
from ditloom.contracts.condition import Condition
from ditloom.contracts.registry import register
from ditloom.contracts.settings import positive
from ditloom.distillation.lesson import Lesson
from ditloom.distillation.price import Price
from ditloom.distillation.setting import Setting

TINY = 1e-15
"""Weighted errors are far below AdamW's usual epsilon on small models."""
Note = Callable[[int, int, Mapping[str, float]], None]
"""Told after every unit of work: how many are done, of how many, and what to show."""


@register("harmonica", paper="HarmoniCa, arXiv 2410.01723", trains="harmonica")
@dataclass(frozen=True, kw_only=True)
class HarmoniCaTraining:
    """How the routers are trained.

    trajectories: runs of `batch` samples each. rate: of AdamW (0.01 as published, for 20,000 steps; ours for some
    hundred). penalty: beta, the price of a computed sub-module (7e-8 as published for DiT-XL/2). target: instead, find
    the penalty at which about this share of the sub-modules' MACs is worth its price (ours; 0 keeps the fixed one).
    weigh_every: trajectories between two measurements of the weights.
    """

    trajectories: int = 120
    batch: int = 8
    rate: float = 0.1
    penalty: float = 7e-8
    target: float = 0.5
    threshold: float = 0.1
    weigh_every: int = 30
    seed: int = 1_000_003

    def __post_init__(self) -> None:
        positive(trajectories=self.trajectories, batch=self.batch, rate=self.rate, weigh_every=self.weigh_every)

    def train(self, setting: Setting, note: Note = lambda *_: None) -> dict[str, Tensor]:
        """The scores [S, sites] of a model in a setting."""
        lessons = _Lessons(self, setting)
        for number in range(self.trajectories):
            if number % self.weigh_every == 0:
                lessons.weigh()
            lessons.trajectory(number)
            note(number + 1, self.trajectories, {"loss": lessons.loss, "computed": lessons.share})
        return {SCORES: lessons.gates.scores.detach(), "weights": torch.tensor(lessons.weights)}


@dataclass
class _Lessons:
    """A training under way."""

    how: HarmoniCaTraining
    setting: Setting
    loss: float = 0.0
    share: float = 1.0
    weights: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        surface, steps = self.setting.surface, self.setting.steps
        self.gates = Gates(steps, len(surface.submodules), self.how.threshold, range(1, steps), self.how.seed)
        self.optimiser = torch.optim.AdamW(self.gates.parameters(), lr=self.how.rate, weight_decay=0.0, eps=TINY)
        self.price = Price(self.gates, costs_of(surface), self.how.penalty, self.how.target, self.how.threshold)

    def trajectory(self, number: int) -> None:
        """One run: learn at every step but the first."""
        first = number * self.how.batch
        losses: list[float] = []

        def teach(step: int, out: Tensor, target: Tensor) -> None:
            error = (out - target).square().mean()
            self.optimiser.zero_grad(set_to_none=True)
            (self.weights[step] * error).backward()
            self.price.charge(step)
            self.optimiser.step()
            self.gates.clamp()
            losses.append(float(error.detach()))

        self._lesson(range(first, first + self.how.batch), teach)
        self.loss, self.share = sum(losses) / max(len(losses), 1), self.price.share()
        self.price.settle()

    @torch.no_grad()
    def weigh(self) -> None:
        """For each step the squared change of the final latent when its gates join those of the steps before."""
        steps, indices = self.setting.steps, range(self.how.batch)
        every, before = self.gates.active, self._drawn(frozenset(), indices)
        self.weights = [0.0] * steps
        for step in range(1, steps):
            now = self._drawn(frozenset(range(1, step + 1)), indices)
            self.weights[step] = float((now - before).square().mean())
            before = now
        self.gates.active = every

    def _drawn(self, active: frozenset[int], indices: Sequence[int]) -> Tensor:
        self.gates.active = active
        return self._lesson(indices, None)

    def _lesson(self, indices: Sequence[int], teach: Callable[[int, Tensor, Tensor], None] | None) -> Tensor:
        s = self.setting
        lesson = Lesson(
            s.model.backbone,
            s.model.process,
            s.sampler,
            s.guidance,
            self._conditions(indices),
            [self.gates],
            seed=self.how.seed,
            indices=list(indices),
            teach=teach,
            lessons=frozenset(range(1, s.steps)),
        )
        return lesson.draw(s.shape, s.grid)

    def _conditions(self, indices: Sequence[int]) -> dict[str, Condition]:
        chosen = rng.integers(len(self.setting.inputs), (1,), self.how.seed, "inputs", indices)[:, 0].tolist()
        return self.setting.conditions([self.setting.inputs[i] for i in chosen])
