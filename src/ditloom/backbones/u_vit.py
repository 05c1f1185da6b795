"""U-ViT: All are Worth Words, a ViT Backbone for Diffusion Models (Bao et al., CVPR 2023, arXiv 2209.12152).

Time, label or text, and image patches are tokens of one sequence; long skips join the first half to the second.
Scaled up for text to image in Efficient Scaling of Diffusion Transformers (Li et al., arXiv 2412.12391), whose exact
shapes are not published: the presets of that size are assumed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ditloom.contracts.backbone import NOTHING, Backbone, BackboneConfig, Block, check_size
from ditloom.contracts.condition import Condition
from ditloom.contracts.errors import UserError
from ditloom.contracts.layout import Layout, Segment, Span
from ditloom.contracts.plan import BlockPlan
from ditloom.contracts.registry import register
from ditloom.contracts.streams import Context, Memory, Streams
from ditloom.contracts.time import FLOW_1000, TimeInput
from ditloom.parts import attention, cost
from ditloom.parts.attention_kinds import self_attention
from ditloom.parts.checks import check_rows, check_text
from ditloom.parts.embedders import LabelEmbedding, sinusoid, time_mlp
from ditloom.parts.feed_forward import MLP
from ditloom.parts.norms import LayerNorm
from ditloom.parts.patches import PatchEmbed, unpatchify
from ditloom.parts.segments import check_streams, join
from ditloom.parts.tables import add_learned
from ditloom.sites.rules import with_padding
from ditloom.sites.visit import take_rows, visit


@dataclass(frozen=True, kw_only=True)
class UViTConfig(BackboneConfig):
    """Settings of a U-ViT. `depth` counts the blocks of both halves; one middle block comes on top.

    Conditional on a class (`classes`, with `null_class` one more row), on text (`text_width`, at most `text_tokens`
    tokens), or on neither. `image_size` is fixed, as positions are learned. `convolution`: a final 3x3 convolution.
    `attention`: a kind of self-attention by name: softmax, diff or dint.
    """

    family: ClassVar[str] = "u-vit"
    process: ClassVar[Mapping[str, Any]] = {
        "name": "discrete-vp",
        "schedule": "scaled-linear",
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "predicts": "eps",
    }
    sign: ClassVar[int] = 1

    depth: int
    width: int
    heads: int
    patch: int = 2
    image_size: int = 32
    channels: int = 4
    classes: int = 0
    null_class: bool = True
    text_width: int = 0
    text_tokens: int = 77
    mlp_ratio: float = 4.0
    qkv_bias: bool = False
    attention: str = "softmax"
    time_mlp: bool = False
    convolution: bool = True
    time: TimeInput = FLOW_1000

    def __post_init__(self) -> None:
        if self.depth % 2:
            raise UserError(f"the depth of a U-ViT is even (both halves, without the middle block); got {self.depth}")
        if self.classes and self.text_width:
            raise UserError("a U-ViT is conditional on classes or on text, not on both")

    @property
    def prefix(self) -> tuple[Span, ...]:
        """The tokens before the image, in order, at full text length."""
        time = Span("time", 1)
        if self.classes:
            return Span("label", 1), time
        return (time, Span("text", self.text_tokens)) if self.text_width else (time,)

    def build(self) -> UViT:
        return UViT(self)


class UViTBlock(Block):
    """x += Attn(LN x); x += MLP(LN x): plain residuals, no gates, no modulation."""

    sites = ("attn", "mlp")
    stages: tuple[str, ...] = ("modulated_in", *attention.STAGES, "ff_hidden")
    row_sites = ("mlp",)

    def __init__(
        self,
        width: int,
        heads: int,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = False,
        attn: attention.SelfAttention | None = None,
    ):
        super().__init__()
        self.norm1, self.norm2 = LayerNorm(width, True, 1e-5), LayerNorm(width, True, 1e-5)
        self.attn = attn or attention.SelfAttention(width, heads, qkv_bias)
        self.mlp = MLP(width, int(width * mlp_ratio), exact=True)
        self.stages = ("modulated_in", *self.attn.stages, "ff_hidden")

    def forward(
        self, streams: Streams, context: Context, plan: BlockPlan | None = None, given: Mapping[str, Any] = NOTHING
    ) -> tuple[Streams, dict[str, Any]]:
        layout = streams.layout
        at = visit(plan, given, layout)
        x = self.enter(streams["image"], given)

        h = at.tap("modulated_in", self.norm1(x))
        x = x + at.around("attn", lambda h: self.attn(h, layout, context, at), h)
        h = self.norm2(x)
        mlp_rows = lambda index: self.mlp(take_rows(h, index))  # noqa: E731
        x = x + at.around("mlp", lambda h: self.mlp(h, at), h, rows=mlp_rows)
        return streams.updated(image=x), at.kept

    def enter(self, x: Tensor, given: Mapping[str, Any]) -> Tensor:
        """What the residual stream is at the start of the block."""
        return x

    def modulated_in(self, streams: Streams, context: Context) -> Tensor:
        """The normed input; there is nothing to modulate it."""
        return self.norm1(streams["image"])

    def macs(self, layout: Layout) -> dict[str, int]:
        return {"attn": self.attn.site_macs(layout), "mlp": self.mlp.macs(layout.length()), "rest": 0}


class UViTSkipBlock(UViTBlock):
    """The same after x = linear([x, skip]), with the skip in given["skip"]; no norm on the concatenation."""

    def __init__(self, width: int, heads: int, *parts: Any):
        super().__init__(width, heads, *parts)
        self.skip_linear = nn.Linear(2 * width, width)

    def enter(self, x: Tensor, given: Mapping[str, Any]) -> Tensor:
        return self.skip_linear(torch.cat([x, given["skip"]["image"]], dim=-1))

    def modulated_in(self, streams: Streams, context: Context) -> Tensor:
        raise UserError("the input of this U-ViT block depends on its long skip: probe a block of the first half")

    def macs(self, layout: Layout) -> dict[str, int]:
        return {**super().macs(layout), "rest": cost.linear(self.skip_linear, layout.length())}


@register("u-vit", paper="All are Worth Words, arXiv 2209.12152; Efficient Scaling of DiTs, arXiv 2412.12391")
class UViT(Backbone):
    """A ViT over [label, time, image] or [time, text, image] tokens with long skips.

    x [B, C, H, W] of the size it was built for; prediction [B, C, H, W].
    """

    missing: ClassVar[Mapping[str, str]] = {
        "modulation": "U-ViT reads time and condition as tokens: there are no shifts, scales or gates, and what stands "
        "at modulated_in is the normed input",
        "cross": "U-ViT reads text through self-attention and has no cross-attention",
        "temporal": "U-ViT has no temporal attention",
    }
    preset: UViTConfig

    def __init__(self, config: UViTConfig):
        super().__init__()
        self.preset = config
        width, half = config.width, config.depth // 2
        grid = config.image_size // config.patch
        self.x_embedder = PatchEmbed(config.patch, config.channels, width)
        self.t_embedder = time_mlp(width) if config.time_mlp else nn.Identity()
        self.y_embedder = LabelEmbedding(config.classes, width, config.null_class) if config.classes else None
        self.text_embedder = nn.Linear(config.text_width, width) if config.text_width else None
        self.pos_embed = nn.Parameter(torch.zeros(1, sum(s.length for s in config.prefix) + grid**2, width))
        self.blocks = nn.ModuleList(self.make_block(layer) for layer in range(config.depth + 1))
        self.skips = {half + 1 + j: half - 1 - j for j in range(half)}
        self.norm = LayerNorm(width, True, 1e-5)
        self.linear = nn.Linear(width, config.patch**2 * config.channels)
        convolution = nn.Conv2d(config.channels, config.channels, 3, padding=1)
        self.final_layer = convolution if config.convolution else nn.Identity()
        self.initialise()

    def make_block(self, layer: int) -> UViTBlock:
        c = self.preset
        kind = UViTBlock if layer <= c.depth // 2 else UViTSkipBlock
        attn = self_attention(c.attention, c.width, c.heads, layer, qkv_bias=c.qkv_bias)
        return kind(c.width, c.heads, c.mlp_ratio, c.qkv_bias, attn)

    def initialise(self) -> None:
        """As published: linears and positions truncated normal 0.02, biases zero. The output does not start at 0."""
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        for m in self.modules():
            if isinstance(m, nn.Linear):
                nn.init.trunc_normal_(m.weight, std=0.02)
                if m.bias is not None:
                    nn.init.zeros_(m.bias)

    def prepare(self, condition: Condition) -> Memory:
        if self.y_embedder is not None:
            return Memory(vector=self.y_embedder(self.y_embedder.check(condition.label)))
        if self.text_embedder is None:
            return Memory()
        text = check_text(condition.text, condition.text_mask, self.preset.text_width, "U-ViT")
        if text.shape[1] > self.preset.text_tokens:
            raise UserError(f"U-ViT was built for {self.preset.text_tokens} text tokens; got {text.shape[1]}")
        return Memory(text=self.text_embedder(text.to(self.dtype)), text_mask=condition.text_mask)

    def embed(
        self, x: Tensor, time: Tensor, memory: Memory, segments: Sequence[Segment] = ()
    ) -> tuple[Streams, Context]:
        self._check(x, time, memory, segments)
        joined = join(x.to(self.dtype), self.x_embedder, segments, absolute=self._add_positions)
        emb = self.t_embedder(sinusoid(time, self.preset.width).to(self.dtype))
        tokens = self._prefix(emb, memory)
        spans = tuple(replace(s, length=tokens[s.name].shape[1]) for s in self.preset.prefix)
        layout = replace(joined.layout, spans=(*spans, *joined.layout.spans))
        context = with_padding(Context(time=emb), layout, memory.text_mask)
        return Streams({"image": torch.cat([*tokens.values(), joined.tokens], dim=1)}, layout), context

    def _check(self, x: Tensor, time: Tensor, memory: Memory, segments: Sequence[Segment]) -> None:
        size = self.preset.image_size
        check_size(x, self.preset.channels, self.preset.patch, "UViT")
        check_rows(x, memory.vector if memory.vector is not None else memory.text, "condition")
        check_streams(segments, ("image",), "UViT")
        if x.shape[2:] != (size, size):
            height, width = x.shape[2:]
            raise UserError(f"the learned positions of this U-ViT are for {size}x{size}; got {height}x{width}")
        if time.ndim != 1 or any(s.modulation != "t" for s in segments):
            raise UserError("U-ViT has one time token: one time per image, for all its tokens and segments")

    def _prefix(self, emb: Tensor, memory: Memory) -> dict[str, Tensor]:
        """The tokens before the image, with their positions, in order."""
        given = {"time": emb[:, None], "text": memory.text}
        if memory.vector is not None:
            given["label"] = memory.vector[:, None]
        tokens, start = {}, 0
        for span in self.preset.prefix:
            part = given[span.name]
            assert part is not None
            tokens[span.name] = part + self.pos_embed[:, start : start + part.shape[1]]
            start += span.length
        return tokens

    def _add_positions(self, tokens: Tensor, grid: tuple[int, int], positions: Tensor | None) -> Tensor:
        side = self.preset.image_size // self.preset.patch
        return add_learned(self.pos_embed[0, -(side**2) :], tokens, grid, positions)

    def head(self, streams: Streams, context: Context) -> Tensor:
        tokens = self.linear(self.norm(streams.segment("image")))
        return self.final_layer(unpatchify(tokens, self.preset.patch, streams.layout.grid))

    def example(self, batch: int = 1, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor, Condition]:
        c = self.preset
        x = torch.randn(batch, c.channels, c.image_size, c.image_size, device=device)
        label = torch.randint(c.classes, (batch,), device=device) if c.classes else None
        text = torch.randn(batch, c.text_tokens, c.text_width, device=device) if c.text_width else None
        return x, torch.rand(batch, dtype=torch.float64, device=device), Condition(label=label, text=text)

    def end_macs(self, layout: Layout) -> dict[str, int]:
        image = layout.span("image").length
        embed = self.x_embedder.macs(image) + cost.linears(self.t_embedder, 1)
        if self.text_embedder is not None:
            embed += cost.linear(self.text_embedder, layout.span("text").length)
        pixels = image * self.preset.patch**2
        final = cost.convolution(self.final_layer, pixels) if isinstance(self.final_layer, nn.Conv2d) else 0
        return {"embed": embed, "head": cost.linear(self.linear, image) + final}


def _classes(depth: int, width: int, heads: int, **more: Any) -> UViTConfig:
    return UViTConfig(depth=depth, width=width, heads=heads, classes=1000, **more)


def _text(depth: int, width: int, heads: int, **more: Any) -> UViTConfig:
    return UViTConfig(depth=depth, width=width, heads=heads, **more)


PRESETS = {
    "U-ViT-S/2": _classes(12, 512, 8),
    "U-ViT-M/2": _classes(16, 768, 12),
    "U-ViT-L/2": _classes(20, 1024, 16),
    "U-ViT-H/2": _classes(28, 1152, 16, convolution=False),
    "U-ViT-L/4": _classes(20, 1024, 16, patch=4, image_size=64),
    "U-ViT-H/4": _classes(28, 1152, 16, patch=4, image_size=64, convolution=False),
    "U-ViT-S/2-T2I": _text(12, 512, 8, text_width=768),
    "U-ViT-S-deep/2-T2I": _text(16, 512, 8, text_width=768),
    "U-ViT-0.5B/2-T2I": _text(28, 1152, 16, text_width=4096, image_size=64),
    "U-ViT-1.6B/2-T2I": _text(28, 2048, 32, text_width=4096, image_size=64),
    "U-ViT-2.3B/2-T2I": _text(42, 2048, 32, text_width=4096, image_size=64),
}
