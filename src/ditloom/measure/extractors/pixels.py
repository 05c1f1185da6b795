"""Pixels as features: no network, for tests and for the plain reading of "nearest"."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from ditloom.contracts.registry import register
from ditloom.measure.features import Extractor, as_rgb


@register("pixels")
class Pixels(Extractor):
    """Values in [0, 1] of the picture at `size` pixels, RGB, flattened; larger pictures are averaged down."""

    def __init__(self, size: int = 32):
        super().__init__()
        self.size, self.dimension = size, 3 * size * size
        self.tag = f"pixels-{size}"

    def forward(self, images: Tensor) -> Tensor:
        x = as_rgb(images) / 255
        if x.shape[-2:] != torch.Size((self.size, self.size)):
            x = interpolate(x, (self.size, self.size), mode="bilinear", antialias=True)
        return x.flatten(1)
