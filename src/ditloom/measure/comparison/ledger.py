"""What of a comparison is measured and what is still to do, kept as it grows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from ditloom.measure.comparison.bench import FAILED, Bench
from ditloom.measure.comparison.candidates import PLAIN, Candidate
from ditloom.measure.comparison.folder import Folder
from ditloom.measure.comparison.row import Row

if TYPE_CHECKING:
    from ditloom.measure.evidence import Pictures

Follow = Callable[[str, int, int], None]
"""Called with the set that is being measured, the steps of batches done, and all there will be."""


@dataclass
class Ledger:
    """Rows and pictures measured so far: taken from a folder where they are there, else measured and kept."""

    bench: Bench
    folder: Folder | None
    follow: Follow
    rows: dict[Candidate, Row] = field(default_factory=dict)
    pictures: dict[str, Pictures] = field(default_factory=dict)
    done: int = 0
    total: int = 0

    def measure(self, wanted: Sequence[Candidate], later: int = 0) -> None:
        """Measure what is not yet there; `later`: more work that is expected after it."""
        missing = [candidate for candidate in wanted if not self._found(candidate)]
        self.total = self.done + later + sum(map(self.work, missing))
        for candidate in missing:
            before = self.done
            self.bench.on_step = lambda name=candidate.name: self._step(name)  # type: ignore[misc]
            row, pictures = self.bench.measured(candidate)
            if self.folder is not None and not (row.refused or "").startswith(FAILED):
                self.folder.keep(candidate, row, pictures)
            self._note(candidate, row, pictures)
            self.done = before + self.work(candidate)

    def _found(self, candidate: Candidate) -> bool:
        if candidate in self.rows:
            return True
        row = self.folder.row(candidate) if self.folder is not None else None
        if row is None or self.folder is None:
            return False
        pictures = None if row.refused is not None else self.folder.pictures(candidate)
        self._note(candidate, row, pictures)
        if candidate == PLAIN and pictures is not None:
            self.bench.knows_plain(row, pictures)
        return True

    def _note(self, candidate: Candidate, row: Row, pictures: Pictures | None) -> None:
        self.rows[candidate] = replace(row, name=candidate.name, methods=candidate.methods, control=candidate.control)
        if pictures is not None:
            self.pictures[candidate.name] = pictures

    def _step(self, name: str) -> None:
        self.done += 1
        self.follow(name, self.done, max(self.total, self.done))

    def work(self, candidate: Candidate) -> int:
        """Steps of batches that measuring takes."""
        question = self.bench.question
        steps = int(question.settings["steps"])
        own = int(candidate.methods[0].rpartition("=")[2]) if candidate.control else steps
        turns = question.repeats * (own if candidate == PLAIN else own + steps)
        return sum(1 for _ in question.groups()) * own + turns
