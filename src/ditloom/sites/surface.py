"""What a method sees of a model: its sites with their costs, its blocks, skips and layouts."""

from __future__ import annotations

from functools import cached_property

from ditloom.contracts.backbone import Backbone, Block
from ditloom.contracts.errors import UserError
from ditloom.contracts.layout import Layout
from ditloom.contracts.site import Site, block_range, branch

KINDS = {"attn": "attn", "attn2": "attn", "cross": "cross", "temporal": "temporal", "mlp": "mlp", "mlp_text": "mlp"}


class Surface:
    """The sites of one backbone at one layout. Block indices count blocks only, never transitions."""

    def __init__(self, backbone: Backbone, layout: Layout, branches: tuple[str, ...] = ("cond",)):
        self.backbone, self.layout, self.branches = backbone, layout, branches

    @cached_property
    def flat(self) -> list[int]:
        """Positions of the blocks in the flat list of blocks and transitions."""
        return [p for p, block in enumerate(self.backbone.blocks) if not block.is_transition]

    @property
    def blocks(self) -> int:
        """Number of blocks L."""
        return len(self.flat)

    @cached_property
    def layouts(self) -> list[Layout]:
        """The layout entering every flat position, and the one entering the head."""
        layouts = [self.layout]
        for block in self.backbone.blocks:
            layouts.append(block.after(layouts[-1]))
        return layouts

    @cached_property
    def costs(self) -> list[dict[str, int]]:
        """MACs per batch row of every flat position, by site."""
        return [b.macs(layout) for b, layout in zip(self.backbone.blocks, self.layouts, strict=False)]

    def block(self, index: int) -> Block:
        """Block `index`, 0-based."""
        return self.backbone.blocks[self.flat[index]]  # type: ignore[return-value]

    def position(self, index: int) -> int:
        """Flat position at which block `index` starts (index L: the end)."""
        return self.flat[index] if index < self.blocks else len(self.backbone.blocks)

    def sites(self, kind: str) -> tuple[Site, ...]:
        """Every in-block site of a kind: attn, mlp, cross, ...; empty if the family has none."""
        return tuple(
            Site(
                kind,
                "block",
                block=index,
                name=name,
                boundary=block.boundaries.get(name, "pre-gate"),
                cost=self.costs[self.flat[index]].get(name, 0),
                rows=name in block.row_sites,
            )
            for index in range(self.blocks)
            for block in [self.block(index)]
            for name in block.sites
            if KINDS.get(name, name) == kind
        )

    def require(self, kind: str, method: str) -> tuple[Site, ...]:
        """The sites of a kind, or one sentence why this family has none."""
        found = self.sites(kind)
        if not found:
            family = self.backbone.preset.family
            reason = self.backbone.missing.get(kind, f"{family} has no site {kind!r}")
            raise UserError(f"{method} needs the site {kind!r}: {reason}")
        return found

    def has_stage(self, stage: str, index: int) -> bool:
        """Whether a block has a stage to tap."""
        block = self.block(index)
        return stage in ("block_in", "block_out") or stage in block.stages or stage in block.sites

    def range(self, i: int, j: int) -> Site:
        """The site from block i to block j; refused when a long skip crosses its border."""
        if not 0 <= i < j <= self.blocks:
            raise UserError(f"range({i},{j}) is not inside this model's blocks 0..{self.blocks}")
        first, last = self.position(i), self.position(j)
        for consumer, source in self.backbone.skips.items():
            if (first <= source < last) != (first <= consumer < last):
                k = min(i, self.blocks - j) or 1
                raise UserError(
                    f"range({i},{j}) cannot be reused: the long skip from block {self._name(source)} to block "
                    f"{self._name(consumer)} crosses its border; range({k},{self.blocks - k}) is self-contained"
                )
        cost = sum(sum(c.values()) for c in self.costs[first:last])
        return block_range(i, j, cost, self.layout.streams)

    def keeps_layout(self, site: Site) -> bool:
        """Whether what leaves a range has the layout of what enters it (so that a change can be stored)."""
        assert site.span is not None
        i, j = site.span
        return self.layouts[self.position(i)] == self.layouts[self.position(j)]

    def branch(self, name: str) -> Site:
        """The site of a guidance branch."""
        if name not in self.branches:
            raise UserError(f"this run has no branch {name!r}: it has {', '.join(self.branches)}")
        return branch(name)

    @cached_property
    def total(self) -> int:
        """MACs of one whole forward per batch row."""
        return sum(self.backbone.end_macs(self.layout).values()) + sum(sum(c.values()) for c in self.costs)

    def _name(self, flat: int) -> int:
        return self.flat.index(flat) if flat in self.flat else flat
