"""Inputs that can be written down: the golden numbers of other code bases were made with these."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def wave(shape: tuple[int, ...], rate: float, phase: float = 0.0, scale: float = 1.0) -> Tensor:
    """``scale sin(i rate + phase)`` over the flattened index i, float64."""
    return (scale * torch.sin(torch.arange(math.prod(shape), dtype=torch.float64) * rate + phase)).reshape(shape)
