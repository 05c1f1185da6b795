"""From x and added segments to one stream: tokens, layout, positions, and the modulation of each group."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ditloom.contracts.errors import UserError
from ditloom.contracts.layout import Layout, Segment, Span
from ditloom.contracts.streams import Context, Memory, Streams
from ditloom.parts.patches import PatchEmbed
from ditloom.parts.positions import grid_positions, sincos_at, sincos_grid, with_axes

AddPositions = Callable[[Tensor, tuple[int, int], Tensor | None], Tensor]


@dataclass(frozen=True)
class Joined:
    """The tokens of one stream [B, n, D], their layout, and their (row, column) positions [n, 2]."""

    tokens: Tensor
    layout: Layout
    positions: Tensor


def join(
    x: Tensor,
    embedder: PatchEmbed,
    segments: Sequence[Segment] = (),
    absolute: bool | AddPositions = True,
    stream: str = "image",
    axes: int = 2,
) -> Joined:
    """Embed x [B, C, H, W] and the segments of `stream` with one patch embedding.

    absolute: True adds sine-cosine tables, False nothing; a function (tokens, grid, positions or None) adds its own.
    axes: coordinates of a token; those before (row, column) are 0 unless a segment gives them.
    """
    grid = (x.shape[-2] // embedder.patch, x.shape[-1] // embedder.patch)
    add = (add_sincos if absolute else _add_nothing) if isinstance(absolute, bool) else absolute
    tokens = [_embedded(x, embedder, add, None)]
    positions = [grid_positions(*grid)]
    spans = [Span("image", tokens[0].shape[1], stream)]
    for segment in (s for s in segments if s.weights == stream):
        tokens.append(_embedded(segment.tokens.to(x.dtype), embedder, add, segment.positions))
        positions.append(_positions_of(segment, embedder.patch))
        spans.append(span_of(segment, tokens[-1].shape[1]))
    joined = tokens[0] if len(tokens) == 1 else torch.cat(tokens, dim=1)
    positions = [with_axes(p, axes) for p in positions]
    placed = positions[0] if len(positions) == 1 else torch.cat(positions)
    return Joined(joined, Layout(tuple(spans), grid), placed)


def text_stream(memory: Memory, segments: Sequence[Segment], dtype: torch.dtype) -> tuple[Tensor, tuple[Span, ...]]:
    """The text tokens with the segments added to their stream, and the spans of both."""
    assert memory.text is not None
    tokens, spans = [memory.text], [Span("text", memory.text.shape[1], "text")]
    for segment in (s for s in segments if s.weights == "text"):
        if segment.tokens.ndim != 3:
            raise UserError(
                f"the text stream takes embedded tokens [batch, n, width]; segment {segment.name!r} has none"
            )
        tokens.append(segment.tokens.to(dtype))
        spans.append(span_of(segment, segment.tokens.shape[1]))
    return (tokens[0] if len(tokens) == 1 else torch.cat(tokens, dim=1)), tuple(spans)


def span_of(segment: Segment, length: int) -> Span:
    """The span that a segment of `length` tokens takes."""
    return Span(segment.name, length, segment.weights, segment.modulation, segment.static, segment.emit)


def _embedded(x: Tensor, embedder: PatchEmbed, add: AddPositions, positions: Tensor | None) -> Tensor:
    if x.ndim == 3:
        return x
    return add(embedder(x), (x.shape[-2] // embedder.patch, x.shape[-1] // embedder.patch), positions)


def add_sincos(tokens: Tensor, grid: tuple[int, int], positions: Tensor | None) -> Tensor:
    """The frozen table of DiT: of the whole grid, or at given (row, column) positions [n, 2]."""
    width = tokens.shape[-1]
    if positions is not None:
        return tokens + sincos_at(positions.cpu(), width).to(tokens)
    return tokens + sincos_grid(*grid, width, tokens.dtype, tokens.device)


def _add_nothing(tokens: Tensor, grid: tuple[int, int], positions: Tensor | None) -> Tensor:
    return tokens


def check_streams(segments: Sequence[Segment], streams: tuple[str, ...], family: str) -> None:
    """Refuse a segment that asks for the weights of a stream which the family does not have."""
    for segment in segments:
        if segment.weights not in streams:
            have = " and ".join(repr(s) for s in streams)
            raise UserError(
                f"segment {segment.name!r} asks for the weights of {segment.weights!r}; {family} has {have}"
            )


def _positions_of(segment: Segment, patch: int) -> Tensor:
    if segment.positions is not None:
        return segment.positions.to(torch.float64).cpu()
    if segment.tokens.ndim == 4:
        return grid_positions(segment.tokens.shape[-2] // patch, segment.tokens.shape[-1] // patch)
    return torch.zeros(segment.tokens.shape[1], 2, dtype=torch.float64)


def modulation(
    emb: Tensor,
    vector: Tensor | None,
    segments: Sequence[Segment],
    embed_time: Callable[[Tensor], Tensor],
    stream: str = "image",
) -> Tensor:
    """The conditioning of a stream, groups as in `Layout.groups`: [B, 1, D], [B, G, D], or per token [B, n, D].

    emb: the time embedding [B, D], or [B, N, D] for per-token times. vector [B, D] is added to every group.
    """
    groups = [emb[:, None] if emb.ndim == 2 else emb]
    last = "t"
    for segment in (s for s in segments if s.weights == stream):
        if segment.modulation == "own" or segment.modulation != last:
            groups.append(_group(segment, emb, embed_time))
        elif emb.ndim == 3:
            groups.append(groups[-1])
        last = segment.modulation
    if emb.ndim == 3:
        lengths = [emb.shape[1], *(_length(s) for s in segments if s.weights == stream)]
        groups = [g if g.shape[1] == n else g.expand(-1, n, -1) for g, n in zip(groups, lengths, strict=True)]
    c = groups[0] if len(groups) == 1 else torch.cat(groups, dim=1)
    return c if vector is None else c + vector[:, None]


def _group(segment: Segment, emb: Tensor, embed_time: Callable[[Tensor], Tensor]) -> Tensor:
    batch = emb.shape[0]
    if segment.modulation == "t":
        return emb[:, None] if emb.ndim == 2 else emb.mean(1, keepdim=True)
    time = segment.time if segment.modulation == "own" else None
    level = torch.zeros(batch, dtype=torch.float64, device=emb.device) if time is None else time
    return embed_time(level).expand(batch, -1)[:, None]


def _length(segment: Segment) -> int:
    if segment.tokens.ndim != 3:
        raise ValueError("per-token times with added segments need segments given as embedded tokens [B, n, D]")
    return segment.tokens.shape[1]


def main_modulation(streams: Streams, context: Context, stream: str = "image", key: str = "") -> Tensor:
    """The conditioning of the segment "image" alone, for the head: [B, 1, D] or per token; `key`: where it is kept."""
    c = context.modulation[key or stream]
    at = streams.layout.slice("image")
    return c[:, at] if c.shape[1] == streams.layout.length(stream) else c[:, :1]
