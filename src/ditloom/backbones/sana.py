"""SANA: Efficient High-Resolution Image Synthesis with Linear Diffusion Transformers (Xie et al., ICLR 2025).

arXiv 2410.10629. Linear attention, a convolution in the feed-forward in place of positions, text by cross-attention.
SANA 1.5 (Xie et al., arXiv 2501.18427) adds norms of queries and keys and grows deeper.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ditloom.contracts.backbone import NOTHING, Backbone, BackboneConfig, Block, check_size
from ditloom.contracts.condition import Condition
from ditloom.contracts.errors import UserError
from ditloom.contracts.layout import Layout, Segment
from ditloom.contracts.plan import BlockPlan
from ditloom.contracts.registry import register
from ditloom.contracts.streams import Context, Memory, Streams
from ditloom.contracts.time import FLOW_1000, TimeInput
from ditloom.parts import cost, cross_attention, linear_attention
from ditloom.parts.adaln_single import AdaLNSingle, ModulationTable, TableHead, head_modulation, single_modulation
from ditloom.parts.checks import check_heads, check_no_rule, check_no_segments, check_rows, check_text
from ditloom.parts.cross_attention import CrossAttention, handed, reading_text, text_memory, text_shared
from ditloom.parts.embedders import TextEmbedding, TimeEmbedding
from ditloom.parts.linear_attention import LinearAttention
from ditloom.parts.mix_ffn import MixFFN
from ditloom.parts.norms import AcrossHeads, LayerNorm, RMSNorm, modulate
from ditloom.parts.patches import PatchEmbed, normal_linears_, unpatchify, xavier_linears_, xavier_patches_
from ditloom.parts.segments import join, modulation
from ditloom.sites.visit import visit


@dataclass(frozen=True, kw_only=True)
class SanaConfig(BackboneConfig):
    """Settings of a SANA. image_size: latent size it was trained at; any size and aspect ratio works.

    heads: of the linear attention (of 32 features in the releases); cross_heads: of the cross-attention. qk_norm: an
    RMS norm of queries and keys over the full width in both (SANA 1.5). text_scale: where the weight of the text's norm
    starts. null_tokens: length of the null caption stored with the weights, 0 for none.
    """

    family: ClassVar[str] = "sana"
    process: ClassVar[Mapping[str, Any]] = {"name": "linear", "predicts": "v"}
    sign: ClassVar[int] = 1

    depth: int
    width: int
    heads: int
    cross_heads: int
    patch: int = 1
    image_size: int = 32
    channels: int = 32
    text_width: int = 2304
    text_tokens: int = 300
    mlp_ratio: float = 2.5
    qk_norm: bool = False
    text_scale: float = 0.01
    null_tokens: int = 0
    time: TimeInput = FLOW_1000

    def __post_init__(self) -> None:
        check_heads(self.width, self.heads)
        check_heads(self.width, self.cross_heads)
        if self.text_tokens < 1:
            raise UserError(f"a SANA reads at least one text token; got text_tokens={self.text_tokens}")

    def build(self) -> Sana:
        return Sana(self)


class SanaBlock(Block):
    """x += g1 LinAttn(mod(LN x)); x += Cross(x, text); x += g2 MixFFN(mod(LN x)), mod and gates from table + shared."""

    sites = ("attn", "cross", "mlp")
    stages = ("modulated_in", *linear_attention.STAGES, *cross_attention.STAGES, "ff_hidden")
    row_sites = ("cross",)

    def __init__(self, width: int, heads: int, cross_heads: int, hidden: int, qk_norm: bool = False):
        super().__init__()
        self.norm1, self.norm2 = LayerNorm(width), LayerNorm(width)
        self.attn = LinearAttention(width, heads, qk_norm)
        self.cross = CrossAttention(width, cross_heads)
        if qk_norm:
            self.cross.q_norm, self.cross.k_norm = (AcrossHeads(RMSNorm(width, eps=1e-5)) for _ in range(2))
        self.mlp = MixFFN(width, hidden)
        self.modulation = ModulationTable(width)

    def forward(
        self, streams: Streams, context: Context, plan: BlockPlan | None = None, given: Mapping[str, Any] = NOTHING
    ) -> tuple[Streams, dict[str, Any]]:
        check_no_rule(context.rule, "SANA", MISSING["rule"])
        x, layout = streams["image"], streams.layout
        at = visit(plan, given, layout)
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(context.modulation["image"])
        h = at.tap("modulated_in", modulate(self.norm1(x), shift1, scale1))
        x = torch.addcmul(x, gate1, at.around("attn", lambda h: self.attn(h, at), h))
        x = x + self.cross.around(x, context, given, at)
        h = modulate(self.norm2(x), shift2, scale2)
        x = torch.addcmul(x, gate2, at.around("mlp", lambda h: self.mlp(h, layout.grid, at), h))
        return streams.updated(image=x), at.kept

    def modulated_in(self, streams: Streams, context: Context) -> Tensor:
        shift, scale, *_ = self.modulation(context.modulation["image"])
        return modulate(self.norm1(streams["image"]), shift, scale)

    def macs(self, layout: Layout) -> dict[str, int]:
        n = layout.length()
        return {
            "attn": self.attn.macs(n),
            "cross": self.cross.macs(n, layout.read("text")),
            "mlp": self.mlp.macs(n),
            "rest": 0,
        }


MISSING = {
    "skip": "SANA has no long skips",
    "temporal": "SANA has no temporal attention",
    "logits": "SANA's linear attention never forms the matrix of logits",
    "attend": "SANA's linear attention sums over all keys at once: none can be appended",
    "segment": "SANA convolves over the image's grid, where further tokens have no place",
    "rule": "its linear attention sums over all keys at once, so that no token can be hidden from another",
}


@register("sana", paper="SANA, arXiv 2410.10629; SANA 1.5, arXiv 2501.18427")
class Sana(Backbone):
    """Tokens of a deeply compressed latent; attention whose cost is linear in them; no position embedding at all.

    x [B, C, H, W] with H, W multiples of the patch; prediction [B, C, H, W], the velocity dx/dt.
    """

    missing: ClassVar[Mapping[str, str]] = MISSING
    preset: SanaConfig

    def __init__(self, config: SanaConfig):
        super().__init__()
        self.preset = config
        width = config.width
        self.x_embedder = PatchEmbed(config.patch, config.channels, width)
        self.t_embedder = TimeEmbedding(width)
        self.modulation = AdaLNSingle(width)
        self.text_embedder = TextEmbedding(config.text_width, width)
        self.text_norm = RMSNorm(width, eps=1e-5)
        if config.null_tokens:
            null = torch.randn(config.null_tokens, config.text_width) / config.text_width**0.5
            self.register_buffer("null_text", null)
        parts = (width, config.heads, config.cross_heads, int(width * config.mlp_ratio), config.qk_norm)
        self.blocks = nn.ModuleList(SanaBlock(*parts) for _ in range(config.depth))
        self.final_layer = TableHead(width, config.patch**2 * config.channels)
        self.initialise()

    @property
    def crosses(self) -> list[CrossAttention]:
        """The cross-attention of every block."""
        return [block.cross for block in self.blocks]

    def initialise(self) -> None:
        """As published: xavier but for the feed-forwards (torch's own), N(0, 0.02) embeddings; no weight is zero."""
        blocks: list[Any] = list(self.blocks)
        for block in blocks:
            xavier_linears_(block.attn)
            xavier_linears_(block.cross)
        xavier_patches_(self.x_embedder)
        xavier_linears_(self.final_layer)
        for module in (self.t_embedder, self.modulation, self.text_embedder):
            xavier_linears_(module)
            normal_linears_(module)
        nn.init.constant_(self.text_norm.weight, self.preset.text_scale)

    def prepare(self, condition: Condition) -> Memory:
        text = check_text(condition.text, condition.text_mask, self.preset.text_width, "SANA")
        embedded = self.text_norm(self.text_embedder(text.to(self.dtype)))
        return text_memory(self.crosses, embedded, condition.text_mask)

    def embed(
        self, x: Tensor, time: Tensor, memory: Memory, segments: Sequence[Segment] = ()
    ) -> tuple[Streams, Context]:
        check_size(x, self.preset.channels, self.preset.patch, "SANA")
        check_rows(x, memory.text, "text")
        check_no_segments(segments, "SANA", MISSING["segment"])
        joined = join(x.to(self.dtype), self.x_embedder, absolute=False)
        emb = self.t_embedder(time)
        c = single_modulation(self.modulation, modulation(emb, None, (), self.t_embedder))
        layout = reading_text(joined.layout, memory)
        return Streams({"image": joined.tokens}, layout), Context(modulation=c, time=emb, shared=text_shared(memory))

    def handed(self, position: int, context: Context) -> Mapping[str, Any]:
        return handed(position, context)

    def head(self, streams: Streams, context: Context) -> Tensor:
        tokens = self.final_layer(streams.segment("image"), head_modulation(streams, context))
        return unpatchify(tokens, self.preset.patch, streams.layout.grid)

    def example(self, batch: int = 1, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor, Condition]:
        c = self.preset
        x = torch.randn(batch, c.channels, c.image_size, c.image_size, device=device)
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


def _sana(depth: int, width: int, cross_heads: int, **more: Any) -> SanaConfig:
    return SanaConfig(depth=depth, width=width, heads=width // 32, cross_heads=cross_heads, **more)


PRESETS = {
    "SANA-0.6B": _sana(28, 1152, 16),
    "SANA-1.6B": _sana(20, 2240, 20),
    "SANA-1.5-1.6B": _sana(20, 2240, 20, qk_norm=True),
    "SANA-1.5-4.8B": _sana(60, 2240, 20, qk_norm=True),
}
