"""Batches of a source by image count: decoded ahead by threads, equal for any number of workers and ranks.

Threads, not processes: pillow decodes and resamples without the interpreter lock, nothing is pickled or copied, and
a killed run leaves nothing behind. What is in a batch follows from (source, seed, image count) alone.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import KW_ONLY, dataclass, field
from typing import Literal, NamedTuple, TypedDict

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ditloom.contracts.data import DataSource, Example
from ditloom.contracts.errors import UserError
from ditloom.contracts.rng import uniform
from ditloom.data.augment import DRAWS, Augment
from ditloom.data.images import CorruptImage
from ditloom.data.order import ImageOrder

CONSECUTIVE_SKIPS = 100


class Skipped(NamedTuple):
    """A file that could not be read, and why; the next readable example took its place."""

    name: str
    reason: str


class Batch(TypedDict):
    """`image` uint8 [b, C, H, W]; `label` int64 [b], -1 for none; `caption` with None for none; `name`; `example`:
    int64 [b], which example of the source; `index`: int64 [b], global image indices; `skipped`."""

    image: Tensor
    label: Tensor
    caption: list[str | None]
    name: list[str]
    example: Tensor
    index: Tensor
    skipped: tuple[Skipped, ...]


def to_signed(images: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """uint8 [0, 255] to floats in [-1, 1]."""
    return images.to(dtype) / 127.5 - 1


@dataclass(eq=False)
class Batches:
    """The loader of one rank.

    batch_size: images of the global batch, of which each rank gets its contiguous share.  size: side of the images
    given out (default: the source's).  workers: threads that work ahead, 0 for none.  wordings: draw one of the
    source's `texts(example)` instead of the caption.  on_error: "skip" replaces an unreadable example by the next
    one in the source's order.  keep: bytes of decoded pictures held in memory.
    """

    source: DataSource
    _: KW_ONLY
    batch_size: int
    seed: int = 0
    shuffle: bool = True
    augment: Augment = field(default_factory=Augment)
    size: int | None = None
    rank: int = 0
    world_size: int = 1
    workers: int = 2
    prefetch: int = 4
    wordings: bool = False
    on_error: Literal["refuse", "skip"] = "refuse"
    keep: int = 256 << 20
    skipped: dict[str, str] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        source = self.source.info
        if not len(self.source):
            raise UserError(f"the data source {source.name!r} holds no example.")
        if self.batch_size < 1 or self.batch_size % self.world_size:
            raise UserError(f"batch_size={self.batch_size} cannot be split over {self.world_size} processes evenly.")
        if self.size is None and source.size is None:
            raise UserError(f"the images of {source.name!r} differ in size: give the size to train at, as in size=64.")
        if self.on_error not in ("refuse", "skip"):
            raise UserError(f"on_error={self.on_error!r}: expected 'refuse' or 'skip'.")
        if self.wordings and not hasattr(self.source, "texts"):
            raise UserError(f"wordings=True: the data source {source.name!r} knows one caption an image only.")
        self.order = ImageOrder(len(self.source), self.seed, self.shuffle)
        self._kept: dict[int, Example] = {}
        self._room = self.keep

    def from_image(self, start: int = 0, stop: int | None = None) -> Iterator[Batch]:
        """Batches from image count `start` on; without `stop` for ever, epoch after epoch."""
        counts = iter(range(start, stop, self.batch_size)) if stop is not None else _every(start, self.batch_size)
        if self.workers == 0:
            for count in counts:
                yield self.at(count, stop)
            return
        with ThreadPoolExecutor(self.workers, "batches") as pool:
            ahead: deque[Future[Batch]] = deque()
            try:
                for count in counts:
                    ahead.append(pool.submit(self.at, count, stop))
                    if len(ahead) > max(self.prefetch, self.workers):
                        yield ahead.popleft().result()
                while ahead:
                    yield ahead.popleft().result()
            finally:
                pool.shutdown(wait=True, cancel_futures=True)

    def at(self, count: int, stop: int | None = None) -> Batch:
        """This rank's share of the global batch that begins at image count `count`."""
        end = count + self.batch_size if stop is None else min(stop, count + self.batch_size)
        share = np.array_split(np.arange(count, end, dtype=np.int64), self.world_size)[self.rank]
        found = [self._readable(int(example)) for example in self.order.at(share)]
        examples, skipped = [example for example, _, _ in found], [s for _, _, missing in found for s in missing]
        return Batch(
            image=self._images(examples, share),
            label=torch.tensor([-1 if e.label is None else e.label for e in examples], dtype=torch.int64),
            caption=self._captions([at for _, at, _ in found], examples, share),
            name=[example.name for example in examples],
            example=torch.tensor([at for _, at, _ in found], dtype=torch.int64),
            index=torch.from_numpy(share.copy()),
            skipped=tuple(dict.fromkeys(skipped)),
        )

    def _readable(self, at: int) -> tuple[Example, int, list[Skipped]]:
        """The example at `at` or, with on_error="skip", the first readable one after it."""
        missing: list[Skipped] = []
        for step in range(min(len(self.source), CONSECUTIVE_SKIPS)):
            place = (at + step) % len(self.source)
            try:
                return self._example(place), place, missing
            except CorruptImage as error:
                if self.on_error == "refuse":
                    raise UserError(f"{error}; repair or remove it, or go on without it by on_error='skip'.") from error
                missing.append(Skipped(error.name, error.reason))
                self.skipped[error.name] = error.reason
        raise UserError(f"{len(missing)} examples in a row cannot be read, the last because of: {missing[-1].reason}.")

    def _example(self, at: int) -> Example:
        kept = self._kept.get(at)
        if kept is None:
            kept = self.source[at]
            if self._room >= kept.image.nbytes:
                self._room -= kept.image.nbytes
                self._kept[at] = kept
        return kept

    def _images(self, examples: list[Example], indices: NDArray[np.int64]) -> Tensor:
        draws = uniform((DRAWS,), self.seed, "augment", indices.tolist()).numpy()
        pictures = [self.augment(e.image, row, self.size) for e, row in zip(examples, draws, strict=True)]
        height, width = (self.size, self.size) if self.size is not None else self.source.info.size or (0, 0)
        shape = (height, width, self.source.info.channels)
        for example, picture in zip(examples, pictures, strict=True):
            if picture.shape != shape:
                raise UserError(f"{example.name} is {picture.shape}, but the source promises {shape} (H, W, channels).")
        stacked = np.stack(pictures) if pictures else np.empty((0, *shape), dtype=np.uint8)
        return torch.from_numpy(stacked).permute(0, 3, 1, 2).contiguous()

    def _captions(self, places: list[int], examples: list[Example], indices: NDArray[np.int64]) -> list[str | None]:
        if not self.wordings:
            return [example.caption for example in examples]
        draws = uniform((1,), self.seed, "wording", indices.tolist())[:, 0].tolist()
        texts = [self.source.texts(place) for place in places]  # type: ignore[attr-defined]
        return [choices[int(draw * len(choices))] for choices, draw in zip(texts, draws, strict=True)]


def _every(start: int, step: int) -> Iterator[int]:
    while True:
        yield start
        start += step
