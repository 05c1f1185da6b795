"""No compression: the trunk sees the pixels."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ditloom.contracts.errors import UserError
from ditloom.contracts.latent import LatentSpace
from ditloom.contracts.registry import register


@register("pixels")
class Pixels(LatentSpace):
    """Identity in both directions; images [B, channels, H, W] in [-1, 1]."""

    factor = 1

    def __init__(self, channels: int = 3):
        super().__init__()
        if channels < 1:
            raise UserError(f"pixels have at least 1 channel, got {channels}")
        self.channels = channels

    def config(self) -> dict[str, Any]:
        return {"channels": self.channels}

    def encode(self, images: Tensor) -> Tensor:
        if images.ndim != 4 or images.shape[1] != self.channels:
            raise UserError(f"these pixels are [B, {self.channels}, H, W], got {list(images.shape)}")
        return images

    def decode(self, latents: Tensor) -> Tensor:
        return latents.clamp(-1, 1)
