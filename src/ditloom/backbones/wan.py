"""Wan 2.1: Open and Advanced Large-Scale Video Generative Models (Wan Team 2025, arXiv 2503.20314).

Attention among all tokens of all frames, placed by a rotary embedding of three axes; text by cross-attention; one
modulation for all blocks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ditloom.contracts.backbone import NOTHING, Backbone, BackboneConfig, Block
from ditloom.contracts.condition import Condition
from ditloom.contracts.errors import UserError
from ditloom.contracts.layout import Layout, Segment
from ditloom.contracts.plan import BlockPlan
from ditloom.contracts.registry import register
from ditloom.contracts.streams import Context, Memory, Streams
from ditloom.contracts.time import FLOW_1000, TimeInput
from ditloom.parts import attention, cost
from ditloom.parts.adaln_single import AdaLNSingle, ModulationTable, TableHead, head_modulation, single_modulation
from ditloom.parts.checks import check_heads, check_rows, check_text
from ditloom.parts.cross_attention import (
    CrossAttention,
    ImageCrossAttention,
    handed,
    reading_text,
    text_memory,
    text_shared,
)
from ditloom.parts.embedders import TextEmbedding, TimeEmbedding
from ditloom.parts.feed_forward import MLP
from ditloom.parts.norms import LayerNorm, modulate
from ditloom.parts.patches import normal_linears_, xavier_linears_, zero_
from ditloom.parts.positions import rotary, rotary_grid
from ditloom.parts.segments import Joined, check_streams, modulation
from ditloom.parts.video_patches import VideoPatchEmbed, check_video, unpatchify_video
from ditloom.parts.video_segments import join_video
from ditloom.sites.visit import take_rows, visit


@dataclass(frozen=True, kw_only=True)
class WanConfig(BackboneConfig):
    """Settings of a Wan. size: latent (frames, height, width) of an example; any other works. hidden: of the MLP.

    text_tokens: to how many tokens every text is filled up with zeros, which are attended to, as in training.
    image_width: of the states of CLIP's image encoder in a model for images to video, 0 for text alone; image_tokens:
    how many an example has. given: channels of the video, with its masks, that such a model is given beside x.
    """

    family: ClassVar[str] = "wan"
    process: ClassVar[Mapping[str, Any]] = {"name": "linear", "predicts": "v"}
    sign: ClassVar[int] = 1

    depth: int
    width: int
    heads: int
    hidden: int
    patch: tuple[int, int, int] = (1, 2, 2)
    size: tuple[int, int, int] = (21, 60, 104)
    channels: int = 16
    text_width: int = 4096
    text_tokens: int = 512
    image_width: int = 0
    image_tokens: int = 257
    given: int = 0
    theta: float = 10000.0
    time: TimeInput = FLOW_1000

    def __post_init__(self) -> None:
        check_heads(self.width, self.heads)
        if self.width // self.heads % 2:
            raise UserError(f"rotary positions turn pairs of features: the head dimension {self.head_dim} is odd")

    @property
    def head_dim(self) -> int:
        """Features of a head."""
        return self.width // self.heads

    @property
    def axes(self) -> tuple[int, int, int]:
        """Features of a head turned by frame, row and column: a third of the pairs for rows, for columns, the rest."""
        third = 2 * (self.head_dim // 6)
        return self.head_dim - 2 * third, third, third

    def build(self) -> Wan:
        return Wan(self)


class WanBlock(Block):
    """x += g1 Attn(mod(LN x)); x += Cross(LN x, text), without a gate; x += g2 MLP(mod(LN x)).

    Queries and keys pass an RMSNorm over their full width.
    """

    sites = ("attn", "cross", "mlp")
    row_sites = ("cross", "mlp")

    def __init__(self, width: int, heads: int, hidden: int, cross: CrossAttention):
        super().__init__()
        self.norm1, self.norm_cross, self.norm2 = LayerNorm(width), LayerNorm(width, True), LayerNorm(width)
        self.attn = attention.SelfAttention(width, heads, qk_norm="rms-full")
        self.cross = cross
        self.stages = ("modulated_in", *attention.STAGES, *cross.stages, "ff_hidden")
        self.mlp = MLP(width, hidden)
        self.modulation = ModulationTable(width)

    def forward(
        self, streams: Streams, context: Context, plan: BlockPlan | None = None, given: Mapping[str, Any] = NOTHING
    ) -> tuple[Streams, dict[str, Any]]:
        x, layout = streams["image"], streams.layout
        at = visit(plan, given, layout)
        chunks = (context.spread(m, layout) for m in self.modulation(context.modulation["image"]))
        shift1, scale1, gate1, shift2, scale2, gate2 = chunks
        h = at.tap("modulated_in", modulate(self.norm1(x), shift1, scale1))
        x = torch.addcmul(x, gate1, at.around("attn", lambda h: self.attn(h, layout, context, at), h))
        x = x + self.cross.around(self.norm_cross(x), context, given, at)
        h = modulate(self.norm2(x), shift2, scale2)
        mlp_rows = lambda index: self.mlp(take_rows(h, index))  # noqa: E731
        x = torch.addcmul(x, gate2, at.around("mlp", lambda h: self.mlp(h, at), h, rows=mlp_rows))
        return streams.updated(image=x), at.kept

    def modulated_in(self, streams: Streams, context: Context) -> Tensor:
        shift, scale, *_ = self.modulation(context.modulation["image"])
        spread = context.spread
        return modulate(self.norm1(streams["image"]), spread(shift, streams.layout), spread(scale, streams.layout))

    def macs(self, layout: Layout) -> dict[str, int]:
        return {
            "attn": self.attn.site_macs(layout),
            "cross": self.cross.macs(layout.length(), layout.read("text")),
            "mlp": self.mlp.macs(layout.length()),
            "rest": 0,
        }


class ImageEmbedding(nn.Module):
    """States of an image encoder [B, n, inputs] to tokens [B, n, D]: LN, linear, GELU, linear, LN."""

    def __init__(self, inputs: int, width: int):
        super().__init__()
        self.norm_in, self.norm_out = nn.LayerNorm(inputs), nn.LayerNorm(width)
        self.fc1, self.fc2 = nn.Linear(inputs, inputs), nn.Linear(inputs, width)

    def forward(self, image: Tensor) -> Tensor:
        return self.norm_out(self.fc2(nn.functional.gelu(self.fc1(self.norm_in(image)))))


@register("wan", paper="Wan: Open and Advanced Large-Scale Video Generative Models, arXiv 2503.20314")
class Wan(Backbone):
    """Text, or text and an image, to video.

    A text mask tells which states are real: the others are taken as zeros, and attended to. A model for images to video
    reads extra["image"], CLIP's states [B, n, image_width], and extra["given"], the encoded video that is given with
    the masks of what is given [B, given, T, H, W]. x [B, C, T, H, W] with sizes that are multiples of the patch;
    prediction [B, C, T, H, W], noise - data.
    """

    missing: ClassVar[Mapping[str, str]] = {
        "skip": "Wan has no long skips",
        "temporal": "Wan attends among all tokens of all frames: it has no attention along time alone",
    }
    preset: WanConfig

    def __init__(self, config: WanConfig):
        super().__init__()
        self.preset = config
        width = config.width
        self.x_embedder = VideoPatchEmbed(config.patch, config.channels + config.given, width)
        self.t_embedder = TimeEmbedding(width)
        self.modulation = AdaLNSingle(width)
        self.text_embedder = TextEmbedding(config.text_width, width)
        self.image_embedder = ImageEmbedding(config.image_width, width) if config.image_width else None
        self.blocks = nn.ModuleList(
            WanBlock(width, config.heads, config.hidden, self._cross()) for _ in range(config.depth)
        )
        self.final_layer = TableHead(width, math.prod(config.patch) * config.channels)
        self.initialise()

    def _cross(self) -> CrossAttention:
        c = self.preset
        if c.image_width:
            return ImageCrossAttention(c.width, c.heads, c.text_tokens, qk_norm="rms-full")
        return CrossAttention(c.width, c.heads, qk_norm="rms-full")

    @property
    def crosses(self) -> list[CrossAttention]:
        """The cross-attention of every block."""
        return [block.cross for block in self.blocks]

    def initialise(self) -> None:
        """As published: xavier, N(0, 0.02) text and time embedders, zero head; gates start as a random table."""
        xavier_linears_(self)
        nn.init.xavier_uniform_(self.x_embedder.proj.weight.view(self.preset.width, -1))
        normal_linears_(self.t_embedder)
        normal_linears_(self.text_embedder)
        zero_(self.final_layer.linear)

    def prepare(self, condition: Condition) -> Memory:
        c = self.preset
        text = check_text(condition.text, condition.text_mask, c.text_width, "Wan").to(self.dtype)
        if text.shape[1] > c.text_tokens:
            raise UserError(f"this Wan reads {c.text_tokens} text tokens; got {text.shape[1]}")
        if condition.text_mask is not None:
            text = text * condition.text_mask[..., None].to(text.dtype)
        text = nn.functional.pad(text, (0, 0, 0, c.text_tokens - text.shape[1]))
        tokens, extra = self.text_embedder(text), {}
        if self.image_embedder is not None:
            tokens = torch.cat([self.image_embedder(self._asked(condition, "image", 3, c.image_width)), tokens], dim=1)
        if c.given:
            extra = {"given": self._asked(condition, "given", 5, c.given)}
        memory = text_memory(self.crosses, tokens, None)
        return replace(memory, extra={**memory.extra, **extra})

    def _asked(self, condition: Condition, name: str, axes: int, features: int) -> Tensor:
        """A condition of a model for images to video: [B, n, features], or [B, features, T, H, W]."""
        value = condition.extra.get(name)
        if value is None or value.ndim != axes or value.shape[2 if axes == 3 else 1] != features:
            shape = {3: f"[batch, tokens, {features}]", 5: f"[batch, {features}, frames, height, width]"}[axes]
            raise UserError(
                f"this Wan makes videos of images: give Condition(extra={{{name!r}: ...}}) of shape {shape}"
            )
        return value.to(self.dtype)

    def embed(
        self, x: Tensor, time: Tensor, memory: Memory, segments: Sequence[Segment] = ()
    ) -> tuple[Streams, Context]:
        check_video(x, self.preset.channels, self.preset.patch, "Wan")
        check_rows(x, memory.text, "text")
        check_streams(segments, ("image",), "Wan")
        joined = join_video(self._completed(x.to(self.dtype), memory), self.x_embedder, segments)
        emb = self.t_embedder(time)
        embed_time = lambda t: self.t_embedder(self.preset.time.native(t))  # noqa: E731
        c = single_modulation(self.modulation, modulation(emb, None, segments, embed_time))
        tables = {"image": self._rotary(joined)}
        context = Context(modulation=c, rotary=tables, time=emb, shared=text_shared(memory))
        return Streams({"image": joined.tokens}, reading_text(joined.layout, memory)), context

    def _completed(self, x: Tensor, memory: Memory) -> Tensor:
        """x and what is given beside it."""
        given = memory.extra.get("given")
        if given is None:
            return x
        if given.shape[2:] != x.shape[2:]:
            raise UserError(f"x has the size {list(x.shape[2:])} and the video given beside it {list(given.shape[2:])}")
        return torch.cat([x, given], dim=1)

    def _rotary(self, joined: Joined) -> tuple[Tensor, Tensor]:
        c, device = self.preset, joined.tokens.device
        if len(joined.layout.spans) == 1:
            return rotary_grid(*joined.layout.grid, axes=c.axes, theta=c.theta, device=device)
        cos, sin = rotary(joined.positions, c.axes, c.theta)
        return cos.to(device), sin.to(device)

    def handed(self, position: int, context: Context) -> Mapping[str, Any]:
        return handed(position, context)

    def head(self, streams: Streams, context: Context) -> Tensor:
        tokens = self.final_layer(streams.segment("image"), head_modulation(streams, context))
        return unpatchify_video(tokens, self.preset.patch, streams.layout.grid)

    def example(self, batch: int = 1, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor, Condition]:
        c = self.preset
        x = torch.randn(batch, c.channels, *c.size, device=device)
        text = torch.randn(batch, c.text_tokens, c.text_width, device=device)
        extra = {}
        if c.image_width:
            extra["image"] = torch.randn(batch, c.image_tokens, c.image_width, device=device)
        if c.given:
            extra["given"] = torch.randn(batch, c.given, *c.size, device=device)
        return x, torch.rand(batch, dtype=torch.float64, device=device), Condition(text=text, extra=extra)

    def end_macs(self, layout: Layout) -> dict[str, int]:
        image, read, text = layout.span("image").length, layout.read("text"), self.preset.text_tokens
        prepare = cost.linears(self.text_embedder, text) + sum(cross.text_macs(read) for cross in self.crosses)
        if self.image_embedder is not None:
            prepare += cost.linears(self.image_embedder, read - text)
        return {
            "embed": self.x_embedder.macs(image),
            "time": cost.linears(self.t_embedder, 1) + self.modulation.macs(1),
            "prepare": prepare,
            "head": self.final_layer.macs(image),
        }


def _i2v(**more: Any) -> WanConfig:
    return WanConfig(depth=40, width=5120, heads=40, hidden=13824, image_width=1280, given=20, **more)


PRESETS = {
    "Wan2.1-T2V-1.3B": WanConfig(depth=30, width=1536, heads=12, hidden=8960),
    "Wan2.1-T2V-14B": WanConfig(depth=40, width=5120, heads=40, hidden=13824, size=(21, 90, 160)),
    "Wan2.1-I2V-14B-480P": _i2v(),
    "Wan2.1-I2V-14B-720P": _i2v(size=(21, 90, 160)),
}
