"""STDiT: the spatial-temporal Diffusion Transformer of Open-Sora (Zheng et al. 2024, arXiv 2412.20404).

A PixArt that learned to move. In Open-Sora 1.0 every block has an attention along time between its attention within
frames and its cross-attention (STDiT); in 1.2 whole blocks along time stand between whole blocks within frames, with
rotary positions in time (STDiT3). A frame that is given is clean: its tokens have time 0 (a time per token).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ditloom.backbones.latte import ReadingLatteBlock
from ditloom.contracts.backbone import NOTHING, Backbone, BackboneConfig, Block
from ditloom.contracts.condition import Condition
from ditloom.contracts.errors import UserError
from ditloom.contracts.layout import Layout, Segment, Span
from ditloom.contracts.plan import BlockPlan
from ditloom.contracts.registry import register
from ditloom.contracts.streams import Context, Memory, Streams
from ditloom.contracts.time import DISCRETE_1000, FLOW_1000, TimeInput
from ditloom.parts import cost, cross_attention
from ditloom.parts.adaln_single import AdaLNSingle, ModulationTable, TableHead, head_modulation, single_modulation
from ditloom.parts.axis_attention import AxisAttention, SpatialAttention, TemporalAttention
from ditloom.parts.checks import check_rows, check_text
from ditloom.parts.cross_attention import CrossAttention, handed, reading_text, text_memory, text_shared
from ditloom.parts.embedders import TextEmbedding, TimeEmbedding
from ditloom.parts.feed_forward import MLP
from ditloom.parts.norms import LayerNorm, modulate
from ditloom.parts.patches import normal_linears_, xavier_linears_, zero_
from ditloom.parts.positions import grid_positions, rotary, sincos_1d, sincos_at
from ditloom.parts.segments import modulation
from ditloom.parts.video_patches import (
    VideoPatchEmbed,
    check_video,
    check_whole_video,
    tokens_of,
    unpatchify_video,
    xavier_video_patches_,
)
from ditloom.sites.visit import take_rows, visit

VERSIONS = (1, 3)


@dataclass(frozen=True, kw_only=True)
class STDiTConfig(BackboneConfig):
    """Settings of an STDiT. `depth` counts blocks, in version 3 half of them along time.

    space_scale, time_scale: positions of version 1 are divided by them. trained: pixels along the side of the square
    that version 3 counts positions in, of pictures with `stride` pixels for one of the latent. size: latent (frames,
    height, width) of an example. null_tokens: length of the null caption stored with the weights, 0 for none.
    """

    family: ClassVar[str] = "stdit"

    version: int = 3
    depth: int
    width: int
    heads: int
    patch: tuple[int, int, int] = (1, 2, 2)
    size: tuple[int, int, int] = (16, 32, 32)
    channels: int = 4
    text_width: int = 4096
    text_tokens: int = 300
    learn_sigma: bool = True
    mlp_ratio: float = 4.0
    space_scale: float = 1.0
    time_scale: float = 1.0
    trained: int = 512
    stride: int = 8
    null_tokens: int = 0
    time: TimeInput = FLOW_1000

    def __post_init__(self) -> None:
        if self.version not in VERSIONS:
            raise UserError(f"STDiT is known in the versions {' and '.join(map(str, VERSIONS))}; got {self.version}")
        if self.version == 3 and self.depth % 2:
            raise UserError(f"the blocks of STDiT3 come in pairs, within frames and along time; got {self.depth}")
        if self.version == 3 and self.heads and self.width // self.heads % 2:
            raise UserError("rotary positions in time turn pairs of features: the head dimension must be even")

    @property
    def process(self) -> Mapping[str, Any]:
        """What the released weights were trained for: version 3 is a rectified flow."""
        if self.version == 3:
            return {"name": "linear", "predicts": "v"}
        return {"name": "discrete-vp", "schedule": "linear", "predicts": "eps+var" if self.learn_sigma else "eps"}

    @property
    def sign(self) -> int:
        """-1 where the released network points from noise to data."""
        return -1 if self.version == 3 else 1

    @property
    def out_channels(self) -> int:
        """Channels that the network puts out."""
        return self.channels * (1 + self.learn_sigma)

    def build(self) -> STDiT:
        return (STDiT3 if self.version == 3 else STDiT)(self)


class STDiTBlock(Block):
    """x += g1 Attn(mod(LN x)) within frames; x += g1 Attn(x) along time; x += Cross(x, text); x += g2 MLP(mod(LN x)).

    The attention along time reads x as it is; its output starts at zero, so that a PixArt is not disturbed. Stages
    (q_proj, ...) and appended keys belong to the attention within frames.
    """

    sites = ("attn", "temporal", "cross", "mlp")
    stages = ("modulated_in", *AxisAttention.stages, *cross_attention.STAGES, "ff_hidden")
    row_sites = ("cross", "mlp")

    def __init__(self, width: int, heads: int, mlp_ratio: float):
        super().__init__()
        self.norm1, self.norm2 = LayerNorm(width), LayerNorm(width)
        self.attn, self.attn_time = SpatialAttention(width, heads), TemporalAttention(width, heads)
        self.cross = CrossAttention(width, heads)
        self.mlp = MLP(width, int(width * mlp_ratio))
        self.modulation = ModulationTable(width)

    def forward(
        self, streams: Streams, context: Context, plan: BlockPlan | None = None, given: Mapping[str, Any] = NOTHING
    ) -> tuple[Streams, dict[str, Any]]:
        x, layout = streams["image"], streams.layout
        at = visit(plan, given, layout)
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(context.modulation["image"])
        h = at.tap("modulated_in", modulate(self.norm1(x), shift1, scale1))
        x = torch.addcmul(x, gate1, at.around("attn", lambda h: self.attn(h, layout, context, at), h))
        along = lambda x: self.attn_time(self.timed(x, layout), layout, context)  # noqa: E731
        x = torch.addcmul(x, gate1, at.around("temporal", along, x))
        x = x + self.cross.around(x, context, given, at)
        h = modulate(self.norm2(x), shift2, scale2)
        mlp_rows = lambda index: self.mlp(take_rows(h, index))  # noqa: E731
        x = torch.addcmul(x, gate2, at.around("mlp", lambda h: self.mlp(h, at), h, rows=mlp_rows))
        return streams.updated(image=x), at.kept

    def timed(self, x: Tensor, layout: Layout) -> Tensor:
        """What the attention along time reads."""
        return x

    def modulated_in(self, streams: Streams, context: Context) -> Tensor:
        shift, scale, *_ = self.modulation(context.modulation["image"])
        return modulate(self.norm1(streams["image"]), shift, scale)

    def macs(self, layout: Layout) -> dict[str, int]:
        return {
            "attn": self.attn.site_macs(layout),
            "temporal": self.attn_time.site_macs(layout),
            "cross": self.cross.macs(layout.length(), layout.read("text")),
            "mlp": self.mlp.macs(layout.length()),
            "rest": 0,
        }


class FirstSTDiTBlock(STDiTBlock):
    """The first block: sine-cosine positions of frames are added to what its attention along time reads."""

    def __init__(self, width: int, heads: int, mlp_ratio: float, time_scale: float):
        super().__init__(width, heads, mlp_ratio)
        self.time_scale = time_scale

    def timed(self, x: Tensor, layout: Layout) -> Tensor:
        frames = layout.grid[0]
        table = scaled_frames(frames, self.time_scale, x.shape[-1], x.dtype, x.device)
        return (x.unflatten(1, (frames, -1)) + table[:, None]).flatten(1, 2)


@lru_cache(maxsize=64)
def scaled_frames(frames: int, scale: float, width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Sine-cosine positions of frames, [frames, width]."""
    return sincos_1d(torch.arange(frames, dtype=torch.float64, device="cpu") / scale, width).to(device, dtype)


class TemporalSTDiT3Block(ReadingLatteBlock):
    """A whole block along time, text and feed-forward included."""

    sites = ("temporal", "cross", "mlp")
    kind = TemporalAttention


@register("stdit", paper="Open-Sora: Democratizing Efficient Video Production for All, arXiv 2412.20404")
class STDiT(Backbone):
    """Version 1: three attentions in every block.

    x [B, C, T, H, W] with sizes that are multiples of the patch; prediction [B, C or 2C, T, H, W].
    """

    missing: ClassVar[Mapping[str, str]] = {"skip": "STDiT has no long skips"}
    preset: STDiTConfig

    def __init__(self, config: STDiTConfig):
        super().__init__()
        self.preset = c = config
        self.x_embedder = VideoPatchEmbed(c.patch, c.channels, c.width)
        self.t_embedder = TimeEmbedding(c.width)
        self.modulation = AdaLNSingle(c.width)
        self.text_embedder = TextEmbedding(c.text_width, c.width)
        if c.null_tokens:
            self.register_buffer("null_text", torch.randn(c.null_tokens, c.text_width) / c.text_width**0.5)
        self.blocks = nn.ModuleList(self.make_block(i) for i in range(c.depth))
        self.final_layer = TableHead(c.width, math.prod(c.patch) * c.out_channels)
        self.make_more()
        self.initialise()

    def make_block(self, index: int) -> Block:
        c = self.preset
        if index == 0:
            return FirstSTDiTBlock(c.width, c.heads, c.mlp_ratio, c.time_scale)
        return STDiTBlock(c.width, c.heads, c.mlp_ratio)

    def make_more(self) -> None:
        """What later versions have besides."""

    @property
    def crosses(self) -> list[CrossAttention]:
        """The cross-attention of every block."""
        return [block.cross for block in self.blocks]

    def initialise(self) -> None:
        """As published: as PixArt, and the attention along time puts out zero."""
        xavier_linears_(self)
        xavier_video_patches_(self.x_embedder)
        for module in (self.t_embedder, self.modulation, self.text_embedder):
            normal_linears_(module)
        along = [block.attn_time for block in self.blocks if isinstance(block, STDiTBlock)]
        zero_(*(cross.proj for cross in self.crosses), *(attn.proj for attn in along))
        zero_(self.final_layer.linear)

    def prepare(self, condition: Condition) -> Memory:
        text = check_text(condition.text, condition.text_mask, self.preset.text_width, "STDiT")
        memory = text_memory(self.crosses, self.text_embedder(text.to(self.dtype)), condition.text_mask)
        return replace(memory, vector=self.vector(condition))

    def vector(self, condition: Condition) -> Tensor | None:
        """What is added to the embedded time."""
        return None

    def embed(
        self, x: Tensor, time: Tensor, memory: Memory, segments: Sequence[Segment] = ()
    ) -> tuple[Streams, Context]:
        check_video(x, self.preset.channels, self.preset.patch, "STDiT")
        check_rows(x, memory.text, "text")
        check_whole_video(segments, "STDiT")
        grid = self.x_embedder.grid(x)
        tokens = self.x_embedder(x.to(self.dtype))
        places = scaled_places(*grid[1:], *self.spacing(grid, x), self.preset.width, tokens.dtype, tokens.device)
        layout = reading_text(Layout((Span("image", tokens_of(grid)),), grid), memory)
        emb = self.t_embedder(time)
        c = modulation(emb, memory.vector, (), lambda t: self.t_embedder(self.preset.time.native(t)))
        context = Context(
            modulation=single_modulation(self.modulation, c),
            rotary=self.rotary(grid, tokens.device),
            time=emb,
            shared=text_shared(memory),
        )
        return Streams({"image": tokens + places.repeat(grid[0], 1)}, layout), context

    def spacing(self, grid: tuple[int, int, int], x: Tensor) -> tuple[float, float]:
        """How far apart neighbouring rows and columns stand."""
        return 1 / self.preset.space_scale, 1 / self.preset.space_scale

    def rotary(self, grid: tuple[int, int, int], device: torch.device) -> dict[str, tuple[Tensor, Tensor]]:
        """Rotary tables by attention; version 1 has none."""
        return {}

    def handed(self, position: int, context: Context) -> Mapping[str, Any]:
        return handed(position, context)

    def head(self, streams: Streams, context: Context) -> Tensor:
        tokens = self.final_layer(streams.segment("image"), head_modulation(streams, context))
        return unpatchify_video(tokens, self.preset.patch, streams.layout.grid)

    def example(self, batch: int = 1, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor, Condition]:
        c = self.preset
        x = torch.randn(batch, c.channels, *c.size, device=device)
        text = torch.randn(batch, c.text_tokens, c.text_width, device=device)
        extra = self.example_extra(batch, device)
        return x, torch.rand(batch, dtype=torch.float64, device=device), Condition(text=text, extra=extra)

    def example_extra(self, batch: int, device: torch.device | str) -> dict[str, Tensor]:
        """Further conditions of an example."""
        return {}

    def end_macs(self, layout: Layout) -> dict[str, int]:
        image, text = layout.span("image").length, layout.read("text")
        return {
            "embed": self.x_embedder.macs(image),
            "time": cost.linears(self.t_embedder, 1) + self.modulation.macs(1),
            "prepare": cost.linears(self.text_embedder, text) + sum(cross.text_macs(text) for cross in self.crosses),
            "head": self.final_layer.macs(image),
        }


class STDiT3(STDiT):
    """Version 3: whole blocks along time, told the frames per second. Of 2C outputs the second half is dropped.

    Prediction [B, C, T, H, W], the velocity dx/dt: minus what the official network returns.
    """

    def make_block(self, index: int) -> Block:
        c, kind = self.preset, TemporalSTDiT3Block if index % 2 else ReadingLatteBlock
        return kind(c.width, c.heads, c.mlp_ratio, ModulationTable(c.width), qk_norm="rms")

    def make_more(self) -> None:
        self.fps_embedder = TimeEmbedding(self.preset.width)

    def initialise(self) -> None:
        """As published, where the rest came from PixArt: blocks along time and frames per second change nothing."""
        xavier_linears_(self)
        normal_linears_(self.fps_embedder)
        zero_(self.fps_embedder.mlp[2])
        along = [block for block in self.blocks if isinstance(block, TemporalSTDiT3Block)]
        zero_(*(part for b in along for part in (b.attn.proj, b.cross.proj, b.mlp.fc2)))

    def vector(self, condition: Condition) -> Tensor:
        fps = condition.extra.get("fps")
        if fps is None or fps.ndim != 1:
            raise UserError("STDiT3 is told the frames per second: give Condition(extra={'fps': [batch]})")
        return self.fps_embedder(fps)

    def spacing(self, grid: tuple[int, int, int], x: Tensor) -> tuple[float, float]:
        """Every aspect ratio is stretched to a square of as many tokens; pictures larger than trained stand closer."""
        c, (rows, columns) = self.preset, grid[1:]
        scale = c.stride * math.sqrt(x.shape[-2] * x.shape[-1]) / c.trained
        base = round(math.sqrt(rows * columns))
        return base / rows / scale, base / columns / scale

    def rotary(self, grid: tuple[int, int, int], device: torch.device) -> dict[str, tuple[Tensor, Tensor]]:
        return {"temporal": frame_rotary(*grid, self.preset.width // self.preset.heads, device)}

    def head(self, streams: Streams, context: Context) -> Tensor:
        return self.preset.sign * super().head(streams, context)[:, : self.preset.channels]

    def example_extra(self, batch: int, device: torch.device | str) -> dict[str, Tensor]:
        return {"fps": torch.randint(8, 31, (batch,), device=device).float()}

    def end_macs(self, layout: Layout) -> dict[str, int]:
        costs = super().end_macs(layout)
        return {**costs, "prepare": costs["prepare"] + cost.linears(self.fps_embedder, 1)}


@lru_cache(maxsize=64)
def scaled_places(
    height: int, width: int, down: float, across: float, channels: int, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Sine-cosine positions of a grid with rows `down` and columns `across` apart: [height * width, D]."""
    places = grid_positions(height, width) * torch.tensor([down, across], dtype=torch.float64)
    return sincos_at(places, channels).to(device=device, dtype=dtype)


@lru_cache(maxsize=64)
def frame_rotary(frames: int, height: int, width: int, head: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The rotary table of all tokens that tells only their frame."""
    cos, sin = rotary(grid_positions(frames, height, width)[:, :1], (head,))
    return cos.to(device), sin.to(device)


def _xl(**more: Any) -> STDiTConfig:
    return STDiTConfig(**{"width": 1152, "heads": 16, **more})


PRESETS = {
    "STDiT-XL/2": _xl(version=1, depth=28, text_tokens=120, space_scale=0.5, time=DISCRETE_1000),
    "STDiT3-XL/2": _xl(depth=56, size=(15, 30, 52)),
    "STDiT3-3B/2": _xl(depth=56, width=1872, heads=26, size=(15, 30, 52)),
}
