"""The generalised variance-preserving (trigonometric) path: alpha = cos(pi t / 2), sigma = sin(pi t / 2)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ditloom.contracts.registry import register
from ditloom.processes.gaussian import GaussianPath

HALF_PI = math.pi / 2


@register("gvp", paper="SiT: Scalable Interpolant Transformers")
@dataclass(frozen=True, kw_only=True)
class GVP(GaussianPath):
    """The trigonometric interpolant (Albergo et al. 2023; SiT "GVP"): alpha^2 + sigma^2 = 1 at constant speed.

    Its velocity is pi / 2 times the v of Salimans & Ho.
    """

    @property
    def span(self) -> tuple[float, float]:
        """All of [0, 1] for the velocity, 1e-3 from the ends for other targets (SiT)."""
        return (0.0, 1.0) if self.predicts in ("v", "v-trig") else (1e-3, 1 - 1e-3)

    def alpha(self, t: Tensor) -> Tensor:
        return torch.sin(HALF_PI * (1 - t))

    def sigma(self, t: Tensor) -> Tensor:
        return torch.sin(HALF_PI * t)

    def d_alpha(self, t: Tensor) -> Tensor:
        return -HALF_PI * torch.sin(HALF_PI * t)

    def d_sigma(self, t: Tensor) -> Tensor:
        return HALF_PI * torch.sin(HALF_PI * (1 - t))

    def half_log_snr(self, t: Tensor) -> Tensor:
        return torch.log(self.alpha(t)) - torch.log(self.sigma(t))

    def level(self, half_log_snr: Tensor) -> Tensor:
        return torch.atan(torch.exp(-half_log_snr)) / HALF_PI
