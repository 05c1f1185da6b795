"""Which tokens are where: spans of named segments inside streams; the one place where offsets are computed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from torch import Tensor

Modulation = Literal["t", "zero", "own"]
Place = slice


@dataclass(frozen=True)
class Span:
    """A segment's place: its name, its length in tokens, the stream (weight set) it runs in, and its time."""

    name: str
    length: int
    stream: str = "image"
    modulation: Modulation = "t"
    static: bool = False
    emit: bool = True


@dataclass(frozen=True)
class Layout:
    """The spans of a forward in joint order (stream by stream), with the token grid of the main segment.

    reads: (name, length) of tokens that blocks read and that are in no stream, such as the text of cross-attention, or
    of what they go by, such as the side of a pooled grid.
    Static and hashable: it is part of what a compiled graph and a stored tensor belong to.
    """

    spans: tuple[Span, ...]
    grid: tuple[int, ...] = ()
    reads: tuple[tuple[str, int], ...] = ()

    @property
    def streams(self) -> tuple[str, ...]:
        """Stream names in joint order."""
        return tuple(dict.fromkeys(span.stream for span in self.spans))

    def of(self, stream: str) -> tuple[Span, ...]:
        """The spans of one stream, in order."""
        return tuple(span for span in self.spans if span.stream == stream)

    def length(self, stream: str | None = None) -> int:
        """Tokens of one stream, or of all."""
        return sum(span.length for span in self.spans if stream in (None, span.stream))

    def slice(self, name: str) -> Place:
        """Where a segment lies inside its own stream."""
        span = self.span(name)
        return _slice_of(self.of(span.stream), name)

    def joint_slice(self, name: str) -> Place:
        """Where a segment lies in the joint sequence of all streams."""
        return _slice_of([s for stream in self.streams for s in self.of(stream)], name)

    def stream_slice(self, stream: str) -> Place:
        """Where a stream lies in the joint sequence."""
        start = 0
        for name in self.streams:
            if name == stream:
                return slice(start, start + self.length(name))
            start += self.length(name)
        raise KeyError(stream)

    def span(self, name: str) -> Span:
        """The span of a segment; KeyError if the layout has none of that name."""
        return next(span for span in self._named(name))

    def __contains__(self, name: str) -> bool:
        return any(span.name == name for span in self.spans)

    def groups(self, stream: str) -> tuple[int, ...]:
        """Lengths of the runs of spans that share one modulation (own ones never share)."""
        lengths: list[int] = []
        last: str | None = None
        for span in self.of(stream):
            if span.modulation == last and last != "own":
                lengths[-1] += span.length
            else:
                lengths.append(span.length)
            last = span.modulation
        return tuple(lengths)

    def read(self, name: str) -> int:
        """Tokens of something that blocks read and that is in no stream; 0 if there is none of that name."""
        return dict(self.reads).get(name, 0)

    def with_spans(self, *spans: Span) -> Layout:
        """The layout with further spans at the end of their streams."""
        return replace(self, spans=(*self.spans, *spans))

    def _named(self, name: str) -> Iterator[Span]:
        found = [span for span in self.spans if span.name == name]
        if not found:
            raise KeyError(f"no segment {name!r}: the layout has {[s.name for s in self.spans]}")
        return iter(found)


def _slice_of(spans: Sequence[Span], name: str) -> slice:
    start = 0
    for span in spans:
        if span.name == name:
            return slice(start, start + span.length)
        start += span.length
    raise KeyError(name)


@dataclass(frozen=True)
class Segment:
    """Tokens that a method or user adds to a forward.

    tokens: a latent image [B, C, h, w], embedded by the backbone's own patch embedding, or embedded tokens
    [B, n, D]. positions: [n, axes] coordinates in token units, or None for the target's own grid.
    modulation: the run's time "t", the clean time "zero", or "own" with `time` [B], a noise level.
    weights: the stream whose weights it runs through. A static segment depends on neither x, t nor text
    (its rule isolates it), so its keys and values may be kept for the run.
    """

    name: str
    tokens: Tensor
    positions: Tensor | None = None
    modulation: Modulation = "t"
    time: Tensor | None = None
    weights: str = "image"
    static: bool = False
    emit: bool = False
