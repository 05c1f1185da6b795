"""What a run computed, reused and predicted, and at what cost."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from ditloom.contracts.plan import Action
from ditloom.contracts.site import Site


@dataclass
class Report:
    """Counts per site and action, MACs, and the step-by-block map of a run.

    counts: (site label, action) -> visits, one per branch forward. cells: (step, block or -1 for a whole forward) ->
    share of its MACs that was not computed. macs and full_macs: executed, and what the plain run would have taken.
    """

    counts: Counter[tuple[str, str]] = field(default_factory=Counter)
    cells: dict[tuple[int, int], float] = field(default_factory=dict)
    macs: int = 0
    full_macs: int = 0
    forwards: int = 0
    bytes_held: int = 0
    notes: list[str] = field(default_factory=list)

    def visit(self, site: Site, action: Action, times: int = 1) -> None:
        """One visit of a site."""
        self.counts[site.label, action.value] += times

    def note(self, sentence: str) -> None:
        """A remark for the user, once."""
        if sentence not in self.notes:
            self.notes.append(sentence)

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
