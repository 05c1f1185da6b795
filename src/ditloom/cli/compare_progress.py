"""Progress of a comparison: which set is being measured, and the time that all of them will take."""

from __future__ import annotations

from ditloom.training.progress import Progress, Speed, duration


class CompareProgress(Progress):
    """Counts steps of batches. How many there will be is only known on the way, since controls follow from the sets."""

    def __init__(self) -> None:
        super().__init__(1, label="compare")
        self.name = ""

    def follow(self, name: str, done: int, total: int) -> None:
        """`done` steps of `total` are done, this one for the set `name`."""
        self.name = name
        if done <= 1:
            self.speed = Speed(self.clock)
        if total != self.total:
            self.total = total
            if self._bar is not None:
                self._bar.update(self._task, total=total)
        self.update(done)

    def _describe(self, images: int, values: dict[str, float]) -> str:
        parts = [f"{100 * images // max(self.total, 1)} %", self.name]
        rate = self.speed.rate
        if rate:
            parts.append(f"{duration((self.total - images) / rate)} left")
        return "  ".join(parts)
