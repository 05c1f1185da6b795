"""CFG-Zero*: an optimised scale for the unconditional velocity, and no motion in the first steps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ditloom.contracts.process import Estimate
from ditloom.contracts.registry import register
from ditloom.contracts.sampler import Moment
from ditloom.processes.gaussian import require_gaussian
from ditloom.samplers.guidance.contrast import Contrast


@register("cfg-zero-star", paper="CFG-Zero*: Improved Classifier-Free Guidance for Flow Matching Models")
@dataclass(frozen=True, kw_only=True)
class CFGZeroStar(Contrast):
    """``s uncond + scale (cond - s uncond)``, ``s = <cond, uncond> / (|uncond|^2 + 1e-8)`` per sample.

    The velocity is 0 in the first `zero_steps` steps, which then need no model at all; the paper takes about 4 % of
    the steps (1 of 28). For flow models; scale 1 is the conditional prediction, in those steps too. (The official
    code counts differently: its zero_steps = 0 zeroes one step.)
    """

    zero_steps: int = 1

    def branches(self, moment: Moment) -> tuple[str, ...]:
        """None while the velocity is 0."""
        return () if self._still(moment) else super().branches(moment)

    def combine(self, predictions: Mapping[str, Any], moment: Moment, memory: dict[str, Any]) -> Estimate:
        """The estimate of the mixed prediction, or of a velocity of 0."""
        if not self._still(moment):
            return super().combine(predictions, moment, memory)
        path = require_gaussian(moment.process, "cfg-zero-star")
        still = torch.zeros_like(moment.x)
        return path.estimate(moment.x, moment.t, path.join(still, still if path.learns_variance else None)).of(
            "v", still
        )

    def mix(self, strong: Tensor, weak: Tensor, moment: Moment, memory: dict[str, Any]) -> Tensor:
        require_gaussian(moment.process, "cfg-zero-star")
        weak = optimal_scale(strong, weak) * weak
        return moment.process.guide(strong, weak, self.scale)

    def _still(self, moment: Moment) -> bool:
        return self.scale != 1 and moment.step < self.zero_steps


def optimal_scale(strong: Tensor, weak: Tensor) -> Tensor:
    """The s that brings ``s weak`` closest to the strong prediction, [B, 1, ...]."""
    axes = tuple(range(1, strong.ndim))
    strong32, weak32 = strong.float(), weak.float()
    s = (strong32 * weak32).sum(axes, keepdim=True) / (weak32.square().sum(axes, keepdim=True) + 1e-8)
    return s.to(strong.dtype)
