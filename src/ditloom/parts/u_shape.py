"""What a U shape is made of: transitions between its scales, and one condition per scale."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ditloom.contracts.backbone import NOTHING, Transition
from ditloom.contracts.layout import Layout
from ditloom.contracts.plan import BlockPlan
from ditloom.contracts.streams import Context, Streams
from ditloom.parts import cost
from ditloom.parts.embedders import LabelEmbedding, TimeEmbedding
from ditloom.parts.grids import at_scale, convolution, to_map, to_tokens


class Down(Transition):
    """A 3x3 convolution to a quarter of the channels, then pixel-unshuffle: half the grid, `outputs` channels."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.conv = convolution(inputs, outputs // 4, bias=False)

    def forward(
        self, streams: Streams, context: Context, plan: BlockPlan | None = None, given: Mapping[str, Any] = NOTHING
    ) -> tuple[Streams, dict[str, Any]]:
        x = F.pixel_unshuffle(self.conv(to_map(streams["image"], streams.layout.grid)), 2)
        return Streams({"image": to_tokens(x)}, self.after(streams.layout)), {}

    def macs(self, layout: Layout) -> dict[str, int]:
        return {"rest": cost.convolution(self.conv, layout.length("image"))}

    def after(self, layout: Layout) -> Layout:
        return at_scale(layout, tuple(n // 2 for n in layout.grid), 4 * self.conv.out_channels)


class Up(Transition):
    """A 3x3 convolution to four times the channels, then pixel-shuffle: twice the grid, `outputs` channels."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.conv = convolution(inputs, 4 * outputs, bias=False)

    def forward(
        self, streams: Streams, context: Context, plan: BlockPlan | None = None, given: Mapping[str, Any] = NOTHING
    ) -> tuple[Streams, dict[str, Any]]:
        x = F.pixel_shuffle(self.conv(to_map(streams["image"], streams.layout.grid)), 2)
        return Streams({"image": to_tokens(x)}, self.after(streams.layout)), {}

    def macs(self, layout: Layout) -> dict[str, int]:
        return {"rest": cost.convolution(self.conv, layout.length("image"))}

    def after(self, layout: Layout) -> Layout:
        return at_scale(layout, tuple(2 * n for n in layout.grid), self.conv.out_channels // 4)


class Concatenate(Transition):
    """x = linear([x, skip]) per token, with the long skip in given["skip"]."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.linear = nn.Linear(inputs, outputs)

    def forward(
        self, streams: Streams, context: Context, plan: BlockPlan | None = None, given: Mapping[str, Any] = NOTHING
    ) -> tuple[Streams, dict[str, Any]]:
        x = self.linear(torch.cat([streams["image"], given["skip"]["image"]], dim=-1))
        return Streams({"image": x}, self.after(streams.layout)), {}

    def macs(self, layout: Layout) -> dict[str, int]:
        return {"rest": cost.linear(self.linear, layout.length("image"))}

    def after(self, layout: Layout) -> Layout:
        return at_scale(layout, layout.grid, self.linear.out_features)


class ScaleConditions(nn.Module):
    """A time embedding and a label table of its own for every width of a U shape.

    One label serves all scales: a dropped one is dropped everywhere.
    """

    def __init__(self, widths: tuple[int, ...], classes: int, null: bool):
        super().__init__()
        self.widths = widths
        self.time = nn.ModuleList(TimeEmbedding(width) for width in widths)
        labels = (LabelEmbedding(classes, width, null) for width in widths) if classes else ()
        self.label = nn.ModuleList(labels)

    def labels(self, label: Tensor | None) -> Tensor | None:
        """Label vectors of all scales side by side [B, sum(widths)]; None where there are no classes."""
        tables: list[Any] = list(self.label)
        if not tables:
            return None
        checked = tables[0].check(label)
        return torch.cat([table(checked) for table in tables], dim=-1)

    def forward(self, time: Tensor, labels: Tensor | None) -> tuple[list[Tensor], Tensor]:
        """The condition of every scale [B, 1, D_s], and the first scale's time embedding [B, D_0]."""
        embedded = [embed(time) for embed in self.time]
        if labels is None:
            return [e[:, None] for e in embedded], embedded[0]
        vectors = labels.split(self.widths, dim=-1)
        return [(e + y)[:, None] for e, y in zip(embedded, vectors, strict=True)], embedded[0]

    def macs(self) -> int:
        """Multiply-accumulates of one evaluation per batch row."""
        return cost.linears(self, 1)
