"""Attention from image tokens to text that is in no stream, with keys and values that a run computes once.

While gradients are recorded, blocks compute keys and values of the text themselves, so that checkpointing, compiling
and sharding see them. Otherwise `prepare` computes them for all blocks, and each block is handed its own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ditloom.contracts.backbone import NOTHING
from ditloom.contracts.errors import UserError
from ditloom.contracts.layout import Layout
from ditloom.contracts.streams import Context, Memory
from ditloom.parts import cost
from ditloom.parts.attention import kernel, logits
from ditloom.parts.norms import head_norm
from ditloom.parts.positions import rotate
from ditloom.sites.visit import BARE, BareVisit, Visit, take_rows

STAGES = ("cross_q", "cross_k", "cross_v", "cross_logits", "cross_heads")
KEPT = "text_kv"


class CrossAttention(nn.Module):
    """Queries of x [B, N, D], keys and values of text [B, n, text_width]; no token is left out but padding.

    `qk_norm` as in `Projections`. The queries, not the keys, may be rotated.
    """

    stages: ClassVar[tuple[str, ...]] = STAGES

    def __init__(self, width: int, heads: int, text_width: int | None = None, qk_norm: str | None = None):
        super().__init__()
        if width % heads:
            raise UserError(f"width {width} is not a multiple of {heads} heads")
        self.heads = heads
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(text_width or width, 2 * width)
        self.q_norm, self.k_norm = (head_norm(qk_norm, width, heads) for _ in range(2))
        self.proj = nn.Linear(width, width)

    def keys_values(self, text: Tensor) -> Tensor:
        """Keys, normed, and values of the text: [B, n, 2, h, d]."""
        k, v = self.kv(text).unflatten(-1, (2, self.heads, -1)).unbind(2)
        return torch.stack([self.k_norm(k), v], dim=2)

    def forward(
        self,
        x: Tensor,
        context: Context,
        given: Mapping[str, Any] = NOTHING,
        at: Visit | BareVisit = BARE,
        rotary: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """x [B, N, D] to the attention's output [B, N, D]; keys and values from `given`, else from the context."""
        kept = given[KEPT] if KEPT in given else self.keys_values(context.shared["text"])
        k, v = (at.tap(stage, part) for stage, part in zip(("cross_k", "cross_v"), kept.unbind(2), strict=True))
        q = self.q_norm(self.q(x).unflatten(-1, (self.heads, -1)))
        q = at.tap("cross_q", q if rotary is None else rotate(q, rotary))
        mask = context.shared.get("text_mask")
        if at.wants("cross_logits"):
            scores = logits(q, k)
            at.keep("cross_logits", scores if mask is None else scores.masked_fill(~mask, -math.inf))
        return self.proj(at.tap("cross_heads", self.attend(q, k, v, mask).flatten(2)))

    def around(
        self,
        x: Tensor,
        context: Context,
        given: Mapping[str, Any] = NOTHING,
        at: Visit | BareVisit = BARE,
        rotary: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """The same as the block's site "cross", of which some tokens can be computed alone."""

        def rows(index: Tensor) -> Tensor:
            turned = rotary and tuple(t[index] if t.ndim == 2 else take_rows(t, index) for t in rotary)
            return self(take_rows(x, index), context, given, at, turned)

        return at.around("cross", lambda x: self(x, context, given, at, rotary), x, rows=rows)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """Queries [B, N, h, d] and keys and values [B, n, h, d] to heads [B, N, h, d]."""
        return kernel(q, k, v, mask)

    def macs(self, tokens: int, text: int) -> int:
        """Of one forward, without keys and values: projections of `tokens` queries and the products with `text`."""
        projections = cost.linear(self.q, tokens) + cost.linear(self.proj, tokens)
        return projections + cost.attention(tokens, text, self.q.out_features)

    def text_macs(self, text: int) -> int:
        """Of keys and values of `text` tokens."""
        return cost.linear(self.kv, text)


class ImageCrossAttention(CrossAttention):
    """Also attends to tokens of an image, which stand before `text_tokens` of text: two softmaxes, added (Wan).

    The image has projections of keys and values, and a norm of its keys, of its own.
    """

    stages = tuple(stage for stage in STAGES if stage != "cross_logits")

    def __init__(self, width: int, heads: int, text_tokens: int, qk_norm: str | None = None):
        super().__init__(width, heads, qk_norm=qk_norm)
        self.text_tokens = text_tokens
        self.kv_image = nn.Linear(width, 2 * width)
        self.k_norm_image = head_norm(qk_norm, width, heads)

    def keys_values(self, text: Tensor) -> Tensor:
        image = text.shape[1] - self.text_tokens
        k, v = self.kv_image(text[:, :image]).unflatten(-1, (2, self.heads, -1)).unbind(2)
        return torch.cat([torch.stack([self.k_norm_image(k), v], dim=2), super().keys_values(text[:, image:])], dim=1)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        image = k.shape[1] - self.text_tokens
        return kernel(q, k[:, image:], v[:, image:]) + kernel(q, k[:, :image], v[:, :image])


def text_memory(layers: Sequence[CrossAttention], text: Tensor, mask: Tensor | None) -> Memory:
    """Text [B, n, D], its mask [B, n], and keys and values for every layer, unless gradients will flow through them."""
    if mask is not None and not (torch.compiler.is_compiling() or mask.is_meta) and not bool(mask.any(1).all()):
        raise UserError("a text mask leaves a row without any token: cross-attention needs at least one")
    extra = {}
    if layers and not _computed_in_blocks(layers, text):
        extra[KEPT] = torch.stack([layer.keys_values(text) for layer in layers], dim=1)
    return Memory(text=text, text_mask=mask, extra=extra)


def _computed_in_blocks(layers: Sequence[CrossAttention], text: Tensor) -> bool:
    """Whether gradients are recorded, or weights are spread over devices and whole only inside a block's forward."""
    parameters = [p for layer in layers for p in layer.parameters()]
    if any(hasattr(p, "placements") for p in parameters):
        return True
    return torch.is_grad_enabled() and (text.requires_grad or any(p.requires_grad for p in parameters))


def text_shared(memory: Memory) -> dict[str, Tensor]:
    """`Context.shared` of a family with cross-attention: text, mask [B, 1, 1, n], and what is kept for the layers."""
    assert memory.text is not None
    mask = {} if memory.text_mask is None else {"text_mask": memory.text_mask[:, None, None].bool()}
    kept = {KEPT: memory.extra[KEPT]} if KEPT in memory.extra else {}
    return {"text": memory.text, **mask, **kept}


def reading_text(layout: Layout, memory: Memory) -> Layout:
    """The layout with the length of the text that blocks read."""
    assert memory.text is not None
    return replace(layout, reads=(*layout.reads, ("text", memory.text.shape[1])))


def handed(layer: int | None, context: Context) -> Mapping[str, Any]:
    """What a block with the cross-attention number `layer` is handed; None: it has none."""
    kept = context.shared.get(KEPT)
    return NOTHING if kept is None or layer is None else {KEPT: kept[:, layer]}
