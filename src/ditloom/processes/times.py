"""Training-time distributions, each as its inverse distribution function: uniforms in (0, 1) to noise levels.

So every draw follows from one uniform per image, and stratification is a change of the uniforms. All are in
noise-level time: a logit-normal mean m of data time is -m here.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from ditloom.contracts.errors import UserError
from ditloom.contracts.process import Process
from ditloom.contracts.settings import named, positive
from ditloom.processes.discrete_vp import DiscreteVP
from ditloom.processes.gaussian import require_gaussian
from ditloom.processes.shift import shift


@dataclass(frozen=True)
class TimeSampler(ABC):
    """A distribution of noise levels."""

    @abstractmethod
    def quantile(self, u: Tensor, process: Process) -> Tensor:
        """The inverse distribution function at u, float64; it may leave the process's span."""

    def __call__(self, u: Tensor, process: Process, strata: tuple[Tensor, int] | None = None) -> Tensor:
        """Noise levels like u (uniform, one per image), within the span of the process.

        strata: each image's place in the global batch and that batch's size, for stratified draws.
        """
        u = u.to(torch.float64).clamp(torch.finfo(torch.float64).tiny, 1 - 2**-53)
        low, high = process.span
        return self.quantile(u, process).clamp(low, high)


class Uniform(TimeSampler):
    """Uniform on the span of the process (SiT)."""

    def quantile(self, u: Tensor, process: Process) -> Tensor:
        low, high = process.span
        return low + (high - low) * u


class Discrete(TimeSampler):
    """Uniform on the indices of a discrete chain (DDPM, DiT)."""

    def quantile(self, u: Tensor, process: Process) -> Tensor:
        if not isinstance(process, DiscreteVP):
            raise UserError(f"discrete times need a discrete process, got {type(process).__name__}; try uniform")
        return process.level_of(torch.floor(u * process.levels))


@dataclass(frozen=True)
class LogitNormal(TimeSampler):
    """``sigmoid(N(mean, std^2))`` (Esser et al. 2024, eq. 19); its median is sigmoid(mean)."""

    mean: float = 0.0
    std: float = 1.0

    def quantile(self, u: Tensor, process: Process) -> Tensor:
        return torch.sigmoid(self.mean + self.std * torch.special.ndtri(u))


@dataclass(frozen=True)
class Mode(TimeSampler):
    """``1 - u - s (cos^2(pi u / 2) - 1 + u)``, heavy in the middle and without empty ends (Esser et al., eq. 20)."""

    scale: float = 1.29

    def quantile(self, u: Tensor, process: Process) -> Tensor:
        return 1 - u - self.scale * (torch.cos(math.pi / 2 * u) ** 2 - 1 + u)


class CosMap(TimeSampler):
    """``1 - 1 / (tan(pi u / 2) + 1)``: the log-SNR distribution of the cosine schedule (Esser et al., eq. 21)."""

    def quantile(self, u: Tensor, process: Process) -> Tensor:
        return 1 - 1 / (torch.tan(math.pi / 2 * u) + 1)


@dataclass(frozen=True)
class EDM(TimeSampler):
    """``log(sigma / alpha) ~ N(mean, std^2)`` (Karras et al. 2022: -1.2, 1.2; EDM2: -0.4, 1.0)."""

    mean: float = -1.2
    std: float = 1.2

    def quantile(self, u: Tensor, process: Process) -> Tensor:
        path = require_gaussian(process, "the EDM time distribution")
        return path.level(-(self.mean + self.std * torch.special.ndtri(u)))


@dataclass(frozen=True)
class Shifted(TimeSampler):
    """Another distribution, each level then moved by a shift."""

    inner: TimeSampler
    amount: float

    def __post_init__(self) -> None:
        positive(shift=self.amount)

    def quantile(self, u: Tensor, process: Process) -> Tensor:
        return shift(self.inner.quantile(u, process), self.amount)


@dataclass(frozen=True)
class Stratified(TimeSampler):
    """Another distribution with u_i = (place_i + u) / batch: one draw per equal slice, of lower variance.

    Places and batch are those of the global batch, so that the split over ranks changes nothing.
    """

    inner: TimeSampler

    def quantile(self, u: Tensor, process: Process) -> Tensor:
        return self.inner.quantile(u, process)

    def __call__(self, u: Tensor, process: Process, strata: tuple[Tensor, int] | None = None) -> Tensor:
        if strata is None:
            raise UserError("stratified times need each image's place in the global batch and its size")
        place, batch = strata
        return super().__call__((place.to(u.device, torch.float64) + u) / batch, process)


TIMES: dict[str, type[TimeSampler]] = {
    "uniform": Uniform,
    "discrete": Discrete,
    "logit-normal": LogitNormal,
    "mode": Mode,
    "cosmap": CosMap,
    "edm": EDM,
}


def time_sampler(spec: str | TimeSampler, amount: float = 1.0, stratified: bool = False) -> TimeSampler:
    """A distribution by spec ("logit-normal:mean=0.5"), shifted and stratified if asked for."""
    sampler = named("time distribution", TIMES, spec)
    if amount != 1:
        sampler = Shifted(sampler, amount)
    return Stratified(sampler) if stratified else sampler
