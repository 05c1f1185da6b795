"""EDM: variance exploding, with the network wrapped so that its input and target have unit variance."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ditloom.contracts.registry import register
from ditloom.contracts.settings import positive
from ditloom.processes.gaussian import GaussianPath, scaled
from ditloom.processes.targets import Preconditioned, Target


@register("edm", paper="Elucidating the Design Space of Diffusion-Based Generative Models")
@dataclass(frozen=True, kw_only=True)
class EDM(GaussianPath):
    """``x = x0 + sigma eps`` with c_skip, c_out, c_in and c_noise of Karras et al. 2022, table 1.

    Noise level: ``sigma = sigma_max t^rho``, so that t = 0 is exactly data, t = 1 is sigma_max, and the paper's
    grid of noise levels (eq. 5) is a uniform grid in t. The network hears ``c_noise = log(sigma) / 4`` as its time,
    so its `TimeInput` is usually the identity. In EDM's loss the weight of the network's raw output is 1 at every
    level, which is "uniform" here.
    """

    spacing = "karras"
    times = "edm"

    predicts: str = "edm"
    sigma_min: float = 0.002
    sigma_max: float = 80.0
    sigma_data: float = 0.5
    rho: float = 7.0

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(sigma_min=self.sigma_min, sigma_max=self.sigma_max, sigma_data=self.sigma_data, rho=self.rho)

    @property
    def span(self) -> tuple[float, float]:
        """From sigma_min to sigma_max."""
        return (self.sigma_min / self.sigma_max) ** (1 / self.rho), 1.0

    @cached_property
    def kind(self) -> Target:
        """The prediction target; the preconditioned one knows sigma_data."""
        plain = super().kind
        return Preconditioned(self.sigma_data) if isinstance(plain, Preconditioned) else plain

    def prior(self, noise: Tensor, t: float = 1.0) -> Tensor:
        """Noise of the standard deviation at level t; the data is lost in it."""
        return self.at(t).sigma * noise

    def scale_input(self, x: Tensor, t: float | Tensor) -> Tensor:
        """``c_in x``, c_in = 1 / sqrt(sigma^2 + sigma_data^2)."""
        return scaled((self.at(t).sigma ** 2 + self.sigma_data**2) ** -0.5, x)

    def network_time(self, t: float | Tensor) -> float | Tensor:
        """``c_noise = log(sigma) / 4``; levels below sigma_min are told as sigma_min."""
        if not isinstance(t, Tensor):
            return 0.25 * math.log(max(self.at(t).sigma, self.sigma_min))
        return 0.25 * torch.log(self.sigma(t.to(torch.float64)).clamp_min(self.sigma_min))

    def alpha(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)

    def sigma(self, t: Tensor) -> Tensor:
        return self.sigma_max * t**self.rho

    def d_alpha(self, t: Tensor) -> Tensor:
        return torch.zeros_like(t)

    def d_sigma(self, t: Tensor) -> Tensor:
        return self.sigma_max * self.rho * t ** (self.rho - 1)

    def half_log_snr(self, t: Tensor) -> Tensor:
        return -torch.log(self.sigma(t))

    def level(self, half_log_snr: Tensor) -> Tensor:
        return (torch.exp(-half_log_snr) / self.sigma_max) ** (1 / self.rho)
