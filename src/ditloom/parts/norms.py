"""Normalisations over the feature axis."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class LayerNorm(nn.LayerNorm):
    """LayerNorm; `affine=False` as in adaLN blocks. eps 1e-6."""

    def __init__(self, width: int, affine: bool = False, eps: float = 1e-6):
        super().__init__(width, eps=eps, elementwise_affine=affine)


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last axis, statistics in float32, then cast, then weighted."""

    def __init__(self, width: int, eps: float = 1e-6):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        scale = torch.rsqrt(x.to(torch.float32).square().mean(-1, keepdim=True) + self.eps)
        return (x * scale).to(x.dtype) * self.weight.to(x.dtype)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x * (1 + scale) + shift, broadcast over tokens."""
    return torch.addcmul(shift, x, 1 + scale)


def norm(kind: str, width: int, affine: bool = False) -> nn.Module:
    """A norm by name: "layer", "rms" (always with weight), or "layer-affine" (always, with torch's eps of 1e-5)."""
    return NORMS[kind](width, affine)


NORMS = {
    "layer": lambda width, affine: LayerNorm(width, affine),
    "rms": lambda width, affine: RMSNorm(width),
    "layer-affine": lambda width, affine: LayerNorm(width, True, 1e-5),
}
