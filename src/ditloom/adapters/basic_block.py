"""diffusers' BasicTransformerBlock, the block of DiT, PixArt and Latte, re-expressed at its sites."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor

from ditloom.adapters.foreign_block import ForeignBlock, attention_macs, mlp_site
from ditloom.contracts.layout import Layout
from ditloom.contracts.streams import Context, Streams
from ditloom.parts import cost
from ditloom.sites.visit import BareVisit, Visit


class Modulated(NamedTuple):
    """The normed and modulated tokens that attention reads, its gate, and shift, scale and gate of the feed-forward."""

    h: Tensor
    gate: Tensor
    shift_mlp: Tensor
    scale_mlp: Tensor
    gate_mlp: Tensor


class BasicBlock(ForeignBlock):
    """x += g1 Attn(h); x += Cross(x, text) where there is text; x += g2 MLP(mod(x)).

    Read from `context.shared`: timestep, class_labels, encoder_hidden_states and masks, as the block takes them.
    """

    sites: tuple[str, ...] = ("attn", "mlp")  # type: ignore[misc]
    stages = ("modulated_in", "ff_hidden")
    row_sites = ("mlp",)
    attention = "attn"

    def __init__(self, inner: Any):
        super().__init__(inner)
        if inner.attn2 is not None:
            self.sites = (self.attention, "cross", "mlp")

    def told(self, context: Context) -> Mapping[str, Any]:
        """What the block is called with besides its tokens."""
        return context.shared

    def whole(self, streams: Streams, context: Context, given: Mapping[str, Any]) -> Streams:
        return self.leave(streams, self.inner(self.enter(streams), **self.told(context)))

    def inside(self, streams: Streams, context: Context, given: Mapping[str, Any], at: Visit | BareVisit) -> Streams:
        x, told, block = self.enter(streams), self.told(context), self.inner
        extra = told.get("cross_attention_kwargs") or {}
        mask = told.get("attention_mask")
        m = self.modulated(x, told)
        h = at.tap("modulated_in", m.h)
        x = m.gate * at.around(self.attention, lambda h: block.attn1(h, attention_mask=mask, **extra), h) + x
        if block.attn2 is not None:
            x = at.around("cross", lambda x: self.read(x, told, extra), x) + x
        h = self.norm_mlp(x) * (1 + m.scale_mlp) + m.shift_mlp
        return self.leave(streams, m.gate_mlp * mlp_site(block.ff, h, at) + x)

    def read(self, x: Tensor, told: Mapping[str, Any], extra: Mapping[str, Any]) -> Tensor:
        """Cross-attention to the text."""
        text, mask = told["encoder_hidden_states"], told.get("encoder_attention_mask")
        return self.inner.attn2(x, encoder_hidden_states=text, attention_mask=mask, **extra)

    def modulated(self, x: Tensor, told: Mapping[str, Any]) -> Modulated:
        """adaLN-single: a table of the block's own plus what the time says, [B, 6 D]."""
        table = self.inner.scale_shift_table[None] + told["timestep"].reshape(x.shape[0], 6, -1)
        shift, scale, gate, *mlp = table.chunk(6, dim=1)
        return Modulated(self.inner.norm1(x) * (1 + scale) + shift, gate, *mlp)

    def norm_mlp(self, x: Tensor) -> Tensor:
        """The norm before the feed-forward."""
        return self.inner.norm2(x)

    def enter(self, streams: Streams) -> Tensor:
        """Tokens as the block takes them."""
        return streams["image"]

    def leave(self, streams: Streams, x: Tensor) -> Streams:
        """The streams with the block's tokens."""
        return streams.updated(image=x)

    def modulated_in(self, streams: Streams, context: Context) -> Tensor:
        return self.modulated(self.enter(streams), self.told(context)).h

    def macs(self, layout: Layout) -> dict[str, int]:
        n = layout.length()
        costs = {
            self.attention: attention_macs(self.inner.attn1, n),
            "mlp": cost.linears(self.inner.ff, n),
            "rest": cost.linears(self.inner.norm1, 1),
        }
        if self.inner.attn2 is not None:
            costs["cross"] = attention_macs(self.inner.attn2, n, layout.read("text"))
        return costs
