"""A training objective: per-sample losses from a prediction and what it captured on the way."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from ditloom.contracts.condition import Condition
from ditloom.contracts.method import Tap


@dataclass
class TrainBatch:
    """One batch with everything drawn once: all objectives and teachers share x, noise, t and the drop mask.

    x [B, ...] clean latents; noise like x; t [B] noise level, float64; indices: global image indices.
    """

    x: Tensor
    noise: Tensor
    t: Tensor
    condition: Condition
    indices: Sequence[int] = ()
    images: Tensor | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)


class Objective(nn.Module):
    """One loss. Heads it owns are its parameters; captures it names are taken in the student's forward.

    At coefficient 0 it is not run at all.
    """

    def captures(self) -> Sequence[Tap]:
        """What it wants to see of the student's forward."""
        return ()

    def coefficient(self, images_seen: int) -> float:
        """Its weight at this point of training."""
        return 1.0

    @abstractmethod
    def forward(
        self, batch: TrainBatch, prediction: Tensor, captured: Mapping[Tap, Any]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Per-sample losses [B] and values to log."""
