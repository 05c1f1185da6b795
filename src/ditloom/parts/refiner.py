"""A refiner of text tokens: full attention where a language model's was causal, and between several models (LI-DiT).

Each branch holds the tokens of one model. In a layer a branch attends to itself, then to the tokens of all other
branches, then runs a feed-forward; time and pooled text modulate all three. Branches move at the same time: each reads
the others as they were when the layer began.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from ditloom.contracts.streams import Context
from ditloom.parts import attention, cost
from ditloom.parts.cross_attention import CrossAttention
from ditloom.parts.feed_forward import MLP
from ditloom.parts.modulation import AdaLN
from ditloom.parts.norms import LayerNorm, modulate

Mask = Tensor | None


class RefinerLayer(nn.Module):
    """One layer of one branch: x += g1 Attn(mod(LN x)); x += g2 Cross(mod(LN x), others); x += g3 MLP(mod(LN x)).

    With `crossed` off there is no second step. Gates start at zero, so that a fresh layer changes nothing.
    """

    def __init__(self, width: int, heads: int, mlp_ratio: float, qk_norm: str | None, crossed: bool):
        super().__init__()
        self.norms = nn.ModuleList(LayerNorm(width) for _ in range(2 + crossed))
        self.attn = attention.Projections(width, heads, qk_norm=qk_norm)
        self.cross = CrossAttention(width, heads, qk_norm=qk_norm) if crossed else None
        self.mlp = MLP(width, int(width * mlp_ratio))
        self.modulation = AdaLN(width, 3 * len(self.norms))

    def forward(self, x: Tensor, mask: Mask, c: Tensor, others: Tensor | None, others_mask: Mask) -> Tensor:
        """x [B, n, D] with mask [B, n], c [B, 1, D], and the other branches' tokens [B, m, D] with theirs."""
        steps: list[Callable[[Tensor], Tensor]] = [
            lambda h: self._attend(h, mask),
            lambda h: self._cross(h, others, others_mask),
            self.mlp,
        ]
        steps = steps if self.cross is not None else [steps[0], steps[2]]
        chunks = self.modulation(c)
        for n, (norm, step) in enumerate(zip(self.norms, steps, strict=True)):
            shift, scale, gate = chunks[3 * n : 3 * n + 3]
            x = torch.addcmul(x, gate, step(modulate(norm(x), shift, scale)))
        return x

    def _attend(self, h: Tensor, mask: Mask) -> Tensor:
        return self.attn.out(attention.kernel(*self.attn.heads_of(h, None), _keys(mask)).flatten(2))

    def _cross(self, h: Tensor, others: Tensor | None, mask: Mask) -> Tensor:
        if self.cross is None or others is None:  # nobody to listen to
            return torch.zeros_like(h)
        return self.cross(h, Context(shared={"text": others, "text_mask": _keys(mask)}))

    def macs(self, tokens: int, others: int) -> int:
        """For `tokens` of its own and `others` of the other branches."""
        own = self.attn.macs(tokens) + cost.attention(tokens, tokens, self.attn.qkv.in_features)
        crossed = self.cross is not None and others
        heard = self.cross.macs(tokens, others) + self.cross.text_macs(others) if self.cross and crossed else 0
        return own + heard + self.mlp.macs(tokens) + self.modulation.macs(1)


class TokenRefiner(nn.Module):
    """`depth` layers over one or more branches of text tokens."""

    def __init__(
        self, width: int, heads: int, depth: int, branches: int = 1, mlp_ratio: float = 4.0, qk_norm: str | None = None
    ):
        super().__init__()
        self.layers = nn.ModuleList(
            nn.ModuleList(RefinerLayer(width, heads, mlp_ratio, qk_norm, branches > 1) for _ in range(branches))
            for _ in range(depth)
        )

    def forward(self, texts: Sequence[Tensor], masks: Sequence[Mask], c: Tensor) -> list[Tensor]:
        """The branches' tokens [B, n, D], refined; the last branches may be left out. c [B, D]."""
        current = list(texts)
        for layer in cast("Sequence[nn.ModuleList]", self.layers):
            others = [_others(current, masks, i) for i in range(len(current))]
            current = [
                one(x, mask, c[:, None], *other)
                for one, x, mask, other in zip(layer, current, masks, others, strict=False)
            ]
        return current

    def macs(self, tokens: Sequence[int]) -> int:
        """For the numbers of tokens of the branches that are there."""
        total = sum(tokens)
        layers = cast("Sequence[Sequence[RefinerLayer]]", self.layers)
        return sum(one.macs(n, total - n) for layer in layers for one, n in zip(layer, tokens, strict=False))


def _others(texts: Sequence[Tensor], masks: Sequence[Mask], index: int) -> tuple[Tensor | None, Mask]:
    """All tokens but one branch's, side by side, with their mask."""
    rest = [i for i in range(len(texts)) if i != index]
    if not rest:
        return None, None
    joined = torch.cat([texts[i] for i in rest], dim=1)
    if all(masks[i] is None for i in rest):
        return joined, None
    return joined, torch.cat([_whole(texts[i], masks[i]) for i in rest], dim=1)


def _whole(text: Tensor, mask: Mask) -> Tensor:
    return torch.ones(text.shape[:2], dtype=torch.bool, device=text.device) if mask is None else mask.bool()


def _keys(mask: Mask) -> Mask:
    """[B, n] to what a kernel takes: [B, 1, 1, n]."""
    return None if mask is None else mask.bool()[:, None, None]
