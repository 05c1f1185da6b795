"""Progress with speed and time left: a bar on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Callable
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, TaskID, TextColumn
from rich.progress import Progress as Bar


class Speed:
    """Images a second over the last `window` seconds, so that a slow start (compilation) is soon forgotten."""

    def __init__(self, clock: Callable[[], float] = time.monotonic, window: float = 60.0):
        self.clock, self.window = clock, window
        self._marks: deque[tuple[float, int]] = deque()

    def note(self, images: int) -> None:
        """Say how many images are done by now."""
        now = self.clock()
        self._marks.append((now, images))
        while len(self._marks) > 2 and self._marks[1][0] < now - self.window:
            self._marks.popleft()

    @property
    def rate(self) -> float | None:
        """Images a second, or None while two moments are not yet known."""
        if len(self._marks) < 2:
            return None
        (start, first), (end, last) = self._marks[0], self._marks[-1]
        return (last - first) / (end - start) if end > start else None


class Progress:
    """Shows images done of `total`, logged values, img/s and the time left.

    On a terminal a live bar; else a line at most every `every` seconds and one at the end. quiet: show nothing.
    """

    def __init__(
        self,
        total: int,
        *,
        done: int = 0,
        label: str = "train",
        stream: TextIO | None = None,
        every: float = 10.0,
        clock: Callable[[], float] = time.monotonic,
        quiet: bool = False,
    ):
        self.total, self.label, self.every, self.clock, self.quiet = total, label, every, clock, quiet
        self.console = Console(file=stream or sys.stderr)
        self.speed = Speed(clock)
        self.speed.note(done)
        self._shown, self._last, self._line = clock(), done, ""
        self._bar: Bar | None = None
        self._task = TaskID(0)

    def __enter__(self) -> Progress:
        if self.console.is_terminal and not self.quiet:
            text = TextColumn("{task.fields[line]}", markup=False)
            self._bar = Bar(TextColumn(self.label, markup=False), BarColumn(None), text, console=self.console)
            self._bar.start()
            self._task = self._bar.add_task(self.label, total=self.total, completed=self._last, line="")
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()
        elif self._line:
            self._print()

    def update(self, images: int, **values: float) -> None:
        """`images` are done; `values` are shown beside."""
        self.speed.note(images)
        self._last, self._line = images, self._describe(images, values)
        if self._bar is not None:
            self._bar.update(self._task, completed=images, line=self._line)
        elif self.clock() - self._shown >= self.every:
            self._print()

    def say(self, message: str) -> None:
        """A line that stays above the bar."""
        if not self.quiet:
            self.console.print(message, markup=False, highlight=False, soft_wrap=True)

    def _print(self) -> None:
        self.say(f"{self.label} {self._line}")
        self._shown, self._line = self.clock(), ""

    def _describe(self, images: int, values: dict[str, float]) -> str:
        parts = [f"{images:,}/{self.total:,} images", *(f"{name} {value:.4g}" for name, value in values.items())]
        rate = self.speed.rate
        if rate:
            parts += [f"{rate:.3g} img/s", f"{duration((self.total - images) / rate)} left"]
        return "  ".join(parts)


def duration(seconds: float) -> str:
    """Seconds as people say them: 45 s, 3 min 20 s, 2 h 05 min."""
    whole = round(max(0.0, seconds))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
