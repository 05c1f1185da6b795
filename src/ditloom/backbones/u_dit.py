"""U-DiT: Downsample Tokens in U-Shaped Diffusion Transformers (Tian et al., NeurIPS 2024, arXiv 2405.02730)."""

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
from ditloom.parts import cost
from ditloom.parts.checks import check_grid_only, check_no_rule, check_rows
from ditloom.parts.downsampled import DownsampledAttention
from ditloom.parts.grids import Stem, convolution, image_layout, over_grid, xavier_
from ditloom.parts.heads import GridHead
from ditloom.parts.modulation import AdaLN
from ditloom.parts.norms import LayerNorm, modulate
from ditloom.parts.patches import normal_linears_, zero_
from ditloom.parts.positions import grid_positions, rotary
from ditloom.parts.rep_mlp import MergedMLP, RepMLP
from ditloom.parts.u_shape import Concatenate, Down, ScaleConditions, Up
from ditloom.sites.visit import visit

STAGES = ("encoder1", "encoder2", "latent", "decoder2", "decoder1")
GRID_OF = (0, 1, 2, 1, 0)
WIDTH_OF = (0, 1, 2, 1, 1)


@dataclass(frozen=True, kw_only=True)
class UDiTConfig(BackboneConfig):
    """Settings of a U-DiT.

    depths: published blocks of the five stages; each is two blocks here, for it holds attention, feed-forward,
    attention, feed-forward. width: of the first scale; the next have twice and four times as many, and the last decoder
    stage keeps twice. factor: tokens are cut into factor^2 sub-grids. merged: the deployed form of the feed-forward,
    in which three depthwise convolutions are one. classes=0: unconditional.
    """

    family: ClassVar[str] = "u-dit"
    process: ClassVar[Mapping[str, Any]] = {"name": "discrete-vp", "schedule": "linear", "predicts": "eps+var"}
    sign: ClassVar[int] = 1

    width: int
    heads: int
    depths: tuple[int, ...] = (2, 5, 8, 5, 2)
    factor: int = 2
    merged: bool = False
    image_size: int = 32
    channels: int = 4
    classes: int = 1000
    null_class: bool = True
    learn_sigma: bool = True
    mlp_ratio: float = 2.0
    time: TimeInput = DISCRETE_1000

    def __post_init__(self) -> None:
        if len(self.depths) != len(STAGES):
            raise UserError(f"a U-DiT has {len(STAGES)} stages ({', '.join(STAGES)}); got depths {list(self.depths)}")
        if self.width % self.heads or self.width // self.heads % 4:
            raise UserError(
                f"the heads of a U-DiT turn by rows and columns in pairs: width {self.width} must be a multiple of "
                f"4 x {self.heads} heads"
            )

    @property
    def out_channels(self) -> int:
        """Channels of the prediction."""
        return self.channels * (1 + self.learn_sigma)

    @property
    def widths(self) -> tuple[int, int, int]:
        """Channels of the three scales."""
        return self.width, 2 * self.width, 4 * self.width

    @property
    def multiple(self) -> int:
        """Of what heights and widths must be multiples: two halvings, then sub-grids."""
        return 4 * self.factor

    def build(self) -> UDiT:
        return UDiT(self)


class UDiTBlock(Block):
    """x += g1 Attn(mod(LN x)); x += g2 FFN(mod(LN x)), with token-downsampled attention and a convolution in the FFN.

    Half a published block. `stage` says whose condition and rotary table it reads.
    """

    sites = ("attn", "mlp")
    stages = (
        *("modulated_in", "q_proj", "k_proj", "v_proj", "q_norm", "k_norm", "q_rope", "k_rope"),
        *("attn_heads", "attn_out", "ff_hidden"),
    )

    def __init__(self, stage: str, width: int, heads: int, mlp_ratio: float, factor: int, merged: bool):
        super().__init__()
        self.stage = stage
        hidden = int(width * mlp_ratio)
        self.norm1, self.norm2 = LayerNorm(width), LayerNorm(width)
        self.attn = DownsampledAttention(width, heads, factor)
        self.mlp = MergedMLP(width, hidden) if merged else RepMLP(width, hidden)
        self.modulation = AdaLN(width, 6)

    def forward(
        self, streams: Streams, context: Context, plan: BlockPlan | None = None, given: Mapping[str, Any] = NOTHING
    ) -> tuple[Streams, dict[str, Any]]:
        check_no_rule(context.rule, "U-DiT", MISSING["rule"])
        x, grid = streams["image"], streams.layout.grid
        at = visit(plan, given, streams.layout)
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(context.modulation[self.stage])
        h = at.tap("modulated_in", modulate(self.norm1(x), shift1, scale1))
        table = context.rotary[self.stage]
        x = torch.addcmul(x, gate1, at.around("attn", lambda h: self.attn(h, grid, table, at), h))
        h = modulate(self.norm2(x), shift2, scale2)
        x = torch.addcmul(x, gate2, at.around("mlp", lambda h: self.mlp(h, grid, at), h))
        return streams.updated(image=x), at.kept

    def modulated_in(self, streams: Streams, context: Context) -> Tensor:
        shift, scale, *_ = self.modulation(context.modulation[self.stage])
        return modulate(self.norm1(streams["image"]), shift, scale)

    def macs(self, layout: Layout) -> dict[str, int]:
        n = layout.length()
        return {"attn": self.attn.macs(n), "mlp": self.mlp.macs(n), "rest": self.modulation.macs(1)}


MISSING = {
    "cross": "U-DiT is conditioned through adaLN and has no cross-attention",
    "temporal": "U-DiT has no temporal attention",
    "logits": "in U-DiT each of the sub-grids attends within itself: there is no one matrix of logits",
    "attend": "in U-DiT each of the sub-grids attends within itself: no keys can be appended for all tokens",
    "segment": "U-DiT convolves over the image's grid, where further tokens have no place",
    "rule": "in U-DiT each of the sub-grids attends within itself, at three scales: no rule between tokens holds there",
}


@register("u-dit", paper="U-DiTs: Downsample Tokens in U-Shaped Diffusion Transformers, arXiv 2405.02730")
class UDiT(Backbone):
    """Three scales, down and up again, on latents without patches; conditioned on time and class by adaLN-Zero.

    x [B, C, H, W] with H, W multiples of 4 * factor; prediction [B, C or 2C, H, W]. The label of a row is one for all
    scales (the official code drops labels for each scale by itself in training).
    """

    missing: ClassVar[Mapping[str, str]] = MISSING
    preset: UDiTConfig

    def __init__(self, config: UDiTConfig):
        super().__init__()
        self.preset = config
        first, second, third = config.widths
        self.x_embedder = Stem(config.channels, first)
        self.conditions = ScaleConditions(config.widths, config.classes, config.null_class)
        self.blocks = nn.ModuleList(
            [
                *self._stage(0),
                Down(first, second),
                *self._stage(1),
                Down(second, third),
                *self._stage(2),
                Up(third, second),
                Concatenate(2 * second, second),
                *self._stage(3),
                Up(second, first),
                Concatenate(2 * first, second),
                *self._stage(4),
            ]
        )
        self.skips = long_skips(self.blocks)
        self.output = convolution(second, second)
        self.final_layer = GridHead(second, config.out_channels)
        self.initialise()

    def _stage(self, number: int) -> list[UDiTBlock]:
        c = self.preset
        width = c.widths[WIDTH_OF[number]]
        parts = (STAGES[number], width, c.heads, c.mlp_ratio, c.factor, c.merged)
        return [UDiTBlock(*parts) for _ in range(2 * c.depths[number])]

    def initialise(self) -> None:
        """As published: xavier, N(0, 0.02) embeddings, zero modulation and output, so that the network starts at 0."""
        xavier_(self)
        normal_linears_(self.conditions.time)
        for table in self.conditions.label.parameters():
            nn.init.normal_(table, std=0.02)
        zero_(*(m for m in self.modules() if isinstance(m, AdaLN)), self.final_layer.proj)

    @torch.no_grad()
    def merged(self) -> UDiT:
        """The deployed form with the same values: every feed-forward's branches are one convolution."""
        if self.preset.merged:
            return self
        out = UDiT(replace(self.preset, merged=True)).to(self.device, self.dtype)
        values = self.state_dict()
        for i, block in enumerate(self.blocks):
            if isinstance(block, UDiTBlock) and isinstance(block.mlp, RepMLP):
                values = {k: v for k, v in values.items() if not k.startswith(f"blocks.{i}.mlp.")}
                values |= {f"blocks.{i}.mlp.{k}": v for k, v in block.mlp.merged().state_dict().items()}
        out.load_state_dict(values)
        return out.train(self.training)

    def prepare(self, condition: Condition) -> Memory:
        return Memory(vector=self.conditions.labels(condition.label))

    def embed(
        self, x: Tensor, time: Tensor, memory: Memory, segments: Sequence[Segment] = ()
    ) -> tuple[Streams, Context]:
        c = self.preset
        check_size(x, c.channels, c.multiple, "UDiT", "what two halvings and its sub-grids divide")
        check_rows(x, memory.vector, "labels")
        check_grid_only(time, segments, "U-DiT", MISSING["segment"])
        conditions, emb = self.conditions(time, memory.vector)
        tokens, grid = self.x_embedder(x.to(self.dtype)), (x.shape[2], x.shape[3])
        context = Context(
            modulation={stage: conditions[WIDTH_OF[s]] for s, stage in enumerate(STAGES)},
            rotary={stage: self._rotary(s, grid, x.device) for s, stage in enumerate(STAGES)},
            time=emb,
        )
        return Streams({"image": tokens}, image_layout(grid, c.width)), context

    def _rotary(self, stage: int, grid: tuple[int, int], device: torch.device) -> tuple[Tensor, Tensor]:
        c = self.preset
        height, width = (side >> GRID_OF[stage] for side in grid)
        return alternating(height, width, c.factor, c.widths[WIDTH_OF[stage]] // c.heads, device)

    def head(self, streams: Streams, context: Context) -> Tensor:
        grid = streams.layout.grid
        return self.final_layer(over_grid(self.output, streams["image"], grid), context.modulation[STAGES[-1]], grid)

    def example(self, batch: int = 1, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor, Condition]:
        c = self.preset
        x = torch.randn(batch, c.channels, c.image_size, c.image_size, device=device)
        label = torch.randint(c.classes, (batch,), device=device) if c.classes else None
        return x, torch.rand(batch, dtype=torch.float64, device=device), Condition(label=label)

    def end_macs(self, layout: Layout) -> dict[str, int]:
        image = layout.span("image").length
        head = cost.convolution(self.output, image) + self.final_layer.macs(image)
        return {"embed": self.x_embedder.macs(image) + self.conditions.macs(), "head": head}


def long_skips(blocks: nn.ModuleList) -> dict[int, int]:
    """Every concatenation is given what leaves the last block before the halving that its doubling undoes."""
    downs = [i for i, block in enumerate(blocks) if isinstance(block, Down)]
    joins = [i for i, block in enumerate(blocks) if isinstance(block, Concatenate)]
    return {join: down - 1 for join, down in zip(joins, reversed(downs), strict=True)}


@lru_cache(maxsize=64)
def alternating(height: int, width: int, factor: int, head_dim: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The rotary table (cos, sin) [H * W, d] of tokens at their places in a sub-grid; pairs turn by column, row, ..."""
    places = grid_positions(height, width).div(factor, rounding_mode="floor")
    table = rotary(places[:, [1, 0]], (head_dim // 2, head_dim // 2))
    cos, sin = (t.unflatten(-1, (2, -1, 2)).transpose(1, 2).flatten(1).to(device) for t in table)
    return cos, sin


SIZES = {"S": (96, 4), "B": (192, 8), "L": (384, 16)}
PRESETS = {
    f"U-DiT-{size}{suffix}": UDiTConfig(width=width, heads=heads, merged=merged)
    for suffix, merged in (("", False), ("-merged", True))
    for size, (width, heads) in SIZES.items()
}
