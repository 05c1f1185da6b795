"""DDT: Decoupled Diffusion Transformer (Wang et al., arXiv 2504.05741).

An encoder reads the noisy tokens and leaves a state per token; a short head sees the noisy tokens again, each modulated
by its own state. The state changes little from step to step: a run may keep the range of the encoder's blocks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ditloom.backbones.dit import DiTBlock
from ditloom.contracts.backbone import NOTHING, Backbone, BackboneConfig, Block, check_size
from ditloom.contracts.condition import Condition
from ditloom.contracts.errors import UserError
from ditloom.contracts.layout import Layout, Segment
from ditloom.contracts.plan import BlockPlan
from ditloom.contracts.registry import register
from ditloom.contracts.streams import Context, Memory, Streams
from ditloom.contracts.time import REVERSED, TimeInput
from ditloom.parts import cost
from ditloom.parts.attention import SelfAttention
from ditloom.parts.checks import check_rows
from ditloom.parts.embedders import LabelEmbedding, TimeEmbedding
from ditloom.parts.feed_forward import SwiGLU
from ditloom.parts.heads import Head
from ditloom.parts.modulation import AdaLN, LinearAdaLN
from ditloom.parts.norms import norm
from ditloom.parts.patches import PatchEmbed, normal_linears_, unpack, xavier_patches_, zero_
from ditloom.parts.positions import axial_axes, interleaved, rotary
from ditloom.parts.segments import Joined, check_streams, join, modulation

EXTENT = 16.0


@dataclass(frozen=True, kw_only=True)
class DDTConfig(BackboneConfig):
    """Settings of a DDT: `depth` encoder blocks and `head_depth` head blocks of one width.

    `image_size` is the native latent size; any other works too, since rotary positions span the same extent.
    Released weights predict the velocity towards the data, x0 - noise; `sign` turns it into noise - x0.
    """

    family: ClassVar[str] = "ddt"
    process: ClassVar[Mapping[str, Any]] = {"name": "linear", "predicts": "v"}
    sign: ClassVar[int] = -1

    depth: int
    head_depth: int
    width: int
    heads: int
    patch: int = 2
    image_size: int = 32
    channels: int = 4
    classes: int = 1000
    null_class: bool = True
    mlp_ratio: float = 4.0
    theta: float = 10000.0
    time: TimeInput = REVERSED

    def __post_init__(self) -> None:
        if min(self.depth, self.head_depth) < 1:
            raise UserError(f"encoder and head need a block each; got {self.depth} and {self.head_depth}")

    @property
    def head_size(self) -> tuple[int, int]:
        """(width, heads) of the head."""
        return self.width, self.heads

    def build(self) -> DDT:
        return DDT(self)


class LastEncoderBlock(DiTBlock):
    """The encoder's last block: what leaves it is the state, SiLU(time + x)."""

    def forward(
        self, streams: Streams, context: Context, plan: BlockPlan | None = None, given: Mapping[str, Any] = NOTHING
    ) -> tuple[Streams, dict[str, Any]]:
        out, kept = super().forward(streams, context, plan, given)
        time = context.spread(context.shared["time"], out.layout)
        return out.updated(image=F.silu(time + out["image"])), kept


class HeadBlock(DiTBlock):
    """A DiT block on the noisy tokens whose shifts, scales and gates come from the state: others for every token."""

    def forward(
        self, streams: Streams, context: Context, plan: BlockPlan | None = None, given: Mapping[str, Any] = NOTHING
    ) -> tuple[Streams, dict[str, Any]]:
        return super().forward(*self.inside(streams, context), plan, given)

    def modulated_in(self, streams: Streams, context: Context) -> Tensor:
        return super().modulated_in(*self.inside(streams, context))

    def inside(self, streams: Streams, context: Context) -> tuple[Streams, Context]:
        """What its DiT block reads."""
        rotary = {"image": context.rotary["head"]}
        return streams, replace(context, modulation={"image": streams["state"]}, rotary=rotary)

    def macs(self, layout: Layout) -> dict[str, int]:
        return {**super().macs(layout), "rest": self.modulation.macs(layout.length())}


class FirstHeadBlock(HeadBlock):
    """The same; its stream is the state, which from here on rides beside the noisy tokens (`project`: to its width)."""

    def __init__(self, width: int, heads: int, project: nn.Module, **parts: Any):
        super().__init__(width, heads, **parts)
        self.project = project

    def inside(self, streams: Streams, context: Context) -> tuple[Streams, Context]:
        tokens = {"image": context.shared["noisy"], "state": self.project(streams["image"])}
        return super().inside(Streams(tokens, self.after(streams.layout)), context)

    def macs(self, layout: Layout) -> dict[str, int]:
        costs, n = super().macs(layout), layout.length()
        return {**costs, "rest": costs["rest"] + cost.linears(self.project, n)}

    def after(self, layout: Layout) -> Layout:
        return replace(layout, reads=(("state", layout.length()),))


class TokenHead(Head):
    """linear(mod(norm x)) with a shift and a scale for every token."""

    def __init__(self, width: int, patch: int, out_channels: int, norm: nn.Module | None, modulation: AdaLN):
        super().__init__(width, patch, out_channels, norm)
        self.modulation = modulation

    def macs(self, tokens: int) -> int:
        return cost.linear(self.linear, tokens) + self.modulation.macs(tokens)


@register("ddt", paper="DDT: Decoupled Diffusion Transformer, arXiv 2504.05741")
class DDT(Backbone):
    """Encoder and per-token modulated head; no absolute positions, RMSNorm, SwiGLU and norms of queries and keys.

    x [B, C, H, W] with H, W multiples of the patch; prediction [B, C, H, W], the velocity dx/dt.
    """

    missing: ClassVar[Mapping[str, str]] = {
        "cross": "DDT is conditioned through adaLN and has no cross-attention",
        "skip": "the head of a DDT reads its encoder through modulation; there are no long skips",
        "temporal": "DDT has no temporal attention",
    }
    preset: DDTConfig
    absolute: ClassVar[bool] = False

    def __init__(self, config: DDTConfig):
        super().__init__()
        self.preset = config
        sizes = ((config.width, config.heads), config.head_size)
        self.axes = tuple(axial_axes(width // heads) for width, heads in sizes)
        self.x_embedder = PatchEmbed(config.patch, config.channels, config.head_size[0])
        self.s_embedder = PatchEmbed(config.patch, config.channels, config.width)
        self.t_embedder = self.make_time_embedding()
        self.y_embedder = LabelEmbedding(config.classes, config.width, config.null_class) if config.classes else None
        self.blocks = nn.ModuleList(self.make_block(layer) for layer in range(config.depth + config.head_depth))
        self.final_layer = self.make_head()
        self.initialise()

    def make_time_embedding(self) -> nn.Module:
        return TimeEmbedding(self.preset.width, max_period=10.0)

    def make_block(self, layer: int) -> Block:
        c = self.preset
        encoder, head = (c.width, c.heads), c.head_size
        if layer < c.depth:
            kind = DiTBlock if layer < c.depth - 1 else LastEncoderBlock
            return kind(*encoder, **self.make_parts(*encoder))
        if layer > c.depth:
            return HeadBlock(*head, **self.make_parts(*head))
        project = nn.Identity() if c.width == head[0] else nn.Linear(c.width, head[0])
        return FirstHeadBlock(*head, project, **self.make_parts(*head))

    def make_parts(self, width: int, heads: int) -> dict[str, Any]:
        """What a block of one width is composed of; its conditioning has been through SiLU."""
        return {
            "norms": (norm("rms", width), norm("rms", width)),
            "attn": SelfAttention(width, heads, qkv_bias=False, qk_norm="rms"),
            "mlp": SwiGLU(width, int(2 * int(width * self.preset.mlp_ratio) / 3), bias=False),
            "modulation": LinearAdaLN(width, 6),
        }

    def make_head(self) -> TokenHead:
        c, width = self.preset, self.preset.head_size[0]
        return TokenHead(width, c.patch, c.channels, None, LinearAdaLN(width, 2))

    def initialise(self) -> None:
        """As published: the output starts at 0; the blocks keep torch's defaults and do not start as identities."""
        xavier_patches_(self.x_embedder)
        xavier_patches_(self.s_embedder)
        normal_linears_(self.t_embedder)
        if self.y_embedder is not None:
            nn.init.normal_(self.y_embedder.embedding_table.weight, std=0.02)
        zero_(self.final_layer.modulation, self.final_layer.linear)

    def prepare(self, condition: Condition) -> Memory:
        if self.y_embedder is None:
            return Memory()
        return Memory(vector=self.y_embedder(self.y_embedder.check(condition.label)))

    def embed(
        self, x: Tensor, time: Tensor, memory: Memory, segments: Sequence[Segment] = ()
    ) -> tuple[Streams, Context]:
        self._check(x, memory, segments)
        x = x.to(self.dtype)
        state = join(x, self.s_embedder, segments, absolute=self.absolute)
        noisy = join(x, self.x_embedder, segments, absolute=False)
        emb = self.t_embedder(time)
        times = modulation(emb, None, segments, lambda t: self.t_embedder(self.preset.time.native(t)))
        c = F.silu(times if memory.vector is None else times + memory.vector[:, None])
        tables = dict(zip(("image", "head"), (self.rotary(state, axes) for axes in self.axes), strict=True))
        shared = {"time": times, "noisy": noisy.tokens}
        context = Context(modulation={"image": c}, rotary=tables, time=emb, shared=shared)
        return Streams({"image": state.tokens}, state.layout), context

    def _check(self, x: Tensor, memory: Memory, segments: Sequence[Segment]) -> None:
        c, family = self.preset, type(self).__name__
        check_size(x, c.channels, c.patch, family)
        check_rows(x, memory.vector, "labels")
        check_streams(segments, ("image",), family)
        if any(s.tokens.ndim == 3 for s in segments) and c.width != c.head_size[0]:
            raise UserError(f"{family} embeds a segment for encoder and head apart: give an image, not tokens")

    def rotary(self, joined: Joined, axes: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """Coordinates 0..16 over the image along either side, whatever the grid; pairs turn by column, row, ..."""
        size = torch.tensor(joined.layout.grid, dtype=torch.float64)
        places = joined.positions * EXTENT / (size - 1).clamp(min=1)
        cos, sin = interleaved(rotary(places[:, [1, 0]], axes, self.preset.theta))
        return cos.to(joined.tokens.device), sin.to(joined.tokens.device)

    def head(self, streams: Streams, context: Context) -> Tensor:
        state = streams["state"][:, streams.layout.slice("image")]
        tokens = self.final_layer(streams.segment("image"), state)
        return self.preset.sign * unpack(tokens, self.preset.patch, streams.layout.grid)

    def example(self, batch: int = 1, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor, Condition]:
        c = self.preset
        x = torch.randn(batch, c.channels, c.image_size, c.image_size, device=device)
        label = torch.randint(c.classes, (batch,), device=device) if c.classes else None
        return x, torch.rand(batch, dtype=torch.float64, device=device), Condition(label=label)

    def end_macs(self, layout: Layout) -> dict[str, int]:
        image = layout.span("image").length
        return {
            "embed": self.x_embedder.macs(image) + self.s_embedder.macs(image),
            "time": cost.linears(self.t_embedder, 1),
            "head": self.final_layer.macs(image),
        }


PRESETS = {"DDT-XL/2": DDTConfig(depth=22, head_depth=6, width=1152, heads=16)}
