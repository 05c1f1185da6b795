"""DiT: Scalable Diffusion Models with Transformers (Peebles & Xie, ICCV 2023, arXiv 2212.09748)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
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
from ditloom.parts import attention, cost
from ditloom.parts.attention import SelfAttention
from ditloom.parts.attention_kinds import self_attention
from ditloom.parts.checks import check_rows
from ditloom.parts.embedders import LabelEmbedding, TimeEmbedding
from ditloom.parts.feed_forward import MLP, SwiGLU
from ditloom.parts.heads import Head
from ditloom.parts.modulation import AdaLN
from ditloom.parts.norms import LayerNorm, modulate
from ditloom.parts.patches import PatchEmbed, normal_linears_, unpatchify, xavier_linears_, xavier_patches_, zero_
from ditloom.parts.segments import Joined, check_streams, join, main_modulation, modulation
from ditloom.sites.visit import take_rows, visit


@dataclass(frozen=True, kw_only=True)
class DiTConfig(BackboneConfig):
    """Settings of a DiT. `classes=0`: unconditional. `image_size` is the native latent size; any other works too.

    `attention`: a kind of self-attention by name: softmax, diff or dint.
    `null_class` adds the row that label dropout uses. `learn_sigma` doubles the outputs: prediction, then variance.
    `frequency_shift` and `norm2_eps` are what diffusers' port does otherwise: 1, and 1e-5.
    """

    family: ClassVar[str] = "dit"
    process: ClassVar[Mapping[str, Any]] = {"name": "discrete-vp", "schedule": "linear", "predicts": "eps+var"}
    sign: ClassVar[int] = 1

    depth: int
    width: int
    heads: int
    patch: int = 2
    image_size: int = 32
    channels: int = 4
    classes: int = 1000
    null_class: bool = True
    learn_sigma: bool = True
    mlp_ratio: float = 4.0
    attention: str = "softmax"
    frequency_shift: int = 0
    norm2_eps: float = 1e-6
    time: TimeInput = DISCRETE_1000

    @property
    def out_channels(self) -> int:
        """Channels of the prediction."""
        return self.channels * (1 + self.learn_sigma)

    @property
    def condition_width(self) -> int:
        """Width of the conditioning vector c."""
        return self.width

    def build(self) -> DiT:
        return DiT(self)


class DiTBlock(Block):
    """x += g1 Attn(mod(LN x)); x += g2 MLP(mod(LN x)); shifts, scales and gates from c by adaLN-Zero."""

    sites = ("attn", "mlp")
    stages: tuple[str, ...] = ("modulated_in", *attention.STAGES, "ff_hidden")
    row_sites = ("mlp",)

    def __init__(
        self,
        width: int,
        heads: int,
        mlp_ratio: float = 4.0,
        qk_norm: str | None = None,
        norms: tuple[nn.Module, nn.Module] | None = None,
        mlp: MLP | SwiGLU | None = None,
        modulation: AdaLN | None = None,
        attn: SelfAttention | None = None,
    ):
        super().__init__()
        self.norm1, self.norm2 = norms or (LayerNorm(width), LayerNorm(width))
        self.attn = attn or SelfAttention(width, heads, qk_norm=qk_norm)
        self.mlp = mlp or MLP(width, int(width * mlp_ratio))
        self.modulation = modulation or AdaLN(width, 6)
        self.stages = ("modulated_in", *self.attn.stages, "ff_hidden")

    def forward(
        self, streams: Streams, context: Context, plan: BlockPlan | None = None, given: Mapping[str, Any] = NOTHING
    ) -> tuple[Streams, dict[str, Any]]:
        x, layout = streams["image"], streams.layout
        at = visit(plan, given, layout)
        chunks = (context.spread(m, layout) for m in self.modulation(context.modulation["image"]))
        shift1, scale1, gate1, shift2, scale2, gate2 = chunks

        enter = lambda x: at.tap("modulated_in", modulate(self.norm1(x), shift1, scale1))  # noqa: E731
        x = torch.addcmul(x, gate1, at.around("attn", lambda x: self.attn(enter(x), layout, context, at), x))
        read = lambda x: modulate(self.norm2(x), shift2, scale2)  # noqa: E731
        mlp_rows = lambda index: self.mlp(take_rows(read(x), index))  # noqa: E731
        x = torch.addcmul(x, gate2, at.around("mlp", lambda x: self.mlp(read(x), at), x, rows=mlp_rows))
        return streams.updated(image=x), at.kept

    def modulated_in(self, streams: Streams, context: Context) -> Tensor:
        shift, scale, *_ = self.modulation(context.modulation["image"])
        spread = context.spread
        return modulate(self.norm1(streams["image"]), spread(shift, streams.layout), spread(scale, streams.layout))

    def macs(self, layout: Layout) -> dict[str, int]:
        return {
            "attn": self.attn.site_macs(layout),
            "mlp": self.mlp.macs(layout.length()),
            "rest": self.modulation.macs(len(layout.groups("image"))),
        }


def _sizes(table: Mapping[str, tuple[int, int, int]], patches: Sequence[int]) -> dict[str, DiTConfig]:
    return {
        f"DiT-{size}/{p}": DiTConfig(depth=depth, width=width, heads=heads, patch=p)
        for size, (depth, width, heads) in table.items()
        for p in patches
    }


SIZES = {"S": (12, 384, 6), "B": (12, 768, 12), "L": (24, 1024, 16), "XL": (28, 1152, 16)}
PRESETS = _sizes(SIZES, (2, 4, 8))


@register("dit", paper="Scalable Diffusion Models with Transformers, arXiv 2212.09748")
class DiT(Backbone):
    """A plain ViT over latent patches, conditioned on time and class by adaLN-Zero.

    x [B, C, H, W] with H, W multiples of the patch; prediction [B, C or 2C, H, W].
    """

    missing: ClassVar[Mapping[str, str]] = {
        "cross": "DiT is conditioned through adaLN and has no cross-attention",
        "skip": "DiT has no long skips",
        "temporal": "DiT has no temporal attention",
    }

    absolute: ClassVar[bool] = True
    preset: DiTConfig

    def __init__(self, config: DiTConfig):
        super().__init__()
        self.preset = config
        width = config.condition_width
        self.x_embedder = PatchEmbed(config.patch, config.channels, config.width)
        self.t_embedder = TimeEmbedding(width, shift=config.frequency_shift)
        self.y_embedder = LabelEmbedding(config.classes, width, config.null_class) if config.classes else None
        self.blocks = nn.ModuleList(self.make_block(layer) for layer in range(config.depth))
        self.final_layer = self.make_head()
        self.initialise()

    def make_block(self, layer: int) -> Block:
        """Block `layer` of 0..depth - 1."""
        c = self.preset
        return DiTBlock(c.width, c.heads, c.mlp_ratio, norms=self.make_norms(), attn=self.make_attention(layer))

    def make_norms(self) -> tuple[nn.Module, nn.Module]:
        c = self.preset
        return LayerNorm(c.width), LayerNorm(c.width, eps=c.norm2_eps)

    def make_attention(self, layer: int, **more: Any) -> SelfAttention:
        c = self.preset
        return self_attention(c.attention, c.width, c.heads, layer, **more)

    def make_head(self) -> Head:
        return Head(self.preset.width, self.preset.patch, self.preset.out_channels)

    def initialise(self) -> None:
        """As published: xavier, N(0, 0.02) embeddings, zero modulation and output, so that the network starts at 0."""
        xavier_linears_(self)
        xavier_patches_(self.x_embedder)
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
        check_size(x, self.preset.channels, self.preset.patch, type(self).__name__)
        check_rows(x, memory.vector, "labels")
        check_streams(segments, ("image",), type(self).__name__)
        joined = join(x.to(self.dtype), self.x_embedder, segments, absolute=self.absolute)
        emb = self.t_embedder(time)
        c = modulation(emb, memory.vector, segments, lambda t: self.t_embedder(self.preset.time.native(t)))
        rotary = self.rotary(joined)
        context = Context(modulation={"image": c}, rotary={"image": rotary} if rotary else {}, time=emb)
        return Streams({"image": joined.tokens}, joined.layout), context

    def rotary(self, joined: Joined) -> tuple[Tensor, Tensor] | None:
        """The rotary table of all tokens; DiT has none."""
        return None

    def head(self, streams: Streams, context: Context) -> Tensor:
        image = streams.segment("image")
        tokens = self.final_layer(image, main_modulation(streams, context))
        return unpatchify(tokens, self.preset.patch, streams.layout.grid)

    def example(self, batch: int = 1, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor, Condition]:
        c = self.preset
        x = torch.randn(batch, c.channels, c.image_size, c.image_size, device=device)
        label = torch.randint(c.classes, (batch,), device=device) if c.classes else None
        return x, torch.rand(batch, dtype=torch.float64, device=device), Condition(label=label)

    def end_macs(self, layout: Layout) -> dict[str, int]:
        image = layout.span("image").length
        embed = self.x_embedder.macs(image) + cost.linears(self.t_embedder, 1)
        return {"embed": embed, "head": self.final_layer.macs(image)}


def settings_of(config: BackboneConfig, what: str) -> dict[str, Any]:
    """The settings of a plain DiT that another network is made of; `UserError` for a model of any other family."""
    if type(config) is not DiTConfig:
        raise UserError(f"a {what} is made of a 'dit'; this model is a {config.family!r}")
    return {f.name: getattr(config, f.name) for f in fields(config)}
