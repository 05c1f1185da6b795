"""Sites: typed, named places where a method may act."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

Level = Literal["run", "blocks", "block", "attention"]
_FORM = re.compile(r"(?P<kind>[a-z_]+)(?:\((?P<at>[^)]*)\))?$")


@dataclass(frozen=True)
class Site:
    """One place: `kind` at a block, at a range of blocks, or at a named branch.

    level: run (step, branch, output, velocity, latent, segments), blocks (range, block_in, block_out, skip,
    modulated_in, time_embedding), block (attn, mlp and their like) or attention (its stages).
    block: its block index (0-based), or None. span: (i, j) for a range: from what enters block i to what enters
    block j. branch: for `branch(name)`. boundary: where its output is taken ("pre-gate", "gated", "pre-projection").
    cost: MACs per batch row.
    """

    kind: str
    level: Level = "block"
    block: int | None = None
    span: tuple[int, int] | None = None
    branch: str | None = None
    name: str = ""
    boundary: str = "pre-gate"
    streams: tuple[str, ...] = ("image",)
    cost: int = 0
    rows: bool = False

    @cached_property
    def label(self) -> str:
        """How the site is written: attn(3), range(1,12), branch(uncond), output."""
        if self.span is not None:
            return f"{self.kind}({self.span[0]},{self.span[1]})"
        if self.block is not None:
            return f"{self.name or self.kind}({self.block})"
        return f"{self.kind}({self.branch})" if self.branch else self.kind

    @property
    def inner(self) -> str:
        """Its name inside the block."""
        return self.name or self.kind

    def __str__(self) -> str:
        return self.label

    def encloses(self, other: Site) -> bool:
        """True when reusing this site makes `other` not run."""
        if self.level == "run":
            return self.kind in ("output", "step") and other.level != "run"
        if self.span is None or other == self:
            return False
        i, j = self.span
        if other.span is not None:
            return i <= other.span[0] and other.span[1] <= j
        return other.block is not None and i <= other.block < j


def block_range(i: int, j: int, cost: int = 0, streams: tuple[str, ...] = ("image",)) -> Site:
    """The site from what enters block i to what enters block j (j = L: what enters the head)."""
    return Site("range", "blocks", span=(i, j), cost=cost, streams=streams)


OUTPUT = Site("output", "run")


def branch(name: str) -> Site:
    """The site of a whole guidance branch."""
    return Site("branch", "run", branch=name)


def parse(text: str) -> tuple[str, str]:
    """'attn(3)' to ('attn', '3'); 'output' to ('output', '')."""
    match = _FORM.match(text.strip())
    if match is None:
        from ditloom.contracts.errors import UserError

        raise UserError(f"{text!r} is not a site: write kind, kind(block), kind(*) or range(i,j)")
    return match["kind"], (match["at"] or "").replace(" ", "")
