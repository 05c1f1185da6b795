"""Where routers are trained: a model with the sampler, steps and guidance it will be used with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor

from ditloom.contracts.condition import Condition
from ditloom.contracts.registries import GUIDANCE, SAMPLERS
from ditloom.contracts.sampler import Guidance, Sampler
from ditloom.contracts.settings import registered
from ditloom.model import Input, Model
from ditloom.sites.surface import Surface


@dataclass(frozen=True)
class Setting:
    """A model, its sampling settings as `Model.settings` gives them, and the prompts or classes to train on."""

    model: Model
    sampling: Mapping[str, Any]
    inputs: Sequence[Input]

    @property
    def steps(self) -> int:
        """Number of steps S."""
        return int(self.sampling["steps"])

    @cached_property
    def sampler(self) -> Sampler:
        """The sampler."""
        return registered(SAMPLERS, self.sampling["sampler"])

    @cached_property
    def guidance(self) -> Guidance:
        """The guidance rule."""
        return registered(GUIDANCE, self.sampling["guidance"])

    @cached_property
    def grid(self) -> Tensor:
        """Noise levels [S + 1]."""
        return self.sampler.grid(self.model.process, self.steps)

    @cached_property
    def shape(self) -> tuple[int, int, int]:
        """Shape of one latent."""
        return self.model.latent_shape(self.sampling.get("size"))

    @cached_property
    def surface(self) -> Surface:
        """The sites of the model."""
        return self.model.surface(self.shape)

    def conditions(self, inputs: Sequence[Input]) -> dict[str, Condition]:
        """Conditions of every branch that guidance needs."""
        return self.model.conditions(inputs, None, self.guidance.needs)
