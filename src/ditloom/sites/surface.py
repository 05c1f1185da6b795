"""What a method sees of a model: its sites with their costs, its blocks, skips and layouts."""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property
from itertools import accumulate

from ditloom.contracts.backbone import Backbone, Block
from ditloom.contracts.errors import UserError
from ditloom.contracts.layout import Layout
from ditloom.contracts.site import Site, block_range, branch

KINDS = {
    "attn": "attn",
    "attn2": "attn",
    "cross": "cross",
    "temporal": "temporal",
    "mlp": "mlp",
    "mlp_text": "mlp",
    "mixer": "attn",
    "conv": "attn",
}
"""What the names of sites mean to a method: a scan or convolution that mixes tokens stands where attention does."""


class Surface:
    """The sites of one backbone at one layout. Block indices count blocks only, never transitions."""

    def __init__(self, backbone: Backbone, layout: Layout, branches: tuple[str, ...] = ("cond",)):
        self.backbone, self.layout, self.branches = backbone, layout, branches
        self._ends: dict[tuple[int, int], int] = {}

    @cached_property
    def flat_blocks(self) -> list[Block]:
        """Blocks and transitions in execution order."""
        return list(self.backbone.blocks)  # type: ignore[arg-type]

    @cached_property
    def flat(self) -> list[int]:
        """Positions of the blocks in the flat list of blocks and transitions."""
        return [p for p, block in enumerate(self.flat_blocks) if not block.is_transition]

    @cached_property
    def blocks(self) -> int:
        """Number of blocks L."""
        return len(self.flat)

    @cached_property
    def index_at(self) -> list[int | None]:
        """The block index of every flat position; None at a transition."""
        index = {position: i for i, position in enumerate(self.flat)}
        return [index.get(position) for position in range(len(self.flat_blocks))]

    @cached_property
    def layouts(self) -> list[Layout]:
        """The layout entering every flat position, and the one entering the head."""
        layouts = [self.layout]
        for block in self.flat_blocks:
            layouts.append(block.after(layouts[-1]))
        return layouts

    @cached_property
    def costs(self) -> list[dict[str, int]]:
        """MACs per batch row of every flat position, by site."""
        return [b.macs(layout) for b, layout in zip(self.flat_blocks, self.layouts, strict=False)]

    @cached_property
    def block_totals(self) -> list[int]:
        """MACs per batch row of every flat position."""
        return [sum(costs.values()) for costs in self.costs]

    @cached_property
    def totals_before(self) -> list[int]:
        """MACs per batch row of all blocks and transitions before every flat position, and of all."""
        return list(accumulate(self.block_totals, initial=0))

    @cached_property
    def per_pair(self) -> list[dict[str, int]]:
        """MACs per pair of query and key of every attention among tokens, by site, at every flat position."""
        return [_quadratic(b, layout) for b, layout in zip(self.flat_blocks, self.layouts, strict=False)]

    def text_logits(self, position: int) -> int:
        """MACs per batch row of the logits of a block's cross-attention: half of what every token read adds."""
        block, layout = self.flat_blocks[position], self.layouts[position]
        longer = tuple((name, length + (name == "text")) for name, length in layout.reads)
        more = block.macs(replace(layout, reads=longer))["cross"] - self.costs[position]["cross"]
        return more // 2 * layout.read("text")

    def block(self, index: int) -> Block:
        """Block `index`, 0-based."""
        return self.flat_blocks[self.flat[index]]

    def position(self, index: int) -> int:
        """Flat position at which block `index` starts (index L: the end)."""
        return self.flat[index] if index < self.blocks else len(self.flat_blocks)

    def end(self, i: int, j: int) -> int:
        """Flat position at which range(i, j) ends: before block j, or before the transitions that lead there if these
        only rearrange and what leaves the range then has the layout of what enters it."""
        if (i, j) not in self._ends:
            self._ends[i, j] = self._end(i, j)
        return self._ends[i, j]

    def _end(self, i: int, j: int) -> int:
        position, after_last = self.position(j), self.flat[j - 1] + 1
        entering, glue = self.layouts[self.flat[i]], self.flat_blocks[after_last:position]
        early = all(getattr(block, "rearranges", False) for block in glue) and self.layouts[position] != entering
        return after_last if early and self.layouts[after_last] == entering else position

    def sites(self, kind: str) -> tuple[Site, ...]:
        """Every in-block site of a kind: attn, mlp, cross, ...; empty if the family has none."""
        return tuple(site for site in self.submodules if site.kind == kind)

    @cached_property
    def submodules(self) -> tuple[Site, ...]:
        """Every in-block site: all attentions, feed-forwards and their like."""
        return tuple(
            Site(
                KINDS.get(name, name),
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
        if stage == "skip":
            return self.flat[index] in self.backbone.skips.values() and "skip" not in self.backbone.missing
        if stage == "attend":
            return "attn" in block.sites and "attend" not in self.backbone.missing
        return stage in ("block_in", "block_out", *block.stages, *block.sites, *block.auxiliary)

    def range(self, i: int, j: int) -> Site:
        """The site from block i to block j; refused when a long skip crosses its border."""
        if not 0 <= i < j <= self.blocks:
            raise UserError(f"range({i},{j}) is not inside this model's blocks 0..{self.blocks}")
        crossing = self._crossing(i, j)
        if crossing is not None:
            consumer, source = crossing
            a, b = self._nearest(i, j)
            raise UserError(
                f"range({i},{j}) cannot be reused: the long skip from block {self._name(source)} to "
                f"block {self._name(consumer)} crosses its border; range({a},{b}) is self-contained"
            )
        cost = sum(self.block_totals[self.position(i) : self.end(i, j)])
        return block_range(i, j, cost, self.layout.streams)

    def _crossing(self, i: int, j: int) -> tuple[int, int] | None:
        """A long skip (consumer, source) with one end inside the range and one outside."""
        inside = range(self.position(i), self.end(i, j))
        return next((skip for skip in self.backbone.skips.items() if (skip[0] in inside) != (skip[1] in inside)), None)

    def _nearest(self, i: int, j: int) -> tuple[int, int]:
        """The self-contained range closest to one that is not, rather smaller than larger."""
        all_ranges = ((a, b) for a in range(self.blocks) for b in range(a + 1, self.blocks + 1))
        fitting = (r for r in all_ranges if self._crossing(*r) is None)
        return min(fitting, key=lambda r: (abs(r[0] - i) + abs(r[1] - j), r[1] - r[0]))

    def keeps_layout(self, site: Site) -> bool:
        """Whether what leaves a range has the layout of what enters it (so that a change can be stored)."""
        assert site.span is not None
        i, j = site.span
        return self.layouts[self.position(i)] == self.layouts[self.end(i, j)]

    def branch(self, name: str) -> Site:
        """The site of a guidance branch."""
        if name not in self.branches:
            raise UserError(f"this run has no branch {name!r}: it has {', '.join(self.branches)}")
        return branch(name)

    @cached_property
    def ends(self) -> dict[str, int]:
        """MACs per batch row outside the blocks: of every forward, and of "prepare" once per run."""
        return {"prepare": 0, **self.backbone.end_macs(self.layout)}

    @cached_property
    def entry(self) -> int:
        """MACs per batch row of embedding x and time."""
        return sum(self.ends.values()) - self.ends["prepare"] - self.ends["head"]

    @cached_property
    def total(self) -> int:
        """MACs of one whole forward per batch row; what is prepared once per run is not part of it."""
        return self.entry + sum(self.block_totals) + self.ends["head"]

    def _name(self, flat: int) -> int:
        """The block at a flat position; of a transition, the block before it."""
        return sum(position <= flat for position in self.flat) - 1


def _quadratic(block: Block, layout: Layout) -> dict[str, int]:
    """The quadratic coefficients of what sites cost in the number of tokens, by second differences."""
    first, *others = layout.spans
    costs = [
        block.macs(replace(layout, spans=(replace(first, length=first.length + more), *others))) for more in range(3)
    ]
    found = {site: (costs[2][site] - 2 * costs[1][site] + costs[0][site]) // 2 for site in block.sites}
    return {site: coefficient for site, coefficient in found.items() if coefficient}
