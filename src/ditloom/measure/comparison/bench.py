"""Measures one set after the other on one model: pictures, map, cost, memory, and wall time in turns with the plain
run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from time import perf_counter, process_time
from typing import TYPE_CHECKING

import numpy as np

from ditloom.contracts.errors import UserError
from ditloom.measure.comparison.candidates import PLAIN, Candidate
from ditloom.measure.comparison.heat import Heat, Recorder, heat
from ditloom.measure.comparison.memory import NOBODY_SAYS, peak, reset_peak
from ditloom.measure.comparison.question import Group, Question
from ditloom.measure.comparison.row import Row
from ditloom.measure.drawing import as_array

if TYPE_CHECKING:
    from ditloom.measure.comparison.scores import Scorer
    from ditloom.measure.evidence import Pictures
    from ditloom.model import Model

Follow = Callable[[], None]
FAILED = "it failed with"
"""How the sentence begins of a set that broke instead of being refused: a fault of a method, not of the user."""


@dataclass
class Drawn:
    """The pictures of a set, what it took, and the map of its first batch."""

    pictures: Pictures
    macs: int
    held_bytes: int
    steps: int
    heat: Heat
    notes: tuple[str, ...]


@dataclass
class Bench:
    """A model and what it is asked to draw. on_step is called after every step of a batch."""

    model: Model
    question: Question
    score: Scorer
    on_step: Follow = lambda: None
    plain_pictures: Pictures | None = None
    plain_macs: int = 0

    def measured(self, candidate: Candidate) -> tuple[Row, Pictures | None]:
        """The row of a set and its pictures; a set that this model cannot run is a row that says why."""
        watched = reset_peak(self.model.backbone.device)
        try:
            drawn = self.drawn(candidate)
        except Exception as why:
            if candidate == PLAIN:
                raise
            told = str(why) if isinstance(why, UserError) else f"{FAILED} {type(why).__name__}: {why}"
            name, methods, control = candidate.name, candidate.methods, candidate.control
            return Row(name=name, methods=methods, control=control, refused=told), None
        top = peak(self.model.backbone.device) if watched else None
        if candidate == PLAIN:
            self.plain_pictures, self.plain_macs = drawn.pictures, drawn.macs
        assert self.plain_pictures is not None
        began, used = perf_counter(), process_time()
        plain_times, times = self._timed(candidate)
        taken = perf_counter() - began
        share = (process_time() - used) / taken
        scores, absent = self.score(drawn.pictures, self.plain_pictures)
        row = Row(
            name=candidate.name,
            methods=candidate.methods,
            control=candidate.control,
            steps=drawn.steps,
            times=times,
            plain_times=plain_times,
            processor_share=share if self.model.backbone.device.type == "cpu" else None,
            macs=drawn.macs,
            share_saved=1 - drawn.macs / self.plain_macs if self.plain_macs else 0.0,
            share_reused=drawn.heat.reused,
            peak_bytes=top,
            held_bytes=drawn.held_bytes,
            scores=scores,
            absent=absent if top is not None else {**absent, "peak_bytes": NOBODY_SAYS},
            heat=drawn.heat,
            notes=drawn.notes,
        )
        return row, drawn.pictures

    def knows_plain(self, row: Row, pictures: Pictures) -> None:
        """The plain run was measured before: take it from where it was kept."""
        self.plain_macs, self.plain_pictures = row.macs, pictures

    def drawn(self, candidate: Candidate) -> Drawn:
        """Draw everything once."""
        pictures: list[Pictures] = []
        found: Drawn | None = None
        macs = held = 0
        for group in self.question.groups():
            images, recorder, told = self._batch(candidate, group)
            pictures += images
            macs, held = macs + recorder.macs, max(held, recorder.bytes_held)
            found = found or told
        assert found is not None
        return replace(found, pictures=np.stack(pictures), macs=macs // self.question.pictures, held_bytes=held)

    def _batch(self, candidate: Candidate, group: Group) -> tuple[list[Pictures], Recorder, Drawn]:
        question, recorder = self.question, Recorder()
        inputs = [question.inputs[i] for i in group.indices]
        settings = {**question.settings, "seed": group.seed}
        batch = self.model.batch(inputs, group.indices, settings, settings.get("negative"), candidate.methods)
        batch.drawing.report = recorder
        for step in batch.steps():
            recorder.step = step.index + 1
            self.on_step()
        run = batch.drawing.run
        branches = run.schedule.branches
        told = heat(recorder, run.program, run.schedule.steps, run.blocks, branches)
        images = [as_array(picture) for picture in self.model.pictures(step.x)]
        return images, recorder, Drawn(np.stack(images), 0, 0, run.schedule.steps, told, tuple(recorder.notes))

    def _timed(self, candidate: Candidate) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Seconds a picture of the plain run and of the set, in turns; which comes first changes from turn to turn."""
        if candidate == PLAIN:
            return (), tuple(self._seconds(PLAIN) for _ in range(self.question.repeats))
        taken: dict[Candidate, list[float]] = {PLAIN: [], candidate: []}
        for turn in range(self.question.repeats):
            for who in (PLAIN, candidate) if turn % 2 == 0 else (candidate, PLAIN):
                taken[who].append(self._seconds(who))
        return tuple(taken[PLAIN]), tuple(taken[candidate])

    def _seconds(self, candidate: Candidate) -> float:
        group = next(self.question.groups())
        start = perf_counter()
        self._batch(candidate, group)
        return (perf_counter() - start) / len(group.indices)
