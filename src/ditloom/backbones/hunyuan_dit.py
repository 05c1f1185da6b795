"""Hunyuan-DiT: A Powerful Multi-Resolution DiT with Fine-Grained Chinese Understanding (Li et al., arXiv 2405.08748).

Two kinds of text tokens, CLIP's and T5's, read by cross-attention; long skips from the first half to the second; time
and conditions only shift what enters the self-attention; rotary positions, also for the queries of the text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
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
from ditloom.parts.attention_pool import AttentionPool
from ditloom.parts.checks import check_rows, check_text
from ditloom.parts.cross_attention import CrossAttention, handed, reading_text, text_memory, text_shared
from ditloom.parts.embedders import TimeEmbedding, sinusoid
from ditloom.parts.feed_forward import MLP
from ditloom.parts.heads import Head
from ditloom.parts.long_skip import SkipMerge
from ditloom.parts.modulation import AdaLN
from ditloom.parts.norms import LayerNorm
from ditloom.parts.patches import PatchEmbed, normal_linears_, unpatchify, xavier_linears_, xavier_patches_, zero_
from ditloom.parts.positions import axial_axes, grid_positions, rotary
from ditloom.parts.segments import Joined, check_streams, join, main_modulation, modulation
from ditloom.sites.visit import take_rows, visit

NUMBERS = 6  # of the size conditions: original, target and crop, each (height, width)


@dataclass(frozen=True, kw_only=True)
class HunyuanDiTConfig(BackboneConfig):
    """Settings of a Hunyuan-DiT.

    text_width, text_tokens: of CLIP's states; t5_width, t5_tokens: of T5's; pooled: what T5's states are pooled to, by
    pool_heads. sized: also told sizes and a style (up to v1.1). base: side in tokens of the square into which every
    grid is fitted, centred, before it is cut into its tokens; None: coordinates count tokens.
    """

    family: ClassVar[str] = "hunyuan-dit"
    sign: ClassVar[int] = 1

    depth: int
    width: int
    heads: int
    patch: int = 2
    image_size: int = 128
    channels: int = 4
    text_width: int = 1024
    text_tokens: int = 77
    t5_width: int = 2048
    t5_tokens: int = 256
    pooled: int = 1024
    pool_heads: int = 8
    learn_sigma: bool = True
    mlp_ratio: float = 4.0
    sized: bool = False
    base: int | None = 32
    time: TimeInput = DISCRETE_1000

    def __post_init__(self) -> None:
        if self.depth % 2:
            raise UserError(f"the depth of a Hunyuan-DiT is even, as its halves are joined by skips; got {self.depth}")
        if self.heads and self.width % self.heads == 0:
            axial_axes(self.width // self.heads)

    @property
    def process(self) -> Mapping[str, Any]:
        """What the released weights were trained for; the last beta changed with v1.2."""
        return {
            "name": "discrete-vp",
            "schedule": "scaled-linear",
            "beta_start": 0.00085,
            "beta_end": 0.03 if self.sized else 0.02,
            "predicts": "v-trig+var" if self.learn_sigma else "v-trig",
        }

    @property
    def out_channels(self) -> int:
        """Channels of the prediction."""
        return self.channels * (1 + self.learn_sigma)

    def build(self) -> HunyuanDiT:
        return HunyuanDiT(self)


class HunyuanDiTBlock(Block):
    """x += Attn(LN x + shift(c)); x += Cross(LN x, text); x += MLP(LN x): a shift, no scale, no gates."""

    sites = ("attn", "cross", "mlp")
    stages = ("modulated_in", *attention.STAGES, *cross_attention.STAGES, "ff_hidden")
    row_sites = ("cross", "mlp")

    def __init__(self, width: int, heads: int, mlp_ratio: float, text_width: int):
        super().__init__()
        self.norm1, self.norm_cross, self.norm2 = (LayerNorm(width, True) for _ in range(3))
        self.modulation = AdaLN(width, 1)
        self.attn = attention.SelfAttention(width, heads, qk_norm="layer")
        self.cross = CrossAttention(width, heads, text_width, qk_norm="layer")
        self.mlp = MLP(width, int(width * mlp_ratio))

    def forward(
        self, streams: Streams, context: Context, plan: BlockPlan | None = None, given: Mapping[str, Any] = NOTHING
    ) -> tuple[Streams, dict[str, Any]]:
        layout = streams.layout
        at = visit(plan, given, layout)
        x = self.enter(streams["image"], given)
        h = at.tap("modulated_in", self.norm1(x) + self._shift(context, layout))
        x = x + at.around("attn", lambda h: self.attn(h, layout, context, at), h)
        rotary = context.rotary["image"]
        x = x + self.cross.around(self.norm_cross(x), context, given, at, rotary)
        h = self.norm2(x)
        mlp_rows = lambda index: self.mlp(take_rows(h, index))  # noqa: E731
        x = x + at.around("mlp", lambda h: self.mlp(h, at), h, rows=mlp_rows)
        return streams.updated(image=x), at.kept

    def enter(self, x: Tensor, given: Mapping[str, Any]) -> Tensor:
        """What the residual stream is at the start of the block."""
        return x

    def _shift(self, context: Context, layout: Layout) -> Tensor:
        (shift,) = self.modulation(context.modulation["image"])
        return context.spread(shift, layout)

    def modulated_in(self, streams: Streams, context: Context) -> Tensor:
        return self.norm1(streams["image"]) + self._shift(context, streams.layout)

    def macs(self, layout: Layout) -> dict[str, int]:
        return {
            "attn": self.attn.site_macs(layout),
            "cross": self.cross.macs(layout.length(), layout.read("text")),
            "mlp": self.mlp.macs(layout.length()),
            "rest": self.modulation.macs(len(layout.groups("image"))),
        }


class HunyuanDiTSkipBlock(HunyuanDiTBlock):
    """The same after x = linear(LN [x, skip])."""

    def __init__(self, width: int, heads: int, mlp_ratio: float, text_width: int):
        super().__init__(width, heads, mlp_ratio, text_width)
        self.merge = SkipMerge(width)

    def enter(self, x: Tensor, given: Mapping[str, Any]) -> Tensor:
        return self.merge(x, given["skip"]["image"])

    def modulated_in(self, streams: Streams, context: Context) -> Tensor:
        raise UserError("what this Hunyuan-DiT block reads depends on its long skip: probe a block of the first half")

    def macs(self, layout: Layout) -> dict[str, int]:
        costs = super().macs(layout)
        return {**costs, "rest": costs["rest"] + self.merge.macs(layout.length())}


class Conditions(nn.Module):
    """Pooled T5 states, with `sized` six numbers and a style too, through a SiLU MLP to a vector [B, D]."""

    def __init__(self, config: HunyuanDiTConfig):
        super().__init__()
        c = config
        self.pool = AttentionPool(c.t5_tokens, c.t5_width, c.pool_heads, c.pooled)
        self.style = nn.Embedding(1, c.width) if c.sized else None
        inputs = c.pooled + (256 * NUMBERS + c.width if c.sized else 0)
        self.mlp = nn.Sequential(nn.Linear(inputs, 4 * c.width), nn.SiLU(), nn.Linear(4 * c.width, c.width))

    def forward(self, t5: Tensor, condition: Condition) -> Tensor:
        parts = [self.pool(t5)]
        if self.style is not None:
            sizes = condition.extra.get("sizes")
            if sizes is None or sizes.shape != (len(t5), NUMBERS):
                raise UserError(
                    "this Hunyuan-DiT is told sizes: give Condition(extra={'sizes': [batch, 6]}), the original, target "
                    "and crop (height, width)"
                )
            style = condition.extra.get("style", torch.zeros(len(t5), dtype=torch.int64, device=t5.device))
            parts += [sinusoid(sizes).flatten(1).to(t5.dtype), self.style(style)]
        return self.mlp(torch.cat(parts, dim=1))

    @property
    def macs(self) -> int:
        """Multiply-accumulates per batch row."""
        return self.pool.macs + cost.linears(self.mlp, 1)


@register("hunyuan-dit", paper="Hunyuan-DiT, arXiv 2405.08748")
class HunyuanDiT(Backbone):
    """Condition: CLIP's states as `text` with `text_mask`, T5's as extra["t5"] with extra["t5_mask"].

    Text positions that are masked or not given hold a learned embedding; the text is then not masked any more.
    x [B, C, H, W] with H, W multiples of the patch; prediction [B, C or 2C, H, W].
    """

    missing: ClassVar[Mapping[str, str]] = {
        "temporal": "Hunyuan-DiT has no temporal attention",
        "modulation": "Hunyuan-DiT shifts what enters its self-attention; it has neither scales nor gates",
    }
    preset: HunyuanDiTConfig

    def __init__(self, config: HunyuanDiTConfig):
        super().__init__()
        self.preset = c = config
        self.x_embedder = PatchEmbed(c.patch, c.channels, c.width)
        self.t_embedder = TimeEmbedding(c.width)
        self.conditions = Conditions(c)
        hidden = 4 * c.t5_width
        self.t5_embedder = nn.Sequential(nn.Linear(c.t5_width, hidden), nn.SiLU(), nn.Linear(hidden, c.text_width))
        self.padding = nn.Parameter(torch.randn(c.text_tokens + c.t5_tokens, c.text_width))
        half = c.depth // 2
        kinds = [HunyuanDiTBlock] * (half + 1) + [HunyuanDiTSkipBlock] * (half - 1)
        self.blocks = nn.ModuleList(kind(c.width, c.heads, c.mlp_ratio, c.text_width) for kind in kinds)
        self.skips = {half + 1 + j: half - 2 - j for j in range(half - 1)}
        self.final_layer = Head(c.width, c.patch, c.out_channels)
        self.initialise()

    @property
    def crosses(self) -> list[CrossAttention]:
        """The cross-attention of every block."""
        return [block.cross for block in self.blocks]

    def initialise(self) -> None:
        """As published: xavier, N(0, 0.02) embedders, zero shifts and zero head; cross-attention is not zero."""
        xavier_linears_(self)
        xavier_patches_(self.x_embedder)
        normal_linears_(self.t_embedder)
        normal_linears_(self.conditions.mlp)
        zero_(*(m for m in self.modules() if isinstance(m, AdaLN)), self.final_layer.linear)

    def prepare(self, condition: Condition) -> Memory:
        c = self.preset
        clip = check_text(condition.text, condition.text_mask, c.text_width, "Hunyuan-DiT").to(self.dtype)
        if clip.shape[1] > c.text_tokens:
            raise UserError(f"Hunyuan-DiT was built for {c.text_tokens} CLIP tokens; got {clip.shape[1]}")
        t5 = self._t5(condition, len(clip)).to(self.dtype)
        short = (0, c.text_tokens - clip.shape[1])
        masks = [
            _mask(condition.text_mask, clip),
            torch.zeros(len(clip), short[1], dtype=torch.bool, device=clip.device),
            _mask(condition.extra.get("t5_mask"), t5),
        ]
        text = torch.cat([nn.functional.pad(clip, (0, 0, *short)), self.t5_embedder(t5)], dim=1)
        text = torch.where(torch.cat(masks, dim=1)[..., None], text, self.padding)
        return replace(text_memory(self.crosses, text, None), vector=self.conditions(t5, condition))

    def _t5(self, condition: Condition, batch: int) -> Tensor:
        c, t5 = self.preset, condition.extra.get("t5")
        if t5 is None or t5.shape != (batch, c.t5_tokens, c.t5_width):
            raise UserError(
                f"Hunyuan-DiT reads T5's states too, padding included: give Condition(extra={{'t5': ...}}) of shape "
                f"[{batch}, {c.t5_tokens}, {c.t5_width}], and 't5_mask'"
            )
        return t5

    def embed(
        self, x: Tensor, time: Tensor, memory: Memory, segments: Sequence[Segment] = ()
    ) -> tuple[Streams, Context]:
        check_size(x, self.preset.channels, self.preset.patch, "Hunyuan-DiT")
        check_rows(x, memory.text, "text")
        check_streams(segments, ("image",), "Hunyuan-DiT")
        joined = join(x.to(self.dtype), self.x_embedder, segments, absolute=False)
        emb = self.t_embedder(time)
        c = modulation(emb, memory.vector, segments, lambda t: self.t_embedder(self.preset.time.native(t)))
        tables = {"image": self._rotary(joined)}
        context = Context(modulation={"image": c}, rotary=tables, time=emb, shared=text_shared(memory))
        return Streams({"image": joined.tokens}, reading_text(joined.layout, memory)), context

    def _rotary(self, joined: Joined) -> tuple[Tensor, Tensor]:
        """Columns turn the first half of a head, rows the second."""
        c, device = self.preset, joined.tokens.device
        if len(joined.layout.spans) == 1:
            return rotary_of_grid(*joined.layout.grid, c.base, c.width // c.heads, device)
        return rotary_fitted(joined.positions, joined.layout.grid, c.base, c.width // c.heads, device)

    def handed(self, position: int, context: Context) -> Mapping[str, Any]:
        return handed(position, context)

    def head(self, streams: Streams, context: Context) -> Tensor:
        tokens = self.final_layer(streams.segment("image"), main_modulation(streams, context))
        return unpatchify(tokens, self.preset.patch, streams.layout.grid)

    def example(self, batch: int = 1, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor, Condition]:
        c = self.preset
        x = torch.randn(batch, c.channels, c.image_size, c.image_size, device=device)
        text = torch.randn(batch, c.text_tokens, c.text_width, device=device)
        extra = {"t5": torch.randn(batch, c.t5_tokens, c.t5_width, device=device)}
        if c.sized:
            extra["sizes"] = 256.0 * torch.randint(0, 5, (batch, NUMBERS), device=device)
        return x, torch.rand(batch, dtype=torch.float64, device=device), Condition(text=text, extra=extra)

    def end_macs(self, layout: Layout) -> dict[str, int]:
        image, text = layout.span("image").length, layout.read("text")
        prepare = cost.linears(self.t5_embedder, self.preset.t5_tokens) + self.conditions.macs
        return {
            "embed": self.x_embedder.macs(image),
            "time": cost.linears(self.t_embedder, 1),
            "prepare": prepare + sum(cross.text_macs(text) for cross in self.crosses),
            "head": self.final_layer.macs(image),
        }


def _mask(mask: Tensor | None, tokens: Tensor) -> Tensor:
    """The mask [B, n] of some tokens, True where they are real."""
    return torch.ones_like(tokens[..., 0], dtype=torch.bool) if mask is None else mask.bool()


def fitted(grid: Sequence[int], base: int | None) -> tuple[Tensor, Tensor]:
    """(start, step) of a grid's coordinates along its two axes, float64 [2]: fitted into a square, or by tokens."""
    if base is None:
        return torch.zeros(2, dtype=torch.float64), torch.ones(2, dtype=torch.float64)
    longest = max(grid)
    sides = [base if n == longest else round(base / longest * n) for n in grid]
    start = torch.tensor([round((base - side) / 2) for side in sides], dtype=torch.float64)
    return start, torch.tensor([side / n for side, n in zip(sides, grid, strict=True)], dtype=torch.float64)


def rotary_fitted(
    positions: Tensor, grid: Sequence[int], base: int | None, head: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """The rotary table of (row, column) positions [n, 2], counted in tokens of the grid that is fitted."""
    start, step = fitted(grid, base)
    cos, sin = rotary((start + positions * step)[:, [1, 0]], axial_axes(head))
    return cos.to(device), sin.to(device)


@lru_cache(maxsize=64)
def rotary_of_grid(height: int, width: int, base: int | None, head: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The same for all tokens of a grid in row-major order."""
    return rotary_fitted(grid_positions(height, width), (height, width), base, head, device)


def _g(**more: Any) -> HunyuanDiTConfig:
    return HunyuanDiTConfig(depth=40, width=1408, heads=16, mlp_ratio=4.3637, **more)


PRESETS = {"HunyuanDiT-g/2-v1.1": _g(sized=True), "HunyuanDiT-g/2-v1.2": _g()}
