"""One call of a foreign transformer: its arguments by name, and which rows belong to which guidance branch."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from ditloom.contracts.clock import Rows
from ditloom.contracts.streams import Memory
from ditloom.sites.fingerprint import Same


@dataclass(frozen=True, eq=False)
class Call:
    """Arguments of a root forward. `rows` names the branch of every batch row; `static` the arguments without rows."""

    values: Mapping[str, Any]
    rows: Rows
    static: Collection[str] = ()

    def __getitem__(self, name: str) -> Any:
        """An argument; None where it was not given."""
        return self.values.get(name)

    def of(self, branches: tuple[str, ...]) -> Call:
        """The same call with the rows of some branches only."""
        if branches == self.rows.branches:
            return self
        at = [self.rows.slice(branch) for branch in branches]
        total = self.rows.total

        def part(value: Any) -> Any:
            if not isinstance(value, Tensor) or value.ndim == 0 or len(value) != total:
                return value
            return value[at[0]] if len(at) == 1 else torch.cat([value[a] for a in at])

        values = {k: v if k in self.static else tree_map(part, v) for k, v in self.values.items()}
        return replace(self, values=values, rows=Rows(branches, self.rows.samples))


@dataclass(frozen=True)
class Arguments(Memory):
    """A call in the place of what a native backbone prepares: everything it is told is told anew on every call."""

    call: Call | None = None


class Signature:
    """The parameter names of a root forward, to give every argument its name."""

    def __init__(self, module: nn.Module):
        self.names = tuple(inspect.signature(type(module).forward).parameters)[1:]

    def bind(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """Arguments by name."""
        return {**dict(zip(self.names, args, strict=False)), **kwargs} if args else dict(kwargs)


class Constants:
    """Whether a branch is told the same as before, besides x and time: by identity, and where that fails by value.

    Pipelines hand the same tensors to every step; a caller who makes them anew is understood as well.
    """

    def __init__(self) -> None:
        self._held: dict[Hashable, tuple[list[Any], list[Any], int]] = {}

    def mark(self, key: Hashable, told: Mapping[str, Any]) -> int:
        """A number that changes when what is told under `key` changes."""
        leaves = list(_leaves(told))
        marks = [Same(leaf) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        before = self._held.get(key)
        if before is None or not (before[0] == marks or _alike(before[1], leaves, before[0], marks)):
            self._held[key] = (marks, leaves, before[2] + 1 if before else 0)
        else:
            self._held[key] = (marks, leaves, before[2])
        return self._held[key][2]


def _leaves(told: Mapping[str, Any]) -> Iterator[Any]:
    """What is told, one by one, containers opened."""
    for value in told.values():
        if isinstance(value, Tensor) or value is None:
            yield value
        else:
            yield from tree_leaves(value)


def _alike(old: list[Any], new: list[Any], old_marks: list[Any], new_marks: list[Any]) -> bool:
    """Equal in value; a tensor written in place since cannot be compared with what it was."""
    if len(old) != len(new):
        return False
    return all(p == q or _equal(a, b, p) for a, b, p, q in zip(old, new, old_marks, new_marks, strict=True))


def _equal(a: Any, b: Any, mark: Any) -> bool:
    if not (isinstance(a, Tensor) and isinstance(b, Tensor)):
        return False
    same_kind = a.shape == b.shape and a.dtype == b.dtype and a.device == b.device
    return a is not b and same_kind and Same(a) == mark and torch.equal(a, b)
