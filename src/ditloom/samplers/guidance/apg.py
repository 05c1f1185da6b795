"""Adaptive projected guidance: high scales without oversaturation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ditloom.contracts.process import Estimate
from ditloom.contracts.registry import register
from ditloom.contracts.sampler import Moment
from ditloom.processes.gaussian import require_gaussian
from ditloom.samplers.guidance.contrast import Contrast

PAPER = "Eliminating Oversaturation and Artifacts of High Guidance Scales in Diffusion Models"


@register("apg", paper=PAPER)
@dataclass(frozen=True, kw_only=True)
class APG(Contrast):
    """On data estimates: ``D_cond + (scale - 1) (perpendicular + eta parallel)`` (Sadat et al. 2025, algorithm 1).

    The two parts are those of ``D_cond - D_uncond`` with respect to D_cond, after momentum over the steps (negative
    pushes away from the past) and a limit on its norm per sample (0: none). Built from the paper, not from code.
    """

    eta: float = 0.0
    momentum: float = -0.5
    norm_limit: float = 15.0

    def combine(self, predictions: Mapping[str, Any], moment: Moment, memory: dict[str, Any]) -> Estimate:
        """The estimate with the guided data estimate."""
        path = require_gaussian(moment.process, "apg")
        strong = path.estimate(moment.x, moment.t, predictions["cond"])
        if self.weak not in predictions or self.scale == 1:
            return strong
        weak = path.estimate(moment.x, moment.t, predictions[self.weak])
        return strong.of("x0", self.mix(strong.x0, weak.x0, moment, memory))

    def mix(self, strong: Tensor, weak: Tensor, moment: Moment, memory: dict[str, Any]) -> Tensor:
        gap = strong - weak
        if "gap" in memory:
            gap = gap + self.momentum * memory["gap"]
        if self.momentum:
            memory["gap"] = gap
        gap = _limited(gap, self.norm_limit)
        parallel = _projection(gap, strong)
        return strong + (self.scale - 1) * (gap - (1 - self.eta) * parallel)


def _axes(x: Tensor) -> tuple[int, ...]:
    return tuple(range(1, x.ndim))


def _limited(gap: Tensor, limit: float) -> Tensor:
    if not limit:
        return gap
    norm = gap.square().sum(_axes(gap), keepdim=True).sqrt()
    return gap * (limit / norm.clamp_min(1e-12)).clamp_max(1)


def _projection(gap: Tensor, onto: Tensor) -> Tensor:
    """The part of gap along `onto`, in float64 as the two nearly agree."""
    a, b = gap.double(), onto.double()
    share = (a * b).sum(_axes(a), keepdim=True) / b.square().sum(_axes(b), keepdim=True).clamp_min(1e-24)
    return (share * b).to(gap.dtype)
