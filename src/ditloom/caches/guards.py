"""Guards of a cache: where it must compute, whatever it would decide. A guard beats a policy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, Literal

from ditloom.caches.amounts import Amount, at_least, check_amount, count_of
from ditloom.contracts.clock import Clock, Schedule, Window
from ditloom.contracts.errors import UnknownName, UserError
from ditloom.contracts.plan import Action

MASKS: Mapping[str, tuple[int, ...]] = {
    "slow": (8, 1, 3, 2, 3, 2, 2, 2, 1, 3, 1),
    "medium": (6, 1, 2, 3, 2, 3, 2, 3, 2, 3, 1),
    "fast": (6, 1, 1, 3, 1, 4, 1, 5, 1, 4, 1),
    "ultra": (4, 2, 1, 5, 1, 6, 1, 7, 1),
}
"""Steps of cache-dit's presets for 28 steps, computed and reusable in turn."""


@dataclass(frozen=True, kw_only=True)
class Guards:
    """When steps are computed without asking; the settings that dynamic caches share.

    warmup, tail: steps computed at the beginning and at the end, a count or a share such as 0.2. start, end, unit:
    reuse only inside this window, by "fraction" of the steps, step "index" or "noise" level (the noisier bound first).
    max_consecutive, max_total: how many steps may be reused in a row and in all; 0 is no limit.
    mask: slow, medium, fast, ultra, or counts of computed and reusable steps in turn such as 6/1/2/3, stretched to the
    length of the run. policy: whether a reusable step of the mask is decided on (dynamic) or reused as it is (static).
    """

    warmup: Amount = 0
    tail: Amount = 0
    start: float = 0.0
    end: float = 1.0
    unit: Literal["fraction", "index", "noise"] = "fraction"
    max_consecutive: int = 0
    max_total: int = 0
    mask: str = ""
    policy: Literal["dynamic", "static"] = "dynamic"

    def __post_init__(self) -> None:
        check_amount("warmup", self.warmup)
        check_amount("tail", self.tail)
        at_least(0, max_consecutive=self.max_consecutive, max_total=self.max_total)
        for name, value, known in (
            ("unit", self.unit, ("fraction", "index", "noise")),
            ("policy", self.policy, ("dynamic", "static")),
        ):
            if value not in known:
                raise UnknownName(name, str(value), known)
        _ = self.window
        if self.mask:
            _bins(self.mask)

    @cached_property
    def window(self) -> Window:
        """Where reuse is allowed."""
        return Window(self.start, self.end, self.unit)

    @property
    def by_mask(self) -> bool:
        """Whether a mask alone decides."""
        return bool(self.mask) and self.policy == "static"

    def allow(self, clock: Clock) -> bool:
        """Whether a step may be reused at all, as known before the run."""
        first, last = count_of(self.warmup, clock.steps), clock.steps - count_of(self.tail, clock.steps)
        masked = bool(self.mask) and stretched(self.mask, clock.steps)[clock.step]
        return first <= clock.step < last and self.window.contains(clock) and not masked

    def allowed(self, schedule: Schedule) -> list[bool]:
        """For every step whether it may be reused; a window that holds no step is refused."""
        clocks = [schedule.clock(s) for s in range(schedule.steps)]
        if not any(self.window.contains(clock) for clock in clocks):
            raise UserError(
                f"the window {self.start:g} to {self.end:g} by {self.unit} holds none of the {schedule.steps} steps"
            )
        return [self.allow(clock) for clock in clocks]

    def verdict(self, clock: Clock, memo: Mapping[str, Any]) -> Action | None:
        """COMPUTE or REUSE where a guard decides, None where the policy does."""
        if not self.allow(clock):
            return Action.COMPUTE
        if self.by_mask:
            return Action.REUSE
        in_a_row, in_all = memo.get("in_a_row", 0), memo.get("in_all", 0)
        if (self.max_total and in_all >= self.max_total) or (self.max_consecutive and in_a_row >= self.max_consecutive):
            return Action.COMPUTE
        return None

    def count(self, action: Action, memo: dict[str, Any]) -> None:
        """Note what became of a step."""
        reused = action is Action.REUSE
        memo["in_a_row"] = memo.get("in_a_row", 0) + 1 if reused else 0
        memo["in_all"] = memo.get("in_all", 0) + reused


@lru_cache(maxsize=256)
def stretched(mask: str, steps: int) -> tuple[bool, ...]:
    """For each of `steps` whether the mask computes it: the step of the mask that is nearest in relative position."""
    flat = [i % 2 == 0 for i, count in enumerate(_bins(mask)) for _ in range(count)]
    scale = (len(flat) - 1) / max(steps - 1, 1)
    return tuple(flat[int(s * scale + 0.5)] for s in range(steps))


def _bins(mask: str) -> Sequence[int]:
    if mask in MASKS:
        return MASKS[mask]
    counts = str(mask).split("/")
    if not all(c.isdecimal() for c in counts):
        if len(counts) == 1:
            raise UnknownName("mask", str(mask), MASKS)
        raise UserError(f"a mask counts computed and reusable steps in turn, such as 6/1/2/3; got {mask!r}")
    bins = [int(c) for c in counts]
    if not bins[0] or not sum(bins[::2]):
        raise UserError(f"a mask begins with computed steps; got {mask!r}")
    return bins
