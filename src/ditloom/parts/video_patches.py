"""Videos to tokens and back: x [B, C, T, H, W], tokens frame by frame, row by row."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor, nn

from ditloom.contracts.errors import UserError
from ditloom.contracts.layout import Segment

Patch = tuple[int, int, int]
AXES = ("frames", "height", "width")


class VideoPatchEmbed(nn.Module):
    """A strided convolution (pt, ph, pw): x [B, C, T, H, W] to tokens [B, (T/pt)(H/ph)(W/pw), D]."""

    def __init__(self, patch: Patch, channels: int, width: int):
        super().__init__()
        self.patch = patch
        self.proj = nn.Conv3d(channels, width, kernel_size=patch, stride=patch)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(patchify_video(x, self.patch), self.proj.weight.flatten(1), self.proj.bias)

    def grid(self, x: Tensor) -> tuple[int, int, int]:
        """(frames, rows, columns) of the tokens of x."""
        t, h, w = (n // p for n, p in zip(x.shape[-3:], self.patch, strict=True))
        return t, h, w

    def macs(self, tokens: int) -> int:
        return self.proj.weight.numel() * tokens


def patchify_video(x: Tensor, patch: Patch) -> Tensor:
    """[B, C, T, H, W] to [B, N, C * pt * ph * pw]; inside a token the order is (channel, frame, row, column)."""
    pt, ph, pw = patch
    b, c, t, h, w = x.shape
    x = x.reshape(b, c, t // pt, pt, h // ph, ph, w // pw, pw)
    return x.permute(0, 2, 4, 6, 1, 3, 5, 7).reshape(b, -1, c * pt * ph * pw)


def unpatchify_video(tokens: Tensor, patch: Patch, grid: tuple[int, ...]) -> Tensor:
    """[B, N, pt * ph * pw * C] to [B, C, T, H, W]; inside a token the order is (frame, row, column, channel)."""
    (pt, ph, pw), (t, h, w) = patch, grid
    x = tokens.reshape(len(tokens), t, h, w, pt, ph, pw, -1)
    return x.permute(0, 7, 1, 4, 2, 5, 3, 6).reshape(len(tokens), -1, t * pt, h * ph, w * pw)


def xavier_video_patches_(embedder: VideoPatchEmbed) -> None:
    """Xavier-uniform over the flattened kernel and a zero bias."""
    nn.init.xavier_uniform_(embedder.proj.weight.view(embedder.proj.out_channels, -1))
    if embedder.proj.bias is not None:
        nn.init.zeros_(embedder.proj.bias)


def check_video(x: Tensor, channels: int, patch: Patch, family: str) -> None:
    """One clear sentence when x [B, C, T, H, W] does not fit: wrong rank, channels, or no multiple of the patch."""
    if x.ndim != 5:
        raise UserError(f"{family} takes x of shape [batch, channels, frames, height, width]; got {list(x.shape)}")
    if x.shape[1] != channels:
        raise UserError(f"{family} was built for {channels} channels; x has {x.shape[1]}")
    sizes = x.shape[2:]
    if any(n % p or not n for n, p in zip(sizes, patch, strict=True)):
        fits = "x".join(str(n // p * p or p) for n, p in zip(sizes, patch, strict=True))
        given, wanted = ("x".join(map(str, numbers)) for numbers in (sizes, patch))
        raise UserError(
            f"{family} takes {', '.join(AXES)} that are multiples of its patch, {wanted}; got {given}, try {fits}"
        )


def check_whole_video(segments: Sequence[Segment], family: str) -> None:
    """Refuse added segments in a family whose attentions run along the axes of one grid."""
    if segments:
        raise UserError(
            f"{family} attends within frames and along time, on one grid of tokens: it takes no segment "
            f"{segments[0].name!r}"
        )


def tokens_of(grid: Sequence[int]) -> int:
    """Number of tokens of a grid."""
    return math.prod(grid)
