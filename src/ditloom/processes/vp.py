"""The continuous variance-preserving path with a linear beta(t)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ditloom.contracts.registry import register
from ditloom.processes.gaussian import GaussianPath


@register("vp", paper="Score-Based Generative Modeling through Stochastic Differential Equations")
@dataclass(frozen=True, kw_only=True)
class VP(GaussianPath):
    """beta(t) = beta_min + t (beta_max - beta_min), ``log alpha = -(1/2) integral of beta`` (Song et al. 2021; SiT).

    sigma' is infinite at t = 0, so training stays 1e-5 away from the data (SiT).
    """

    beta_min: float = 0.1
    beta_max: float = 20.0

    @property
    def span(self) -> tuple[float, float]:
        """1e-5 from the data."""
        return 1e-5, 1.0

    def beta(self, t: Tensor) -> Tensor:
        """Rate of the forward SDE."""
        return self.beta_min + t * (self.beta_max - self.beta_min)

    def log_alpha(self, t: Tensor) -> Tensor:
        """log alpha, the negative half of beta's integral."""
        return -0.25 * t**2 * (self.beta_max - self.beta_min) - 0.5 * t * self.beta_min

    def alpha(self, t: Tensor) -> Tensor:
        return torch.exp(self.log_alpha(t))

    def sigma(self, t: Tensor) -> Tensor:
        return torch.sqrt(-torch.expm1(2 * self.log_alpha(t)))

    def d_alpha(self, t: Tensor) -> Tensor:
        return -0.5 * self.beta(t) * self.alpha(t)

    def d_sigma(self, t: Tensor) -> Tensor:
        return 0.5 * self.beta(t) * self.alpha(t) ** 2 / self.sigma(t)

    def half_log_snr(self, t: Tensor) -> Tensor:
        return self.log_alpha(t) - torch.log(self.sigma(t))

    def level(self, half_log_snr: Tensor) -> Tensor:
        """The root of ``(beta_max - beta_min) t^2 / 4 + beta_min t / 2 = -log alpha``, in its stable form."""
        drop = 0.5 * F.softplus(-2 * half_log_snr)
        root = torch.sqrt(self.beta_min**2 / 4 + (self.beta_max - self.beta_min) * drop)
        return 2 * drop / (self.beta_min / 2 + root)
