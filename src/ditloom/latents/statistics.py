"""Per-channel mean and standard deviation of a latent space over data, so that every channel enters at unit scale.

LightningDiT (Yao et al. 2025) normalises this way; its numbers come from about ten thousand examples.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from ditloom.contracts.errors import UserError
from ditloom.contracts.latent import LatentSpace


@dataclass(frozen=True)
class LatentStatistics:
    """mean and std [C] over `count` images, each averaged over images and positions."""

    mean: Tensor
    std: Tensor
    count: int


class RunningMoments:
    """Exact first and second moments per channel in float64 (Chan, Golub and LeVeque 1979, pairwise update)."""

    def __init__(self, channels: int):
        self.images, self.values = 0, 0
        self.mean = torch.zeros(channels, dtype=torch.float64)
        self.squares = torch.zeros(channels, dtype=torch.float64)

    def add(self, latents: Tensor) -> None:
        """Take in a batch [B, C, h, w]."""
        rows = latents.detach().to("cpu", torch.float64).transpose(0, 1).flatten(1)
        mean, count = rows.mean(1), rows.shape[1]
        shift, total = mean - self.mean, self.values + count
        self.squares += (rows - mean[:, None]).square().sum(1) + shift.square() * self.values * count / total
        self.mean += shift * count / total
        self.images, self.values = self.images + len(latents), total

    def result(self) -> LatentStatistics:
        """The statistics so far; population standard deviation, at least 1e-6."""
        if not self.values:
            raise UserError("latent statistics need at least one image, and the source is empty")
        std = (self.squares / self.values).sqrt().clamp_min(1e-6)
        return LatentStatistics(self.mean.float(), std.float(), self.images)


@torch.no_grad()
def measure(space: LatentSpace, batches: Iterable[Tensor]) -> LatentStatistics:
    """Statistics of what `space.encode` returns over batches of images [B, 3, H, W] in [-1, 1]."""
    moments = RunningMoments(space.channels)
    for images in batches:
        moments.add(space.encode(images))
    return moments.result()
