"""Latte: Latent Diffusion Transformer for Video Generation (Ma et al., TMLR 2025, arXiv 2401.03048).

Blocks that attend within frames and blocks that attend along time take turns; everything else is a DiT's. The model for
text (Latte-1) has the parts of PixArt: one modulation for all blocks, cross-attention in the blocks within frames.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ditloom.contracts.backbone import NOTHING, Backbone, BackboneConfig, Block, Transition
from ditloom.contracts.condition import Condition
from ditloom.contracts.errors import UserError
from ditloom.contracts.layout import Layout, Segment, Span
from ditloom.contracts.plan import BlockPlan
from ditloom.contracts.registry import register
from ditloom.contracts.streams import Context, Memory, Streams
from ditloom.contracts.time import DISCRETE_1000, TimeInput
from ditloom.parts import cost, cross_attention
from ditloom.parts.adaln_single import AdaLNSingle, ModulationTable, TableHead, head_modulation, single_modulation
from ditloom.parts.axis_attention import AxisAttention, SpatialAttention, TemporalAttention
from ditloom.parts.checks import check_rows, check_text
from ditloom.parts.cross_attention import CrossAttention, handed, reading_text, text_memory, text_shared
from ditloom.parts.embedders import LabelEmbedding, TextEmbedding, TimeEmbedding
from ditloom.parts.feed_forward import MLP
from ditloom.parts.heads import Head
from ditloom.parts.modulation import AdaLN
from ditloom.parts.norms import LayerNorm, modulate
from ditloom.parts.patches import normal_linears_, xavier_linears_, zero_
from ditloom.parts.positions import sincos_1d, sincos_grid, stretched_grid
from ditloom.parts.segments import main_modulation, modulation
from ditloom.parts.video_patches import (
    VideoPatchEmbed,
    check_video,
    check_whole_video,
    tokens_of,
    unpatchify_video,
    xavier_video_patches_,
)
from ditloom.sites.visit import BareVisit, Visit, take_rows, visit


@dataclass(frozen=True, kw_only=True)
class LatteConfig(BackboneConfig):
    """Settings of a Latte. `depth` counts blocks, half of them within frames, half along time.

    classes, null_class: as in DiT; 0: unconditional. text_width: the model is Latte-1's kind, read by cross-attention;
    its positions are stretched to those of image_size, up to image_size / patch / interpolation.
    """

    family: ClassVar[str] = "latte"
    process: ClassVar[Mapping[str, Any]] = {"name": "discrete-vp", "schedule": "linear", "predicts": "eps+var"}
    sign: ClassVar[int] = 1

    depth: int
    width: int
    heads: int
    patch: int = 2
    image_size: int = 32
    frames: int = 16
    channels: int = 4
    classes: int = 0
    null_class: bool = True
    text_width: int = 0
    text_tokens: int = 120
    learn_sigma: bool = True
    mlp_ratio: float = 4.0
    interpolation: float = 1.0
    time: TimeInput = DISCRETE_1000

    def __post_init__(self) -> None:
        if self.depth % 2:
            raise UserError(f"the blocks of a Latte come in pairs, within frames and along time; got {self.depth}")
        if self.classes and self.text_width:
            raise UserError("a Latte is conditional on classes or on text, not on both")

    @property
    def out_channels(self) -> int:
        """Channels of the prediction."""
        return self.channels * (1 + self.learn_sigma)

    def build(self) -> Latte:
        return (TextLatte if self.text_width else Latte)(self)


class LatteBlock(Block):
    """x += g1 Attn(mod(LN x)) within each frame; x += g2 MLP(mod(LN x))."""

    sites: ClassVar[tuple[str, ...]] = ("attn", "mlp")
    stages: ClassVar[tuple[str, ...]] = ("modulated_in", *AxisAttention.stages, "ff_hidden")
    row_sites: ClassVar[tuple[str, ...]] = ("mlp",)
    kind: ClassVar[type[AxisAttention]] = SpatialAttention

    def __init__(
        self,
        width: int,
        heads: int,
        mlp_ratio: float,
        modulation: AdaLN | ModulationTable,
        qk_norm: str | None = None,
    ):
        super().__init__()
        self.norm1, self.norm2 = LayerNorm(width), LayerNorm(width)
        self.attn = self.kind(width, heads, qk_norm=qk_norm)
        self.mlp = MLP(width, int(width * mlp_ratio))
        self.modulation = modulation

    def forward(
        self, streams: Streams, context: Context, plan: BlockPlan | None = None, given: Mapping[str, Any] = NOTHING
    ) -> tuple[Streams, dict[str, Any]]:
        x, layout = streams["image"], streams.layout
        at = visit(plan, given, layout)
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(context.modulation["image"])
        h = at.tap("modulated_in", modulate(self.norm1(x), shift1, scale1))
        x = torch.addcmul(x, gate1, at.around(self.sites[0], lambda h: self.attn(h, layout, context, at), h))
        x = self.read(x, context, given, at)
        h = modulate(self.norm2(x), shift2, scale2)
        mlp_rows = lambda index: self.mlp(take_rows(h, index))  # noqa: E731
        x = torch.addcmul(x, gate2, at.around("mlp", lambda h: self.mlp(h, at), h, rows=mlp_rows))
        return streams.updated(image=x), at.kept

    def read(self, x: Tensor, context: Context, given: Mapping[str, Any], at: Visit | BareVisit) -> Tensor:
        """x after the text was read, in blocks that read it."""
        return x

    def modulated_in(self, streams: Streams, context: Context) -> Tensor:
        shift, scale, *_ = self.modulation(context.modulation["image"])
        return modulate(self.norm1(streams["image"]), shift, scale)

    def macs(self, layout: Layout) -> dict[str, int]:
        rest = self.modulation.macs(1) if isinstance(self.modulation, AdaLN) else 0
        return {self.sites[0]: self.attn.site_macs(layout), "mlp": self.mlp.macs(layout.length()), "rest": rest}


class TemporalLatteBlock(LatteBlock):
    """The same along time, at each place of the frame."""

    sites = ("temporal", "mlp")
    kind = TemporalAttention


class ReadingLatteBlock(LatteBlock):
    """Within each frame, with x += Cross(x, text) in between, without norm or gate; all frames read the same text."""

    sites: ClassVar[tuple[str, ...]] = ("attn", "cross", "mlp")
    stages = (*LatteBlock.stages, *cross_attention.STAGES)
    row_sites = ("cross", "mlp")

    def __init__(
        self,
        width: int,
        heads: int,
        mlp_ratio: float,
        modulation: AdaLN | ModulationTable,
        qk_norm: str | None = None,
    ):
        super().__init__(width, heads, mlp_ratio, modulation, qk_norm)
        self.cross = CrossAttention(width, heads)

    def read(self, x: Tensor, context: Context, given: Mapping[str, Any], at: Visit | BareVisit) -> Tensor:
        return x + self.cross.around(x, context, given, at)

    def macs(self, layout: Layout) -> dict[str, int]:
        return {**super().macs(layout), "cross": self.cross.macs(layout.length(), layout.read("text"))}


class FramePositions(Transition):
    """Frozen sine-cosine positions of frames are added, once, before the first block along time.

    single: also to a video of one frame.
    """

    def __init__(self, single: bool = True):
        super().__init__()
        self.single = single

    def forward(
        self, streams: Streams, context: Context, plan: BlockPlan | None = None, given: Mapping[str, Any] = NOTHING
    ) -> tuple[Streams, dict[str, Any]]:
        x, frames = streams["image"], streams.layout.grid[0]
        if frames == 1 and not self.single:
            return streams, {}
        table = frame_table(frames, x.shape[-1], x.dtype, x.device)
        return streams.updated(image=(x.unflatten(1, (frames, -1)) + table[:, None]).flatten(1, 2)), {}


@lru_cache(maxsize=64)
def frame_table(frames: int, width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Sine-cosine positions of frames, [frames, width]."""
    return sincos_1d(torch.arange(frames, device="cpu"), width).to(device=device, dtype=dtype)


@register("latte", paper="Latte: Latent Diffusion Transformer for Video Generation, arXiv 2401.03048")
class Latte(Backbone):
    """A DiT whose blocks attend within frames and along time in turn.

    x [B, C, T, H, W] with H, W multiples of the patch; prediction [B, C or 2C, T, H, W].
    """

    missing: ClassVar[Mapping[str, str]] = {
        "skip": "Latte has no long skips",
        "cross": "this Latte is conditioned through adaLN and has no cross-attention",
    }
    preset: LatteConfig

    def __init__(self, config: LatteConfig):
        super().__init__()
        self.preset = config
        self.x_embedder = VideoPatchEmbed((1, config.patch, config.patch), config.channels, config.width)
        self.t_embedder = TimeEmbedding(config.width)
        self.make_condition()
        blocks: list[Block] = [self.make_block(i) for i in range(config.depth)]
        self.blocks = nn.ModuleList([*blocks[:1], FramePositions(not config.text_width), *blocks[1:]])
        self.final_layer: Head | TableHead = self.make_head()
        self.initialise()

    def make_condition(self) -> None:
        """What embeds the condition."""
        c = self.preset
        self.y_embedder = LabelEmbedding(c.classes, c.width, c.null_class) if c.classes else None

    def make_block(self, index: int) -> LatteBlock:
        c, kind = self.preset, TemporalLatteBlock if index % 2 else LatteBlock
        return kind(c.width, c.heads, c.mlp_ratio, AdaLN(c.width, 6))

    def make_head(self) -> Head | TableHead:
        return Head(self.preset.width, self.preset.patch, self.preset.out_channels)

    def initialise(self) -> None:
        """As DiT: zero modulation and output, so that blocks start as the identity and the network at 0."""
        xavier_linears_(self)
        xavier_video_patches_(self.x_embedder)
        normal_linears_(self.t_embedder)
        if self.y_embedder is not None:
            nn.init.normal_(self.y_embedder.embedding_table.weight, std=0.02)
        zero_(*(m for m in self.modules() if isinstance(m, AdaLN)), self.final_layer.linear)

    def prepare(self, condition: Condition) -> Memory:
        if self.y_embedder is None:
            return Memory()
        return Memory(vector=self.y_embedder(self.y_embedder.check(condition.label)))

    def embed(
        self, x: Tensor, time: Tensor, memory: Memory, segments: Sequence[Segment] = ()
    ) -> tuple[Streams, Context]:
        check_video(x, self.preset.channels, self.x_embedder.patch, "Latte")
        check_rows(x, memory.vector if memory.vector is not None else memory.text, "condition")
        check_whole_video(segments, "Latte")
        grid = self.x_embedder.grid(x)
        tokens = self.x_embedder(x.to(self.dtype))
        places = self.places(grid, tokens).repeat(grid[0], 1)
        layout = Layout((Span("image", tokens_of(grid)),), grid)
        emb = self.t_embedder(time)
        return Streams({"image": tokens + places}, layout), self.context(emb, memory)

    def places(self, grid: tuple[int, int, int], tokens: Tensor) -> Tensor:
        """Frozen positions within a frame [h * w, D]."""
        return sincos_grid(*grid[1:], self.preset.width, tokens.dtype, tokens.device)

    def context(self, emb: Tensor, memory: Memory) -> Context:
        """What blocks read: here time and label together."""
        return Context(modulation={"image": self.c(emb, memory)}, time=emb)

    def c(self, emb: Tensor, memory: Memory) -> Tensor:
        """The conditioning vector [B, 1, D], or per token."""
        return modulation(emb, memory.vector, (), lambda t: self.t_embedder(self.preset.time.native(t)))

    def head(self, streams: Streams, context: Context) -> Tensor:
        tokens = self.final_layer(streams.segment("image"), main_modulation(streams, context))
        return unpatchify_video(tokens, self.x_embedder.patch, streams.layout.grid)

    def example(self, batch: int = 1, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor, Condition]:
        c = self.preset
        x = torch.randn(batch, c.channels, c.frames, c.image_size, c.image_size, device=device)
        return x, torch.rand(batch, dtype=torch.float64, device=device), self.example_condition(batch, device)

    def example_condition(self, batch: int, device: torch.device | str) -> Condition:
        """A random condition."""
        classes = self.preset.classes
        return Condition(label=torch.randint(classes, (batch,), device=device) if classes else None)

    def end_macs(self, layout: Layout) -> dict[str, int]:
        image = layout.span("image").length
        embed, time = self.x_embedder.macs(image), cost.linears(self.t_embedder, 1)
        return {"embed": embed, "time": time, "head": self.final_layer.macs(image)}


class TextLatte(Latte):
    """The model for text: blocks within frames also read it."""

    missing: ClassVar[Mapping[str, str]] = {"skip": "Latte has no long skips"}

    def make_condition(self) -> None:
        c = self.preset
        self.y_embedder = None
        self.text_embedder = TextEmbedding(c.text_width, c.width)
        self.modulation = AdaLNSingle(c.width)

    def make_block(self, index: int) -> LatteBlock:
        c, kind = self.preset, TemporalLatteBlock if index % 2 else ReadingLatteBlock
        return kind(c.width, c.heads, c.mlp_ratio, ModulationTable(c.width))

    def make_head(self) -> TableHead:
        return TableHead(self.preset.width, self.preset.patch**2 * self.preset.out_channels)

    @property
    def crosses(self) -> list[CrossAttention]:
        """The cross-attention of every block within frames."""
        return [block.cross for block in self.blocks if isinstance(block, ReadingLatteBlock)]

    def initialise(self) -> None:
        """As PixArt, for the release carries no initialiser: zero cross-attention output and zero head."""
        super().initialise()
        normal_linears_(self.modulation)
        normal_linears_(self.text_embedder)
        zero_(*(cross.proj for cross in self.crosses))

    def prepare(self, condition: Condition) -> Memory:
        text = check_text(condition.text, condition.text_mask, self.preset.text_width, "Latte")
        return text_memory(self.crosses, self.text_embedder(text.to(self.dtype)), condition.text_mask)

    def embed(
        self, x: Tensor, time: Tensor, memory: Memory, segments: Sequence[Segment] = ()
    ) -> tuple[Streams, Context]:
        streams, context = super().embed(x, time, memory, segments)
        return Streams(streams.tokens, reading_text(streams.layout, memory)), context

    def places(self, grid: tuple[int, int, int], tokens: Tensor) -> Tensor:
        c = self.preset
        span = c.image_size // c.patch / c.interpolation
        return stretched_grid(*grid[1:], span, c.width, tokens.dtype, tokens.device)

    def context(self, emb: Tensor, memory: Memory) -> Context:
        c = single_modulation(self.modulation, self.c(emb, memory))
        return Context(modulation=c, time=emb, shared=text_shared(memory))

    def handed(self, position: int, context: Context) -> Mapping[str, Any]:
        if not isinstance(self.blocks[position], ReadingLatteBlock):
            return NOTHING
        return handed(position // 2, context)  # position 1 holds the positions of frames

    def head(self, streams: Streams, context: Context) -> Tensor:
        tokens = self.final_layer(streams.segment("image"), head_modulation(streams, context))
        return unpatchify_video(tokens, self.x_embedder.patch, streams.layout.grid)

    def example_condition(self, batch: int, device: torch.device | str) -> Condition:
        return Condition(text=torch.randn(batch, self.preset.text_tokens, self.preset.text_width, device=device))

    def end_macs(self, layout: Layout) -> dict[str, int]:
        text, costs = layout.read("text"), super().end_macs(layout)
        prepare = cost.linears(self.text_embedder, text) + sum(cross.text_macs(text) for cross in self.crosses)
        return {**costs, "time": costs["time"] + self.modulation.macs(1), "prepare": prepare}


SIZES = {"S": (12, 384, 6), "B": (12, 768, 12), "L": (24, 1024, 16), "XL": (28, 1152, 16)}
PRESETS = {
    **{
        f"Latte-{size}/{p}": LatteConfig(depth=depth, width=width, heads=heads, patch=p)
        for size, (depth, width, heads) in SIZES.items()
        for p in (2, 4, 8)
    },
    "Latte-XL/2-UCF101": LatteConfig(depth=28, width=1152, heads=16, classes=101),
    "Latte-1-T2V": LatteConfig(depth=56, width=1152, heads=16, image_size=64, text_width=4096),
}
