"""From a video and added segments to one stream of tokens with (frame, row, column) positions."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ditloom.contracts.layout import Layout, Segment, Span
from ditloom.parts.positions import grid_positions, with_axes
from ditloom.parts.segments import Joined, span_of
from ditloom.parts.video_patches import VideoPatchEmbed, tokens_of

AXES = 3


def join_video(x: Tensor, embedder: VideoPatchEmbed, segments: Sequence[Segment] = (), stream: str = "image") -> Joined:
    """Embed x [B, C, T, H, W] and the segments of `stream` with one patch embedding.

    A segment is a video [B, C, t, h, w], an image [B, C, h, w], or embedded tokens [B, n, D]. Its positions [n, 3],
    where not given, are those of its own grid (of tokens: all zero).
    """
    grid = embedder.grid(x)
    tokens, positions = [embedder(x)], [grid_positions(*grid)]
    spans = [Span("image", tokens_of(grid), stream)]
    for segment in (s for s in segments if s.weights == stream):
        given = segment.tokens.to(x.dtype)
        given = given[:, :, None] if given.ndim == 4 else given
        tokens.append(embedder(given) if given.ndim == 5 else given)
        positions.append(_positions(segment, given, embedder))
        spans.append(span_of(segment, tokens[-1].shape[1]))
    joined = tokens[0] if len(tokens) == 1 else torch.cat(tokens, dim=1)
    return Joined(joined, Layout(tuple(spans), grid), positions[0] if len(positions) == 1 else torch.cat(positions))


def _positions(segment: Segment, given: Tensor, embedder: VideoPatchEmbed) -> Tensor:
    if segment.positions is not None:
        return with_axes(segment.positions.to(torch.float64).cpu(), AXES)
    if given.ndim == 5:
        return grid_positions(*embedder.grid(given))
    return torch.zeros(given.shape[1], AXES, dtype=torch.float64)
