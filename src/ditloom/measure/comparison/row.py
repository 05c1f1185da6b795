"""One line of a comparison: everything that was measured of one set, or why it could not run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any

from ditloom.measure.comparison.heat import Heat


@dataclass(frozen=True)
class Score:
    """A mean over pictures (or one number of them all) with its standard error, where there is one."""

    value: float
    error: float | None = None


@dataclass(frozen=True, kw_only=True)
class Row:
    """One set. Times are seconds a picture, multiply-accumulates are of one picture, bytes of the whole run.

    times: of the set, plain_times: of the plain run, taken in turn with them. processor_share: processor time by wall
    time in all turns, below 1 where other work held this one up (None on an accelerator). peak_bytes: the most memory
    of the process (of the device, on an accelerator) while it ran. held_bytes: what the methods stored at most. scores
    by metric; absent: for a column that is empty, why. refused: why the set could not run at all.
    """

    name: str
    methods: tuple[str, ...] = ()
    control: bool = False
    refused: str | None = None
    steps: int = 0
    times: tuple[float, ...] = ()
    plain_times: tuple[float, ...] = ()
    processor_share: float | None = None
    macs: int = 0
    share_saved: float = 0.0
    share_reused: float = 0.0
    peak_bytes: int | None = None
    held_bytes: int = 0
    scores: Mapping[str, Score] = field(default_factory=dict)
    absent: Mapping[str, str] = field(default_factory=dict)
    heat: Heat = Heat()
    notes: tuple[str, ...] = ()

    @property
    def seconds(self) -> float:
        """Seconds a picture: the median of the repeats."""
        return median(self.times) if self.times else 0.0

    @property
    def speedup(self) -> float:
        """How many times as fast as the plain run: the median over the turns, each held against its own plain run."""
        return median(self._turns)

    @property
    def spread(self) -> tuple[float, float]:
        """The least and the greatest speed-up among the turns."""
        return min(self._turns), max(self._turns)

    @property
    def _turns(self) -> list[float]:
        pairs = zip(self.plain_times, self.times, strict=True) if self.plain_times else ()
        return [plain / own for plain, own in pairs] or [1.0]

    def value(self, metric: str) -> float | None:
        """The score in a metric, or None where there is none."""
        score = self.scores.get(metric)
        return None if score is None else score.value

    def to_dict(self) -> dict[str, Any]:
        """Plain values: what was measured, and what follows from it."""
        low, high = self.spread
        derived = {"seconds": self.seconds, "speedup": self.speedup, "speedup_range": [low, high]}
        kept = {name: value for name, value in vars(self).items() if name not in ("heat", "scores")}
        scores = {name: asdict(score) for name, score in self.scores.items()}
        return {**kept, **derived, "scores": scores, "heat": self.heat.to_dict()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Row:
        """The inverse of `to_dict`."""
        known = {name: values[name] for name in cls.__dataclass_fields__ if name in values}
        for name in ("methods", "times", "plain_times", "notes"):
            known[name] = tuple(known.get(name, ()))
        known["scores"] = {name: Score(**score) for name, score in values["scores"].items()}
        return cls(**{**known, "heat": Heat.from_dict(values["heat"])})


def by_name(rows: Sequence[Row], name: str | None) -> Row | None:
    """The row of a name."""
    return next((row for row in rows if row.name == name), None)
