"""MMDiT: Scaling Rectified Flow Transformers for High-Resolution Image Synthesis (Esser et al., ICML 2024, 2403.03206).

The network of Stable Diffusion 3 and 3.5: image and text are two streams with weights of their own, which meet in one
softmax. The joint order is image, then text.
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
from ditloom.contracts.layout import Layout, Segment
from ditloom.contracts.plan import BlockPlan
from ditloom.contracts.registry import register
from ditloom.contracts.streams import Context, Memory, Streams
from ditloom.contracts.time import FLOW_1000, TimeInput
from ditloom.parts import attention, cost
from ditloom.parts.checks import check_pooled, check_rows, check_text
from ditloom.parts.embedders import TimeEmbedding, VectorEmbedding
from ditloom.parts.feed_forward import MLP
from ditloom.parts.heads import Head
from ditloom.parts.joint import joint_attention, joint_macs, within
from ditloom.parts.modulation import AdaLN
from ditloom.parts.norms import LayerNorm, modulate
from ditloom.parts.patches import PatchEmbed, normal_linears_, unpatchify, xavier_linears_, xavier_patches_, zero_
from ditloom.parts.segments import check_streams, join, main_modulation, modulation, text_stream
from ditloom.parts.tables import CroppedTable
from ditloom.sites.rules import with_paddings
from ditloom.sites.visit import BareVisit, Visit, take_rows, visit


@dataclass(frozen=True, kw_only=True)
class MMDiTConfig(BackboneConfig):
    """Settings of an MMDiT.

    text_width, pooled_width: of the token states and of the pooled vector (0: none). text_tokens: of an example.
    qk_norm: "rms" or None, per head. dual: indices of the blocks with a second attention among image tokens only.
    table, table_span: side of the frozen position table in tokens, and up to which coordinate it runs.
    """

    family: ClassVar[str] = "mmdit"
    process: ClassVar[Mapping[str, Any]] = {"name": "linear", "predicts": "v"}
    sign: ClassVar[int] = 1

    depth: int
    width: int
    heads: int
    patch: int = 2
    image_size: int = 128
    channels: int = 16
    text_width: int = 4096
    text_tokens: int = 333
    pooled_width: int = 2048
    qk_norm: str | None = None
    dual: tuple[int, ...] = ()
    table: int = 192
    table_span: int = 64
    mlp_ratio: float = 4.0
    time: TimeInput = FLOW_1000

    def __post_init__(self) -> None:
        if any(not 0 <= i < self.depth - 1 for i in self.dual):
            raise UserError(f"dual attention is possible in blocks 0..{self.depth - 2}; got {list(self.dual)}")

    def build(self) -> MMDiT:
        return MMDiT(self)


class Side(nn.Module):
    """One stream's weights in a block: norms, attention projections, feed-forward, and `chunks` modulation vectors."""

    def __init__(self, width: int, heads: int, mlp_ratio: float, qk_norm: str | None, chunks: int = 6, mlp: Any = None):
        super().__init__()
        self.norm1, self.norm2 = LayerNorm(width), LayerNorm(width)
        self.attn = attention.Projections(width, heads, qk_norm=qk_norm)
        self.mlp = mlp or MLP(width, int(width * mlp_ratio))
        self.modulation = AdaLN(width, chunks)


class KeySide(nn.Module):
    """The text stream's weights in the last block: queries, keys and values only; its tokens end here."""

    def __init__(self, width: int, heads: int, qk_norm: str | None):
        super().__init__()
        self.norm1 = LayerNorm(width)
        self.attn = attention.Projections(width, heads, qk_norm=qk_norm, project_out=False)
        self.modulation = AdaLN(width, 2)


class MMDiTBlock(Block):
    """Per stream x += g1 Attn(mod(LN x)); x += g2 MLP(mod(LN x)), with one attention over both streams.

    The site "attn" passes a dict by stream; "mlp" the image's tokens; "mlp_text" the text's. `mlps` may give other
    feed-forwards by stream.
    """

    sites: ClassVar[tuple[str, ...]] = ("attn", "mlp", "mlp_text")
    stages = ("modulated_in", *attention.STAGES, "ff_hidden")
    row_sites = ("mlp",)
    image_chunks: ClassVar[int] = 6
    returned: ClassVar[tuple[str, ...]] = ("image", "text")
    text: Any  # a Side; a KeySide in the last block

    def __init__(
        self,
        width: int,
        heads: int,
        mlp_ratio: float = 4.0,
        qk_norm: str | None = None,
        mlps: Mapping[str, Any] = NOTHING,
    ):
        super().__init__()
        self.image = Side(width, heads, mlp_ratio, qk_norm, self.image_chunks, mlps.get("image"))
        self.text = self.make_text(width, heads, mlp_ratio, qk_norm, mlps.get("text"))

    def make_text(
        self, width: int, heads: int, mlp_ratio: float, qk_norm: str | None, mlp: Any = None
    ) -> Side | KeySide:
        return Side(width, heads, mlp_ratio, qk_norm, mlp=mlp)

    def forward(
        self, streams: Streams, context: Context, plan: BlockPlan | None = None, given: Mapping[str, Any] = NOTHING
    ) -> tuple[Streams, dict[str, Any]]:
        x, y, layout = streams["image"], streams["text"], streams.layout
        at = visit(plan, given, layout)
        mx, my = (self._chunks(s, context, layout) for s in ("image", "text"))
        h = {
            "image": at.tap("modulated_in", modulate(self.image.norm1(x), mx[0], mx[1])),
            "text": at.tap("modulated_in", modulate(self.text.norm1(y), my[0], my[1]), "text"),
        }
        sides = {"image": self.image.attn, "text": self.text.attn}
        out = at.around("attn", lambda h: joint_attention(sides, h, layout, context, at, self.returned), h)
        x = self.second_attention(torch.addcmul(x, mx[2], out["image"]), x, mx, layout, context, at)
        x = self._image_mlp(x, mx, at)
        return streams.updated(image=x, text=self.text_update(y, out, my, at)), at.kept

    def _chunks(self, stream: str, context: Context, layout: Layout) -> list[Tensor]:
        values = getattr(self, stream).modulation(context.modulation[stream])
        return [context.spread(v, layout, stream) for v in values]

    def second_attention(
        self, x: Tensor, entered: Tensor, m: list[Tensor], layout: Layout, context: Context, at: Visit | BareVisit
    ) -> Tensor:
        """x after a further attention, for blocks that have one; `entered` is the block's input."""
        return x

    def _image_mlp(self, x: Tensor, m: list[Tensor], at: Visit | BareVisit) -> Tensor:
        h = modulate(self.image.norm2(x), m[3], m[4])
        mlp_rows = lambda index: self.image.mlp(take_rows(h, index))  # noqa: E731
        return torch.addcmul(x, m[5], at.around("mlp", lambda h: self.image.mlp(h, at), h, rows=mlp_rows))

    def text_update(self, y: Tensor, out: Mapping[str, Tensor], m: list[Tensor], at: Visit | BareVisit) -> Tensor:
        """The text tokens after attention and feed-forward."""
        y = torch.addcmul(y, m[2], out["text"])
        h = modulate(self.text.norm2(y), m[3], m[4])
        return torch.addcmul(y, m[5], at.around("mlp_text", lambda h: self.text.mlp(h, at, "text"), h))

    def modulated_in(self, streams: Streams, context: Context) -> Tensor:
        shift, scale, *_ = self._chunks("image", context, streams.layout)
        return modulate(self.image.norm1(streams["image"]), shift, scale)

    def modulated_in_macs(self, layout: Layout) -> int:
        return self.image.modulation.macs(len(layout.groups("image")))

    def macs(self, layout: Layout) -> dict[str, int]:
        sides = {"image": self.image, "text": self.text}
        costs = {
            "attn": joint_macs({s: side.attn for s, side in sides.items()}, layout),
            "mlp": self.image.mlp.macs(layout.length("image")),
            "rest": sum(side.modulation.macs(len(layout.groups(s))) for s, side in sides.items()),
        }
        if isinstance(self.text, Side):
            costs["mlp_text"] = self.text.mlp.macs(layout.length("text"))
        return costs


class DualMMDiTBlock(MMDiTBlock):
    """With a second attention among the image tokens (SD3.5-medium).

    It is fed by the same norm with a shift, scale and gate of its own. Stages (q_proj, ...) and appended keys belong to
    the joint attention; the second one is the site "attn2".
    """

    sites = ("attn", "attn2", "mlp", "mlp_text")
    image_chunks = 9

    def __init__(self, width: int, heads: int, mlp_ratio: float = 4.0, qk_norm: str | None = None):
        super().__init__(width, heads, mlp_ratio, qk_norm)
        self.attn2 = attention.Projections(width, heads, qk_norm=qk_norm)

    def second_attention(
        self, x: Tensor, entered: Tensor, m: list[Tensor], layout: Layout, context: Context, at: Visit | BareVisit
    ) -> Tensor:
        h = modulate(self.image.norm1(entered), m[6], m[7])
        alone, inner = image_only(layout), within(context, layout, "image")

        def attend(h: Tensor) -> Tensor:
            return joint_attention({"image": self.attn2}, {"image": h}, alone, inner)["image"]

        return torch.addcmul(x, m[8], at.around("attn2", attend, h))

    def macs(self, layout: Layout) -> dict[str, int]:
        return {**super().macs(layout), "attn2": joint_macs({"image": self.attn2}, image_only(layout))}


class LastMMDiTBlock(MMDiTBlock):
    """The text is only attended to: its tokens leave unchanged, and "attn" returns the image's alone."""

    sites = ("attn", "mlp")
    returned = ("image",)

    def make_text(self, width: int, heads: int, mlp_ratio: float, qk_norm: str | None, mlp: Any = None) -> KeySide:
        return KeySide(width, heads, qk_norm)

    def text_update(self, y: Tensor, out: Mapping[str, Tensor], m: list[Tensor], at: Visit | BareVisit) -> Tensor:
        return y


def image_only(layout: Layout) -> Layout:
    """The layout of the image stream by itself."""
    return replace(layout, spans=layout.of("image"))


@register("mmdit", paper="Scaling Rectified Flow Transformers for High-Resolution Image Synthesis, arXiv 2403.03206")
class MMDiT(Backbone):
    """Two streams, image and text, joined in every attention; time and a pooled text vector modulate both.

    x [B, C, H, W] with H, W multiples of the patch and at most `table` patches; prediction [B, C, H, W].
    """

    missing: ClassVar[Mapping[str, str]] = {
        "cross": "MMDiT reads text in its joint attention and has no cross-attention",
        "skip": "MMDiT has no long skips",
        "temporal": "MMDiT has no temporal attention",
    }
    title: ClassVar[str] = "MMDiT"
    preset: MMDiTConfig

    def __init__(self, config: MMDiTConfig):
        super().__init__()
        self.preset = config
        width = config.width
        self.x_embedder = PatchEmbed(config.patch, config.channels, width)
        self.pos_embed = CroppedTable(config.table, config.table_span, width)
        self.t_embedder = TimeEmbedding(width)
        self.pooled_embedder = VectorEmbedding(config.pooled_width, width) if config.pooled_width else None
        self.text_embedder = nn.Linear(config.text_width, width)
        self.blocks = nn.ModuleList(
            self._kind(i)(width, config.heads, config.mlp_ratio, config.qk_norm) for i in range(config.depth)
        )
        self.final_layer = Head(width, config.patch, config.channels)
        self.initialise()

    def _kind(self, index: int) -> type[MMDiTBlock]:
        if index == self.preset.depth - 1:
            return LastMMDiTBlock
        return DualMMDiTBlock if index in self.preset.dual else MMDiTBlock

    def initialise(self) -> None:
        """adaLN-Zero as in DiT, for the releases carry no initialiser: output 0, every block the identity."""
        xavier_linears_(self)
        xavier_patches_(self.x_embedder)
        normal_linears_(self.t_embedder)
        if self.pooled_embedder is not None:
            normal_linears_(self.pooled_embedder)
        zero_(*(m for m in self.modules() if isinstance(m, AdaLN)), self.final_layer.linear)

    def prepare(self, condition: Condition) -> Memory:
        c = self.preset
        text = check_text(condition.text, condition.text_mask, c.text_width, self.title)
        pooled = None
        if self.pooled_embedder is not None:
            pooled = self.pooled_embedder(check_pooled(condition.pooled, c.pooled_width, self.title))
        return Memory(vector=pooled, text=self.text_embedder(text.to(self.dtype)), text_mask=condition.text_mask)

    def embed(
        self, x: Tensor, time: Tensor, memory: Memory, segments: Sequence[Segment] = ()
    ) -> tuple[Streams, Context]:
        check_size(x, self.preset.channels, self.preset.patch, self.title)
        check_rows(x, memory.text, "text")
        check_rows(x, memory.vector, "pooled vector")
        check_streams(segments, ("image", "text"), self.title)
        emb = self.t_embedder(time)
        embed_time = lambda t: self.t_embedder(self.preset.time.native(t))  # noqa: E731
        text_emb = self.t_embedder(time.mean(1)) if time.ndim == 2 else emb
        memory, more = self.refine(memory, text_emb)
        segments = (*more, *segments)
        joined = join(x.to(self.dtype), self.x_embedder, segments, absolute=self.pos_embed)
        text, spans = text_stream(memory, segments, self.dtype)
        layout = joined.layout.with_spans(*spans)
        c = {
            "image": modulation(emb, memory.vector, segments, embed_time),
            "text": modulation(text_emb, memory.vector, segments, embed_time, "text"),
        }
        context = with_paddings(Context(modulation=c, time=emb), layout, self.masks(memory))
        return Streams({"image": joined.tokens, "text": text}, layout), context

    def refine(self, memory: Memory, time: Tensor) -> tuple[Memory, Sequence[Segment]]:
        """The text as blocks get it at this time [B, D], and further segments of text; MMDiT leaves it as it is."""
        return memory, ()

    def masks(self, memory: Memory) -> dict[str, Tensor | None]:
        """The padding masks [B, n] of segments, by name."""
        return {"text": memory.text_mask}

    def head(self, streams: Streams, context: Context) -> Tensor:
        tokens = self.final_layer(streams.segment("image"), main_modulation(streams, context))
        return unpatchify(tokens, self.preset.patch, streams.layout.grid)

    def example(self, batch: int = 1, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor, Condition]:
        c = self.preset
        x = torch.randn(batch, c.channels, c.image_size, c.image_size, device=device)
        text = torch.randn(batch, c.text_tokens, c.text_width, device=device)
        pooled = torch.randn(batch, c.pooled_width, device=device) if c.pooled_width else None
        return x, torch.rand(batch, dtype=torch.float64, device=device), Condition(text=text, pooled=pooled)

    def end_macs(self, layout: Layout) -> dict[str, int]:
        image = layout.span("image").length
        embed = self.x_embedder.macs(image) + cost.linears(self.t_embedder, 1)
        embed += cost.linear(self.text_embedder, layout.span("text").length)
        if self.pooled_embedder is not None:
            embed += cost.linears(self.pooled_embedder, 1)
        return {"embed": embed, "head": self.final_layer.macs(image)}


def _sd3(depth: int, **more: Any) -> MMDiTConfig:
    return MMDiTConfig(depth=depth, width=64 * depth, heads=depth, **more)


def _small(depth: int, width: int, patch: int) -> MMDiTConfig:
    """For 64 to 256 image tokens and sentences of MiniLM (384 numbers per token and as the pooled vector)."""
    return MMDiTConfig(
        depth=depth,
        width=width,
        heads=width // 32,
        patch=patch,
        image_size=8 * patch,
        text_width=384,
        text_tokens=16,
        pooled_width=384,
        qk_norm="rms",
        table=32,
        table_span=32,
    )


SMALL = {"XXS": (8, 128), "XS": (8, 192), "S": (10, 256), "M": (12, 384)}
PRESETS = {
    "SD3-medium": _sd3(24),
    "SD3.5-medium": _sd3(24, qk_norm="rms", dual=tuple(range(13)), table=384),
    "SD3.5-large": _sd3(38, qk_norm="rms"),
    **{f"MMDiT-{name}/{p}": _small(*shape, p) for name, shape in SMALL.items() for p in (1, 2)},
}
