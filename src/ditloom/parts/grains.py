"""Two grains of a latent: which regions are fine, noise and losses that respect it (D2iT, arXiv 2504.09454).

A grain map [B, h, w] is True where a region, a cell of p x p latent positions, is fine.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ditloom.contracts.errors import UserError


def region_entropy(images: Tensor, region: int, bins: int = 64, sigma: float = 0.01) -> Tensor:
    """Entropy of the grey values of every region x region square of images [B, C, H, W] in [-1, 1]: [B, h, w].

    -sum p log p of a kernel density over bins: p(b) = mean over pixels of exp(-(x - b)^2 / (2 sigma^2)), normalised.
    """
    grey = (images.mean(1) + 1) / 2
    cells = grey.unfold(1, region, region).unfold(2, region, region).flatten(3)
    centres = torch.linspace(0, 1, bins, dtype=grey.dtype, device=grey.device)
    density = torch.exp(-(cells[..., None] - centres).square() / (2 * sigma**2)).mean(-2)
    p = density / density.sum(-1, keepdim=True).clamp(min=1e-12)
    return -torch.special.xlogy(p, p).sum(-1)


def grain_map(entropy: Tensor, ratio: float = 0.5) -> Tensor:
    """The `ratio` of regions with the highest entropy [B, h, w] are fine, the same number in every image: bool."""
    if not 0 <= ratio <= 1:
        raise UserError(f"the share of fine regions lies in 0..1; got {ratio}")
    flat = entropy.flatten(1)
    chosen = flat.argsort(dim=1, descending=True)[:, : round(ratio * flat.shape[1])]
    return torch.zeros_like(flat, dtype=torch.bool).scatter(1, chosen, True).unflatten(1, entropy.shape[1:])


def over_cells(values: Tensor, cell: int) -> Tensor:
    """A map [B, ..., h, w] with every value repeated over its cell: [B, ..., h * cell, w * cell]."""
    return values.repeat_interleave(cell, dim=-2).repeat_interleave(cell, dim=-1)


def grain_noise(noise: Tensor, grain: Tensor) -> Tensor:
    """Noise [B, C, H, W] that is one draw per cell where the grain is coarse: the cell's first one."""
    cell = noise.shape[-1] // grain.shape[-1]
    coarse = over_cells(noise[..., ::cell, ::cell], cell)
    return torch.where(over_cells(grain, cell)[:, None], noise, coarse)


def grain_loss(errors: Tensor, grain: Tensor) -> Tensor:
    """Per-sample mean [B] of squared errors [B, C, H, W]: every coarse cell counts once, every fine position once."""
    cell = errors.shape[-1] // grain.shape[-1]
    weight = torch.where(over_cells(grain, cell), 1.0, 1.0 / cell**2)[:, None].to(errors.dtype)
    return (weight * errors).sum((1, 2, 3)) / (weight.sum((1, 2, 3)) * errors.shape[1])


def fine_places(grain: Tensor, cell: int, regions: int) -> tuple[Tensor, Tensor, Tensor]:
    """Where `regions` fine regions are: their index [B, K], their positions [B, K * cell^2], and which are real (bool).

    Positions count row by row over the fine grid; real ones come first. A map with fewer fine regions is filled up.
    """
    height, width = grain.shape[1:]
    chosen = grain.flatten(1).to(torch.int8).argsort(dim=1, descending=True, stable=True)[:, :regions]
    real = grain.flatten(1).gather(1, chosen).repeat_interleave(cell**2, dim=1)
    inside = torch.arange(cell, device=grain.device)
    offsets = (inside[:, None] * (width * cell) + inside).flatten()
    corners = (chosen // width) * cell * (width * cell) + (chosen % width) * cell
    return chosen, (corners[..., None] + offsets).flatten(1), real
