"""DiMSUM: Diffusion Mamba, a Scalable and Unified Spatial-Frequency Method (Phung et al., NeurIPS 2024, 2411.04168).

Every block scans half of its channels over the image and half over their Haar bands, and lets both read each other; one
transformer block with shared weights comes after every fourth.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

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
from ditloom.parts.attention import Projections, kernel
from ditloom.parts.checks import check_grid_only, check_heads, check_no_rule, check_rows
from ditloom.parts.embedders import LabelEmbedding, TimeEmbedding
from ditloom.parts.feed_forward import GEGLU
from ditloom.parts.heads import Head
from ditloom.parts.mamba import Mamba
from ditloom.parts.modulation import AdaLN
from ditloom.parts.norms import RMSNorm, modulate
from ditloom.parts.patches import PatchEmbed, normal_linears_, unpatchify, xavier_patches_, zero_
from ditloom.parts.positions import sincos_grid
from ditloom.parts.segments import join, main_modulation
from ditloom.parts.wavelet import CELL, from_bands, to_bands, transposed, unwindowed, windowed
from ditloom.sites.visit import take_rows, visit


@dataclass(frozen=True, kw_only=True)
class DiMSUMConfig(BackboneConfig):
    """Settings of a DiMSUM. `depth` counts its own blocks; after every `every`-th the shared one comes on top.

    heads, fusion_heads: of the shared block and of the fusion. image_size is fixed, as positions are learned.
    initial_state: c also stands where a scan's convolution looks before the first token. The released kernel takes that
    tensor for its output buffer and overwrites it: without the setting the projection is stored and has no effect.
    The published drop-path (0.1, growing with depth) regularises training and is no part of the network.
    """

    family: ClassVar[str] = "dimsum"
    process: ClassVar[Mapping[str, Any]] = {"name": "gvp", "predicts": "v"}
    sign: ClassVar[int] = -1

    depth: int
    width: int
    heads: int = 16
    fusion_heads: int = 8
    every: int = 4
    patch: int = 2
    image_size: int = 32
    channels: int = 4
    classes: int = 1000
    null_class: bool = True
    mlp_ratio: float = 4.0
    states: int = 16
    initial_state: bool = False
    time: TimeInput = REVERSED

    def __post_init__(self) -> None:
        check_heads(self.width, self.heads)
        check_heads(self.width // 2, self.fusion_heads)
        side = self.image_size // self.patch
        if self.image_size % self.patch or side % CELL:
            raise UserError(
                f"the bands of DiMSUM need a grid of multiples of {CELL} tokens: image_size {self.image_size} with "
                f"patches of {self.patch} gives {side}"
            )

    def build(self) -> DiMSUM:
        return DiMSUM(self)


class Scan(nn.Module):
    """x += gate Mamba(mod x), with shift, scale and gate from c; one half of a block's channels, in a given order."""

    def __init__(self, width: int, inputs: int, states: int, initial_state: bool):
        super().__init__()
        self.mixer = Mamba(width, both=False, states=states)
        self.before = nn.Linear(inputs, self.mixer.out_proj.in_features)
        self.modulation = AdaLN(width, 3, inputs)
        self.initial_state = initial_state

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale, gate = self.modulation(c)
        before = self.before(c.squeeze(1)) if self.initial_state else None
        return torch.addcmul(x, gate, self.mixer(modulate(x, shift, scale), before=before))

    def macs(self, tokens: int) -> int:
        before = cost.linear(self.before, 1) if self.initial_state else 0
        return self.mixer.macs(tokens) + self.modulation.macs(1) + before


class Fusion(nn.Module):
    """proj([Attn(q1, k2, v2), Attn(q2, k1, v1)]): each half reads the other."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.first, self.second = (Projections(width // 2, heads, project_out=False) for _ in range(2))
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        (q1, k1, v1), (q2, k2, v2) = self.first.heads_of(x, None), self.second.heads_of(y, None)
        return self.proj(torch.cat([kernel(q1, k2, v2).flatten(2), kernel(q2, k1, v1).flatten(2)], dim=-1))

    def macs(self, tokens: int) -> int:
        return cost.linears(self, tokens) + cost.attention(tokens, tokens, self.proj.in_features)


class DiMSUMBlock(Block):
    """r += x; h = RMS r; h += Fusion(spatial scan, band scan of its halves); x = h + gate GEGLU(mod(RMS h)).

    Streams carry x as "image" and r as "residual". The site "mixer" is what the fusion gives: scans, transform and
    fusion. The spatial scan goes backwards in odd blocks and along columns in every third and fourth; the band scan
    goes window by window, along columns in odd blocks.
    """

    sites = ("mixer", "mlp")
    stages = ("modulated_in", "ff_hidden")
    row_sites = ("mlp",)

    def __init__(self, index: int, config: DiMSUMConfig):
        super().__init__()
        width, half = config.width, config.width // 2
        self.backwards, self.by_columns = index % 2 > 0, index % 4 >= 2
        self.norm1, self.norm2 = (RMSNorm(width, eps=1e-5) for _ in range(2))
        self.spatial, self.frequency = (Scan(half, width, config.states, config.initial_state) for _ in range(2))
        self.fusion = Fusion(width, config.fusion_heads)
        self.mlp = GEGLU(width, int(width * config.mlp_ratio))
        self.modulation = AdaLN(width, 3)

    def forward(
        self, streams: Streams, context: Context, plan: BlockPlan | None = None, given: Mapping[str, Any] = NOTHING
    ) -> tuple[Streams, dict[str, Any]]:
        check_no_rule(context.rule, "DiMSUM", MISSING["rule"])
        grid, c = streams.layout.grid, context.modulation["image"]
        at = visit(plan, given, streams.layout)
        residual = streams["residual"] + streams["image"]
        h = at.tap("modulated_in", self.norm1(residual))
        x = h + at.around("mixer", lambda h: self.mix(h, c, grid), h)
        shift, scale, gate = self.modulation(c)
        h = modulate(self.norm2(x), shift, scale)
        mlp_rows = lambda index: self.mlp(take_rows(h, index))  # noqa: E731
        x = torch.addcmul(x, gate, at.around("mlp", lambda h: self.mlp(h, at), h, rows=mlp_rows))
        return streams.updated(image=x, residual=residual), at.kept

    def mix(self, h: Tensor, c: Tensor, grid: tuple[int, ...]) -> Tensor:
        """Both scans and their fusion, of normed tokens [B, N, D]."""
        first, second = h.chunk(2, dim=-1)
        return self.fusion(self.over_space(first, c, grid), self.over_bands(second, c, grid))

    def over_space(self, x: Tensor, c: Tensor, grid: tuple[int, ...]) -> Tensor:
        """The spatial scan in this block's order, back in row-major order."""
        x = transposed(x, grid) if self.by_columns else x
        x = self.spatial(x.flip(1), c).flip(1) if self.backwards else self.spatial(x, c)
        return transposed(x, grid[::-1]) if self.by_columns else x

    def over_bands(self, x: Tensor, c: Tensor, grid: tuple[int, ...]) -> Tensor:
        """The scan of Haar bands, back as tokens."""
        bands = windowed(to_bands(x, grid), grid, self.backwards)
        return from_bands(unwindowed(self.frequency(bands, c), grid, self.backwards), grid)

    def modulated_in(self, streams: Streams, context: Context) -> Tensor:
        """The normed input; each scan modulates its half of it."""
        return self.norm1(streams["residual"] + streams["image"])

    def modulated_in_macs(self, layout: Layout) -> int:
        return 0

    def macs(self, layout: Layout) -> dict[str, int]:
        n = layout.length()
        mixer = self.spatial.macs(n) + self.frequency.macs(n) + self.fusion.macs(n)
        return {"mixer": mixer, "mlp": self.mlp.macs(n), "rest": self.modulation.macs(1)}


class SharedBlock(Block):
    """The one transformer block of the model at one of its places; its weights belong to the model."""

    sites, stages, row_sites = DiTBlock.sites, DiTBlock.stages, DiTBlock.row_sites
    inner: DiTBlock

    def __init__(self, inner: DiTBlock):
        super().__init__()
        object.__setattr__(self, "inner", inner)  # not registered here: the model has it once

    def forward(
        self, streams: Streams, context: Context, plan: BlockPlan | None = None, given: Mapping[str, Any] = NOTHING
    ) -> tuple[Streams, dict[str, Any]]:
        return self.inner(streams, context, plan, given)

    def modulated_in(self, streams: Streams, context: Context) -> Tensor:
        return self.inner.modulated_in(streams, context)

    def modulated_in_macs(self, layout: Layout) -> int:
        return self.inner.modulated_in_macs(layout)

    def macs(self, layout: Layout) -> dict[str, int]:
        return self.inner.macs(layout)


MISSING = {
    "cross": "DiMSUM is conditioned through adaLN; its fusion reads between scans of the image only",
    "skip": "DiMSUM has no long skips",
    "temporal": "DiMSUM has no temporal mixer",
    "segment": "DiMSUM takes the image's grid apart into bands, where further tokens have no place",
    "rule": "its scans pass over all tokens, and no rule holds there",
}


@register("dimsum", paper="DiMSUM: Diffusion Mamba, arXiv 2411.04168")
class DiMSUM(Backbone):
    """Spatial and band scans with fusion, and a shared transformer block; conditioned on time and class by adaLN.

    x [B, C, H, W] of the size it was built for; prediction [B, C, H, W], the velocity dx/dt: minus what the official
    network returns. Its site "mixer" is of the kind "attn": what caches do to attention they do to the mixer.
    """

    missing: ClassVar[Mapping[str, str]] = MISSING
    preset: DiMSUMConfig

    def __init__(self, config: DiMSUMConfig):
        super().__init__()
        self.preset = config
        width, side = config.width, config.image_size // config.patch
        self.x_embedder = PatchEmbed(config.patch, config.channels, width)
        self.t_embedder = TimeEmbedding(width)
        self.y_embedder = LabelEmbedding(config.classes, width, config.null_class) if config.classes else None
        self.pos_embed = nn.Parameter(torch.zeros(1, side**2, width))
        mlp = GEGLU(width, int(width * config.mlp_ratio))
        self.shared = DiTBlock(width, config.heads, mlp=mlp) if config.depth >= config.every else None
        self.blocks = nn.ModuleList(self._blocks())
        self.final_layer = Head(width, config.patch, config.channels)
        self.initialise()

    @property
    def unread(self) -> bool:
        return not self.preset.initial_state  # what the scans project for it all the same

    def _blocks(self) -> list[Block]:
        found: list[Block] = []
        for index in range(self.preset.depth):
            found.append(DiMSUMBlock(index, self.preset))
            if self.shared is not None and (index + 1) % self.preset.every == 0:
                found.append(SharedBlock(self.shared))
        return found

    def initialise(self) -> None:
        """As published: torch's weights, zero biases, sine-cosine positions, mixers as Mamba's, zero gates of the
        feed-forwards (not of the scans, nor in the shared block), zero head."""
        for m in self.modules():
            if isinstance(m, nn.Linear) and m.bias is not None:
                nn.init.zeros_(m.bias)
        for m in self.modules():
            if isinstance(m, Mamba):
                m.initialise(self.preset.depth)
            elif isinstance(m, DiMSUMBlock):
                zero_(m.modulation)
        xavier_patches_(self.x_embedder)
        normal_linears_(self.t_embedder)
        if self.y_embedder is not None:
            nn.init.normal_(self.y_embedder.embedding_table.weight, std=0.02)
        zero_(self.final_layer)
        side, table = self.preset.image_size // self.preset.patch, self.pos_embed
        with torch.no_grad():
            table[0] = sincos_grid(side, side, table.shape[-1], table.dtype, table.device)

    def prepare(self, condition: Condition) -> Memory:
        if self.y_embedder is None:
            return Memory()
        return Memory(vector=self.y_embedder(self.y_embedder.check(condition.label)))

    def embed(
        self, x: Tensor, time: Tensor, memory: Memory, segments: Sequence[Segment] = ()
    ) -> tuple[Streams, Context]:
        c = self.preset
        check_size(x, c.channels, c.patch, "DiMSUM")
        if x.shape[2:] != (c.image_size, c.image_size):
            size = f"{c.image_size}x{c.image_size}; got {x.shape[2]}x{x.shape[3]}"
            raise UserError(f"the learned positions of this DiMSUM are for {size}")
        check_rows(x, memory.vector, "labels")
        check_grid_only(time, segments, "DiMSUM", MISSING["segment"])
        joined = join(x.to(self.dtype), self.x_embedder, absolute=False)
        tokens = joined.tokens + self.pos_embed
        emb = self.t_embedder(time)
        vector = emb if memory.vector is None else emb + memory.vector
        context = Context(modulation={"image": vector[:, None]}, time=emb)
        return Streams({"image": tokens, "residual": torch.zeros_like(tokens)}, joined.layout), context

    def head(self, streams: Streams, context: Context) -> Tensor:
        tokens = self.final_layer(streams.segment("image"), main_modulation(streams, context))
        return self.preset.sign * unpatchify(tokens, self.preset.patch, streams.layout.grid)

    def example(self, batch: int = 1, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor, Condition]:
        c = self.preset
        x = torch.randn(batch, c.channels, c.image_size, c.image_size, device=device)
        label = torch.randint(c.classes, (batch,), device=device) if c.classes else None
        return x, torch.rand(batch, dtype=torch.float64, device=device), Condition(label=label)

    def end_macs(self, layout: Layout) -> dict[str, int]:
        image = layout.span("image").length
        embed = self.x_embedder.macs(image) + cost.linears(self.t_embedder, 1)
        return {"embed": embed, "head": self.final_layer.macs(image)}


SIZES = {"B": (12, 768), "L": (16, 1024), "XL": (24, 1152)}
PRESETS = {f"DiMSUM-{size}/2": DiMSUMConfig(depth=depth, width=width) for size, (depth, width) in SIZES.items()}
