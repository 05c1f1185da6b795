"""FlexDiT, later SparseDiT: Dynamic Token Density Control for Diffusion Transformer (Chang et al., arXiv 2412.06028).

The first blocks attend by a mean; then groups of blocks work on a pooled grid of tokens and restore the dense one;
the last blocks are dense. Pooling has no weights, so one network serves several densities, fewer tokens at noisy steps.
How the density depends on time is from the paper's text: the released code has one density.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ditloom.backbones.dit import SIZES, DiT, DiTBlock, DiTConfig, settings_of
from ditloom.contracts.backbone import NOTHING, Backbone, Block, Transition
from ditloom.contracts.errors import UserError
from ditloom.contracts.layout import Layout, Segment
from ditloom.contracts.plan import BlockPlan
from ditloom.contracts.registry import register
from ditloom.contracts.streams import Context, Memory, Streams
from ditloom.parts import cost
from ditloom.parts.density import MeanAttention, TokenCrossAttention, pooled, repeated
from ditloom.parts.grids import with_grid
from ditloom.parts.norms import modulate
from ditloom.sites.visit import take_rows, visit

SIDE, ROWS, COLUMNS = "side", "full rows", "full columns"


@dataclass(frozen=True, kw_only=True)
class FlexDiTConfig(DiTConfig):
    """Settings of a FlexDiT: `pooling` mean blocks, `groups` of (merge, sparse, recover, dense) blocks, `dense` blocks.

    They add up to `depth`. sides: tokens along a side of the pooled grid, from the cleanest to the noisiest part of the
    noise levels that `levels` separate; one side is one density for all.
    """

    family: ClassVar[str] = "flexdit"

    pooling: int = 2
    groups: int = 4
    group: tuple[int, int, int, int] = (1, 3, 1, 1)
    dense: int = 2
    sides: tuple[int, ...] = (8,)
    levels: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if len(self.group) != 4 or self.group[2] != 1 or min(self.group) < 0 or not sum(self.group[:2]):
            raise UserError(
                f"a group is (merge, sparse, 1 recover, dense) blocks, with one at least to merge or sparse; "
                f"got {list(self.group)}"
            )
        total = self.pooling + self.groups * sum(self.group) + self.dense
        if total != self.depth:
            raise UserError(
                f"{self.pooling} pooling blocks, {self.groups} groups of {sum(self.group)} and {self.dense} dense "
                f"blocks are {total}, not the depth, {self.depth}"
            )
        if len(self.sides) != len(self.levels) + 1 or list(self.levels) != sorted(self.levels):
            raise UserError("levels separate sides: there is one side more than levels, which ascend")
        if self.attention != "softmax":
            raise UserError(f"FlexDiT has softmax attention between densities; got the kind {self.attention!r}")

    def side(self, level: float) -> int:
        """Tokens along a side of the pooled grid at a noise level."""
        return self.sides[bisect_right(self.levels, level)]

    def build(self) -> FlexDiT:
        return FlexDiT(self)


def sparse(layout: Layout) -> Layout:
    """The layout on the pooled grid; the dense map rides along, and the layout remembers its size."""
    (rows, columns), side = layout.grid, layout.read(SIDE)
    carried = (*layout.reads, (ROWS, rows), (COLUMNS, columns))
    return replace(with_grid(layout, (side, side)), reads=carried)


def full(layout: Layout) -> tuple[int, int]:
    """(rows, columns) of the dense grid, wherever one is."""
    return (layout.read(ROWS), layout.read(COLUMNS)) if layout.read(ROWS) else (layout.grid[0], layout.grid[1])


class Pool(Transition):
    """The image averaged onto the coarse grid; the dense map is kept beside it as the stream "full"."""

    def forward(
        self, streams: Streams, context: Context, plan: BlockPlan | None = None, given: Mapping[str, Any] = NOTHING
    ) -> tuple[Streams, dict[str, Any]]:
        x, layout = streams["image"], streams.layout
        coarse = pooled(x, layout.grid, layout.read(SIDE))
        return Streams({"image": coarse, "full": x}, self.after(layout)), {}

    def after(self, layout: Layout) -> Layout:
        return sparse(layout)


class DensityBlock(DiTBlock):
    """x += g1 Cross(mod(LN x), mod(LN others)); x += g2 MLP(mod(LN x)): both sides share norm, shift and scale."""

    attn: TokenCrossAttention  # type: ignore[assignment]

    def __init__(self, width: int, heads: int, mlp_ratio: float, **parts: Any):
        attn: Any = TokenCrossAttention(width, heads)
        super().__init__(width, heads, mlp_ratio, attn=attn, **parts)

    def enter(self, streams: Streams) -> tuple[Tensor, Tensor]:
        """Whose queries, and whose keys and values."""
        raise NotImplementedError

    def forward(
        self, streams: Streams, context: Context, plan: BlockPlan | None = None, given: Mapping[str, Any] = NOTHING
    ) -> tuple[Streams, dict[str, Any]]:
        at = visit(plan, given, streams.layout)
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(context.modulation["image"])
        x, others = self.enter(streams)
        others = modulate(self.norm1(others), shift1, scale1)
        h = at.tap("modulated_in", modulate(self.norm1(x), shift1, scale1))
        x = torch.addcmul(x, gate1, at.around("attn", lambda h: self.attn(h, others, at), h))
        h = modulate(self.norm2(x), shift2, scale2)
        mlp_rows = lambda index: self.mlp(take_rows(h, index))  # noqa: E731
        x = torch.addcmul(x, gate2, at.around("mlp", lambda h: self.mlp(h, at), h, rows=mlp_rows))
        return self.leave(streams, x), at.kept

    def leave(self, streams: Streams, x: Tensor) -> Streams:
        """The streams after the block."""
        return streams.updated(image=x)

    def modulated_in(self, streams: Streams, context: Context) -> Tensor:
        shift, scale, *_ = self.modulation(context.modulation["image"])
        return modulate(self.norm1(self.enter(streams)[0]), shift, scale)

    def tokens(self, layout: Layout) -> tuple[int, int]:
        """(queries, keys)."""
        raise NotImplementedError

    def macs(self, layout: Layout) -> dict[str, int]:
        queries, keys = self.tokens(layout)
        return {
            "attn": self.attn.macs(queries, keys),
            "mlp": self.mlp.macs(queries),
            "rest": self.modulation.macs(1),
        }


class MergeBlock(DensityBlock):
    """Pooled tokens read the dense map."""

    def enter(self, streams: Streams) -> tuple[Tensor, Tensor]:
        return streams["image"], streams["full"]

    def tokens(self, layout: Layout) -> tuple[int, int]:
        rows, columns = full(layout)
        return layout.length(), rows * columns


class RecoverBlock(DensityBlock):
    """Z = linear(X repeated) + linear(Y), then dense tokens Z read the pooled ones X; Y is the dense map.

    The first linear is applied before the repetition: the same result for the pooled tokens' cost.
    """

    def __init__(self, width: int, heads: int, mlp_ratio: float, **parts: Any):
        super().__init__(width, heads, mlp_ratio, **parts)
        self.from_sparse, self.from_full = nn.Linear(width, width), nn.Linear(width, width)

    def enter(self, streams: Streams) -> tuple[Tensor, Tensor]:
        x, layout = streams["image"], streams.layout
        spread = repeated(self.from_sparse(x), layout.grid, full(layout))
        return spread + self.from_full(streams["full"]), x

    def leave(self, streams: Streams, x: Tensor) -> Streams:
        return Streams({"image": x}, self.after(streams.layout))

    def tokens(self, layout: Layout) -> tuple[int, int]:
        rows, columns = full(layout)
        return rows * columns, layout.length()

    def macs(self, layout: Layout) -> dict[str, int]:
        costs, (dense, pooled_tokens) = super().macs(layout), self.tokens(layout)
        merging = cost.linear(self.from_sparse, pooled_tokens) + cost.linear(self.from_full, dense)
        return {**costs, "rest": costs["rest"] + merging}

    def after(self, layout: Layout) -> Layout:
        kept = tuple(read for read in layout.reads if read[0] not in (ROWS, COLUMNS))
        return replace(with_grid(layout, full(layout)), reads=kept)


@register("flexdit", paper="SparseDiT: Dynamic Token Density Control, arXiv 2412.06028")
class FlexDiT(DiT):
    """A DiT whose middle works on pooled tokens.

    x [B, C, H, W] with H, W multiples of the patch, at least `side` tokens either way; prediction [B, C or 2C, H, W].
    """

    missing: ClassVar[Mapping[str, str]] = {
        **{kind: why.replace("DiT", "FlexDiT") for kind, why in DiT.missing.items()},
        "attend": "FlexDiT attends by means and between densities, where no keys can be appended",
    }
    preset: FlexDiTConfig

    def __init__(self, config: FlexDiTConfig):
        super().__init__(config)
        flat: list[Block] = []
        for block, kind in zip(self.blocks, kinds(config), strict=True):
            assert isinstance(block, Block)
            flat += [Pool(), block] if kind == "first" else [block]
        self.blocks = nn.ModuleList(flat)

    def make_block(self, layer: int) -> Block:
        c, kind = self.preset, kinds(self.preset)[layer]
        if kind == "mean":
            attn: Any = MeanAttention(c.width)
            return DiTBlock(c.width, c.heads, c.mlp_ratio, norms=self.make_norms(), attn=attn)
        if kind in ("merge", "recover") or (kind == "first" and c.group[0]):
            made = RecoverBlock if kind == "recover" else MergeBlock
            return made(c.width, c.heads, c.mlp_ratio, norms=self.make_norms())
        return super().make_block(layer)

    def initialise(self) -> None:
        """As published: linears at half the gain of DiT's, Z = Y in every recovery; the output starts at 0."""
        super().initialise()
        with torch.no_grad():
            for m in self.blocks.modules():
                if isinstance(m, nn.Linear):
                    m.weight.mul_(0.5)
        for block in self.blocks:
            if isinstance(block, RecoverBlock):
                nn.init.zeros_(block.from_sparse.weight)
                nn.init.eye_(block.from_full.weight)

    def grown_from(self, other: Backbone) -> Mapping[str, Tensor]:
        """The weights of a DiT in this network's places; those of a FlexDiT as they are."""
        return other.state_dict() if isinstance(other, FlexDiT) else self.rearranged(other.state_dict())

    def rearranged(self, state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """A DiT's weights, its blocks taken in order, and this network's own linears between densities."""
        ours, blocks = self.state_dict(), {name.split(".")[1] for name in state if name.startswith("blocks.")}
        if len(blocks) != self.preset.depth or "blocks.0.attn.qkv.weight" not in state:
            raise UserError(f"a FlexDiT of {self.preset.depth} blocks is made of a DiT of as many; got {len(blocks)}")
        flat = [position for position, block in enumerate(self.blocks) if not isinstance(block, Transition)]
        for layer, position in enumerate(flat):
            prefix = f"blocks.{position}."
            for name in (name for name in ours if name.startswith(prefix)):
                ours[name] = _of_block(state, f"blocks.{layer}.", name.removeprefix(prefix), ours[name])
        return {**ours, **{name: value for name, value in state.items() if not name.startswith("blocks.")}}

    def embed(
        self, x: Tensor, time: Tensor, memory: Memory, segments: Sequence[Segment] = ()
    ) -> tuple[Streams, Context]:
        if time.ndim != 1 or segments:
            raise UserError("FlexDiT pools the image's tokens: one time per image, and no added segments")
        streams, context = super().embed(x, time, memory, segments)
        side, grid = self._side(time), streams.layout.grid
        if side > min(grid):
            raise UserError(f"FlexDiT pools onto {side}x{side} tokens here; x has {grid[0]}x{grid[1]}")
        return replace(streams, layout=replace(streams.layout, reads=((SIDE, side),))), context

    def _side(self, time: Tensor) -> int:
        """The side of the pooled grid, which a batch shares."""
        c = self.preset
        if not c.levels:
            return c.sides[0]
        sides = {c.side(level) for level in c.time.noise_level(time).tolist()}
        if len(sides) > 1:
            raise UserError(f"one batch has one token density; its times ask for {sorted(sides)} tokens along a side")
        return sides.pop()


def kinds(config: FlexDiTConfig) -> list[str]:
    """What every block is; "first" is the first of a group, before which the image is pooled."""
    merge, middle, recover, dense = config.group
    coarse = ["merge"] * merge + ["sparse"] * middle
    group = ["first", *coarse[1:], *["recover"] * recover, *["dense"] * dense]
    return [*["mean"] * config.pooling, *group * config.groups, *["dense"] * config.dense]


def from_dit(config: DiTConfig, state: Mapping[str, Tensor], **more: Any) -> FlexDiT:
    """A FlexDiT with the weights of a DiT (its state dict), block by block in order; `more`: settings of its own.

    Queries are cut from q, k and v where a block has no self-attention; it has to be trained before it draws well.
    """
    backbone = FlexDiT(FlexDiTConfig(**{**settings_of(config, "FlexDiT"), **more}))
    backbone.load_state_dict(dict(backbone.rearranged(state)), strict=True)
    return backbone


def _of_block(state: Mapping[str, Tensor], prefix: str, rest: str, fresh: Tensor) -> Tensor:
    """One tensor of a block from the DiT's block; what it has no counterpart for stays as it is."""
    parts = {"q": slice(0, 1), "kv": slice(1, 3), "v": slice(2, 3)}
    module, _, leaf = rest.rpartition(".")
    name = module.removeprefix("attn.")
    if module.startswith("attn.") and name in parts:
        return torch.cat(state[f"{prefix}attn.qkv.{leaf}"].chunk(3)[parts[name]])
    return state.get(prefix + rest, fresh)


DEPTH, WIDTH, HEADS = SIZES["XL"]
PRESETS = {
    "FlexDiT-XL/2": FlexDiTConfig(depth=DEPTH, width=WIDTH, heads=HEADS, pooling=1, dense=3),
    "FlexDiT-XL/2-512": FlexDiTConfig(depth=DEPTH, width=WIDTH, heads=HEADS, image_size=64),
}
