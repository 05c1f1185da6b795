"""DiT-Air: Revisiting the Efficiency of Diffusion Model Architecture Design in Text to Image Generation.

Chen et al., 2025, arXiv 2503.10618. One set of weights for text and image tokens, and one adaLN for all blocks, with a
half for either kind of token; in the Lite models all blocks share attention, or attention and feed-forward, too. Also
the MMDiT that the paper compares with, where text and image have weights of their own.

No code was released. What is shared and the widths 64 N of N blocks are the paper's (its table of parameters follows);
encoders, channels, positions and biases are a reconstruction after SD3.
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
from ditloom.contracts.errors import UnknownName, UserError
from ditloom.contracts.layout import Layout, Segment
from ditloom.contracts.plan import BlockPlan
from ditloom.contracts.registry import register
from ditloom.contracts.streams import Context, Memory, Streams
from ditloom.contracts.time import FLOW_1000, TimeInput
from ditloom.parts import attention, cost
from ditloom.parts.attention import SelfAttention
from ditloom.parts.checks import check_heads, check_pooled, check_rows, check_text
from ditloom.parts.embedders import TimeEmbedding, VectorEmbedding
from ditloom.parts.feed_forward import MLP
from ditloom.parts.heads import Head
from ditloom.parts.modulation import AdaLN
from ditloom.parts.norms import LayerNorm, modulate
from ditloom.parts.patches import PatchEmbed, normal_linears_, unpatchify, xavier_linears_, xavier_patches_, zero_
from ditloom.parts.segments import check_streams, join, main_modulation, modulation, text_stream
from ditloom.parts.single_stream import JoinStreams, PartStreams
from ditloom.parts.tying import tie
from ditloom.sites.rules import with_padding
from ditloom.sites.visit import take_rows, visit

PARTS = ("modulation", "attn", "mlp")
STREAMS = ("text", "image")
JOIN, PART = JoinStreams(), PartStreams(*STREAMS)


@dataclass(frozen=True, kw_only=True)
class DiTAirConfig(BackboneConfig):
    """Settings of a DiT-Air.

    tied: what all blocks share, of "modulation", "attn" and "mlp". dual: weights of their own for text and image, as in
    MMDiT; as the paper counts, the last block has all of them, though nothing reads the text that leaves it.
    """

    family: ClassVar[str] = "dit-air"
    process: ClassVar[Mapping[str, Any]] = {"name": "linear", "predicts": "v"}
    sign: ClassVar[int] = 1

    depth: int
    width: int
    heads: int
    patch: int = 2
    image_size: int = 64
    channels: int = 8
    text_width: int = 1280
    text_tokens: int = 77
    pooled_width: int = 1280
    mlp_ratio: float = 4.0
    tied: tuple[str, ...] = ("modulation",)
    dual: bool = False
    time: TimeInput = FLOW_1000

    def __post_init__(self) -> None:
        check_heads(self.width, self.heads)
        if self.width % 4:
            raise UserError(f"a 2-D sine-cosine table needs a width that is a multiple of 4; got {self.width}")
        for part in self.tied:
            if part not in PARTS:
                raise UnknownName("tied part", part, PARTS)

    def build(self) -> DiTAir:
        return DiTAir(self)


class DiTAirBlock(Block):
    """x += g1 Attn(mod(LN x)); x += g2 MLP(mod(LN x)) over all tokens, modulated by the half of their own kind."""

    sites = ("attn", "mlp")
    stages = ("modulated_in", *attention.STAGES, "ff_hidden")
    row_sites = ("mlp",)

    def __init__(self, width: int, heads: int, mlp_ratio: float = 4.0):
        super().__init__()
        self.norm1, self.norm2 = LayerNorm(width), LayerNorm(width)
        self.attn = SelfAttention(width, heads)
        self.mlp = MLP(width, int(width * mlp_ratio))
        self.modulation = nn.ModuleDict({stream: AdaLN(width, 6) for stream in STREAMS})

    def forward(
        self, streams: Streams, context: Context, plan: BlockPlan | None = None, given: Mapping[str, Any] = NOTHING
    ) -> tuple[Streams, dict[str, Any]]:
        x, layout = streams["image"], streams.layout
        at = visit(plan, given, layout)
        shift1, scale1, gate1, shift2, scale2, gate2 = self._chunks(context, layout)
        h = at.tap("modulated_in", modulate(self.norm1(x), shift1, scale1))
        x = torch.addcmul(x, gate1, at.around("attn", lambda h: self.attn(h, layout, context, at), h))
        h = modulate(self.norm2(x), shift2, scale2)
        mlp_rows = lambda index: self.mlp(take_rows(h, index))  # noqa: E731
        x = torch.addcmul(x, gate2, at.around("mlp", lambda h: self.mlp(h, at), h, rows=mlp_rows))
        return streams.updated(image=x), at.kept

    def _chunks(self, context: Context, layout: Layout) -> list[Tensor]:
        """The six vectors of every token [B, n, D]."""
        own = PART.after(layout)
        chunks = [
            [context.spread(v, own, s).expand(-1, own.length(s), -1) for v in self.modulation[s](context.modulation[s])]
            for s in STREAMS
        ]
        return [torch.cat(pair, dim=1) for pair in zip(*chunks, strict=True)]

    def modulated_in(self, streams: Streams, context: Context) -> Tensor:
        shift, scale, *_ = self._chunks(context, streams.layout)
        return modulate(self.norm1(streams["image"]), shift, scale)

    def macs(self, layout: Layout) -> dict[str, int]:
        own = PART.after(layout)
        return {
            "attn": self.attn.site_macs(layout),
            "mlp": self.mlp.macs(layout.length()),
            "rest": sum(cost.linears(self.modulation[s], len(own.groups(s))) for s in STREAMS),
        }


@register("dit-air", paper="DiT-Air, arXiv 2503.10618")
class DiTAir(Backbone):
    """Text and image as one sequence through the same weights; time and a pooled text vector modulate it.

    x [B, C, H, W] with H, W multiples of the patch; prediction [B, C, H, W]. What blocks share is held by `shared`.
    """

    missing: ClassVar[Mapping[str, str]] = {
        "cross": "DiT-Air reads text in its joint attention and has no cross-attention",
        "skip": "DiT-Air has no long skips",
        "temporal": "DiT-Air has no temporal attention",
    }
    preset: DiTAirConfig

    def __init__(self, config: DiTAirConfig):
        super().__init__()
        self.preset = config
        width = config.width
        self.x_embedder = PatchEmbed(config.patch, config.channels, width)
        self.t_embedder = TimeEmbedding(width)
        self.pooled_embedder = VectorEmbedding(config.pooled_width, width)
        self.text_embedder = nn.Linear(config.text_width, width)
        self.blocks = nn.ModuleList(self._blocks())
        self.shared = nn.ModuleDict(self._tied())
        self.final_layer = Head(width, config.patch, config.channels)
        self.initialise()

    @property
    def unread(self) -> bool:
        return self.preset.dual  # the text that leaves the last block

    def _blocks(self) -> list[nn.Module]:
        c = self.preset
        if c.dual:
            return [MMDiTBlock(c.width, c.heads, c.mlp_ratio) for _ in range(c.depth)]
        return [DiTAirBlock(c.width, c.heads, c.mlp_ratio) for _ in range(c.depth)]

    def _tied(self) -> dict[str, nn.Module]:
        """What was each block's own and is now lent to all."""
        paths = [f"{s}.{p}" if self.preset.dual else p for p in self.preset.tied for s in STREAMS]
        return {path.replace(".", "_"): tie(list(self.blocks), path) for path in dict.fromkeys(paths)}

    def initialise(self) -> None:
        """adaLN-Zero as in DiT: output 0, every block the identity."""
        xavier_linears_(self)
        xavier_patches_(self.x_embedder)
        normal_linears_(self.t_embedder)
        normal_linears_(self.pooled_embedder)
        zero_(*(m for m in self.modules() if isinstance(m, AdaLN)), self.final_layer.linear)

    def prepare(self, condition: Condition) -> Memory:
        c = self.preset
        text = check_text(condition.text, condition.text_mask, c.text_width, "DiT-Air")
        pooled = self.pooled_embedder(check_pooled(condition.pooled, c.pooled_width, "DiT-Air"))
        return Memory(vector=pooled, text=self.text_embedder(text.to(self.dtype)), text_mask=condition.text_mask)

    def embed(
        self, x: Tensor, time: Tensor, memory: Memory, segments: Sequence[Segment] = ()
    ) -> tuple[Streams, Context]:
        check_size(x, self.preset.channels, self.preset.patch, "DiT-Air")
        check_rows(x, memory.text, "text")
        check_rows(x, memory.vector, "pooled vector")
        check_streams(segments, STREAMS, "DiT-Air")
        joined = join(x.to(self.dtype), self.x_embedder, segments)
        text, spans = text_stream(memory, segments, self.dtype)
        layout = Layout((*spans, *joined.layout.spans), joined.layout.grid)
        emb = self.t_embedder(time)
        embed_time = lambda t: self.t_embedder(self.preset.time.native(t))  # noqa: E731
        text_emb = self.t_embedder(time.mean(1)) if time.ndim == 2 else emb
        c = {
            "text": modulation(text_emb, memory.vector, segments, embed_time, "text"),
            "image": modulation(emb, memory.vector, segments, embed_time),
        }
        context = Context(modulation=c, time=emb)
        streams = Streams({"text": text, "image": joined.tokens}, layout)
        if not self.preset.dual:
            streams, _ = JOIN(streams, context)
        return streams, with_padding(context, streams.layout, memory.text_mask)

    def head(self, streams: Streams, context: Context) -> Tensor:
        if not self.preset.dual:
            streams, _ = PART(streams, context)
        tokens = self.final_layer(streams.segment("image"), main_modulation(streams, context))
        return unpatchify(tokens, self.preset.patch, streams.layout.grid)

    def example(self, batch: int = 1, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor, Condition]:
        c = self.preset
        x = torch.randn(batch, c.channels, c.image_size, c.image_size, device=device)
        text = torch.randn(batch, c.text_tokens, c.text_width, device=device)
        pooled = torch.randn(batch, c.pooled_width, device=device)
        return x, torch.rand(batch, dtype=torch.float64, device=device), Condition(text=text, pooled=pooled)

    def end_macs(self, layout: Layout) -> dict[str, int]:
        image = layout.span("image").length
        prepare = cost.linear(self.text_embedder, layout.span("text").length) + cost.linears(self.pooled_embedder, 1)
        return {
            "prepare": prepare,
            "embed": self.x_embedder.macs(image),
            "time": cost.linears(self.t_embedder, 1),
            "head": self.final_layer.macs(image),
        }


def _air(depth: int, *tied: str, **more: Any) -> DiTAirConfig:
    """N blocks of width 64 N with N heads."""
    return DiTAirConfig(depth=depth, width=64 * depth, heads=depth, tied=("modulation", *tied), **more)


PRESETS = {
    "DiT-Air/B": _air(18),
    "DiT-Air/B-lite-attention": _air(18, "attn"),
    "DiT-Air/B-lite-full": _air(18, "attn", "mlp"),
    "MMDiT/B": DiTAirConfig(depth=18, width=1152, heads=18, tied=(), dual=True),
    "MMDiT/B-shared-AdaLN": _air(18, dual=True),
}
