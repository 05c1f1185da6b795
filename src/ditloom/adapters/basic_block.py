"""diffusers' BasicTransformerBlock, the block of DiT, PixArt and Latte, re-expressed at its sites."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

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

    sites: ClassVar[tuple[str, ...]] = ("attn", "mlp")
    stages: ClassVar[tuple[str, ...]] = ("modulated_in", "ff_hidden")
    row_sites = ("mlp",)
    attention = "attn"

    def __init__(self, inner: Any):
        super().__init__(inner)
        if inner.attn2 is not None:
            self.sites = (self.attention, "cross", "mlp")

    def whole(self, streams: Streams, context: Context, given: Mapping[str, Any]) -> Streams:
        return streams.updated(image=self.inner(streams["image"], **context.shared))

    def inside(self, streams: Streams, context: Context, given: Mapping[str, Any], at: Visit | BareVisit) -> Streams:
        x, told, layout = self.entered(streams, context), context.shared, streams.layout
        extra = told.get("cross_attention_kwargs") or {}
        m = self.modulated(x, told)
        attend = lambda h: self.attend(h, told, layout, extra)  # noqa: E731
        x = m.gate * at.around(self.attention, attend, at.tap("modulated_in", m.h)) + x
        if self.inner.attn2 is not None:
            x = at.around("cross", lambda x: self.read(x, told, layout, extra), x) + x
        h = self.norm_mlp(x) * (1 + m.scale_mlp) + m.shift_mlp
        return streams.updated(image=m.gate_mlp * self.mlp(h, layout, at) + x)

    def entered(self, streams: Streams, context: Context) -> Tensor:
        """The block's tokens."""
        return streams["image"]

    def attend(self, h: Tensor, told: Mapping[str, Any], layout: Layout, extra: Mapping[str, Any]) -> Tensor:
        """Attention among the tokens."""
        return self.inner.attn1(h, attention_mask=told.get("attention_mask"), **extra)

    def read(self, x: Tensor, told: Mapping[str, Any], layout: Layout, extra: Mapping[str, Any]) -> Tensor:
        """Cross-attention to the text."""
        text, mask = told["encoder_hidden_states"], told.get("encoder_attention_mask")
        return self.inner.attn2(x, encoder_hidden_states=text, attention_mask=mask, **extra)

    def mlp(self, h: Tensor, layout: Layout, at: Visit | BareVisit) -> Tensor:
        """The feed-forward, a site."""
        return mlp_site(self.inner.ff, h, at)

    def modulated(self, x: Tensor, told: Mapping[str, Any]) -> Modulated:
        """adaLN-single: a table of the block's own plus what the time says, [B, 6 D]."""
        table = self.inner.scale_shift_table[None] + told["timestep"].reshape(x.shape[0], 6, -1)
        shift, scale, gate, *mlp = table.chunk(6, dim=1)
        return Modulated(self.inner.norm1(x) * (1 + scale) + shift, gate, *mlp)

    def norm_mlp(self, x: Tensor) -> Tensor:
        """The norm before the feed-forward."""
        return self.inner.norm2(x)

    def modulated_in(self, streams: Streams, context: Context) -> Tensor:
        return self.modulated(self.entered(streams, context), context.shared).h

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
