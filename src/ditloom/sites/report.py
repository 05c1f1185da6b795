"""What a run computed, reused and predicted, and at what cost."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ditloom.contracts.plan import Action
from ditloom.contracts.site import Site


@dataclass
class Report:
    """Counts per site and action, MACs, and the step-by-block map of a run.

    cells: (step, block or -1 for a whole forward) -> share of its MACs that was not computed. macs: executed, probes
    and added segments included. full_macs: what sampling without any method would have taken, so that a method which
    adds work has a negative share saved. forwards: of one branch each.
    """

    cells: dict[tuple[int, int], float] = field(default_factory=dict)
    macs: int = 0
    full_macs: int = 0
    forwards: int = 0
    bytes_held: int = 0
    notes: list[str] = field(default_factory=list)
    _visited: Counter[tuple[str, str]] = field(default_factory=Counter)
    _passed: Counter[Sequence[str]] = field(default_factory=Counter)

    def visit(self, site: Site, action: Action, times: int = 1) -> None:
        """A controlled site was visited, by `times` branches."""
        self._visited[site.label, action.value] += times

    def passed(self, labels: tuple[str, ...], times: int) -> None:
        """Several controlled sites were computed without further ado, by `times` branches."""
        self._passed[labels] += times

    def note(self, sentence: str) -> None:
        """A remark for the user, once, whatever the numbers in it."""
        if not any(_without_numbers(sentence) == _without_numbers(said) for said in self.notes):
            self.notes.append(sentence)

    @property
    def counts(self) -> Counter[tuple[str, str]]:
        """(site label, action) -> visits, one per branch and forward."""
        found = Counter(self._visited)
        for labels, times in self._passed.items():
            for label in labels:
                found[label, Action.COMPUTE.value] += times
        return found

    def count(self, kind: str, action: Action) -> int:
        """Visits of all sites of a kind with an action."""
        return sum(n for (label, a), n in self.counts.items() if a == action.value and label.split("(")[0] == kind)

    @property
    def share_saved(self) -> float:
        """Share of the plain run's MACs that was not executed."""
        return 1 - self.macs / self.full_macs if self.full_macs else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "macs": self.macs,
            "full_macs": self.full_macs,
            "share_saved": self.share_saved,
            "forwards": self.forwards,
            "bytes_held": self.bytes_held,
            "counts": {f"{site} {action}": n for (site, action), n in sorted(self.counts.items())},
            "cells": [[step, block, share] for (step, block), share in sorted(self.cells.items())],
            "notes": self.notes,
        }


def _without_numbers(sentence: str) -> str:
    return re.sub(r"\d[\d.e+-]*", "", sentence)
