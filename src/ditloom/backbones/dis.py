"""DiS: Scalable Diffusion Models with State Space Backbone (Fei et al., arXiv 2402.05608).

Label, time and patches are one sequence; every block is a Mamba mixer that scans it in both directions; long skips join
the first half to the second.
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
from ditloom.contracts.time import DISCRETE_1000, TimeInput
from ditloom.parts import cost, mamba
from ditloom.parts.checks import check_no_rule, check_rows
from ditloom.parts.embedders import LabelEmbedding, sinusoid, time_mlp
from ditloom.parts.heads import Head
from ditloom.parts.mamba import Mamba
from ditloom.parts.norms import LayerNorm, RMSNorm
from ditloom.parts.patches import PatchEmbed, unpatchify
from ditloom.parts.segments import check_streams, join, main_modulation
from ditloom.parts.tables import add_learned
from ditloom.sites.visit import visit


@dataclass(frozen=True, kw_only=True)
class DiSConfig(BackboneConfig):
    """Settings of a DiS. `depth` counts the blocks of both halves; one middle block comes on top.

    `classes=0`: unconditional, without the label's token and with a plain head. `image_size` is fixed, as positions are
    learned. The published drop-path (0.1, growing with depth) regularises training and is no part of the network.
    """

    family: ClassVar[str] = "dis"
    process: ClassVar[Mapping[str, Any]] = {"name": "discrete-vp", "schedule": "linear", "predicts": "eps+var"}
    sign: ClassVar[int] = 1

    depth: int
    width: int
    patch: int = 2
    image_size: int = 32
    channels: int = 4
    classes: int = 1000
    null_class: bool = True
    learn_sigma: bool = True
    states: int = 16
    time: TimeInput = DISCRETE_1000

    def __post_init__(self) -> None:
        if self.depth % 2:
            raise UserError(f"the depth of a DiS is even (both halves, without the middle block); got {self.depth}")

    @property
    def out_channels(self) -> int:
        """Channels of the prediction."""
        return self.channels * (1 + self.learn_sigma)

    @property
    def prefix(self) -> tuple[Span, ...]:
        """The tokens before the image, in order."""
        return (Span("label", 1), Span("time", 1)) if self.classes else (Span("time", 1),)

    def build(self) -> DiS:
        return DiS(self)


class DiSBlock(Block):
    """h = Mamba(RMS x); x += h. Streams carry x as "image", and h as "hidden": what long skips join."""

    sites = ("mixer",)
    stages = ("modulated_in", *mamba.STAGES)

    def __init__(self, width: int, states: int = 16):
        super().__init__()
        self.norm = RMSNorm(width, eps=1e-5)
        self.mixer = Mamba(width, states=states)

    def forward(
        self, streams: Streams, context: Context, plan: BlockPlan | None = None, given: Mapping[str, Any] = NOTHING
    ) -> tuple[Streams, dict[str, Any]]:
        check_no_rule(context.rule, "DiS", MISSING["rule"])
        at = visit(plan, given, streams.layout)
        x = self.enter(streams, given)
        h = at.around("mixer", lambda h: self.mixer(h, at), at.tap("modulated_in", self.norm(x)))
        return streams.updated(image=x + h, hidden=h), at.kept

    def enter(self, streams: Streams, given: Mapping[str, Any]) -> Tensor:
        """What the residual stream is at the start of the block."""
        return streams["image"]

    def modulated_in(self, streams: Streams, context: Context) -> Tensor:
        """The normed input; there is nothing to modulate it."""
        return self.norm(streams["image"])

    def macs(self, layout: Layout) -> dict[str, int]:
        return {"mixer": self.mixer.macs(layout.length()), "rest": 0}


class DiSSkipBlock(DiSBlock):
    """The same after the last mixer's h in x is replaced by linear([h, skip]); the skip is the h of another block."""

    def __init__(self, width: int, states: int = 16):
        super().__init__(width, states)
        self.skip_linear = nn.Linear(2 * width, width)

    def enter(self, streams: Streams, given: Mapping[str, Any]) -> Tensor:
        hidden = streams["hidden"]
        return streams["image"] - hidden + self.skip_linear(torch.cat([hidden, given["skip"]["hidden"]], dim=-1))

    def modulated_in(self, streams: Streams, context: Context) -> Tensor:
        raise UserError("the input of this DiS block depends on its long skip: probe a block of the first half")

    def macs(self, layout: Layout) -> dict[str, int]:
        return {**super().macs(layout), "rest": cost.linear(self.skip_linear, layout.length())}


MISSING = {
    "mlp": "DiS has no feed-forward networks: each of its blocks is one Mamba mixer",
    "modulation": "DiS reads time and label as tokens: only its head has shifts and scales, and what stands at "
    "modulated_in is the normed input",
    "cross": "DiS reads its label as a token and has no cross-attention",
    "temporal": "DiS has no temporal mixer",
    "logits": "DiS scans its tokens and has no attention logits",
    "attend": "DiS scans its tokens and has no keys to append to",
    "skip": "in DiS a long skip carries what a block's mixer gave: tap that block's stage 'mixer'",
    "rule": "it scans its tokens, and all of them lie on one path",
}


@register("dis", paper="Scalable Diffusion Models with State Space Backbone, arXiv 2402.05608")
class DiS(Backbone):
    """A bidirectional Mamba over [label, time, image] tokens with long skips.

    x [B, C, H, W] of the size it was built for; prediction [B, C or 2C, H, W]. The label also modulates the head. Its
    site "mixer" is of the kind "attn": what caches do to attention they do to the mixer.
    """

    missing: ClassVar[Mapping[str, str]] = MISSING
    preset: DiSConfig

    def __init__(self, config: DiSConfig):
        super().__init__()
        self.preset = config
        width, half = config.width, config.depth // 2
        self.x_embedder = PatchEmbed(config.patch, config.channels, width)
        self.t_embedder = time_mlp(width)
        self.y_embedder = LabelEmbedding(config.classes, width, config.null_class) if config.classes else None
        tokens = len(config.prefix) + (config.image_size // config.patch) ** 2
        self.pos_embed = nn.Parameter(torch.zeros(1, tokens, width))
        first = (DiSBlock(width, config.states) for _ in range(half + 1))
        second = (DiSSkipBlock(width, config.states) for _ in range(half))
        self.blocks = nn.ModuleList([*first, *second])
        self.skips = {half + 1 + j: half - 1 - j for j in range(half)}
        self.norm = RMSNorm(width, eps=1e-5)
        self.final_layer = self._make_head()
        self.initialise()

    def _make_head(self) -> nn.Module:
        c = self.preset
        if c.classes:
            return Head(c.width, c.patch, c.out_channels)
        return nn.Sequential(LayerNorm(c.width), nn.Linear(c.width, c.patch**2 * c.out_channels))

    def initialise(self) -> None:
        """As published: torch's weights, zero biases, N(0, 0.02) labels, mixers as Mamba's. It does not start at 0."""
        for m in self.modules():
            if isinstance(m, nn.Linear) and m.bias is not None:
                nn.init.zeros_(m.bias)
        for m in self.modules():
            if isinstance(m, Mamba):
                m.initialise(self.preset.depth)
        if self.y_embedder is not None:
            nn.init.normal_(self.y_embedder.embedding_table.weight, std=0.02)

    def prepare(self, condition: Condition) -> Memory:
        if self.y_embedder is None:
            return Memory()
        return Memory(vector=self.y_embedder(self.y_embedder.check(condition.label)))

    def embed(
        self, x: Tensor, time: Tensor, memory: Memory, segments: Sequence[Segment] = ()
    ) -> tuple[Streams, Context]:
        self._check(x, time, memory, segments)
        prefix = self.preset.prefix
        table, places = self.pos_embed[:, : len(prefix)], self.pos_embed[0, len(prefix) :]
        joined = join(x.to(self.dtype), self.x_embedder, segments, absolute=lambda *given: add_learned(places, *given))
        emb = self.t_embedder(sinusoid(time, self.preset.width).to(self.dtype))
        vectors = {"time": emb, "label": memory.vector}
        first = torch.stack([v for s in prefix if (v := vectors[s.name]) is not None], dim=1) + table
        tokens = torch.cat([first, joined.tokens], dim=1)
        layout = replace(joined.layout, spans=(*prefix, *joined.layout.spans))
        c = {} if memory.vector is None else {"image": (emb + memory.vector)[:, None]}
        return Streams({"image": tokens, "hidden": tokens}, layout), Context(modulation=c, time=emb)

    def _check(self, x: Tensor, time: Tensor, memory: Memory, segments: Sequence[Segment]) -> None:
        size = self.preset.image_size
        check_size(x, self.preset.channels, self.preset.patch, "DiS")
        check_rows(x, memory.vector, "labels")
        check_streams(segments, ("image",), "DiS")
        if x.shape[2:] != (size, size):
            height, width = x.shape[2:]
            raise UserError(f"the learned positions of this DiS are for {size}x{size}; got {height}x{width}")
        if time.ndim != 1 or any(s.modulation != "t" for s in segments):
            raise UserError("DiS has one time token: one time per image, for all its tokens and segments")

    def head(self, streams: Streams, context: Context) -> Tensor:
        given = (main_modulation(streams, context),) if context.modulation else ()
        tokens = self.final_layer(self.norm(streams.segment("image")), *given)
        return unpatchify(tokens, self.preset.patch, streams.layout.grid)

    def example(self, batch: int = 1, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor, Condition]:
        c = self.preset
        x = torch.randn(batch, c.channels, c.image_size, c.image_size, device=device)
        label = torch.randint(c.classes, (batch,), device=device) if c.classes else None
        return x, torch.rand(batch, dtype=torch.float64, device=device), Condition(label=label)

    def end_macs(self, layout: Layout) -> dict[str, int]:
        image = layout.span("image").length
        embed = self.x_embedder.macs(image) + cost.linears(self.t_embedder, 1)
        head: Any = self.final_layer
        macs = head.macs(image) if isinstance(head, Head) else cost.linears(head, image)
        return {"embed": embed, "head": macs}


SIZES = {"S": (24, 368), "B": (24, 768), "M": (48, 768), "L": (48, 1024), "H": (48, 1536)}
PRESETS = {
    f"DiS-{size}/{patch}": DiSConfig(depth=depth, width=width, patch=patch)
    for size, (depth, width) in SIZES.items()
    for patch in (2, 4)
}
