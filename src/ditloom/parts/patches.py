"""Images to tokens and back."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ditloom.parts import cost


class PatchEmbed(nn.Module):
    """A strided convolution p x p: x [B, C, H, W] to row-major tokens [B, (H/p)(W/p), D]."""

    def __init__(self, patch: int, channels: int, width: int):
        super().__init__()
        self.patch = patch
        self.proj = nn.Conv2d(channels, width, kernel_size=patch, stride=patch)

    def forward(self, x: Tensor) -> Tensor:
        # the matrix form is what the convolution computes, and much faster on CPUs in bf16
        return nn.functional.linear(patchify(x, self.patch), self.proj.weight.flatten(1), self.proj.bias)

    def macs(self, tokens: int) -> int:
        return cost.convolution(self.proj, tokens)


def patchify(x: Tensor, patch: int) -> Tensor:
    """[B, C, H, W] to [B, N, C * p * p]; inside a token the order is (channel, row, column)."""
    b, c, height, width = x.shape
    x = x.reshape(b, c, height // patch, patch, width // patch, patch)
    return x.permute(0, 2, 4, 1, 3, 5).reshape(b, (height // patch) * (width // patch), c * patch * patch)


def unpatchify(tokens: Tensor, patch: int, grid: tuple[int, ...]) -> Tensor:
    """[B, N, p * p * C] to [B, C, H, W]; inside a token the order is (row, column, channel), as in DiT."""
    b, _, features = tokens.shape
    channels = features // patch**2
    x = tokens.reshape(b, *grid, patch, patch, channels)
    return x.permute(0, 5, 1, 3, 2, 4).reshape(b, channels, grid[0] * patch, grid[1] * patch)


def unpack(tokens: Tensor, patch: int, grid: tuple[int, ...]) -> Tensor:
    """[B, N, C * p * p] to [B, C, H, W], the inverse of `patchify`: inside a token (channel, row, column), as FLUX."""
    b, _, features = tokens.shape
    channels = features // patch**2
    x = tokens.reshape(b, *grid, channels, patch, patch)
    return x.permute(0, 3, 1, 4, 2, 5).reshape(b, channels, grid[0] * patch, grid[1] * patch)


def xavier_patches_(embedder: PatchEmbed) -> None:
    """Xavier-uniform over the flattened kernel, as DiT initialises its patch convolution, and a zero bias."""
    nn.init.xavier_uniform_(embedder.proj.weight.view(embedder.proj.out_channels, -1))
    if embedder.proj.bias is not None:
        nn.init.zeros_(embedder.proj.bias)


def normal_linears_(module: nn.Module, std: float = 0.02) -> None:
    """Normal weights for every linear layer inside; biases are left as they are."""
    for m in module.modules():
        if isinstance(m, nn.Linear):
            nn.init.normal_(m.weight, std=std)


def xavier_linears_(module: nn.Module) -> None:
    """Xavier-uniform weights and zero biases for every linear layer inside."""
    for m in module.modules():
        if isinstance(m, nn.Linear):
            nn.init.xavier_uniform_(m.weight)
            if m.bias is not None:
                nn.init.zeros_(m.bias)


def zero_(*modules: nn.Module) -> None:
    """Zero weights and biases: the branch changes nothing at the start."""
    with torch.no_grad():
        for module in modules:
            for parameter in module.parameters():
                parameter.zero_()
