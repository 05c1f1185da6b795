"""Attention rules: who may attend to whom, built by composing masks, compiled to the cheapest exact plan.

A rule is a weighted sum of attentions (terms), each with its own softmax; a plain mask is one term. A term's masks
are AND-ed. Masks speak of segments; what cannot be said by whole segments is a boolean matrix. Everything here is
static except the gates, tensors named by the masks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import IntEnum
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

from ditloom.contracts.errors import UserError
from ditloom.contracts.layout import Layout
from ditloom.contracts.streams import Context

Gates = Mapping[str, Tensor]


class Allow(IntEnum):
    """What a mask says of a pair (query segment, key segment)."""

    NONE = 0
    SOME = 1
    ALL = 2


@dataclass(frozen=True)
class Mask:
    """The base mask: everything is allowed. Subclasses restrict."""

    def pair(self, query: str, key: str) -> Allow:
        """Whether all, none or some of a segment pair is allowed."""
        return Allow.ALL

    def block(self, query: str, key: str, layout: Layout, gates: Gates) -> Tensor:
        """For a pair with SOME: a boolean that broadcasts to [B, n_query, n_key]."""
        raise NotImplementedError

    def __and__(self, other: Mask) -> Rule:
        return Rule((Term((self, other)),))


@dataclass(frozen=True)
class Padding(Mask):
    """Only the real tokens of `segment` are keys; gate `gate` [B, n] is True there."""

    segment: str = "text"
    gate: str = "text_mask"

    def pair(self, query: str, key: str) -> Allow:
        return Allow.SOME if key == self.segment else Allow.ALL

    def block(self, query: str, key: str, layout: Layout, gates: Gates) -> Tensor:
        return gates[self.gate][:, None, :]


@dataclass(frozen=True)
class Isolate(Mask):
    """Rows of each named segment see only their own segment; everyone else sees all."""

    segments: tuple[str, ...]

    def pair(self, query: str, key: str) -> Allow:
        return Allow.ALL if query not in self.segments or query == key else Allow.NONE


@dataclass(frozen=True)
class Only(Mask):
    """Queries of `queries` see only `keys`; other queries are not restricted (siamese branches are two such terms)."""

    queries: tuple[str, ...]
    keys: tuple[str, ...]

    def pair(self, query: str, key: str) -> Allow:
        return Allow.ALL if query not in self.queries or key in self.keys else Allow.NONE


@dataclass(frozen=True)
class Scenes(Mask):
    """Text i and video i see each other; texts see only their own scene; all video segments see each other."""

    texts: tuple[str, ...]
    videos: tuple[str, ...]

    def pair(self, query: str, key: str) -> Allow:
        scene = {name: i for names in (self.texts, self.videos) for i, name in enumerate(names)}
        if query in self.videos and key in self.videos:
            return Allow.ALL
        return Allow.ALL if scene.get(query) == scene.get(key) else Allow.NONE


@dataclass(frozen=True)
class Regions(Mask):
    """Regional prompts: text i and the image tokens of region i see each other, image tokens see those they share a
    region with, uncovered ones see each other; texts do not see other texts. Gate `gate` [B, R, n_image] holds the
    region masks."""

    texts: tuple[str, ...]
    image: str = "image"
    gate: str = "regions"

    def pair(self, query: str, key: str) -> Allow:
        known = (*self.texts, self.image)
        if query not in known or key not in known:
            return Allow.ALL
        if query in self.texts and key in self.texts:
            return Allow.ALL if query == key else Allow.NONE
        return Allow.SOME

    def block(self, query: str, key: str, layout: Layout, gates: Gates) -> Tensor:
        regions = gates[self.gate].bool()
        if key in self.texts:
            return regions[:, self.texts.index(key), :, None].expand(-1, -1, layout.span(key).length)
        if query in self.texts:
            return regions[:, self.texts.index(query), None, :].expand(-1, layout.span(query).length, -1)
        shared = torch.einsum("brq,brk->bqk", regions.float(), regions.float()) > 0
        covered = regions.any(dim=1)
        return shared | ~(covered[:, :, None] | covered[:, None, :])


@dataclass(frozen=True)
class Causal(Mask):
    """Chunk c of `segment` (equal chunks of `chunk` tokens) sees chunks c - window + 1 .. c; window 0: all before."""

    segment: str
    chunk: int
    window: int = 0

    def pair(self, query: str, key: str) -> Allow:
        return Allow.SOME if query == key == self.segment else Allow.ALL

    def block(self, query: str, key: str, layout: Layout, gates: Gates) -> Tensor:
        chunk = torch.arange(layout.span(self.segment).length) // self.chunk
        behind = chunk[:, None] - chunk[None, :]
        allowed = behind >= 0
        return (allowed & (behind < self.window) if self.window else allowed)[None]


@dataclass(frozen=True)
class LocalWindow(Mask):
    """Image tokens see image tokens within `radius` on the grid: a disc, or a square."""

    radius: float
    shape: Literal["disc", "square"] = "disc"
    segment: str = "image"

    def pair(self, query: str, key: str) -> Allow:
        return Allow.SOME if query == key == self.segment else Allow.ALL

    def block(self, query: str, key: str, layout: Layout, gates: Gates) -> Tensor:
        height, width = layout.grid[-2:]
        row = torch.arange(height).repeat_interleave(width)
        column = torch.arange(width).repeat(height)
        dy, dx = row[:, None] - row[None], column[:, None] - column[None]
        if self.shape == "square":
            return ((dy.abs() <= self.radius) & (dx.abs() <= self.radius))[None]
        return (dy**2 + dx**2 <= self.radius**2)[None]


@dataclass(frozen=True)
class Term:
    """One attention: its masks (AND), and its weight: a number, or a gate [B, n_query] by name."""

    masks: tuple[Mask, ...] = ()
    weight: float | str = 1.0


@dataclass(frozen=True)
class Rule:
    """A weighted sum of attentions; one term of weight 1 is an ordinary mask."""

    terms: tuple[Term, ...]

    def __and__(self, other: Rule | Mask) -> Rule:
        """AND further masks into every term."""
        masks = (other,) if isinstance(other, Mask) else _single(other).masks
        return Rule(tuple(Term((*term.masks, *masks), term.weight) for term in self.terms))


def rule(*masks: Mask) -> Rule:
    """The rule of some masks AND-ed."""
    return Rule((Term(masks),))


def both(first: Rule | None, second: Rule | None) -> Rule | None:
    """The conjunction of two rules, either of which may be absent."""
    if first is None or second is None:
        return first or second
    return second & first if len(second.terms) > 1 else first & second


def _single(rule: Rule) -> Term:
    if len(rule.terms) != 1:
        raise UserError("two attention rules that are both weighted sums cannot be combined")
    return rule.terms[0]


@dataclass(frozen=True)
class Plan:
    """How a term is evaluated for a layout: none (no mask), split (whole segments), or dense (a boolean matrix).

    Its tensors are found in the gates: "mask.N" [B or 1, N, N], or "queries.N.G" and "keys.N.G", token indices of
    group G of term N.
    """

    kind: Literal["none", "split", "dense"]
    weight: float | str = 1.0
    groups: int = 0


@dataclass(frozen=True)
class Settled:
    """A rule worked out for one layout: what blocks are given, a compile-time constant."""

    rule: Rule
    layout: Layout
    plans: tuple[Plan, ...]


def settle(rule: Rule, layout: Layout, gates: Gates, device: torch.device | None = None) -> tuple[Settled, Gates]:
    """Work a rule out for a layout, once per forward: the cheapest exact plan of every term, and all its tensors.

    A query that may attend to nothing is refused.
    """
    made = dict(gates)
    plans = []
    for n, term in enumerate(rule.terms):
        kind, groups = compile_term(term, layout)
        if kind == "dense":
            mask = made[f"mask.{n}"] = dense(term, layout, gates, device)
            if may_be_empty(term, layout):
                check_rows(mask)
        for g, (queries, keys) in enumerate(groups):
            made[f"queries.{n}.{g}"] = _tokens(layout, queries, device)
            made[f"keys.{n}.{g}"] = _tokens(layout, keys, device)
        plans.append(Plan(kind, term.weight, len(groups)))
    return Settled(rule, layout, tuple(plans)), made


def with_padding(context: Context, layout: Layout, mask: Tensor | None) -> Context:
    """The context of a forward whose segment "text" has padding, mask [B, n] being True at real tokens."""
    return with_paddings(context, layout, {"text": mask})


def with_paddings(context: Context, layout: Layout, masks: Mapping[str, Tensor | None]) -> Context:
    """The same for several segments, by name."""
    gates = {f"{segment}_mask": mask for segment, mask in masks.items() if mask is not None}
    if not gates:
        return context
    paddings = [Padding(segment, f"{segment}_mask") for segment, mask in masks.items() if mask is not None]
    settled, made = settle(rule(*paddings), layout, gates, next(iter(gates.values())).device)
    return replace(context, rule=settled, gates=dict(made))


def pairs(settled: Settled, extra: int = 0) -> int:
    """Pairs of query and key that are evaluated, over all terms; every query also sees `extra` appended keys."""
    layout, total = settled.layout, 0
    for term, plan in zip(settled.rule.terms, settled.plans, strict=True):
        if plan.kind != "split":
            total += layout.length() * (layout.length() + extra)
            continue
        for queries, keys in compile_term(term, layout)[1]:
            seen = sum(layout.span(k).length for k in keys)
            total += sum(layout.span(q).length for q in queries) * (seen + extra)
    return total


def is_costly(rule: Rule | Settled | None) -> bool:
    """Whether attention under a rule evaluates other pairs than without one: not so for a single mask."""
    return isinstance(rule, Settled) and (len(rule.plans) > 1 or any(plan.kind == "split" for plan in rule.plans))


def is_open(rule: Rule | None, segment: str, layout: Layout) -> bool:
    """Whether every other segment may attend to all of `segment` in every term."""
    if rule is None:
        return True
    others = [name for name in _names(layout) if name != segment]
    return all(m.pair(q, segment) is Allow.ALL for term in rule.terms for m in term.masks for q in others)


Groups = tuple[tuple[tuple[str, ...], tuple[str, ...]], ...]


@lru_cache(maxsize=256)
def may_be_empty(term: Term, layout: Layout) -> bool:
    """Whether some segment has no key segment that it sees in full: only then can one of its rows be empty."""
    names = _names(layout)
    return any(not any(all(m.pair(q, k) is Allow.ALL for m in term.masks) for k in names) for q in names)


@lru_cache(maxsize=256)
def compile_term(term: Term, layout: Layout) -> tuple[Literal["none", "split", "dense"], Groups]:
    """The cheapest exact kind of a term, with its groups (query segments, key segments) when split.

    A segment that may attend to nothing is refused.
    """
    names = _names(layout)
    allowed = {(q, k): min((m.pair(q, k) for m in term.masks), default=Allow.ALL) for q in names for k in names}
    for q in names:
        if all(allowed[q, k] is Allow.NONE for k in names):
            raise UserError(f"the attention rule leaves segment {q!r} nothing to attend to")
    if all(a is Allow.ALL for a in allowed.values()):
        return "none", ()
    if any(a is Allow.SOME for a in allowed.values()):
        return "dense", ()
    groups: dict[tuple[str, ...], list[str]] = {}
    for q in names:
        groups.setdefault(tuple(k for k in names if allowed[q, k] is Allow.ALL), []).append(q)
    return "split", tuple((tuple(queries), keys) for keys, queries in groups.items())


def dense(term: Term, layout: Layout, gates: Gates, device: torch.device | None = None) -> Tensor:
    """The boolean matrix [B or 1, N, N] of a term over the joint sequence."""
    names = _names(layout)
    rows = [torch.cat(_same_batch([_block(term, q, k, layout, gates, device) for k in names]), dim=2) for q in names]
    return torch.cat(_same_batch(rows), dim=1)


def check_rows(mask: Tensor) -> None:
    """Refuse a boolean mask [..., N, N] with an empty query row, whose softmax would be NaN."""
    empty = ~mask.any(dim=-1)
    if bool(empty.any()):
        raise UserError(f"the attention rule leaves {int(empty.sum())} query tokens nothing to attend to")


def _block(term: Term, query: str, key: str, layout: Layout, gates: Gates, device: torch.device | None) -> Tensor:
    shape = (1, layout.span(query).length, layout.span(key).length)
    allow = torch.ones(shape, dtype=torch.bool, device=device)
    for mask in term.masks:
        says = mask.pair(query, key)
        if says is Allow.NONE:
            allow = torch.zeros_like(allow)
        elif says is Allow.SOME:
            allow = allow & mask.block(query, key, layout, gates).to(allow.device)
    return allow


def _same_batch(parts: list[Tensor]) -> list[Tensor]:
    batch = max(p.shape[0] for p in parts)
    return [p.expand(batch, -1, -1) for p in parts]


def _names(layout: Layout) -> list[str]:
    return [span.name for stream in layout.streams for span in layout.of(stream)]


def _tokens(layout: Layout, names: tuple[str, ...], device: torch.device | None) -> Tensor:
    slices = [layout.joint_slice(name) for name in names]
    return torch.cat([torch.arange(s.start, s.stop, device=device) for s in slices])
