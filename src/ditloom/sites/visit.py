"""Inside a block: what its forward calls at its sites and stages. Pure; with a plain plan it does nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from ditloom.contracts.layout import Layout
from ditloom.contracts.plan import PLAIN, Action, BlockPlan, Edit
from ditloom.sites.edits import edited, edited_at

COSTLY = ("logits", "cross_logits")
"""Stages that are only made where they are asked for, and that can only be captured."""


class Visit:
    """One block call under a plan: acts around sites, taps stages, gathers what is to be kept."""

    __slots__ = ("given", "kept", "layout", "plan")

    def __init__(self, plan: BlockPlan, given: Mapping[str, Any], layout: Layout):
        self.plan, self.given, self.layout = plan, given, layout
        self.kept: dict[str, Any] = {}

    def around(self, site: str, fn: Callable[..., Any], *x: Any, rows: Callable[[Tensor], Any] | None = None) -> Any:
        """The output of `fn(*x)` at a site: computed, reused, computed for some rows, mixed, or skipped (zero).

        `rows(index)` computes the output for the tokens index [B, k] only; sites without it refuse action ROWS.
        """
        action = self.plan.action(site)
        if action is Action.REUSE:
            y = self.given[site]
        elif action is Action.SKIP:
            y = tree_map(torch.zeros_like, x[0])
        elif action is Action.ROWS:
            assert rows is not None
            y = scatter_rows(self.given[site], self.given[f"{site}.rows"], rows(self.given[f"{site}.rows"]))
        else:
            y = fn(*x)
            if action is Action.MIX:
                y = mixed(y, self.given[site], self.given[f"{site}.mix"])
        return self._after(site, y)

    def _after(self, site: str, y: Any) -> Any:
        """What leaves a site: kept as it was computed, then tapped. One that has no streams answers to any."""
        if isinstance(y, dict):
            if site in self.plan.keep:
                self.kept[site] = y
            return {stream: self.tap(site, value, stream) for stream, value in y.items()}
        for name in self.plan.keep:
            if name.partition("@")[0] == site:
                self.kept[name] = y
        for edit in self.plan.edits:
            if edit.stage == site:
                y = self._edit(edit, y)
        return y

    def tap(self, stage: str, x: Tensor, stream: str = "image") -> Tensor:
        """The tensor at a stage (tokens on axis 1): captured first if asked, then edited."""
        for name in (stage, f"{stage}@{stream}"):
            if name in self.plan.keep and name not in self.kept:
                self.kept[name] = x
        for edit in self.plan.edits:
            if edit.stage == stage and edit.stream == stream:
                x = self._edit(edit, x)
        return x

    def _edit(self, edit: Edit, x: Tensor) -> Tensor:
        given, rows = self.given.get(edit.key), self.given.get(f"{edit.key}.rows")
        if edit.segment is None:
            return edited(edit.op, x, given, edit.number, rows)
        return edited_at(self.layout.slice(edit.segment), edit.op, x, given, edit.number, rows)

    def wants(self, stage: str) -> bool:
        """Whether a costly stage or an auxiliary value must be materialised."""
        return any(name.partition("@")[0] == stage for name in self.plan.keep)

    def keep(self, stage: str, value: Any) -> None:
        """Hand out a value that is only materialised on request, under the names it was asked for."""
        self.kept.update({name: value for name in self.plan.keep if name.partition("@")[0] == stage})

    @property
    def extra_keys(self) -> tuple[Tensor, Tensor] | None:
        """Stored keys and values [B, n, h, d] to append after the rotary embedding, or None."""
        return self.given.get("extra_keys")


class BareVisit:
    """Nothing attached: every call falls through."""

    __slots__ = ()
    extra_keys = None

    def around(self, site: str, fn: Callable[..., Any], *x: Any, rows: Any = None) -> Any:
        return fn(*x)

    def tap(self, stage: str, x: Tensor, stream: str = "image") -> Tensor:
        return x

    def wants(self, stage: str) -> bool:
        return False

    def keep(self, stage: str, value: Any) -> None: ...

    @property
    def kept(self) -> dict[str, Any]:
        return {}


BARE = BareVisit()


def visit(plan: BlockPlan | None, given: Mapping[str, Any], layout: Layout) -> Visit | BareVisit:
    """The visit of one block call."""
    if (plan is None or plan == PLAIN) and "extra_keys" not in given:
        return BARE
    return Visit(plan or PLAIN, given, layout)


def take_rows(x: Tensor, index: Tensor) -> Tensor:
    """Tokens index [B, k] of x [B, n, D]."""
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[-1]))


def scatter_rows(stored: Tensor, index: Tensor, fresh: Tensor) -> Tensor:
    """`stored` [B, n, D] with the tokens index [B, k] replaced by `fresh` [B, k, D]."""
    return stored.scatter(1, index[..., None].expand(-1, -1, stored.shape[-1]), fresh.to(stored.dtype))


def mixed(computed: Any, stored: Any, weight: Tensor) -> Any:
    """weight * computed + (1 - weight) * stored, over a tensor or a dict of streams."""
    if isinstance(computed, dict):
        return {k: mixed(v, stored[k], weight) for k, v in computed.items()}
    return weight.to(computed.dtype) * computed + (1 - weight).to(computed.dtype) * stored
