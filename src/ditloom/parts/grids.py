"""Tokens as maps and back, and convolutions over a grid of tokens.

Tokens [B, N, C] in row-major order are a channels-last image [B, C, H, W]: neither direction copies.
"""

from __future__ import annotations

from dataclasses import replace
from math import prod

from torch import Tensor, nn

from ditloom.contracts.layout import Layout, Span
from ditloom.parts import cost


def to_map(tokens: Tensor, grid: tuple[int, ...]) -> Tensor:
    """[B, H * W, C] to [B, C, H, W]."""
    return tokens.transpose(1, 2).unflatten(2, grid)


def to_tokens(x: Tensor) -> Tensor:
    """[B, C, H, W] to [B, H * W, C]."""
    return x.flatten(2).transpose(1, 2)


def convolution(inputs: int, outputs: int, kernel: int = 3, bias: bool = True) -> nn.Conv2d:
    """A zero-padded convolution that keeps the grid."""
    return nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=bias)


def depthwise(width: int, kernel: int) -> nn.Conv2d:
    """A zero-padded depthwise convolution that keeps the grid."""
    return nn.Conv2d(width, width, kernel, padding=kernel // 2, groups=width)


def over_grid(conv: nn.Conv2d, tokens: Tensor, grid: tuple[int, ...]) -> Tensor:
    """A convolution of tokens [B, N, C]."""
    return to_tokens(conv(to_map(tokens, grid)))


class Stem(nn.Module):
    """A 3x3 convolution in place of a patch embedding: x [B, C, H, W] to tokens [B, H * W, D], one per position."""

    def __init__(self, channels: int, width: int):
        super().__init__()
        self.proj = convolution(channels, width)

    def forward(self, x: Tensor) -> Tensor:
        return to_tokens(self.proj(x))

    def macs(self, tokens: int) -> int:
        return cost.convolution(self.proj, tokens)


def with_grid(layout: Layout, grid: tuple[int, ...]) -> Layout:
    """The layout whose segment "image" lies on another grid."""
    spans = (replace(s, length=prod(grid)) if s.name == "image" else s for s in layout.spans)
    return replace(layout, spans=tuple(spans), grid=grid)


def at_scale(layout: Layout, grid: tuple[int, ...], width: int) -> Layout:
    """The same, in tokens of another width, which the layout notes as "width"."""
    reads = (*(read for read in layout.reads if read[0] != "width"), ("width", width))
    return replace(with_grid(layout, grid), reads=reads)


def image_layout(grid: tuple[int, ...], width: int) -> Layout:
    """One segment "image", a token per position of the grid."""
    return at_scale(Layout((Span("image", prod(grid)),)), grid, width)


def xavier_(module: nn.Module) -> None:
    """Xavier-uniform weights and zero biases for every linear layer and convolution inside; a stem as if linear."""
    for m in module.modules():
        if isinstance(m, nn.Linear | nn.Conv2d):
            nn.init.xavier_uniform_(m.weight)
            if m.bias is not None:
                nn.init.zeros_(m.bias)
    for m in module.modules():
        if isinstance(m, Stem):
            nn.init.xavier_uniform_(m.proj.weight.view(m.proj.out_channels, -1))
