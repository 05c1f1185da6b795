"""DiC: Rethinking Conv3x3 Designs in Diffusion Models (Tian et al., CVPR 2025, arXiv 2501.00603).

A U shape of 3x3 convolutions without any attention; the condition enters in the middle of every block.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

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
from ditloom.parts.grids import Stem, convolution, image_layout, over_grid, to_map, to_tokens, xavier_
from ditloom.parts.heads import GridHead
from ditloom.parts.modulation import AdaLN
from ditloom.parts.norms import modulate
from ditloom.parts.patches import normal_linears_, zero_
from ditloom.parts.u_shape import Down, ScaleConditions, Up
from ditloom.sites.visit import visit

STAGES = ("encoder1", "encoder2", "latent", "decoder2", "decoder1")
SCALE_OF = (0, 1, 2, 1, 0)


@dataclass(frozen=True, kw_only=True)
class DiCConfig(BackboneConfig):
    """Settings of a DiC.

    depths: blocks of the five stages, the same going down and up. width: of the first scale; the next have twice and
    four times as many channels. skip_stride: every so many blocks, counted from a halving or doubling, one is the end
    of a long skip. classes=0: unconditional.
    """

    family: ClassVar[str] = "dic"
    process: ClassVar[Mapping[str, Any]] = {"name": "discrete-vp", "schedule": "linear", "predicts": "eps+var"}
    sign: ClassVar[int] = 1

    width: int
    depths: tuple[int, ...]
    skip_stride: int = 3
    image_size: int = 32
    channels: int = 4
    classes: int = 1000
    null_class: bool = True
    learn_sigma: bool = True
    time: TimeInput = DISCRETE_1000

    def __post_init__(self) -> None:
        if len(self.depths) != len(STAGES) or self.depths != self.depths[::-1]:
            raise UserError(f"a DiC has five stages, as deep going down as going up; got depths {list(self.depths)}")
        if self.width % 4 or any(n % groups_of(n) for n in (self.width << scale for scale in range(4))):
            raise UserError(f"a DiC needs width, 2, 4 and 8 times it to be multiples of their groups; got {self.width}")

    @property
    def out_channels(self) -> int:
        """Channels of the prediction."""
        return self.channels * (1 + self.learn_sigma)

    @property
    def widths(self) -> tuple[int, int, int]:
        """Channels of the three scales."""
        return self.width, 2 * self.width, 4 * self.width

    def build(self) -> DiC:
        return DiC(self)


def groups_of(channels: int) -> int:
    """Groups of a norm: 32, or fewer so that each has at least 4 channels."""
    return min(32, channels // 4)


class DiCBlock(Block):
    """y = conv3x3(GELU(GN x)); x += gate conv3x3(GELU(GN(y) (1 + scale) + shift)), with gate, scale, shift from c.

    `skipped`: channels of a long skip that is joined to x at the start; then the residual x is a linear of both. Its
    one site "conv" is what the two convolutions give.
    """

    sites = ("conv",)
    stages = ("modulated_in", "conv_hidden")

    def __init__(self, stage: str, width: int, skipped: int = 0):
        super().__init__()
        self.stage, inputs = stage, width + skipped
        self.norm1, self.norm2 = (nn.GroupNorm(groups_of(n), n) for n in (inputs, width))
        self.conv1, self.conv2 = convolution(inputs, width), convolution(width, width)
        self.modulation = AdaLN(width, 3)
        self.skip_linear = nn.Linear(inputs, width) if skipped else None

    def forward(
        self, streams: Streams, context: Context, plan: BlockPlan | None = None, given: Mapping[str, Any] = NOTHING
    ) -> tuple[Streams, dict[str, Any]]:
        check_no_rule(context.rule, "DiC", MISSING["rule"])
        x, grid = streams["image"], streams.layout.grid
        at = visit(plan, given, streams.layout)
        gate, scale, shift = self.modulation(context.modulation[self.stage])
        joined = x if self.skip_linear is None else torch.cat([x, given["skip"]["image"]], dim=-1)
        h = at.tap("modulated_in", normed(self.norm1, joined, grid))

        def convolve(_: Tensor) -> Tensor:
            y = over_grid(self.conv1, F.gelu(h), grid)
            y = modulate(normed(self.norm2, y, grid), shift, scale)
            return over_grid(self.conv2, at.tap("conv_hidden", F.gelu(y)), grid)

        y = at.around("conv", convolve, x)
        x = x if self.skip_linear is None else self.skip_linear(joined)
        return streams.updated(image=torch.addcmul(x, gate, y)), at.kept

    def modulated_in(self, streams: Streams, context: Context) -> Tensor:
        """The normed input: the condition enters later, between the convolutions."""
        if self.skip_linear is not None:
            raise UserError("the input of this DiC block depends on its long skip: probe a block of the way down")
        return normed(self.norm1, streams["image"], streams.layout.grid)

    def modulated_in_macs(self, layout: Layout) -> int:
        return 0

    def macs(self, layout: Layout) -> dict[str, int]:
        n = layout.length()
        skip = 0 if self.skip_linear is None else cost.linear(self.skip_linear, n)
        convolutions = cost.convolution(self.conv1, n) + cost.convolution(self.conv2, n)
        return {"conv": convolutions, "rest": self.modulation.macs(1) + skip}


def normed(norm: nn.GroupNorm, tokens: Tensor, grid: tuple[int, ...]) -> Tensor:
    """A group norm over channels and the whole grid, of tokens [B, N, C]."""
    return to_tokens(norm(to_map(tokens, grid)))


MISSING = {
    "mlp": "DiC has no feed-forward networks: each of its blocks is two convolutions",
    "cross": "DiC is conditioned between its convolutions and has no cross-attention",
    "temporal": "DiC has no temporal mixer",
    "logits": "DiC convolves and has no attention logits",
    "attend": "DiC convolves and has no keys to append to",
    "segment": "DiC convolves over the image's grid, where further tokens have no place",
    "rule": "it convolves, and has no attention",
}


@register("dic", paper="DiC: Rethinking Conv3x3 Designs in Diffusion Models, arXiv 2501.00603")
class DiC(Backbone):
    """Three scales, down and up again, on latents without patches; one label for all scales.

    x [B, C, H, W] with H, W multiples of 4; prediction [B, C or 2C, H, W]. Its site "conv" is of the kind "attn": what
    caches do to attention they do to the convolutions.
    """

    missing: ClassVar[Mapping[str, str]] = MISSING
    preset: DiCConfig

    def __init__(self, config: DiCConfig):
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
                *self._stage(3, joins=True),
                Up(second, first),
                *self._stage(4, joins=True),
            ]
        )
        self.skips = self._skips()
        self.output = convolution(first, first)
        self.final_layer = GridHead(first, config.out_channels)
        self.initialise()

    def _stage(self, number: int, joins: bool = False) -> list[DiCBlock]:
        c = self.preset
        width = c.widths[SCALE_OF[number]]
        skipped = (width if joins and b % c.skip_stride == 0 else 0 for b in range(c.depths[number]))
        return [DiCBlock(STAGES[number], width, s) for s in skipped]

    def _skips(self) -> dict[int, int]:
        """Sources are every stride-th block before a halving, counted from it; consumers take the last one left."""
        blocks: list[Any] = list(self.blocks)
        downs = [i for i, block in enumerate(blocks) if isinstance(block, Down)]
        starts = [0, *(down + 1 for down in downs[:-1])]
        stages = zip(starts, downs, strict=True)
        sources = [i for a, b in stages for i in range(a, b) if (b - 1 - i) % self.preset.skip_stride == 0]
        consumers = [i for i, block in enumerate(blocks) if isinstance(block, DiCBlock) and block.skip_linear]
        return dict(zip(consumers, reversed(sources), strict=True))

    def initialise(self) -> None:
        """As published: xavier, N(0, 0.02) embeddings, zero head. Gates are not zero: blocks act from the start."""
        xavier_(self)
        normal_linears_(self.conditions.time)
        for table in self.conditions.label.parameters():
            nn.init.normal_(table, std=0.02)
        zero_(self.final_layer.modulation, self.final_layer.proj)

    def prepare(self, condition: Condition) -> Memory:
        return Memory(vector=self.conditions.labels(condition.label))

    def embed(
        self, x: Tensor, time: Tensor, memory: Memory, segments: Sequence[Segment] = ()
    ) -> tuple[Streams, Context]:
        check_size(x, self.preset.channels, 4, "DiC", "what two halvings divide")
        check_rows(x, memory.vector, "labels")
        check_grid_only(time, segments, "DiC", MISSING["segment"])
        conditions, emb = self.conditions(time, memory.vector)
        tokens = self.x_embedder(x.to(self.dtype))
        layout = image_layout((x.shape[2], x.shape[3]), self.preset.width)
        modulation = {stage: conditions[SCALE_OF[s]] for s, stage in enumerate(STAGES)}
        return Streams({"image": tokens}, layout), Context(modulation=modulation, time=emb)

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


PRESETS = {
    "DiC-S": DiCConfig(width=96, depths=(6, 6, 5, 6, 6)),
    "DiC-B": DiCConfig(width=192, depths=(6, 6, 5, 6, 6)),
    "DiC-XL": DiCConfig(width=384, depths=(7, 7, 8, 7, 7)),
    "DiC-H": DiCConfig(width=384, depths=(14, 14, 10, 14, 14)),
}
