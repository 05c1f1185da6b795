"""The answer of a comparison: its rows under one protocol, what follows from them, and what was picked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from ditloom.contracts.errors import UserError
from ditloom.contracts.metric import Protocol
from ditloom.measure.comparison.candidates import Candidate, about, fewer_steps
from ditloom.measure.comparison.choice import HIGHER_IS_BETTER, Pick, better
from ditloom.measure.comparison.front import matched_steps, pareto
from ditloom.measure.comparison.question import Question, evaluations_of, in_words
from ditloom.measure.comparison.row import Row, by_name
from ditloom.training.durable import explained, json_bytes, replace_file

if TYPE_CHECKING:
    from ditloom.measure.evidence import Pictures

FORMAT = 1
QUIET = 0.85
"""A process that is not held up by others has at least so much of one processor."""


@dataclass(frozen=True)
class Choice:
    """What was picked on the seeds of the table, and how it did on seeds it was not picked on.

    confirmed: the plain run, the pick and its control on those seeds; kept: whether it still is what was wanted there.
    """

    pick: Pick
    protocol: Protocol | None = None
    confirmed: tuple[Row, ...] = ()
    kept: bool | None = None

    @property
    def again(self) -> Row | None:
        """The pick on seeds it was not picked on."""
        return by_name(self.confirmed, self.pick.best.name) if self.pick.best is not None else None

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        best, nearest = (row.name if row else None for row in (self.pick.best, self.pick.nearest))
        said = None if self.protocol is None else {**asdict(self.protocol), "hash": self.protocol.hash}
        confirmed = [row.to_dict() for row in self.confirmed]
        picked = {"wanted": self.pick.wanted, "best": best, "nearest": nearest, "kept": self.kept}
        return {**picked, "protocol": said, "confirmed": confirmed}


@dataclass(frozen=True)
class Comparison:
    """Rows (the plain run first, then the sets, then the controls) under one protocol, with their pictures by name.

    drawing: the command that draws as the plain run did.
    """

    protocol: Protocol
    question: Question
    rows: tuple[Row, ...]
    pictures: Mapping[str, Pictures]
    remarks: tuple[str, ...] = ()
    choice: Choice | None = None
    drawing: str = "ditloom generate"

    def command(self, row: Row) -> str:
        """How to draw with a set as it was compared."""
        return f"{self.drawing} {Candidate(row.methods).flags}".rstrip()

    @property
    def plain(self) -> Row:
        """The run that all others are held against."""
        return self.rows[0]

    @property
    def ran(self) -> list[Row]:
        """The sets and controls that could run."""
        return [row for row in self.rows[1:] if row.refused is None]

    @property
    def busy(self) -> bool:
        """Whether other work of the machine spoilt the wall times."""
        return busy_share(self.rows) is not None

    def row(self, name: str) -> Row:
        """The row of a set as it is written."""
        found = by_name(self.rows, name)
        if found is None:
            raise UserError(f"{name!r} is not in this comparison")
        return found

    def front(self, metric: str = "psnr") -> list[Row]:
        """The rows that no other beats in both wall time and a metric, the fastest first."""
        scored = [row for row in self.ran if row.value(metric) is not None]
        return [scored[i] for i in pareto([(row.speedup, better(metric)(row)) for row in scored])]

    def control_of(self, row: Row) -> Row | None:
        """The plain run of fewer steps that takes at least as many multiply-accumulates, rounded up to a step."""
        steps = self._matched(row)
        return None if steps is None else by_name(self.rows, fewer_steps(steps).name)

    def margin(self, row: Row, metric: str = "psnr") -> float | None:
        """By how much a row is better than its control, positive where it is."""
        control = self.control_of(row)
        mine, theirs = row.value(metric), control.value(metric) if control is not None else None
        if mine is None or theirs is None or row is control:
            return None
        return mine - theirs if HIGHER_IS_BETTER[metric] else theirs - mine

    def _matched(self, row: Row) -> int | None:
        return matched(row, self.plain, self.question)

    def save(self, folder: str | Path) -> tuple[Path, Path]:
        """Write comparison.json and comparison.html, and return where they are."""
        from ditloom.measure.comparison.page import save_page

        numbers, page = Path(folder) / "comparison.json", Path(folder) / "comparison.html"
        with explained("write to", numbers):
            numbers.parent.mkdir(parents=True, exist_ok=True)
            replace_file(numbers, [json_bytes(self.to_dict()) + b"\n"])
        save_page(self, page)
        return numbers, page

    def to_dict(self) -> dict[str, Any]:
        """What comparison.json holds."""
        return {
            "format": FORMAT,
            "protocol": {**asdict(self.protocol), "hash": self.protocol.hash, "words": in_words(self.protocol)},
            "inputs": list(self.question.inputs),
            "seeds": list(self.question.seeds),
            "remarks": list(self.remarks),
            "methods": {name: about(name) for row in self.rows for name in Candidate(row.methods).names},
            "rows": [self._row_dict(row) for row in self.rows],
            "front": {metric: [row.name for row in self.front(metric)] for metric in HIGHER_IS_BETTER},
            "choice": None if self.choice is None else self.choice.to_dict(),
        }

    def _row_dict(self, row: Row) -> dict[str, Any]:
        control = self.control_of(row) if row.refused is None and row.methods else None
        margins = {metric: self.margin(row, metric) for metric in HIGHER_IS_BETTER} if control is not None else {}
        told = {"flags": Candidate(row.methods).flags, "command": self.command(row)}
        return {**row.to_dict(), **told, "matched": control.name if control else None, "margins": margins}


def matched(row: Row, plain: Row, question: Question) -> int | None:
    """The number of steps of the control of a row; None for the plain run, controls and what saves nothing."""
    if row.refused is not None or not row.methods or Candidate(row.methods).is_control:
        return None
    steps = int(question.settings["steps"])
    return matched_steps(row.macs, plain.macs, steps, lambda n: evaluations_of(question.settings, n))


def busy_share(rows: Sequence[Row]) -> float | None:
    """The share of one processor that this process had while time was taken, where others held it up; else None."""
    shares = [row.processor_share for row in rows if row.processor_share is not None]
    return median(shares) if shares and median(shares) < QUIET else None
