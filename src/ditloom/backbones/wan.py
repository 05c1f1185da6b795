"""Wan 2.1: Open and Advanced Large-Scale Video Generative Models (Wan Team 2025, arXiv 2503.20314).

Attention among all tokens of all frames, placed by a rotary embedding of three axes; text by cross-attention; one
modulation for all blocks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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
from ditloom.parts import attention, cost, cross_attention
from ditloom.parts.adaln_single import AdaLNSingle, ModulationTable, TableHead, head_modulation, single_modulation
from ditloom.parts.checks import check_heads, check_rows, check_text
from ditloom.parts.cross_attention import CrossAttention, handed, reading_text, text_memory, text_shared
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
    stages = ("modulated_in", *attention.STAGES, *cross_attention.STAGES, "ff_hidden")
    row_sites = ("mlp",)

    def __init__(self, width: int, heads: int, hidden: int):
        super().__init__()
        self.norm1, self.norm_cross, self.norm2 = LayerNorm(width), LayerNorm(width, True), LayerNorm(width)
        self.attn = attention.SelfAttention(width, heads, qk_norm="rms-full")
        self.cross = CrossAttention(width, heads, qk_norm="rms-full")
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
        x = x + at.around("cross", lambda h: self.cross(h, context, given, at), self.norm_cross(x))
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


@register("wan", paper="Wan: Open and Advanced Large-Scale Video Generative Models, arXiv 2503.20314")
class Wan(Backbone):
    """Text to video. A text mask tells which states are real: the others are taken as zeros, and attended to.

    x [B, C, T, H, W] with sizes that are multiples of the patch; prediction [B, C, T, H, W], noise - data.
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
        self.x_embedder = VideoPatchEmbed(config.patch, config.channels, width)
        self.t_embedder = TimeEmbedding(width)
        self.modulation = AdaLNSingle(width)
        self.text_embedder = TextEmbedding(config.text_width, width)
        self.blocks = nn.ModuleList(WanBlock(width, config.heads, config.hidden) for _ in range(config.depth))
        patch = self.x_embedder.proj.weight[0, 0].numel()
        self.final_layer = TableHead(width, patch * config.channels)
        self.initialise()

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
        return text_memory(self.crosses, self.text_embedder(text), None)

    def embed(
        self, x: Tensor, time: Tensor, memory: Memory, segments: Sequence[Segment] = ()
    ) -> tuple[Streams, Context]:
        check_video(x, self.preset.channels, self.preset.patch, "Wan")
        check_rows(x, memory.text, "text")
        check_streams(segments, ("image",), "Wan")
        joined = join_video(x.to(self.dtype), self.x_embedder, segments)
        emb = self.t_embedder(time)
        embed_time = lambda t: self.t_embedder(self.preset.time.native(t))  # noqa: E731
        c = single_modulation(self.modulation, modulation(emb, None, segments, embed_time))
        tables = {"image": self._rotary(joined)}
        context = Context(modulation=c, rotary=tables, time=emb, shared=text_shared(memory))
        return Streams({"image": joined.tokens}, reading_text(joined.layout, memory)), context

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
        return x, torch.rand(batch, dtype=torch.float64, device=device), Condition(text=text)

    def end_macs(self, layout: Layout) -> dict[str, int]:
        image, text = layout.span("image").length, layout.read("text")
        return {
            "embed": self.x_embedder.macs(image),
            "time": cost.linears(self.t_embedder, 1) + self.modulation.macs(1),
            "prepare": cost.linears(self.text_embedder, text) + sum(cross.text_macs(text) for cross in self.crosses),
            "head": self.final_layer.macs(image),
        }


PRESETS = {
    "Wan2.1-T2V-1.3B": WanConfig(depth=30, width=1536, heads=12, hidden=8960),
    "Wan2.1-T2V-14B": WanConfig(depth=40, width=5120, heads=40, hidden=13824, size=(21, 90, 160)),
}
