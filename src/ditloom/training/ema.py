"""Exponential moving averages of the weights, in fp32, with decays that follow from image counts.

A profile says how much of the average is kept when `batch` images bring the count to `seen`; a track applies it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from ditloom.contracts.errors import UserError


class Profile(Protocol):
    """How a moving average forgets."""

    def decay(self, seen: int, batch: int) -> float:
        """The share of the old average kept by the update after which `seen` images are seen, `batch` of them new."""


@dataclass(frozen=True, kw_only=True)
class Constant:
    """``average = value * average + (1 - value) * weights`` at every update."""

    value: float = 0.9999

    def decay(self, seen: int, batch: int) -> float:
        return self.value


@dataclass(frozen=True, kw_only=True)
class Ramped:
    """The constant decay reached slowly: ``min(value, (1 + k) / (10 + k))`` at the k-th update, k = 1, 2, ..."""

    value: float = 0.9999

    def decay(self, seen: int, batch: int) -> float:
        updates = seen / batch
        return min(self.value, (1 + updates) / (10 + updates))


@dataclass(frozen=True, kw_only=True)
class HalfLife:
    """A half-life in images, at most the share `ramp` of the images seen so far: ``0.5 ** (batch / half-life)``."""

    images: int = 500_000
    ramp: float = 0.05

    def decay(self, seen: int, batch: int) -> float:
        return float(0.5 ** (batch / min(self.images, self.ramp * seen)))


@dataclass(frozen=True, kw_only=True)
class Power:
    """Weights proportional to a power of training time (Karras et al. 2024, "EDM2", section 3.1).

    `width` is the relative width sigma_rel of the profile;
    ``decay = (1 - batch / seen) ** (gamma + 1)`` (equation 127).
    """

    width: float = 0.05

    def __post_init__(self) -> None:
        if not 0 < self.width < MAX_WIDTH:
            raise UserError(f"the width of a power-function average lies between 0 and {MAX_WIDTH}, got {self.width}")

    def decay(self, seen: int, batch: int) -> float:
        return float((1 - batch / seen) ** (exponent_of(self.width) + 1))


PROFILES = {"constant": Constant, "ramped": Ramped, "half-life": HalfLife, "power": Power}
MAX_WIDTH = 0.28


def exponent_of(width: float) -> float:
    """gamma of a relative width: the largest real root of EDM2's equation 126 (0.05 -> 16.97, 0.10 -> 6.94)."""
    inverse = width**-2
    roots = np.roots([1.0, 7.0, 16.0 - inverse, 12.0 - inverse])
    return float(max(root.real for root in roots if abs(root.imag) < 1e-9 * max(1.0, abs(root))))


def width_of(exponent: float) -> float:
    """Relative width of ``tau ** exponent``: its standard deviation over the training length (EDM2, equation 123)."""
    return math.sqrt((exponent + 1) / ((exponent + 2) ** 2 * (exponent + 3)))


class Track:
    """One running average of named tensors, kept in fp32 beside them (shard beside shard).

    It starts as a copy. `update` moves it towards the current values; what it averages are the fp32 master weights.
    """

    def __init__(self, profile: Profile, sources: Mapping[str, Tensor]):
        self.profile = profile
        self.averages = {name: tensor.detach().to(torch.float32, copy=True) for name, tensor in sources.items()}
        self._own = [local(tensor) for tensor in self.averages.values()]
        self._sources = [local(tensor.detach()) for tensor in sources.values()]

    @torch.no_grad()
    def update(self, seen: int, batch: int) -> None:
        """Take in the sources' current values after a step of `batch` images that brought the count to `seen`."""
        torch._foreach_lerp_(self._own, _in_fp32(self._sources), 1 - self.profile.decay(seen, batch))

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Continue from saved averages, given as full tensors or as shards like its own."""
        for name, own in self.averages.items():
            own.copy_(tensors[name])


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a sharded tensor, or the tensor itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _in_fp32(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [tensor if tensor.dtype == torch.float32 else tensor.float() for tensor in tensors]
