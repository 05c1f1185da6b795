"""No guidance."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ditloom.contracts.process import Estimate
from ditloom.contracts.registry import register
from ditloom.contracts.sampler import Guidance, Moment


@register("none")
@dataclass(frozen=True, kw_only=True)
class NoGuidance(Guidance):
    """The conditional prediction as it is."""

    @property
    def needs(self) -> tuple[str, ...]:
        """The conditional branch."""
        return ("cond",)

    def combine(self, predictions: Mapping[str, Any], moment: Moment, memory: dict[str, Any]) -> Estimate:
        """The estimate of the conditional prediction."""
        return moment.process.estimate(moment.x, moment.t, predictions["cond"])
