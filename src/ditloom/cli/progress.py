"""Progress of drawing, which moves with every step of a batch and not only when pictures are done."""

from __future__ import annotations

from ditloom.training.progress import Progress, duration


class DrawingProgress(Progress):
    """Counts the steps of single pictures and speaks of pictures; `found` of them were there before."""

    def __init__(self, pictures: int, steps: int, *, found: int = 0, label: str = "generate", quiet: bool = False):
        super().__init__(pictures * steps, done=found * steps, label=label, quiet=quiet)
        self.pictures, self.steps, self.found = pictures, steps, found

    def follow(self, steps: int) -> None:
        """`steps` steps of single pictures are done in this run."""
        self.update(self.found * self.steps + steps)

    def _describe(self, images: int, values: dict[str, float]) -> str:
        parts = [f"{images // self.steps:,}/{self.pictures:,} pictures"]
        rate = self.speed.rate
        if rate:
            parts += [f"{rate / self.steps:.3g} img/s", f"{duration((self.total - images) / rate)} left"]
        return "  ".join(parts)


class RoundsProgress(Progress):
    """Counts the rounds of a training."""

    def _describe(self, images: int, values: dict[str, float]) -> str:
        parts = [f"{images:,}/{self.total:,} rounds", *(f"{name} {value:.3g}" for name, value in values.items())]
        rate = self.speed.rate
        return "  ".join([*parts, f"{duration((self.total - images) / rate)} left"] if rate else parts)
