"""Learning rates by the number of images seen, as a factor on the optimiser's rate."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol


class Schedule(Protocol):
    """A factor on the learning rate."""

    def factor(self, images: int) -> float:
        """The factor for the step that brings the count to `images`."""


@dataclass(frozen=True, kw_only=True)
class Constant:
    """1 after a linear warm-up over `warmup` images."""

    warmup: int = 0

    def factor(self, images: int) -> float:
        return min(1.0, images / self.warmup) if self.warmup else 1.0


@dataclass(frozen=True, kw_only=True)
class Linear(Constant):
    """Warm-up, then a straight line from 1 at the end of the warm-up to `floor` at `total` images."""

    total: int
    floor: float = 0.0

    def factor(self, images: int) -> float:
        return super().factor(images) * (self.floor + (1 - self.floor) * (1 - self._progress(images)))

    def _progress(self, images: int) -> float:
        return min(1.0, max(0.0, images - self.warmup) / max(1, self.total - self.warmup))


@dataclass(frozen=True, kw_only=True)
class Cosine(Linear):
    """Warm-up, then half a cosine from 1 to `floor` at `total` images (Loshchilov & Hutter 2017, equation 5)."""

    def factor(self, images: int) -> float:
        height = (1 + math.cos(math.pi * self._progress(images))) / 2
        return Constant.factor(self, images) * (self.floor + (1 - self.floor) * height)


@dataclass(frozen=True, kw_only=True)
class InverseSqrt(Constant):
    """Warm-up times ``1 / sqrt(max(images / reference, 1))``, the decay of EDM2 (Karras et al. 2024)."""

    reference: int

    def factor(self, images: int) -> float:
        return super().factor(images) / math.sqrt(max(images / self.reference, 1.0))


SCHEDULES = {"constant": Constant, "linear": Linear, "cosine": Cosine, "inverse-sqrt": InverseSqrt}
