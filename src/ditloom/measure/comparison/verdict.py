"""What the numbers say, in plain words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ditloom.measure.comparison.candidates import Candidate
from ditloom.measure.comparison.row import Row

if TYPE_CHECKING:
    from ditloom.measure.comparison.answer import Comparison

TIERS = (
    (40.0, "indistinguishable by eye"),
    (32.0, "nearly identical"),
    (26.0, "the same picture with small differences"),
    (20.0, "the same subject, drawn a little differently"),
    (float("-inf"), "another picture"),
)
"""PSNR in dB to the plain run, from which on pictures of an equal seed look like this."""
FAMILIAR = (
    ("safe", "Safe", 32.0, "nothing to see without a magnifying glass"),
    ("balanced", "Balanced", 26.0, "the same pictures, small differences in detail"),
    ("fast", "Fast", 20.0, "the same subjects, for previews and many tries"),
)
NOTABLE = 1.1
"""A speed-up below this is within what the clock of a busy machine gets wrong."""
EVEN = 0.5
"""A difference in dB that is not worth a word."""


@dataclass(frozen=True)
class Advice:
    """For one purpose the fastest that is close enough to the plain run, or None; and the best of the other kind: of
    the methods where taking fewer steps is the answer, else of the runs of fewer steps."""

    key: str
    title: str
    floor: float
    meaning: str
    row: Row | None
    rival: Row | None


def looks(psnr: float) -> str:
    """How alike pictures of such a PSNR are."""
    return next(words for floor, words in TIERS if psnr >= floor)


def pace(found: Comparison, row: Row) -> float:
    """How many times as fast, by the clock; on a busy machine by the arithmetic that is left, which no load changes."""
    return 1 / max(1 - row.share_saved, 1e-9) if found.busy else row.speedup


def unit(found: Comparison) -> str:
    """What a pace is a factor of."""
    return "less arithmetic" if found.busy else "faster"


def advice(found: Comparison) -> list[Advice]:
    """The fastest above each of three floors of quality; a set counts where it is faster than the clock is wrong.

    What fewer steps beat at the same arithmetic is not advised, however fast.
    """
    listed = []
    for key, title, floor, meaning in FAMILIAR:
        close = [row for row in found.ran if (row.value("psnr") or 0.0) >= floor and pace(found, row) >= NOTABLE]
        best = _fastest(found, [row for row in close if not _beaten(found, row)])
        others = [row for row in close if best is not None and _is_control(row) is not _is_control(best)]
        rival = _fastest(found, [row for row in others if not _beaten(found, row)]) or _fastest(found, others)
        listed.append(Advice(key, title, floor, meaning, best, rival))
    return listed


def _beaten(found: Comparison, row: Row) -> bool:
    margin = found.margin(row)
    return margin is not None and margin < -EVEN


def _fastest(found: Comparison, rows: Sequence[Row]) -> Row | None:
    return max(rows, key=lambda row: pace(found, row), default=None)


def _is_control(row: Row) -> bool:
    return Candidate(row.methods).is_control


def headline(found: Comparison) -> str:
    """The answer to "which of these should I use?"."""
    by_key = {item.key: item for item in advice(found)}
    first = next((by_key[key] for key in ("balanced", "safe", "fast") if by_key[key].row is not None), None)
    if first is None or first.row is None:
        return "Nothing here is both faster than the plain run and close to its pictures: keep the plain run."
    use = _use(found, first.row)
    told = f"{use[0].upper()}{use[1:]}."
    safe = by_key["safe"].row
    if safe is not None and safe is not first.row:
        told += f" If nothing may change, {_use(found, safe)}."
    if _is_control(first.row) and first.rival is not None:
        told += f" Of the methods the best is {_worth(found, first.rival)}."
    return told


def _worth(found: Comparison, row: Row) -> str:
    """A set with its pace and likeness."""
    return f"{row.name}: {_figure(found, row)}"


def _use(found: Comparison, row: Row) -> str:
    if not _is_control(row):
        return f"use {_worth(found, row)}"
    return f"take {row.steps} steps instead of {found.plain.steps} and no method at all: {_figure(found, row)}"


def _figure(found: Comparison, row: Row) -> str:
    return f"{pace(found, row):.1f}x {unit(found)}, {looks(row.value('psnr') or 0.0)}"


def reasons(found: Comparison) -> list[str]:
    """Sentences on what the control shows, and on what could not be compared."""
    judged = [(row, found.margin(row)) for row in found.ran if not _is_control(row)]
    won = [row.name for row, margin in judged if margin is not None and margin > EVEN]
    lost = [row.name for row, _ in judged if _beaten(found, row)]
    even = [row.name for row, margin in judged if margin is not None and abs(margin) <= EVEN]
    told = []
    if found.busy:
        told.append("The machine was too busy to time anything: this counts arithmetic. Measure again on a quiet one.")
    if won:
        told.append(f"Closer to the plain run than fewer steps at the same arithmetic: {_listed(won)}.")
    if even:
        told.append(f"No better and no worse than simply taking fewer steps: {_listed(even)}.")
    if lost:
        told.append(f"Taking fewer steps is the better choice than {_listed(lost)}: same arithmetic, closer pictures.")
    idle = [row.name for row in found.ran if row.methods and abs(row.share_saved) < 0.005]
    if idle:
        told.append(f"Saved nothing at these settings: {_listed(idle)}.")
    refused = [row.name for row in found.rows if row.refused is not None]
    if refused:
        told.append(f"Could not run on this model: {_listed(refused)} (the table says why).")
    return told


def choice_in_words(found: Comparison) -> list[str]:
    """What `budget` and `quality` picked, how it did on other seeds, and the flags to use it."""
    choice = found.choice
    if choice is None:
        return []
    best, wanted = choice.pick.best, choice.pick.wanted
    if best is None:
        near = choice.pick.nearest
        nearest = "" if near is None else f" The nearest is {near.name}: {_figures(near)}."
        return [f"No set is {wanted}.{nearest}"]
    told = [f"Best of what is {wanted}: {best.name} ({_figures(best)})."]
    again = choice.again
    if again is not None and choice.protocol is not None:
        still = "still is" if choice.kept else "is no longer"
        told.append(f"On seeds it was not picked on ({choice.protocol.seeds}) it {still} that: {_figures(again)}.")
    return [*told, found.command(best)]


def _figures(row: Row) -> str:
    scores = ", ".join(f"{name} {score.value:.3g}" for name, score in row.scores.items() if name in ("psnr", "lpips"))
    return f"{row.speedup:.2f}x as fast, {scores}"


def _listed(names: list[str], most: int = 6) -> str:
    shown = names[:most] + ([f"{len(names) - most} more"] if len(names) > most else [])
    return shown[0] if len(shown) == 1 else f"{', '.join(shown[:-1])} and {shown[-1]}"
