"""Loss weights over the noise level. Each is stated for the error of x0 or of eps and carried to the target's own.

With SNR = alpha^2 / sigma^2 an x0 error of weight SNR is an eps error of weight 1, and so on for every target, so
a weight means the same whatever the network predicts. Only density times weight matters in expectation.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch

from ditloom.processes.targets import Coefficients, Target


@dataclass(frozen=True)
class LossWeight(ABC):
    """w(t) for the squared error of `of`."""

    of: ClassVar[Literal["x0", "eps"]] = "x0"

    @abstractmethod
    def __call__(self, c: Coefficients) -> Any:
        """The weight of the squared error named by `of`."""

    def for_target(self, target: Target, c: Coefficients) -> Any:
        """The weight of the target's own squared error, float64, shaped like t."""
        gain = getattr(target, self.of)(c).b / target.unit(c)
        return self(c) * gain**2


class Uniform(LossWeight):
    """The plain mean squared error of whatever is predicted."""

    def __call__(self, c: Coefficients) -> Any:
        return 1.0

    def for_target(self, target: Target, c: Coefficients) -> Any:
        return 1.0


class Data(LossWeight):
    """The plain error of x0."""

    def __call__(self, c: Coefficients) -> Any:
        return 1.0


class Noise(LossWeight):
    """The plain error of eps, i.e. SNR on x0 (Ho et al. 2020, L_simple)."""

    of = "eps"

    def __call__(self, c: Coefficients) -> Any:
        return 1.0


@dataclass(frozen=True)
class MinSNR(LossWeight):
    """``min(SNR, gamma)`` (Hang et al. 2023)."""

    gamma: float = 5.0

    def __call__(self, c: Coefficients) -> Any:
        return torch.clamp(_snr(c), max=self.gamma)


class VelocityWeight(LossWeight):
    """``(g / sigma)^2`` on eps: the error of dx/dt (SiT's "velocity")."""

    of = "eps"

    def __call__(self, c: Coefficients) -> Any:
        return (diffusion(c) / c.sigma) ** 2


class Likelihood(LossWeight):
    """``g / sigma^2`` on eps: maximum likelihood (Song et al. 2021; SiT's "likelihood")."""

    of = "eps"

    def __call__(self, c: Coefficients) -> Any:
        return diffusion(c) / c.sigma**2


@dataclass(frozen=True)
class EDM(LossWeight):
    """``SNR + 1 / sigma_data^2`` (Karras et al. 2022, table 1)."""

    sigma_data: float = 0.5

    def __call__(self, c: Coefficients) -> Any:
        return _snr(c) + 1 / self.sigma_data**2


@dataclass(frozen=True)
class Sigmoid(LossWeight):
    """``sigmoid(log SNR - bias)`` on x0 (Kingma & Gao 2023; Hoogeboom et al. 2024), bias in nats of SNR."""

    bias: float = 0.0

    def __call__(self, c: Coefficients) -> Any:
        return torch.sigmoid(torch.log(_snr(c)) - self.bias)


@dataclass(frozen=True)
class P2(LossWeight):
    """``(k + SNR)^-gamma`` on eps (Choi et al. 2022)."""

    k: float = 1.0
    gamma: float = 1.0
    of = "eps"

    def __call__(self, c: Coefficients) -> Any:
        return (self.k + _snr(c)) ** -self.gamma


def _snr(c: Coefficients) -> Any:
    return torch.as_tensor((c.alpha / c.sigma) ** 2, dtype=torch.float64)


def diffusion(c: Coefficients) -> Any:
    """g(t), half the squared diffusion coefficient of the forward SDE: ``sigma sigma' - sigma^2 alpha' / alpha``."""
    return c.sigma * c.d_sigma - c.sigma**2 * c.d_alpha / c.alpha


WEIGHTS: dict[str, type[LossWeight]] = {
    "uniform": Uniform,
    "x0": Data,
    "snr": Noise,
    "min-snr": MinSNR,
    "velocity": VelocityWeight,
    "likelihood": Likelihood,
    "edm": EDM,
    "sigmoid": Sigmoid,
    "p2": P2,
}
