"""Edits of one stage, by registered name: pure functions of the tensor, what is given, and a static number."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

EditFn = Callable[[Tensor, Any, float], Tensor]
EDITS: dict[str, EditFn] = {}
REPLACING = frozenset({"replace", "copy-rows"})
ORDER = ("capture", "replace", "copy-rows", "lerp", "add", "append")


def register_edit(name: str) -> Callable[[EditFn], EditFn]:
    """Make `fn(x, given, number) -> x` usable in plans as `name`; x has its tokens on axis 1."""

    def note(fn: EditFn) -> EditFn:
        EDITS[name] = fn
        return fn

    return note


def canonical_rank(op: str) -> int:
    """The order of operations at one stage: captures see it untouched, then it is replaced, then changed."""
    return ORDER.index(op) if op in ORDER else len(ORDER)


@register_edit("replace")
def replace(x: Tensor, given: Tensor, number: float) -> Tensor:
    """The given tensor instead."""
    return given.to(x.dtype)


@register_edit("add")
def add(x: Tensor, given: Tensor, number: float) -> Tensor:
    """x + given."""
    return x + given.to(x.dtype)


@register_edit("lerp")
def lerp(x: Tensor, given: Tensor, number: float) -> Tensor:
    """number * x + (1 - number) * given."""
    return number * x + (1 - number) * given.to(x.dtype)


@register_edit("copy-rows")
def copy_rows(x: Tensor, given: Tensor, number: float) -> Tensor:
    """Rows where given [B] is true become row `number`."""
    mask = given.reshape(-1, *[1] * (x.ndim - 1))
    return torch.where(mask, x[int(number) : int(number) + 1], x)


def edited(op: str, x: Tensor, given: Any, number: float, rows: Tensor | None = None) -> Tensor:
    """x after an edit; where `rows` [B] is given, only those rows change."""
    y = EDITS[op](x, given, number)
    return y if rows is None else torch.where(rows.reshape(-1, *[1] * (x.ndim - 1)), y, x)


def edited_at(at: slice, op: str, x: Tensor, given: Any, number: float, rows: Tensor | None = None) -> Tensor:
    """The same for some tokens only."""
    return torch.cat([x[:, : at.start], edited(op, x[:, at], given, number, rows), x[:, at.stop :]], dim=1)
