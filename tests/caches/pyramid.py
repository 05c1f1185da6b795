"""A tiny DiT with the three kinds of attention that a video model has: in space, in time, and to text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ditloom.backbones.dit import DiT, DiTBlock, DiTConfig
from ditloom.contracts.backbone import NOTHING
from ditloom.contracts.layout import Layout
from ditloom.contracts.streams import Context, Streams
from ditloom.parts import attention, cost
from ditloom.sites.visit import visit
from tests.sites.toys import SHAPE, randomise


class PyramidBlock(DiTBlock):
    """A DiT block, then mixing over "frames" (halves of the tokens), then a linear map in the place of text."""

    sites = ("attn", "temporal", "cross", "mlp")
    row_sites = ()

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **options)
        width = self.attn.qkv.in_features
        self.over_time, self.to_text = nn.Linear(2 * width, 2 * width), nn.Linear(width, width)

    def forward(
        self, streams: Streams, context: Context, plan: Any = None, given: Mapping[str, Any] = NOTHING
    ) -> tuple[Streams, dict[str, Any]]:
        x, layout = streams["image"], streams.layout
        at = visit(plan, given, layout)
        shift1, scale1, gate1, shift2, scale2, gate2 = (
            context.spread(m, layout) for m in self.modulation(context.modulation["image"])
        )

        def attend(h: Tensor) -> Tensor:
            q, k, v = self.attn.heads_of(h, None, at)
            return self.attn.out(attention.attend(q, k, v, layout, at=at), at)

        def mix(h: Tensor) -> Tensor:
            return torch.cat(self.over_time(torch.cat(h.chunk(2, 1), -1)).chunk(2, -1), 1)

        x = x + gate1 * at.around("attn", attend, self.norm1(x) * (1 + scale1) + shift1)
        x = x + gate1 * at.around("temporal", mix, x)
        x = x + at.around("cross", self.to_text, x)
        x = x + gate2 * at.around("mlp", lambda h: self.mlp(h, at), self.norm2(x) * (1 + scale2) + shift2)
        return streams.updated(image=x), at.kept

    def macs(self, layout: Layout) -> dict[str, int]:
        n = layout.length()
        frames = n // 2 * cost.linear(self.over_time, 1)
        return {**super().macs(layout), "temporal": frames, "cross": cost.linear(self.to_text, n)}


class Pyramid(DiT):
    """A DiT of such blocks."""

    missing: ClassVar[Mapping[str, str]] = {}

    def make_block(self, index: int = 0) -> PyramidBlock:
        return PyramidBlock(self.preset.width, self.preset.heads)


def pyramid() -> Pyramid:
    """Randomised, three blocks."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: Pyramid = randomise(Pyramid(DiTConfig(depth=3, classes=10, learn_sigma=False, **SHAPE)))
        return model
