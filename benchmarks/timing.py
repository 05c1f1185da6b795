"""Interleaved timing: what is compared runs in turn, so that a machine whose speed drifts compares fairly."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median


@dataclass(frozen=True)
class Timing:
    """Seconds of every counted run of one contender."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """The median, to quote."""
        return median(self.seconds)


def interleaved(
    contenders: Mapping[str, Callable[[], object]],
    runs: int,
    warm_up: int = 2,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Timing]:
    """Time all contenders in turn, `runs` times each after `warm_up` uncounted turns.

    clock: for work on one thread `time.thread_time` leaves out what a busy machine does meanwhile.
    """
    taken: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(warm_up + runs):
        for name, run in contenders.items():
            start = clock()
            run()
            if turn >= warm_up:
                taken[name].append(clock() - start)
    return {name: Timing(tuple(seconds)) for name, seconds in taken.items()}


def ratios(a: Timing, b: Timing) -> float:
    """The median over the turns of a's time over b's time."""
    return median(x / y for x, y in zip(a.seconds, b.seconds, strict=True))
