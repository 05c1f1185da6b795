"""A latent space: pixels in, what the trunk sees out, and back."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

from torch import Tensor, nn


class LatentSpace(nn.Module):
    """Maps images [B, 3 or 1, H, W] in [-1, 1] to normalised latents [B, channels, H/factor, W/factor]."""

    channels: int
    factor: int

    @property
    def ships_apart(self) -> bool:
        """Whether `config` alone brings the weights back, so that a model's folder does not hold them."""
        return False

    @abstractmethod
    def encode(self, images: Tensor) -> Tensor:
        """Images to latents with about zero mean and unit variance per channel."""

    @abstractmethod
    def decode(self, latents: Tensor) -> Tensor:
        """Latents back to images in [-1, 1]."""

    @abstractmethod
    def config(self) -> dict[str, Any]:
        """Settings from which the registry rebuilds this space (weights are in the state dict)."""

    def shape(self, image_size: int | tuple[int, int]) -> tuple[int, int, int]:
        """(C, h, w) of the latents of an image size; the size must be a multiple of `factor`."""
        from ditloom.contracts.errors import UserError

        height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
        if height % self.factor or width % self.factor:
            raise UserError(f"the size {height}x{width} is not a multiple of the latent space's factor {self.factor}")
        return self.channels, height // self.factor, width // self.factor
