"""From two streams to one and back: what lies between the double and the single blocks of FLUX and its kind.

The single blocks run text and image through the same weights, so both become segments of the stream "image", in joint
order. What they read from the context stands there under `JOINT`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ditloom.contracts.backbone import NOTHING, Transition
from ditloom.contracts.layout import Layout, Span
from ditloom.contracts.plan import BlockPlan
from ditloom.contracts.streams import Context, Streams

JOINT = "joint"
Table = tuple[Tensor, Tensor]


class JoinStreams(Transition):
    """All streams become one, "image", in joint order."""

    rearranges = True

    def forward(
        self, streams: Streams, context: Context, plan: BlockPlan | None = None, given: Mapping[str, Any] = NOTHING
    ) -> tuple[Streams, dict[str, Any]]:
        joined = torch.cat([streams[s] for s in streams.layout.streams], dim=1)
        return Streams({"image": joined}, self.after(streams.layout)), {}

    def after(self, layout: Layout) -> Layout:
        return replace(layout, spans=tuple(replace(span, stream="image") for span in _ordered(layout)))


class PartStreams(Transition):
    """The inverse: the stream "image" becomes two again, the second from the segment of its own name on."""

    rearranges = True

    def __init__(self, first: str, second: str):
        super().__init__()
        self.names = (first, second)

    def forward(
        self, streams: Streams, context: Context, plan: BlockPlan | None = None, given: Mapping[str, Any] = NOTHING
    ) -> tuple[Streams, dict[str, Any]]:
        layout = self.after(streams.layout)
        tokens = {s: streams["image"][:, layout.stream_slice(s)] for s in self.names}
        return Streams(tokens, layout), {}

    def after(self, layout: Layout) -> Layout:
        first, second = self.names
        border = [span.name for span in layout.spans].index(second)
        spans = (replace(s, stream=first if i < border else second) for i, s in enumerate(layout.spans))
        return replace(layout, spans=tuple(spans))


def single(context: Context) -> Context:
    """The context as a block reads it that knows one stream only, "image"."""
    rotary = {"image": context.rotary[JOINT]} if JOINT in context.rotary else {}
    return replace(context, modulation={"image": context.modulation[JOINT]}, rotary=rotary)


def joined_modulation(modulation: Mapping[str, Tensor], layout: Layout) -> Tensor:
    """The conditioning of the joined stream from that of each stream of `layout`: by group, or per token."""
    streams = layout.streams
    if any(modulation[s].shape[1] != len(layout.groups(s)) for s in streams):
        return torch.cat([_per_token(modulation[s], layout, s) for s in streams], dim=1)
    parts = [modulation[streams[0]]]
    for before, stream in zip(streams, streams[1:], strict=False):
        last, first = layout.of(before)[-1].modulation, layout.of(stream)[0].modulation
        shared = last == first != "own"  # what meets at the border is then one group
        parts.append(modulation[stream][:, 1:] if shared else modulation[stream])
    return torch.cat(parts, dim=1)


def joined_rotary(tables: Mapping[str, Table], layout: Layout) -> Table:
    """The rotary table of the joined stream [n, d]; a stream without one stands at the origin and is not rotated."""
    like = next(iter(tables.values()))[0]
    at_origin = lambda s: (like.new_ones(layout.length(s), like.shape[-1]), like.new_zeros(()))  # noqa: E731
    cos, sin = zip(*(tables.get(s) or at_origin(s) for s in layout.streams), strict=True)
    return torch.cat(cos), torch.cat([s if s.ndim else s.expand_as(c) for c, s in zip(cos, sin, strict=True)])


def _per_token(values: Tensor, layout: Layout, stream: str) -> Tensor:
    spread = Context().spread(values, layout, stream)
    return spread.expand(-1, layout.length(stream), -1)


def _ordered(layout: Layout) -> list[Span]:
    return [span for stream in layout.streams for span in layout.of(stream)]
