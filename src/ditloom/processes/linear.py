"""The straight path of rectified flow: alpha = 1 - t, sigma = t."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ditloom.contracts.registry import register
from ditloom.processes.gaussian import GaussianPath

PAPER = "Flow Straight and Fast: Learning to Generate and Transfer Data with Rectified Flow"


@register("linear", paper=PAPER)
@dataclass(frozen=True, kw_only=True)
class Linear(GaussianPath):
    """``x_t = (1 - t) x0 + t eps`` with ``v = eps - x0`` (Liu et al. 2023; Lipman et al. 2023; SiT "Linear").

    A velocity is defined on all of [0, 1]; other targets are trained and sampled 1e-3 away from the ends (SiT).
    """

    @property
    def span(self) -> tuple[float, float]:
        """All of [0, 1] for the velocity."""
        return (0.0, 1.0) if self.predicts == "v" else (1e-3, 1 - 1e-3)

    def alpha(self, t: Tensor) -> Tensor:
        return 1 - t

    def sigma(self, t: Tensor) -> Tensor:
        return t

    def d_alpha(self, t: Tensor) -> Tensor:
        return -torch.ones_like(t)

    def d_sigma(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)

    def half_log_snr(self, t: Tensor) -> Tensor:
        return torch.log1p(-t) - torch.log(t)

    def level(self, half_log_snr: Tensor) -> Tensor:
        return torch.sigmoid(-half_log_snr)
