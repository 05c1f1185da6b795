"""Training of Learning-to-Cache's routers (Ma et al., NeurIPS 2024, arXiv 2406.01733): pairs of steps on pictures.

A picture is noised to a full step, the plain network takes one step and stores what its sub-modules put out, and on
the step after it gates learn which of them may be reused.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ditloom.caches.routers import SCORES, Gates, costs_of
from ditloom.contracts import rng
from ditloom.contracts.condition import Condition
from ditloom.contracts.errors import UserError
from ditloom.contracts.registries import DATA
from ditloom.contracts.registry import register
from ditloom.contracts.settings import positive, registered
from ditloom.data.batches import Batches
from ditloom.distillation.harmonica import TINY, Note
from ditloom.distillation.lesson import Lesson
from ditloom.distillation.price import Price
from ditloom.distillation.setting import Setting
from ditloom.samplers.guidance.none import NoGuidance
from ditloom.training.draws import dropped
from ditloom.training.feed import ImageFeed
from ditloom.training.recipe import TOLD


@register("learning-to-cache", paper="Learning-to-Cache, arXiv 2406.01733", trains="learning-to-cache")
@dataclass(frozen=True, kw_only=True)
class LearningToCacheTraining:
    """How the routers are trained.

    iterations: batches of `batch` pictures, each for one pair of steps. rate: of AdamW. penalty: the price of one
    computed sub-module (1e-6 to 5e-6 as published). target: instead, find the penalty at which about this share of the
    sub-modules' MACs, full steps included, is worth its price (ours; 0 keeps the fixed one). data: a data source; by
    default the model's own. drop: share of conditions replaced by none.
    """

    iterations: int = 1_000
    batch: int = 16
    rate: float = 0.1
    penalty: float = 5e-6
    target: float = 0.0
    threshold: float = 0.1
    drop: float = 0.1
    data: str = ""
    seed: int = 1_000_003

    def __post_init__(self) -> None:
        positive(iterations=self.iterations, batch=self.batch, rate=self.rate)
        if self.target and not 0.5 < self.target < 1:
            raise UserError(f"every second step is computed, so target is a share in 0.5..1, or 0; got {self.target}")

    def train(self, setting: Setting, note: Note = lambda *_: None) -> dict[str, Tensor]:
        """The scores [S, sites] of a model in a setting; 1 on every full step."""
        if setting.steps % 2:
            raise UserError(f"learning-to-cache takes steps in pairs: the number of steps is even; got {setting.steps}")
        gates = Gates(setting.steps, len(setting.surface.submodules), 1.0, range(1, setting.steps, 2), self.seed)
        optimiser = torch.optim.AdamW(gates.parameters(), lr=self.rate, weight_decay=0.0, eps=TINY)
        price = Price(gates, costs_of(setting.surface), self.penalty, self.target, self.threshold)
        errors: list[float] = []

        def teach(step: int, out: Tensor, target: Tensor) -> None:
            error = (out - target).square().mean()
            optimiser.zero_grad(set_to_none=True)
            error.backward()
            price.charge(step)
            optimiser.step()
            gates.clamp()
            errors.append(float(error.detach()))

        for number, (x0, condition, indices) in enumerate(self._batches(setting)):
            pair = int(rng.integers(setting.steps // 2, (1,), self.seed, "pair", [number])[0, 0])
            lesson = self._lesson(setting, gates, condition, indices)
            lesson.teach, lesson.lessons = teach, frozenset({2 * pair + 1})
            two_steps(lesson, setting, x0, 2 * pair)
            price.settle()
            note(number + 1, self.iterations, {"loss": errors[-1], "computed": price.share()})
        return {SCORES: gates.scores.detach()}

    def _lesson(self, setting: Setting, gates: Gates, condition: Condition, indices: list[int]) -> Lesson:
        model = setting.model
        named = {"cond": condition}
        return Lesson(
            model.backbone,
            model.process,
            setting.sampler,
            NoGuidance(),
            named,
            [gates],
            seed=self.seed,
            indices=indices,
        )

    def _batches(self, setting: Setting) -> Iterator[tuple[Tensor, Condition, list[int]]]:
        """Latents, conditions of which some are dropped, and image indices."""
        model, source = setting.model, registered(DATA, self.data or _source_of(setting))
        told = TOLD.get(type(model.conditioner).__registration__.name, "caption")
        batches = Batches(source, batch_size=self.batch, seed=self.seed, workers=0)
        feed = ImageFeed(batches, model.latents, model.conditioner, told)
        for rows in feed.rows(0, self.iterations * self.batch):
            condition, indices = rows.condition, list(rows.indices)
            if rows.null is not None:
                missing = rng.uniform((1,), self.seed, "drop", indices)[:, 0] < self.drop
                condition = dropped(condition, rows.null, missing)
            yield rows.x, condition, indices


def two_steps(lesson: Lesson, setting: Setting, x0: Tensor, first: int) -> None:
    """From pictures noised to step `first`, that step and the evaluation of the next."""
    process, grid = setting.model.process, setting.grid
    noise = process.draw(tuple(x0.shape[1:]), lesson.seed, "noise", lesson.indices)
    lesson.begin(grid)
    x = process.add_noise(x0, noise, float(grid[first]))

    def evaluate(x: Tensor, t: float, *, step: int, evaluation: int = 0, told: float | None = None) -> object:
        return lesson(x, t, step=first + step, evaluation=evaluation, told=told)

    pair = grid[first : first + 2]
    (last,) = setting.sampler.sample(evaluate, x, pair, process, lesson._noise_like(x))  # type: ignore[arg-type]
    lesson(last.x, float(grid[first + 1]), step=first + 1)


def _source_of(setting: Setting) -> str:
    source = setting.model.info.get("source")
    if not source:
        raise UserError("learning-to-cache trains on pictures, and this model does not say which: name a data source")
    return str(source)
