"""Data to pictures in bulk: groups of consecutive pictures, drawn by whichever process, whichever day.

Picture n of a seed follows from (seed, index) alone; its last bits also depend on what shares its batch, so batches are
fixed: group g holds the `batch_size` pictures from g * batch_size on. Process r of R draws those of the groups r,
r + R, ... that are not there yet. The same files come out byte for byte however the work was split or interrupted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ditloom.cli.place import Share
from ditloom.cli.run_folder import RunFolder
from ditloom.contracts.errors import UserError
from ditloom.sites.report import Report
from ditloom.training.samples import png

if TYPE_CHECKING:
    from ditloom.model import Input, Model


@dataclass(frozen=True)
class Group:
    """One batch: the number of its first picture, the seed, and the index and input of each picture."""

    first: int
    seed: int
    indices: range
    inputs: list[Input]

    @property
    def numbers(self) -> range:
        """The numbers of its pictures in the whole order."""
        return range(self.first, self.first + len(self.indices))


@dataclass(frozen=True, kw_only=True)
class Order:
    """What to draw: for every seed `each` pictures, the inputs taken in turn, in batches of `batch_size`."""

    inputs: Sequence[Input]
    each: int
    seeds: Sequence[int] = (0,)
    batch_size: int = 32

    def __post_init__(self) -> None:
        for name, value in (("--count", self.each), ("--batch-size", self.batch_size)):
            if value < 1:
                raise UserError(f"{name} must be at least 1; got {value}")

    @property
    def total(self) -> int:
        """Pictures in all."""
        return self.each * len(self.seeds)

    def groups(self, share: Share) -> Iterator[Group]:
        """The groups of one process, in order."""
        starts = range(0, self.each, self.batch_size)
        for number in range(share.rank, len(self.seeds) * len(starts), share.size):
            turn, start = divmod(number, len(starts))
            indices = range(starts[start], min(starts[start] + self.batch_size, self.each))
            inputs = [self.inputs[i % len(self.inputs)] for i in indices]
            yield Group(turn * self.each + indices.start, self.seeds[turn], indices, inputs)

    def pictures(self, share: Share) -> int:
        """How many pictures are one process's."""
        return sum(len(group.indices) for group in self.groups(share))

    def input(self, number: int) -> Input:
        """What picture `number` shows."""
        return self.inputs[number % self.each % len(self.inputs)]


Follow = Callable[[int], None]
Notes = Callable[[Group, int], Mapping[str, str]]


def missing(folder: RunFolder, order: Order, share: Share) -> list[Group]:
    """The groups of one process of which a picture is lacking."""
    return [group for group in order.groups(share) if not folder.has(group.numbers)]


def draw(
    folder: RunFolder,
    model: Model,
    groups: Sequence[Group],
    settings: Mapping[str, Any],
    notes: Notes,
    on_step: Follow = lambda steps: None,
) -> Report:
    """Draw the groups into the folder.

    settings: what `Model.generate` takes, without seed and batch size. notes: the text of picture `place` of a group.
    on_step: called with the steps of single pictures done so far.
    """
    report, done = Report(), 0
    for group in groups:
        files = _files(model, group, settings, notes, lambda steps, before=done: on_step(before + steps), report)
        folder.keep(group.numbers, files)
        done += len(group.numbers) * int(settings["steps"])
    return report


def _files(
    model: Model,
    group: Group,
    settings: Mapping[str, Any],
    notes: Notes,
    on_step: Follow,
    report: Report,
) -> list[bytes]:
    """The PNG files of one group."""
    size = len(group.inputs)
    result = model.generate(
        group.inputs,
        **settings,
        seed=group.seed,
        indices=group.indices,
        batch_size=size,
        on_step=lambda batch, step: on_step((step.index + 1) * size),
    )
    add(report, result.report)
    return [png(picture, dict(notes(group, place))) for place, picture in enumerate(result.images)]


def add(total: Report, part: Report) -> None:
    """Take one batch's report into the whole; the step-by-block map stays that of the last batch."""
    total.counts.update(part.counts)
    total.cells = dict(part.cells)
    total.macs += part.macs
    total.full_macs += part.full_macs
    total.forwards += part.forwards
    total.bytes_held = max(total.bytes_held, part.bytes_held)
    for sentence in part.notes:
        total.note(sentence)
