"""What a run keeps of computed sites: per handler, site and branch, with the fingerprint of what made it."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ditloom.contracts.clock import Rows
from ditloom.contracts.method import Predictor
from ditloom.sites.codecs import zip_map
from ditloom.sites.fingerprint import MadeOf

Place = tuple[str, str]
"""Who stores and where: a handler's key and a site's label."""


@dataclass(frozen=True, eq=False)
class Entry:
    """One stored value: the whole batch it was computed in, whose rows are `rows`. Equal only to itself."""

    step: int
    whole: Any
    rows: Rows
    made_of: MadeOf

    @cached_property
    def bytes(self) -> int:
        """Bytes of its tensors."""
        return _bytes(self.whole)

    def part(self, branch: str) -> Any:
        """The rows of one branch, as a view."""
        at = self.rows.slice(branch)
        return zip_map(lambda t: t[at], self.whole)

    def alone(self, branch: str) -> Entry:
        """An entry of one branch only, with memory of its own."""
        own = zip_map(torch.clone, self.part(branch))
        return Entry(self.step, own, Rows((branch,), self.rows.samples), self.made_of)


class Store:
    """Histories of computed values; predicted values never enter."""

    def __init__(self) -> None:
        self._entries: dict[Place, dict[str, deque[Entry]]] = {}
        self._bytes: int | None = 0

    def push(self, place: Place, rows: Rows, step: int, value: Any, depth: int, made_of: MadeOf) -> None:
        """Store a computed value for every branch in `rows`, keeping the last `depth` of each, one per step."""
        entry = Entry(step, zip_map(_owned, value), rows, {b: made_of[b] for b in rows.branches})
        histories = self._entries.setdefault(place, {})
        for branch in rows.branches:
            history = histories.setdefault(branch, deque(maxlen=depth))
            if history and history[-1].step == step:
                history.pop()
            history.append(entry)
        if len(histories) > len(rows.branches):
            _part_ways(histories)
        self._bytes = None

    def ready(self, place: Place, branches: Sequence[str], least: int, made_of: MadeOf) -> bool:
        """Whether every branch holds at least `least` values made of the same things."""
        return all(len(self._valid(place, b, made_of)) >= least for b in branches)

    def predict(self, place: Place, rows: Rows, predictor: Predictor, step: int, made_of: MadeOf) -> Any:
        """The predicted value for these rows; branches computed together are predicted together."""
        histories = [self._valid(place, b, made_of) for b in rows.branches]
        first = histories[0]
        if all(h == first for h in histories) and all(e.rows == rows for e in first):
            return predictor([(e.step, e.whole) for e in first], step)
        parts = [
            predictor([(e.step, e.part(b)) for e in history], step)
            for b, history in zip(rows.branches, histories, strict=True)
        ]
        return zip_map(lambda *t: torch.cat(t), *parts)

    def steps(self, place: Place, branch: str) -> list[int]:
        """The steps at which what is held for a branch was computed, oldest first."""
        return [entry.step for entry in self._entries.get(place, {}).get(branch, ())]

    def _valid(self, place: Place, branch: str, made_of: MadeOf) -> list[Entry]:
        mark = made_of[branch]
        return [e for e in self._entries.get(place, {}).get(branch, ()) if e.made_of[branch] == mark]

    def drop(self, place: Place) -> None:
        """Forget one site of one handler."""
        if self._entries.pop(place, None):
            self._bytes = None

    def scramble(self, branch: str) -> None:
        """Overwrite one branch's values with noise (to show that no other branch depends on them)."""
        for histories in self._entries.values():
            for i, e in enumerate(histories.get(branch, ())):
                noise = zip_map(torch.randn_like, e.part(branch))
                histories[branch][i] = Entry(e.step, noise, Rows((branch,), e.rows.samples), e.made_of)

    def clear(self) -> None:
        """Forget everything."""
        self._entries.clear()
        self._bytes = 0

    @property
    def bytes(self) -> int:
        """Bytes held, each tensor counted once."""
        if self._bytes is None:
            entries = {id(e): e for hs in self._entries.values() for history in hs.values() for e in history}
            self._bytes = sum(e.bytes for e in entries.values())
        return self._bytes


def _bytes(value: Any) -> int:
    if isinstance(value, Tensor):
        return value.nbytes
    return sum(map(_bytes, value.values() if isinstance(value, dict) else value))


def _owned(tensor: Tensor) -> Tensor:
    """Without its graph, and not a view that would keep a larger tensor alive."""
    tensor = tensor.detach()
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()


def _part_ways(histories: dict[str, deque[Entry]]) -> None:
    """Where one branch moved on without another, each keeps its own rows, not the batch they once shared."""
    for branch, history in histories.items():
        for i, entry in enumerate(history):
            if any(entry not in histories.get(other, ()) for other in entry.rows.branches):
                history[i] = entry.alone(branch)
