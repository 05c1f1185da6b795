"""What the numbers say, in plain words."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ditloom.measure.comparison.candidates import Candidate
from ditloom.measure.comparison.row import Row

if TYPE_CHECKING:
    from ditloom.measure.comparison.run import Comparison

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
    """For one purpose the fastest set that is close enough to the plain run, or None."""

    key: str
    title: str
    floor: float
    meaning: str
    row: Row | None


def looks(psnr: float) -> str:
    """How alike pictures of such a PSNR are."""
    return next(words for floor, words in TIERS if psnr >= floor)


def advice(found: Comparison) -> list[Advice]:
    """The fastest set above each of three floors of quality; a set counts where it is faster than it is noise."""
    return [Advice(key, title, floor, meaning, _fastest(found, floor)) for key, title, floor, meaning in FAMILIAR]


def _fastest(found: Comparison, floor: float) -> Row | None:
    close = [row for row in found.ran if (row.value("psnr") or 0.0) >= floor and row.speedup >= NOTABLE]
    return max(close, key=lambda row: row.speedup, default=None)


def headline(found: Comparison) -> str:
    """The answer to "which of these should I use?"."""
    by_key = {item.key: item.row for item in advice(found)}
    best = next((by_key[key] for key in ("balanced", "safe", "fast") if by_key[key] is not None), None)
    if best is None:
        return "Nothing here is both faster than the plain run and close to its pictures: keep the plain run."
    told = f"Use {_named(best)}: {best.speedup:.1f}x faster, {looks(best.value('psnr') or 0.0)}."
    safe = by_key["safe"]
    if safe is not None and safe is not best:
        close = looks(safe.value("psnr") or 0.0)
        told += f" If nothing may change, use {_named(safe)}: {safe.speedup:.1f}x faster, {close}."
    return told


def reasons(found: Comparison) -> list[str]:
    """Sentences on what the control shows, and on what could not be compared."""
    judged = [(row, found.margin(row)) for row in found.ran if not Candidate(row.methods).is_control]
    won = [row.name for row, margin in judged if margin is not None and margin > EVEN]
    lost = [row.name for row, margin in judged if margin is not None and margin < -EVEN]
    even = [row.name for row, margin in judged if margin is not None and abs(margin) <= EVEN]
    told = []
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
    return [*told, f"ditloom generate {Candidate(best.methods).flags}"]


def _figures(row: Row) -> str:
    scores = ", ".join(f"{name} {score.value:.3g}" for name, score in row.scores.items() if name in ("psnr", "lpips"))
    return f"{row.speedup:.2f}x as fast, {scores}"


def _named(row: Row) -> str:
    if Candidate(row.methods).is_control:
        return f"no method at all but fewer steps ({row.steps})"
    return row.name


def _listed(names: list[str], most: int = 6) -> str:
    shown = names[:most] + ([f"{len(names) - most} more"] if len(names) > most else [])
    return shown[0] if len(shown) == 1 else f"{', '.join(shown[:-1])} and {shown[-1]}"
