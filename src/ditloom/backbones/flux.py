"""FLUX.1 (Black Forest Labs, 2024): an MMDiT whose later blocks run text and image through the same weights.

Double blocks are MMDiT's, with QK-norm and rotary positions of three axes (0, row, column), the text standing at the
origin. Single blocks run attention and feed-forward side by side. The joint order is text, then image.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ditloom.backbones.mmdit import MMDiTBlock
from ditloom.contracts.backbone import NOTHING, Backbone, BackboneConfig, Block, check_size
from ditloom.contracts.condition import Condition
from ditloom.contracts.layout import Layout, Segment
from ditloom.contracts.plan import BlockPlan
from ditloom.contracts.registry import register
from ditloom.contracts.streams import Context, Memory, Streams
from ditloom.contracts.time import FLOW, TimeInput
from ditloom.parts import attention, cost
from ditloom.parts.checks import check_guidance, check_heads, check_pooled, check_rows, check_text
from ditloom.parts.embedders import TimeEmbedding, VectorEmbedding
from ditloom.parts.feed_forward import MLP
from ditloom.parts.heads import Head
from ditloom.parts.modulation import AdaLN
from ditloom.parts.norms import LayerNorm, modulate
from ditloom.parts.patches import PatchEmbed, normal_linears_, unpack, xavier_linears_, xavier_patches_, zero_
from ditloom.parts.positions import check_axes, rotary, rotary_grid
from ditloom.parts.segments import Joined, check_streams, join, main_modulation, modulation, text_stream
from ditloom.parts.single_stream import JOINT, JoinStreams, PartStreams, joined_modulation, joined_rotary
from ditloom.sites.rules import with_padding
from ditloom.sites.visit import take_rows, visit


@dataclass(frozen=True, kw_only=True)
class FluxConfig(BackboneConfig):
    """Settings of a FLUX.

    depth, single_depth: double and single blocks. axes: features of a head that each position axis rotates.
    guidance: for a guidance-distilled model the scale that it is told unless Condition.extra["guidance"] [B] is given;
    None for a model without that input.
    """

    family: ClassVar[str] = "flux"
    process: ClassVar[Mapping[str, Any]] = {"name": "linear", "predicts": "v"}
    sign: ClassVar[int] = 1

    depth: int = 19
    single_depth: int = 38
    width: int = 3072
    heads: int = 24
    patch: int = 2
    image_size: int = 128
    channels: int = 16
    text_width: int = 4096
    text_tokens: int = 512
    pooled_width: int = 768
    guidance: float | None = None
    axes: tuple[int, ...] = (16, 56, 56)
    theta: float = 10000.0
    mlp_ratio: float = 4.0
    time: TimeInput = FLOW

    def __post_init__(self) -> None:
        check_heads(self.width, self.heads)
        check_axes(self.axes, self.width // self.heads)

    def build(self) -> Flux:
        return Flux(self)


class FluxSingleBlock(Block):
    """h = mod(LN x); x += g (Attn(h) + MLP(h)), over text and image tokens alike.

    The published projection of the two concatenated branches is a sum of two, here each branch's own, so that both
    sites are the outputs before the gate. Its one bias is the attention's.
    """

    sites = ("attn", "mlp")
    stages = ("modulated_in", *attention.STAGES, "ff_hidden")
    row_sites = ("mlp",)

    def __init__(self, width: int, heads: int, mlp_ratio: float = 4.0, mlp: Any = None):
        super().__init__()
        self.norm = LayerNorm(width)
        self.attn = attention.Projections(width, heads, qk_norm="rms")
        self.mlp = mlp or MLP(width, int(width * mlp_ratio), out_bias=False)
        self.modulation = AdaLN(width, 3)

    def forward(
        self, streams: Streams, context: Context, plan: BlockPlan | None = None, given: Mapping[str, Any] = NOTHING
    ) -> tuple[Streams, dict[str, Any]]:
        x, layout = streams["image"], streams.layout
        at = visit(plan, given, layout)
        shift, scale, gate = self._chunks(context, layout)
        h = at.tap("modulated_in", modulate(self.norm(x), shift, scale))

        def attend(h: Tensor) -> Tensor:
            q, k, v = self.attn.heads_of(h, context.rotary[JOINT], at)
            return self.attn.out(attention.attend(q, k, v, layout, context.rule, context.gates, at), at)

        attended = at.around("attn", attend, h)
        fed = at.around("mlp", lambda h: self.mlp(h, at), h, rows=lambda index: self.mlp(take_rows(h, index)))
        return streams.updated(image=torch.addcmul(x, gate, attended + fed)), at.kept

    def _chunks(self, context: Context, layout: Layout) -> list[Tensor]:
        return [context.spread(v, layout) for v in self.modulation(context.modulation[JOINT])]

    def modulated_in(self, streams: Streams, context: Context) -> Tensor:
        shift, scale, _ = self._chunks(context, streams.layout)
        return modulate(self.norm(streams["image"]), shift, scale)

    def macs(self, layout: Layout) -> dict[str, int]:
        n, width = layout.length("image"), self.attn.qkv.in_features
        return {
            "attn": self.attn.macs(n) + cost.attention(n, n, width),
            "mlp": self.mlp.macs(n),
            "rest": self.modulation.macs(len(layout.groups("image"))),
        }


@register("flux", paper="FLUX.1, Black Forest Labs, 2024")
class Flux(Backbone):
    """Double blocks over two streams, then single blocks over one; time, pooled text and guidance modulate all.

    x [B, C, H, W] with H, W multiples of the patch; prediction [B, C, H, W]. After the single blocks text and image
    are parted again, so that a whole stack ends in the layout in which it begins.
    """

    missing: ClassVar[Mapping[str, str]] = {
        "cross": "FLUX reads text in its joint attention and has no cross-attention",
        "skip": "FLUX has no long skips",
        "temporal": "FLUX has no temporal attention",
    }
    preset: FluxConfig

    def __init__(self, config: FluxConfig):
        super().__init__()
        self.preset = config
        width = config.width
        self.x_embedder = PatchEmbed(config.patch, config.channels, width)
        self.t_embedder = TimeEmbedding(width, factor=1000.0)
        self.pooled_embedder = VectorEmbedding(config.pooled_width, width)
        self.guidance_embedder = TimeEmbedding(width, factor=1000.0) if config.guidance is not None else None
        self.text_embedder = nn.Linear(config.text_width, width)
        doubles = [self.make_double(i) for i in range(config.depth)]
        singles = [self.make_single(i) for i in range(config.single_depth)]
        self.blocks = nn.ModuleList([*doubles, JoinStreams(), *singles, PartStreams("text", "image")])
        self.final_layer = Head(width, config.patch, config.channels)
        self.initialise()

    def make_double(self, index: int) -> Block:
        """Double block `index`."""
        c = self.preset
        return MMDiTBlock(c.width, c.heads, c.mlp_ratio, "rms")

    def make_single(self, index: int) -> Block:
        """Single block `index`."""
        c = self.preset
        return FluxSingleBlock(c.width, c.heads, c.mlp_ratio)

    def initialise(self) -> None:
        """adaLN-Zero as in DiT, for the releases carry no initialiser: output 0, every block the identity."""
        xavier_linears_(self)
        xavier_patches_(self.x_embedder)
        for embedder in (self.t_embedder, self.pooled_embedder, self.guidance_embedder):
            if embedder is not None:
                normal_linears_(embedder)
        zero_(*(m for m in self.modules() if isinstance(m, AdaLN)), self.final_layer.linear)

    def prepare(self, condition: Condition) -> Memory:
        c = self.preset
        text = check_text(condition.text, condition.text_mask, c.text_width, "FLUX")
        pooled = check_pooled(condition.pooled, c.pooled_width, "FLUX")
        vector = self.pooled_embedder(pooled)
        guidance = check_guidance(condition.extra.get("guidance"), c.guidance, pooled, "FLUX")
        if self.guidance_embedder is not None:
            assert guidance is not None
            vector = vector + self.guidance_embedder(guidance)
        return Memory(vector=vector, text=self.text_embedder(text.to(self.dtype)), text_mask=condition.text_mask)

    def embed(
        self, x: Tensor, time: Tensor, memory: Memory, segments: Sequence[Segment] = ()
    ) -> tuple[Streams, Context]:
        check_size(x, self.preset.channels, self.preset.patch, "FLUX")
        check_rows(x, memory.text, "text")
        check_rows(x, memory.vector, "pooled vector")
        check_streams(segments, ("image", "text"), "FLUX")
        joined = join(x.to(self.dtype), self.x_embedder, segments, absolute=False, axes=len(self.preset.axes))
        text, spans = text_stream(memory, segments, self.dtype)
        layout = Layout((*spans, *joined.layout.spans), joined.layout.grid)
        emb = self.t_embedder(time)
        embed_time = lambda t: self.t_embedder(self.preset.time.native(t))  # noqa: E731
        text_emb = self.t_embedder(time.mean(1)) if time.ndim == 2 else emb
        c = {
            "text": modulation(text_emb, memory.vector, segments, embed_time, "text"),
            "image": modulation(emb, memory.vector, segments, embed_time),
        }
        tables = {"image": self.rotary(joined)}
        context = Context(
            modulation={**c, JOINT: joined_modulation(c, layout)},
            rotary={**tables, JOINT: joined_rotary(tables, layout)},
            time=emb,
        )
        return Streams({"text": text, "image": joined.tokens}, layout), with_padding(context, layout, memory.text_mask)

    def rotary(self, joined: Joined) -> tuple[Tensor, Tensor]:
        """The rotary table of the image's stream, at (0, row, column)."""
        c, device = self.preset, joined.tokens.device
        if len(joined.layout.spans) == 1:
            return rotary_grid(*joined.layout.grid, axes=c.axes, theta=c.theta, device=device)
        cos, sin = rotary(joined.positions, c.axes, c.theta)
        return cos.to(device), sin.to(device)

    def head(self, streams: Streams, context: Context) -> Tensor:
        tokens = self.final_layer(streams.segment("image"), main_modulation(streams, context))
        return unpack(tokens, self.preset.patch, streams.layout.grid)

    def example(self, batch: int = 1, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor, Condition]:
        c = self.preset
        x = torch.randn(batch, c.channels, c.image_size, c.image_size, device=device)
        text = torch.randn(batch, c.text_tokens, c.text_width, device=device)
        pooled = torch.randn(batch, c.pooled_width, device=device)
        extra = {} if c.guidance is None else {"guidance": c.guidance + torch.arange(batch, device=device)}
        t = torch.rand(batch, dtype=torch.float64, device=device)
        return x, t, Condition(text=text, pooled=pooled, extra=extra)

    def end_macs(self, layout: Layout) -> dict[str, int]:
        image = layout.span("image").length
        vectors = [m for m in (self.pooled_embedder, self.guidance_embedder) if m is not None]
        prepare = cost.linear(self.text_embedder, layout.span("text").length)
        return {
            "prepare": prepare + sum(cost.linears(m, 1) for m in vectors),
            "embed": self.x_embedder.macs(image),
            "time": cost.linears(self.t_embedder, 1),
            "head": self.final_layer.macs(image),
        }


PRESETS = {
    "FLUX.1-dev": FluxConfig(guidance=3.5),
    "FLUX.1-schnell": FluxConfig(text_tokens=256),
}
