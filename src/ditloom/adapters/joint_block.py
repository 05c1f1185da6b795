"""Two streams with weights of their own in one attention, the blocks of SD3 and FLUX, re-expressed at their sites."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from ditloom.adapters.foreign_block import ForeignBlock, attention_macs, feed_forward, joint_macs, mlp_site
from ditloom.contracts.layout import Layout
from ditloom.contracts.streams import Context, Streams
from ditloom.parts import cost
from ditloom.sites.visit import BareVisit, Visit

Pair = dict[str, Tensor]


class JointBlock(ForeignBlock):
    """Per stream x += g1 Attn(mod(x)); x += g2 MLP(mod(x)), with one attention over both.

    The site "attn" passes a dict by stream. Blocks return (text, image) unless `image_first`.
    """

    sites: ClassVar[tuple[str, ...]] = ("attn", "mlp", "mlp_text")
    stages: ClassVar[tuple[str, ...]] = ("modulated_in", "ff_hidden")
    row_sites = ("mlp",)
    image_first = False

    def whole(self, streams: Streams, context: Context, given: Mapping[str, Any]) -> Streams:
        pair = self.inner(
            hidden_states=streams["image"], encoder_hidden_states=streams["text"], **self.told(streams, context)
        )
        image, text = pair if self.image_first else pair[::-1]
        return streams.updated(image=image, text=streams["text"] if text is None else text)

    def told(self, streams: Streams, context: Context) -> Mapping[str, Any]:
        """What the block is called with besides its tokens."""
        return context.shared

    def inside(self, streams: Streams, context: Context, given: Mapping[str, Any], at: Visit | BareVisit) -> Streams:
        x, y, told = streams["image"], streams["text"], self.told(streams, context)
        hx, gate, shift, scale, gate_mlp, *second = self.image_norm(x, told)
        hy, *text = self.text_norm(y, told)
        h = {"image": at.tap("modulated_in", hx), "text": at.tap("modulated_in", hy, "text")}
        out = at.around("attn", lambda h: self.attend(h, told), h)
        x = x + gate.unsqueeze(1) * out["image"]
        x = self.second_attention(x, second, told, at)
        h_mlp = self.inner.norm2(x) * (1 + scale[:, None]) + shift[:, None]
        x = x + gate_mlp.unsqueeze(1) * mlp_site(self.inner.ff, h_mlp, at)
        return streams.updated(image=x, text=self.update_text(y, out, text, at))

    def image_norm(self, x: Tensor, told: Mapping[str, Any]) -> Any:
        """Normed and modulated tokens, gate, shift, scale and gate of the feed-forward, and perhaps more."""
        return self.inner.norm1(x, emb=told["temb"])

    def text_norm(self, y: Tensor, told: Mapping[str, Any]) -> Any:
        """The same for the text; the tokens alone where its stream ends here."""
        return self.inner.norm1_context(y, emb=told["temb"])

    @abstractmethod
    def attend(self, h: Pair, told: Mapping[str, Any]) -> Pair:
        """The joint attention: what leaves it, by stream."""

    def second_attention(self, x: Tensor, rest: list[Tensor], told: Mapping[str, Any], at: Visit | BareVisit) -> Tensor:
        """x after a further attention, for blocks that have one."""
        return x

    def update_text(self, y: Tensor, out: Pair, rest: list[Tensor], at: Visit | BareVisit) -> Tensor:
        """The text after attention and feed-forward."""
        gate, shift, scale, gate_mlp = rest
        y = y + gate.unsqueeze(1) * out["text"]
        h = self.inner.norm2_context(y) * (1 + scale[:, None]) + shift[:, None]
        ff = self.inner.ff_context
        return y + gate_mlp.unsqueeze(1) * at.around("mlp_text", lambda h: feed_forward(ff, h, at, "text"), h)

    def modulated_in(self, streams: Streams, context: Context) -> Tensor:
        return self.image_norm(streams["image"], self.told(streams, context))[0]

    def macs(self, layout: Layout) -> dict[str, int]:
        n, m, block = layout.length("image"), layout.length("text"), self.inner
        costs = {
            "attn": joint_macs(block.attn, n, m),
            "mlp": cost.linears(block.ff, n),
            "rest": cost.linears(block.norm1, 1) + cost.linears(block.norm1_context, 1),
        }
        if "mlp_text" in self.sites:
            costs["mlp_text"] = cost.linears(block.ff_context, m)
        return costs


class SingleBlock(ForeignBlock):
    """One set of weights for text and image: x += g proj[Attn(h), MLP(h)], attention and feed-forward side by side.

    Their outputs meet in one projection, so the sites end before it: "attn" and "mlp" pass all tokens of both streams
    in joint order, image tokens after the text unless `image_first`.
    """

    sites: ClassVar[tuple[str, ...]] = ("attn", "mlp")
    stages: ClassVar[tuple[str, ...]] = ("modulated_in",)
    boundaries = {"attn": "pre-projection", "mlp": "pre-projection"}
    image_first = False

    def whole(self, streams: Streams, context: Context, given: Mapping[str, Any]) -> Streams:
        pair = self.inner(
            hidden_states=streams["image"], encoder_hidden_states=streams["text"], **self.told(streams, context)
        )
        image, text = pair if self.image_first else pair[::-1]
        return streams.updated(image=image, text=text)

    def told(self, streams: Streams, context: Context) -> Mapping[str, Any]:
        """What the block is called with besides its tokens."""
        return context.shared

    def joined(self, streams: Streams) -> Tensor:
        """Both streams in the block's order."""
        parts = [streams["image"], streams["text"]]
        return torch.cat(parts if self.image_first else parts[::-1], dim=1)

    def parted(self, streams: Streams, x: Tensor) -> Streams:
        """The inverse."""
        n = streams["image"].shape[1] if self.image_first else streams["text"].shape[1]
        first, second = x[:, :n], x[:, n:]
        image, text = (first, second) if self.image_first else (second, first)
        return streams.updated(image=image, text=text)

    def inside(self, streams: Streams, context: Context, given: Mapping[str, Any], at: Visit | BareVisit) -> Streams:
        block, told = self.inner, self.told(streams, context)
        x = self.joined(streams)
        h, *gates = self.norm(x, told)
        h = at.tap("modulated_in", h)
        mlp = at.around("mlp", lambda h: block.act_mlp(block.proj_mlp(h)), h)
        out = at.around("attn", lambda h: self.attend(h, streams, told), h)
        return self.parted(streams, self.gated(block.proj_out(torch.cat([out, mlp], dim=2)), gates, x, told))

    def norm(self, x: Tensor, told: Mapping[str, Any]) -> Any:
        """Normed and modulated tokens, and the gate."""
        return self.inner.norm(x, emb=told["temb"])

    def gated(self, y: Tensor, gates: list[Tensor], x: Tensor, told: Mapping[str, Any]) -> Tensor:
        """x + g y."""
        return x + gates[0].unsqueeze(1) * y

    @abstractmethod
    def attend(self, h: Tensor, streams: Streams, told: Mapping[str, Any]) -> Tensor:
        """Attention over all tokens, before the projection."""

    def modulated_in(self, streams: Streams, context: Context) -> Tensor:
        return self.norm(self.joined(streams), self.told(streams, context))[0]

    def macs(self, layout: Layout) -> dict[str, int]:
        n, block = layout.length(), self.inner
        rest = cost.linears(block.norm, 1) + cost.linear(block.proj_out, n)
        return {"attn": attention_macs(block.attn, n), "mlp": cost.linear(block.proj_mlp, n), "rest": rest}
