"""What a run keeps of computed sites: per handler, site and branch, with the fingerprint of what made it."""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._pytree import tree_leaves, tree_map

from ditloom.contracts.clock import Rows
from ditloom.contracts.method import Predictor
from ditloom.contracts.site import Site


@dataclass(frozen=True)
class Entry:
    """One stored value: the whole batch it was computed in, whose rows are `rows`."""

    step: int
    whole: Any
    rows: Rows
    made_of: Hashable

    def part(self, branch: str) -> Any:
        """The rows of one branch, as a view."""
        at = self.rows.slice(branch)
        return tree_map(lambda t: t[at], self.whole)


Key = tuple[str, Site, str]


class Store:
    """Histories of computed values; predicted values never enter."""

    def __init__(self) -> None:
        self._entries: dict[Key, deque[Entry]] = {}

    def push(
        self, owner: str, site: Site, rows: Rows, step: int, value: Any, depth: int, made_of: Hashable
    ) -> None:
        """Store a computed value for every branch in `rows`, keeping the last `depth` of each."""
        entry = Entry(step, tree_map(lambda t: t.detach(), value), rows, made_of)
        for branch in rows.branches:
            key = (owner, site, branch)
            if key not in self._entries:
                self._entries[key] = deque(maxlen=depth)
            self._entries[key].append(entry)

    def ready(self, owner: str, site: Site, rows: Rows, depth: int, made_of: Hashable) -> bool:
        """Whether every branch holds at least `depth` values made of the same things."""
        return all(len(self._valid(owner, site, b, made_of)) >= depth for b in rows.branches)

    def predict(
        self, owner: str, site: Site, rows: Rows, predictor: Predictor, step: int, made_of: Hashable
    ) -> Any:
        """The predicted value for these rows; branches computed together are predicted together."""
        histories = [self._valid(owner, site, b, made_of) for b in rows.branches]
        first = histories[0]
        together = all(h == first for h in histories) and all(e.rows == rows for e in first)
        if together:
            return predictor([(e.step, e.whole) for e in first], step)
        parts = [
            predictor([(e.step, e.part(b)) for e in history], step)
            for b, history in zip(rows.branches, histories, strict=True)
        ]
        return tree_map(lambda *t: torch.cat(t), *parts)

    def last(self, owner: str, site: Site, rows: Rows, made_of: Hashable) -> Entry:
        """The newest entry of the first branch."""
        return self._valid(owner, site, rows.branches[0], made_of)[-1]

    def _valid(self, owner: str, site: Site, branch: str, made_of: Hashable) -> Sequence[Entry]:
        entries = self._entries.get((owner, site, branch), ())
        return _Identical(e for e in entries if e.made_of == made_of)

    def scramble(self, branch: str) -> None:
        """Overwrite one branch's values with noise (to show that no other branch depends on them)."""
        for (_, _, name), entries in self._entries.items():
            if name == branch:
                for i, e in enumerate(entries):
                    noise = tree_map(torch.randn_like, e.part(name))
                    entries[i] = Entry(e.step, noise, Rows((name,), e.rows.samples), e.made_of)

    def clear(self) -> None:
        """Forget everything."""
        self._entries.clear()

    @property
    def bytes(self) -> int:
        """Bytes held, each tensor counted once."""
        wholes = {id(e): e for entries in self._entries.values() for e in entries}
        return sum(t.nbytes for e in wholes.values() for t in tree_leaves(e.whole))


class _Identical(list[Entry]):
    """A history that equals another only if it holds the very same entries."""

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, list) or len(self) != len(other):
            return False
        return all(a is b for a, b in zip(self, other, strict=True))

    __hash__ = None  # type: ignore[assignment]
