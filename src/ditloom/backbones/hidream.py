"""HiDream-I1: A High-Efficient Image Generative Foundation Model with Sparse Diffusion Transformer (2025, 2505.22705).

Double blocks, then single ones, as in FLUX, with sparse experts in both, and with text from two encoders: what stays is
the first encoder's tokens (T5) and the second's (a language model) of one layer; beside them every block reads the
language model's tokens of a layer of its own. The joint order is image, then text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ditloom.backbones.dit import DiTBlock
from ditloom.backbones.dit_moe import sparse_swiglu, xavier_halves_
from ditloom.backbones.mmdit import MMDiTBlock
from ditloom.contracts.backbone import NOTHING, Backbone, BackboneConfig, check_size
from ditloom.contracts.condition import Condition
from ditloom.contracts.errors import UserError
from ditloom.contracts.layout import Layout, Segment, Span
from ditloom.contracts.plan import BlockPlan
from ditloom.contracts.registry import register
from ditloom.contracts.streams import Context, Memory, Streams
from ditloom.contracts.time import FLOW_1000, TimeInput
from ditloom.parts import cost
from ditloom.parts.attention import SelfAttention
from ditloom.parts.checks import check_heads, check_layers, check_pooled, check_rows, check_text
from ditloom.parts.embedders import TimeEmbedding, VectorEmbedding
from ditloom.parts.experts import BALANCE, MoE
from ditloom.parts.feed_forward import SwiGLU
from ditloom.parts.heads import Head
from ditloom.parts.modulation import AdaLN
from ditloom.parts.patches import PatchEmbed, normal_linears_, unpatchify, xavier_linears_, xavier_patches_, zero_
from ditloom.parts.positions import check_axes, rotary, rotary_grid
from ditloom.parts.segments import Joined, check_streams, join, main_modulation, modulation, text_stream
from ditloom.parts.single_stream import JOINT, JoinStreams, PartStreams, joined_modulation, joined_rotary, single
from ditloom.sites.rules import with_paddings

LAYER = "layer_text"
QK_NORM = "rms-1e-5-full"


@dataclass(frozen=True, kw_only=True)
class HiDreamConfig(BackboneConfig):
    """Settings of a HiDream.

    text_width, text_tokens: of the first encoder's tokens, Condition.text. llama_width, llama_tokens: of the language
    model's, Condition.extra["llama"] [B, states, n, llama_width]; layers: which of its states each block reads (the
    last block's is also what stays). A mask of those tokens may be given as extra["llama_mask"] [B, n].
    """

    family: ClassVar[str] = "hidream"
    process: ClassVar[Mapping[str, Any]] = {"name": "linear", "predicts": "v"}
    sign: ClassVar[int] = -1

    depth: int = 16
    single_depth: int = 32
    width: int = 2560
    heads: int = 20
    patch: int = 2
    image_size: int = 128
    channels: int = 16
    text_width: int = 4096
    text_tokens: int = 128
    llama_width: int = 4096
    llama_tokens: int = 128
    layers: tuple[int, ...] = (*range(32), *(31,) * 16)
    pooled_width: int = 2048
    experts: int = 4
    top_k: int = 2
    axes: tuple[int, ...] = (64, 32, 32)
    theta: float = 10000.0
    time: TimeInput = FLOW_1000

    def __post_init__(self) -> None:
        check_heads(self.width, self.heads)
        check_axes(self.axes, self.width // self.heads)
        blocks = self.depth + self.single_depth
        if len(self.layers) != blocks or min(self.layers, default=-1) < 0:
            raise UserError(
                f"layers names a state of the language model for each of {blocks} blocks; got {self.layers}"
            )
        if not 1 <= self.top_k <= self.experts:
            raise UserError(f"{self.top_k} experts per token cannot be chosen among {self.experts}")

    @property
    def states(self) -> int:
        """How many states of the language model are needed."""
        return max(self.layers) + 1

    def build(self) -> HiDream:
        return HiDream(self)


def hidden(width: int) -> int:
    """The hidden width of a SwiGLU that stands for an MLP of `width`: 2/3 of it, rounded up to a multiple of 256."""
    return -(-int(2 * width / 3) // 256) * 256


def experts(config: HiDreamConfig) -> MoE:
    """The sparse feed-forward of a block."""
    width = config.width
    return sparse_swiglu(width, hidden(4 * width), config.experts, config.top_k, hidden(2 * width))


def with_layer(streams: Streams, given: Mapping[str, Any], stream: str) -> Streams:
    """The streams with a block's own text in its place; what stood there was another block's."""
    if LAYER not in given:
        return streams
    x, at = streams[stream], streams.layout.slice("layer")
    return streams.updated(**{stream: torch.cat([x[:, : at.start], given[LAYER].to(x.dtype), x[:, at.stop :]], dim=1)})


class HiDreamDoubleBlock(MMDiTBlock):
    """An MMDiT block that reads its own layer of text; experts for the image, a SwiGLU for the text."""

    auxiliary = (BALANCE,)

    def __init__(self, config: HiDreamConfig):
        width = config.width
        text = SwiGLU(width, hidden(4 * width), bias=False)
        super().__init__(width, config.heads, qk_norm=QK_NORM, mlps={"image": experts(config), "text": text})

    def forward(
        self, streams: Streams, context: Context, plan: BlockPlan | None = None, given: Mapping[str, Any] = NOTHING
    ) -> tuple[Streams, dict[str, Any]]:
        return super().forward(with_layer(streams, given, "text"), context, plan, given)


class HiDreamSingleBlock(DiTBlock):
    """A DiT block over image and text that reads its own layer of text; experts for all tokens."""

    auxiliary = (BALANCE,)

    def __init__(self, config: HiDreamConfig):
        moe: Any = experts(config)
        super().__init__(
            config.width, config.heads, mlp=moe, attn=SelfAttention(config.width, config.heads, qk_norm=QK_NORM)
        )

    def forward(
        self, streams: Streams, context: Context, plan: BlockPlan | None = None, given: Mapping[str, Any] = NOTHING
    ) -> tuple[Streams, dict[str, Any]]:
        return super().forward(with_layer(streams, given, "image"), single(context), plan, given)

    def modulated_in(self, streams: Streams, context: Context) -> Tensor:
        return super().modulated_in(streams, single(context))


@register("hidream", paper="HiDream-I1, arXiv 2505.22705")
class HiDream(Backbone):
    """Double blocks over two streams, then single blocks over one, with experts; time and pooled text modulate all.

    x [B, C, H, W] with H, W multiples of the patch; prediction [B, C, H, W], the velocity dx/dt: minus what the
    official network returns. The text stream ends in the segment "layer", the place of what one block reads alone.
    """

    missing: ClassVar[Mapping[str, str]] = {
        "cross": "HiDream reads text in its joint attention and has no cross-attention",
        "skip": "HiDream has no long skips",
        "temporal": "HiDream has no temporal attention",
    }
    preset: HiDreamConfig

    def __init__(self, config: HiDreamConfig):
        super().__init__()
        self.preset = config
        width = config.width
        self.x_embedder = PatchEmbed(config.patch, config.channels, width)
        self.t_embedder = TimeEmbedding(width)
        self.pooled_embedder = VectorEmbedding(config.pooled_width, width)
        self.text_embedder = nn.Linear(config.text_width, width, bias=False)
        self.llama_embedders = nn.ModuleList(nn.Linear(config.llama_width, width, bias=False) for _ in config.layers)
        doubles = [HiDreamDoubleBlock(config) for _ in range(config.depth)]
        singles = [HiDreamSingleBlock(config) for _ in range(config.single_depth)]
        self.blocks = nn.ModuleList([*doubles, JoinStreams(), *singles, PartStreams("image", "text")])
        self.final_layer = Head(width, config.patch, config.channels)
        self.initialise()

    def initialise(self) -> None:
        """adaLN-Zero: output 0, every block the identity; routers kaiming-uniform, every matrix of an expert xavier."""
        xavier_linears_(self)
        xavier_patches_(self.x_embedder)
        normal_linears_(self.t_embedder)
        normal_linears_(self.pooled_embedder)
        for mlp in (m for m in self.modules() if isinstance(m, SwiGLU)):
            xavier_halves_(mlp)
        zero_(*(m for m in self.modules() if isinstance(m, AdaLN)), self.final_layer.linear)

    def prepare(self, condition: Condition) -> Memory:
        c, extra = self.preset, condition.extra
        text = check_text(condition.text, condition.text_mask, c.text_width, "HiDream")
        llama, mask = check_layers(extra.get("llama"), extra.get("llama_mask"), c.states, c.llama_width, "HiDream")
        check_rows(text, llama, "language model's text")
        layers = [embed(llama[:, i].to(self.dtype)) for embed, i in zip(self.llama_embedders, c.layers, strict=True)]
        kept = {"layers": torch.stack(layers, dim=1)} | ({} if mask is None else {"llama_mask": mask})
        pooled = self.pooled_embedder(check_pooled(condition.pooled, c.pooled_width, "HiDream"))
        return Memory(pooled, self.text_embedder(text.to(self.dtype)), condition.text_mask, kept)

    def embed(
        self, x: Tensor, time: Tensor, memory: Memory, segments: Sequence[Segment] = ()
    ) -> tuple[Streams, Context]:
        check_size(x, self.preset.channels, self.preset.patch, "HiDream")
        check_rows(x, memory.text, "text")
        check_rows(x, memory.vector, "pooled vector")
        check_streams(segments, ("image", "text"), "HiDream")
        joined = join(x.to(self.dtype), self.x_embedder, segments, absolute=False, axes=len(self.preset.axes))
        text, spans = text_stream(memory, segments, self.dtype)
        layers = memory.extra["layers"]
        n = layers.shape[2]
        stream = torch.cat([text, layers[:, -1], layers[:, 0]], dim=1)
        layout = joined.layout.with_spans(*spans, Span("llama", n, "text"), Span("layer", n, "text"))
        emb = self.t_embedder(time)
        embed_time = lambda t: self.t_embedder(self.preset.time.native(t))  # noqa: E731
        text_emb = self.t_embedder(time.mean(1)) if time.ndim == 2 else emb
        c = {
            "image": modulation(emb, memory.vector, segments, embed_time),
            "text": modulation(text_emb, memory.vector, _text_segments(segments), embed_time, "text"),
        }
        tables = {"image": self.rotary(joined)}
        context = Context(
            modulation={**c, JOINT: joined_modulation(c, layout)},
            rotary={**tables, JOINT: joined_rotary(tables, layout)},
            time=emb,
            shared={"layers": layers},
        )
        llama_mask = memory.extra.get("llama_mask")
        masks = {"text": memory.text_mask, "llama": llama_mask, "layer": llama_mask}
        return Streams({"image": joined.tokens, "text": stream}, layout), with_paddings(context, layout, masks)

    def handed(self, position: int, context: Context) -> Mapping[str, Any]:
        """A block's own layer of text."""
        depth = self.preset.depth
        if self.blocks[position].is_transition:
            return NOTHING
        return {LAYER: context.shared["layers"][:, position if position < depth else position - 1]}

    def rotary(self, joined: Joined) -> tuple[Tensor, Tensor]:
        """The rotary table of the image's stream, at (0, row, column)."""
        c, device = self.preset, joined.tokens.device
        if len(joined.layout.spans) == 1:
            return rotary_grid(*joined.layout.grid, axes=c.axes, theta=c.theta, device=device)
        cos, sin = rotary(joined.positions, c.axes, c.theta)
        return cos.to(device), sin.to(device)

    def head(self, streams: Streams, context: Context) -> Tensor:
        tokens = self.final_layer(streams.segment("image"), main_modulation(streams, context))
        return self.preset.sign * unpatchify(tokens, self.preset.patch, streams.layout.grid)

    def example(self, batch: int = 1, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor, Condition]:
        c = self.preset
        x = torch.randn(batch, c.channels, c.image_size, c.image_size, device=device)
        text = torch.randn(batch, c.text_tokens, c.text_width, device=device)
        llama = torch.randn(batch, c.states, c.llama_tokens, c.llama_width, device=device)
        pooled = torch.randn(batch, c.pooled_width, device=device)
        t = torch.rand(batch, dtype=torch.float64, device=device)
        return x, t, Condition(text=text, pooled=pooled, extra={"llama": llama})

    def end_macs(self, layout: Layout) -> dict[str, int]:
        image, llama = layout.span("image").length, layout.span("llama").length
        prepare = cost.linear(self.text_embedder, layout.span("text").length) + cost.linears(self.pooled_embedder, 1)
        return {
            "prepare": prepare + cost.linears(self.llama_embedders, llama),
            "embed": self.x_embedder.macs(image),
            "time": cost.linears(self.t_embedder, 1),
            "head": self.final_layer.macs(image),
        }


def _text_segments(segments: Sequence[Segment]) -> list[Segment]:
    """Those of the text stream; the language model's tokens, which follow them, have the run's own time again."""
    own = [s for s in segments if s.weights == "text"]
    ended = own and own[-1].modulation != "t"
    return [*own, Segment("llama", torch.empty(0), weights="text")] if ended else own


PRESETS = {"HiDream-I1": HiDreamConfig()}
