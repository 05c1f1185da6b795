"""PixArt-Sigma: Weak-to-Strong Training of Diffusion Transformer for 4K Text-to-Image Generation (ECCV 2024).

Chen et al., arXiv 2403.04692. And PixArt-alpha (Chen et al., ICLR 2024, arXiv 2310.00426), on which it is built: text
by cross-attention, one modulation for all blocks, coordinates that stretch to one range at every size and aspect ratio.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
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
from ditloom.contracts.time import DISCRETE_1000, TimeInput
from ditloom.parts import attention, cost, cross_attention
from ditloom.parts.adaln_single import AdaLNSingle, ModulationTable, TableHead, head_modulation, single_modulation
from ditloom.parts.checks import check_rows, check_text
from ditloom.parts.cross_attention import CrossAttention, handed, reading_text, text_memory, text_shared
from ditloom.parts.embedders import TextEmbedding, TimeEmbedding
from ditloom.parts.feed_forward import MLP
from ditloom.parts.kv_compression import compression
from ditloom.parts.norms import LayerNorm, modulate
from ditloom.parts.patches import PatchEmbed, normal_linears_, unpatchify, xavier_linears_, xavier_patches_, zero_
from ditloom.parts.positions import sincos_at, stretched_grid
from ditloom.parts.segments import check_streams, join, modulation
from ditloom.sites.visit import take_rows, visit


@dataclass(frozen=True, kw_only=True)
class PixArtConfig(BackboneConfig):
    """Settings of a PixArt. image_size: latent size it was trained at; any size and aspect ratio works.

    interpolation: coordinates run to image_size / patch / interpolation, whatever the size of x. sized: also told the
    picture's size and aspect ratio (alpha at 1024). compressed: blocks whose keys and values are compressed, by
    `compression` along each axis, in the manner `kind`: "conv", "uniform" or "uniform-every". qk_norm:
    "layer-affine-full" or None. null_tokens: length of the null caption stored with the weights, 0 for none.
    """

    family: ClassVar[str] = "pixart-sigma"
    process: ClassVar[Mapping[str, Any]] = {"name": "discrete-vp", "schedule": "linear", "predicts": "eps+var"}
    sign: ClassVar[int] = 1

    depth: int
    width: int
    heads: int
    patch: int = 2
    image_size: int = 128
    channels: int = 4
    text_width: int = 4096
    text_tokens: int = 300
    learn_sigma: bool = True
    mlp_ratio: float = 4.0
    interpolation: float = 1.0
    sized: bool = False
    compressed: tuple[int, ...] = ()
    compression: int = 2
    kind: str = "conv"
    qk_norm: str | None = None
    null_tokens: int = 0
    time: TimeInput = DISCRETE_1000

    def __post_init__(self) -> None:
        if any(not 0 <= i < self.depth for i in self.compressed):
            raise UserError(f"keys can be compressed in blocks 0..{self.depth - 1}; got {list(self.compressed)}")
        if self.sized and self.width % 3:
            raise UserError(f"a PixArt that is told sizes has a width that is a multiple of 3; got {self.width}")
        if self.width % 4:
            raise UserError(f"the positions of PixArt need a width that is a multiple of 4; got {self.width}")

    @property
    def out_channels(self) -> int:
        """Channels of the prediction."""
        return self.channels * (1 + self.learn_sigma)

    @property
    def span(self) -> float:
        """Where coordinates end."""
        return self.image_size // self.patch / self.interpolation

    def build(self) -> PixArt:
        return PixArt(self)


class PixArtBlock(Block):
    """x += g1 Attn(mod(LN x)); x += Cross(x, text); x += g2 MLP(mod(LN x)), with mod and gates from table + shared.

    The cross-attention has neither norm nor gate; its output projection starts at zero.
    """

    sites = ("attn", "cross", "mlp")
    stages = ("modulated_in", *attention.STAGES, *cross_attention.STAGES, "ff_hidden")
    row_sites = ("cross", "mlp")

    def __init__(self, width: int, heads: int, mlp_ratio: float = 4.0, qk_norm: str | None = None):
        super().__init__()
        self.norm1, self.norm2 = LayerNorm(width), LayerNorm(width)
        self.attn = attention.SelfAttention(width, heads, qk_norm=qk_norm)
        self.cross = CrossAttention(width, heads)
        self.mlp = MLP(width, int(width * mlp_ratio))
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
        x = x + self.cross.around(x, context, given, at)
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


class CompressedAttention(attention.SelfAttention):
    """Queries of all tokens, keys and values on a coarser grid."""

    def __init__(self, width: int, heads: int, ratio: int, kind: str = "conv", qk_norm: str | None = None):
        super().__init__(width, heads, qk_norm=qk_norm)
        self.compression = compression(kind, width, ratio)

    def forward(self, x: Tensor, layout: Layout, context: Context, at: Any = attention.BARE) -> Tensor:
        if context.rule is not None:
            raise UserError("a PixArt block with compressed keys cannot follow an attention rule among its tokens")
        q, k, v = self.heads_of(x, None, at)
        k, v = self.compression(k, layout.grid), self.compression(v, layout.grid)
        return self.out(attention.attend(q, k, v, layout, at=at), at)

    def site_macs(self, layout: Layout) -> int:
        n, grid = layout.length(), layout.grid
        products = cost.attention(n, self.compression.length(grid), self.qkv.in_features)
        return cost.linear(self.qkv, n) + cost.linear(self.proj, n) + products + self.compression.macs(grid)


class CompressedPixArtBlock(PixArtBlock):
    """The same with compressed keys and values in its self-attention."""

    def __init__(
        self,
        width: int,
        heads: int,
        mlp_ratio: float = 4.0,
        qk_norm: str | None = None,
        ratio: int = 2,
        kind: str = "conv",
    ):
        super().__init__(width, heads, mlp_ratio, qk_norm)
        self.attn = CompressedAttention(width, heads, ratio, kind, qk_norm)


class SizeEmbedding(nn.Module):
    """Size (height, width) and aspect ratio in pixels, each number through a sinusoid and an MLP to D / 3: [B, D]."""

    def __init__(self, width: int):
        super().__init__()
        self.size, self.aspect = TimeEmbedding(width // 3), TimeEmbedding(width // 3)

    def forward(self, condition: Condition) -> Tensor:
        size, aspect = (condition.extra.get(name) for name in ("size", "aspect"))
        if size is None or aspect is None or size.shape[1:] != (2,) or aspect.shape[1:] != (1,):
            raise UserError(
                "this PixArt is told sizes: give Condition(extra={'size': [batch, 2], 'aspect': [batch, 1]}), height "
                "and width in pixels, and height / width"
            )
        return torch.cat([self.size(size).flatten(1), self.aspect(aspect).flatten(1)], dim=1)


@register("pixart-sigma", paper="PixArt-Sigma, arXiv 2403.04692; PixArt-alpha, arXiv 2310.00426")
class PixArt(Backbone):
    """Text by cross-attention, time by adaLN-single. With `learn_sigma` the prediction has 2C channels.

    x [B, C, H, W] with H, W multiples of the patch; prediction [B, C or 2C, H, W].
    """

    missing: ClassVar[Mapping[str, str]] = {
        "skip": "PixArt has no long skips",
        "temporal": "PixArt has no temporal attention",
    }
    preset: PixArtConfig

    def __init__(self, config: PixArtConfig):
        super().__init__()
        self.preset = config
        width = config.width
        self.x_embedder = PatchEmbed(config.patch, config.channels, width)
        self.t_embedder = TimeEmbedding(width)
        self.size_embedder = SizeEmbedding(width) if config.sized else None
        self.modulation = AdaLNSingle(width)
        self.text_embedder = TextEmbedding(config.text_width, width)
        if config.null_tokens:
            null = torch.randn(config.null_tokens, config.text_width) / config.text_width**0.5
            self.register_buffer("null_text", null)
        self.blocks = nn.ModuleList(self._block(i) for i in range(config.depth))
        self.final_layer = TableHead(width, config.patch**2 * config.out_channels)
        self.initialise()

    def _block(self, index: int) -> PixArtBlock:
        c = self.preset
        if index in c.compressed:
            return CompressedPixArtBlock(c.width, c.heads, c.mlp_ratio, c.qk_norm, c.compression, c.kind)
        return PixArtBlock(c.width, c.heads, c.mlp_ratio, c.qk_norm)

    @property
    def crosses(self) -> list[CrossAttention]:
        """The cross-attention of every block."""
        return [block.cross for block in self.blocks]

    def initialise(self) -> None:
        """As published: xavier, N(0, 0.02) embeddings and modulation, zero cross-attention output and zero head."""
        xavier_linears_(self)
        xavier_patches_(self.x_embedder)
        told = [] if self.size_embedder is None else [self.size_embedder]
        for module in (self.t_embedder, self.modulation, self.text_embedder, *told):
            normal_linears_(module)
        zero_(*(cross.proj for cross in self.crosses), self.final_layer.linear)

    def prepare(self, condition: Condition) -> Memory:
        text = check_text(condition.text, condition.text_mask, self.preset.text_width, "PixArt")
        memory = text_memory(self.crosses, self.text_embedder(text.to(self.dtype)), condition.text_mask)
        return memory if self.size_embedder is None else replace(memory, vector=self.size_embedder(condition))

    def embed(
        self, x: Tensor, time: Tensor, memory: Memory, segments: Sequence[Segment] = ()
    ) -> tuple[Streams, Context]:
        self._check(x, memory, segments)
        grid = (x.shape[-2] // self.preset.patch, x.shape[-1] // self.preset.patch)
        add = partial(self._add_positions, main=grid)
        joined = join(x.to(self.dtype), self.x_embedder, segments, absolute=add)
        emb = self.t_embedder(time)
        embed_time = lambda t: self.t_embedder(self.preset.time.native(t))  # noqa: E731
        c = single_modulation(self.modulation, modulation(emb, memory.vector, segments, embed_time))
        layout = reading_text(joined.layout, memory)
        return Streams({"image": joined.tokens}, layout), Context(modulation=c, time=emb, shared=text_shared(memory))

    def _check(self, x: Tensor, memory: Memory, segments: Sequence[Segment]) -> None:
        c = self.preset
        check_size(x, c.channels, c.patch, "PixArt")
        check_rows(x, memory.text, "text")
        check_streams(segments, ("image",), "PixArt")
        if c.compressed and segments:
            raise UserError(f"a PixArt with compressed keys needs its whole grid: no segment {segments[0].name!r}")
        if c.compressed and min(x.shape[2:]) < c.patch * c.compression:
            side = c.patch * c.compression
            raise UserError(f"keys compressed by {c.compression} need at least {side}x{side}; got {list(x.shape[2:])}")

    def _add_positions(
        self, tokens: Tensor, grid: tuple[int, int], positions: Tensor | None, main: tuple[int, int]
    ) -> Tensor:
        """Positions of a segment are counted in tokens of the main grid."""
        width, span = tokens.shape[-1], self.preset.span
        if positions is None:
            return tokens + stretched_grid(*grid, span, width, tokens.dtype, tokens.device)
        scale = torch.tensor([span / n for n in main], dtype=torch.float64)
        return tokens + sincos_at(positions.cpu() * scale, width).to(tokens)

    def handed(self, position: int, context: Context) -> Mapping[str, Any]:
        return handed(position, context)

    def head(self, streams: Streams, context: Context) -> Tensor:
        tokens = self.final_layer(streams.segment("image"), head_modulation(streams, context))
        return unpatchify(tokens, self.preset.patch, streams.layout.grid)

    def example(self, batch: int = 1, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor, Condition]:
        c = self.preset
        x = torch.randn(batch, c.channels, c.image_size, c.image_size, device=device)
        text, extra = torch.randn(batch, c.text_tokens, c.text_width, device=device), {}
        if c.sized:
            size = 256 * torch.randint(2, 6, (batch, 2), device=device).float()
            extra = {"size": size, "aspect": size[:, :1] / size[:, 1:]}
        return x, torch.rand(batch, dtype=torch.float64, device=device), Condition(text=text, extra=extra)

    def end_macs(self, layout: Layout) -> dict[str, int]:
        image, text = layout.span("image").length, layout.read("text")
        time = cost.linears(self.t_embedder, 1) + self.modulation.macs(1)
        prepare = cost.linears(self.text_embedder, text) + sum(cross.text_macs(text) for cross in self.crosses)
        if self.size_embedder is not None:
            prepare += 2 * cost.linears(self.size_embedder.size, 1) + cost.linears(self.size_embedder.aspect, 1)
        return {
            "embed": self.x_embedder.macs(image),
            "time": time,
            "prepare": prepare,
            "head": self.final_layer.macs(image),
        }


def _xl(image_size: int, **more: Any) -> PixArtConfig:
    return PixArtConfig(depth=28, width=1152, heads=16, image_size=image_size, **more)


LAST_HALF = tuple(range(14, 28))
PRESETS = {
    "PixArt-alpha-XL/2-256": _xl(32, text_tokens=120),
    "PixArt-alpha-XL/2-512": _xl(64, text_tokens=120),
    "PixArt-alpha-XL/2-1024-MS": _xl(128, text_tokens=120, interpolation=2.0, sized=True),
    "PixArt-Sigma-XL/2-256-MS": _xl(32, interpolation=0.5),
    "PixArt-Sigma-XL/2-512-MS": _xl(64),
    "PixArt-Sigma-XL/2-1024-MS": _xl(128, interpolation=2.0),
    "PixArt-Sigma-XL/2-2K-MS": _xl(256, interpolation=4.0),
    "PixArt-Sigma-XL/2-1024-MS-KVC": _xl(128, interpolation=2.0, compressed=LAST_HALF),
    "PixArt-Sigma-XL/2-2K-MS-KVC": _xl(256, interpolation=4.0, compressed=LAST_HALF),
}
