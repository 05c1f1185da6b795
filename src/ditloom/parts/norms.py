"""Normalisations over the feature axis."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ditloom.contracts.errors import UnknownName


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
        return F.rms_norm(x, self.weight.shape, eps=self.eps) * self.weight.to(x.dtype)


class AcrossHeads(nn.Module):
    """A norm over the full width of queries or keys that are cut into heads already: [..., h, d]."""

    def __init__(self, norm: nn.Module):
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x.flatten(-2)).view(x.shape)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x * (1 + scale) + shift, broadcast over tokens."""
    return torch.addcmul(shift, x, 1 + scale)


def norm(kind: str, width: int, affine: bool = False) -> nn.Module:
    """A norm by name: "layer", "rms" or "rms-1e-5" (its eps; always with weight), "layer-affine" (eps 1e-5)."""
    return NORMS[kind](width, affine)


NORMS = {
    "layer": lambda width, affine: LayerNorm(width, affine),
    "rms": lambda width, affine: RMSNorm(width),
    "rms-1e-5": lambda width, affine: RMSNorm(width, 1e-5),
    "layer-affine": lambda width, affine: LayerNorm(width, True, 1e-5),
}


def head_norm(kind: str | None, width: int, heads: int) -> nn.Module:
    """A norm of queries or keys [..., h, d]: per head by its name in NORMS, or "rms-full", "layer-affine-full"."""
    if kind is None:
        return nn.Identity()
    name = kind.removesuffix("-full")
    if name not in NORMS:
        raise UnknownName("norm of queries and keys", kind, [*NORMS, *(f"{n}-full" for n in NORMS)])
    return AcrossHeads(NORMS[name](width, True)) if name != kind else NORMS[name](width // heads, True)
