"""Guidance by the contrast of a strong and a weak branch."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from ditloom.contracts.errors import UserError
from ditloom.contracts.process import Estimate
from ditloom.contracts.sampler import Guidance, Moment


@dataclass(frozen=True, kw_only=True)
class Contrast(Guidance):
    """A rule on "cond" and one weaker branch; the rest of a prediction (a learned variance) stays that of "cond".

    scale 1 is the conditional prediction alone. start, end: noise levels, both included, where guidance is on;
    elsewhere only "cond" is computed (Kynkaanniemi et al. 2024).
    """

    weak: ClassVar[str] = "uncond"

    scale: float = 4.0
    start: float = 0.0
    end: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.start <= self.end <= 1:
            raise UserError(f"the guidance interval must have 0 <= start <= end <= 1, got {self.start} to {self.end}")

    @property
    def needs(self) -> tuple[str, ...]:
        """The strong branch, and the weak one unless the scale is 1."""
        return ("cond",) if self.scale == 1 else ("cond", self.weak)

    def branches(self, moment: Moment) -> tuple[str, ...]:
        """Both inside the interval, the strong one outside."""
        return self.needs if self.start <= moment.t <= self.end else ("cond",)

    def combine(self, predictions: Mapping[str, Any], moment: Moment, memory: dict[str, Any]) -> Estimate:
        """The estimate of the mixed prediction."""
        process, guided = moment.process, predictions["cond"]
        if self.weak in predictions and self.scale != 1:
            strong, rest = process.split(guided)
            weak, _ = process.split(predictions[self.weak])
            guided = process.join(self.mix(strong, weak, moment, memory), rest)
        return process.estimate(moment.x, moment.t, guided)

    @abstractmethod
    def mix(self, strong: Any, weak: Any, moment: Moment, memory: dict[str, Any]) -> Any:
        """The guided prediction of the two."""
