"""Classifier-free guidance, with its interval, rescale and channel subset."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ditloom.contracts.errors import UserError
from ditloom.contracts.process import Components
from ditloom.contracts.registry import register
from ditloom.contracts.sampler import Moment
from ditloom.samplers.guidance.contrast import Contrast


@register("cfg", paper="Classifier-Free Diffusion Guidance")
@dataclass(frozen=True, kw_only=True)
class CFG(Contrast):
    """``uncond + scale (cond - uncond)`` (Ho & Salimans 2022).

    rescale: share of the result brought back to the conditional's standard deviation per sample (Lin et al. 2024;
    0.7). channels: guide the first k only, the others stay conditional (DiT's and SiT's code guide 3; 0 is all).
    """

    rescale: float = 0.0
    channels: int = 0

    def mix(self, strong: Any, weak: Any, moment: Moment, memory: dict[str, Any]) -> Any:
        if isinstance(strong, Components) and (self.rescale or self.channels):
            raise UserError("rescale and channels of cfg need a single tensor, and this process has named components")
        guided = moment.process.guide(strong, weak, self.scale)
        if self.rescale:
            guided = _rescaled(guided, strong, self.rescale)
        if self.channels:
            axis = getattr(moment.process, "channel_axis", 1)
            first, _ = guided.tensor_split([self.channels], dim=axis)
            _, others = strong.tensor_split([self.channels], dim=axis)
            guided = torch.cat([first, others], dim=axis)
        return guided


def _rescaled(guided: Tensor, strong: Tensor, share: float) -> Tensor:
    """``share guided std(strong) / std(guided) + (1 - share) guided``, deviations per sample."""
    axes = tuple(range(1, guided.ndim))
    ratio = strong.std(axes, keepdim=True) / guided.std(axes, keepdim=True)
    return guided * (share * ratio + (1 - share))
