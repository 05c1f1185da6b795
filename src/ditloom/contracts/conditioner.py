"""A conditioner: what a user types in, conditions out."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

from torch import nn

from ditloom.contracts.condition import Condition


class Conditioner(nn.Module):
    """Turns prompts or classes into a `Condition`."""

    @abstractmethod
    def encode(self, inputs: Sequence[str | int | None]) -> Condition:
        """One row per input: a prompt, a class index or a class name; None means unconditional."""

    @abstractmethod
    def config(self) -> dict[str, Any]:
        """Settings from which the registry rebuilds this conditioner."""

    def null(self, batch: int) -> Condition:
        """The unconditional condition, `batch` rows."""
        return self.encode([None] * batch)
