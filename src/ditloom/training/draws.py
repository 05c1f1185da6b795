"""Everything random about a training batch, drawn once, per image index."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ditloom.contracts import rng
from ditloom.contracts.condition import Condition
from ditloom.contracts.objective import TrainBatch
from ditloom.contracts.process import Process
from ditloom.processes.times import TimeSampler


@dataclass(frozen=True)
class Rows:
    """What a feed hands out: clean x [B, ...], conditions, global image indices, and the pictures where they are known.

    null: one row that stands for "no condition", or None where the model has no such thing.
    """

    x: Tensor
    condition: Condition
    indices: Sequence[int]
    null: Condition | None = None
    images: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class Draws:
    """Noise, noise level and condition dropout of each image, from (seed, stream, global image index) alone."""

    process: Process
    times: TimeSampler
    seed: int
    drop: float = 0.0

    def __call__(self, rows: Rows, first: int, size: int) -> TrainBatch:
        """The training batch of some rows of the global batch that starts at image `first` and holds `size`."""
        indices = list(rows.indices)
        places = torch.tensor(indices, dtype=torch.float64) - first
        u = rng.uniform((1,), self.seed, "time", indices)[:, 0]
        t = self.times(u, self.process, (places, size))
        noise = self.process.draw(rows.x.shape[1:], self.seed, "noise", indices)
        condition = rows.condition
        if self.drop and rows.null is not None:
            condition = dropped(condition, rows.null, rng.uniform((1,), self.seed, "drop", indices)[:, 0] < self.drop)
        return TrainBatch(rows.x, noise, t, condition, indices, rows.images)


def dropped(condition: Condition, null: Condition, rows: Tensor) -> Condition:
    """The condition with the rows where `rows` [B] is true replaced by the null row."""
    if not null.tensors() or not bool(rows.any()):
        return condition
    count = len(rows)
    index = torch.where(rows, torch.full_like(rows, count, dtype=torch.long), torch.arange(count))
    return Condition.cat([condition, null]).rows(index)


def pieces(batch: TrainBatch, size: int) -> Iterator[TrainBatch]:
    """A batch in micro-batches of at most `size` rows."""
    for start in range(0, len(batch.x), size):
        at = slice(start, start + size)
        images = None if batch.images is None else batch.images[at]
        extra = {name: value[at] for name, value in batch.extra.items()}
        yield TrainBatch(
            batch.x[at], batch.noise[at], batch.t[at], batch.condition.rows(at), batch.indices[at], images, extra
        )


def moved(batch: TrainBatch, device: torch.device) -> TrainBatch:
    """The batch on a device."""
    if device.type == "cpu":
        return batch
    images = None if batch.images is None else batch.images.to(device)
    extra = {name: value.to(device) for name, value in batch.extra.items()}
    x, noise, t = (tensor.to(device, non_blocking=True) for tensor in (batch.x, batch.noise, batch.t))
    return TrainBatch(x, noise, t, batch.condition.to(device), batch.indices, images, extra)
