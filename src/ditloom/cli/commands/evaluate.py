"""Measure a model: draw stated samples and hold them against real pictures."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tyro.conf import Positional, UseAppendAction

from ditloom.cli.command import Answer, Command, OptionalPath, OptionalText, OptionalWhole, Whole
from ditloom.cli.commands.data import source_of
from ditloom.cli.show import shown_path, table
from ditloom.cli.wanted import guidance_of, settings_of
from ditloom.contracts.data import DataSource
from ditloom.contracts.errors import UnknownName, UserError
from ditloom.contracts.registry import register
from ditloom.contracts.settings import parse

if TYPE_CHECKING:
    from ditloom.measure.evaluate import Evaluation
    from ditloom.measure.evidence import Case, Real
    from ditloom.model import Model

BESIDE = ("held-out", "test", "validation")
COMMON = "frechet,kernel-distance,memorisation"
ON_SHEET = 100


@register("evaluate")
@dataclass(frozen=True, kw_only=True)
class Evaluate(Command):
    """Draw the held-out captions or classes, image i from (seed, i), and measure; every number carries its protocol.

    An evaluation that was interrupted goes on where it stopped when it is given the same --out.
    """

    model: Positional[str]
    """a bundled model, a model folder or a hub name"""
    data: OptionalText = None
    """what it was trained on, as SOURCE:KEY=VALUE; unless given, what the model says"""
    held_out: OptionalText = None
    """the real pictures to compare with; unless given, the held-out or test part of --data"""
    metrics: str = ""
    """metrics with commas between; unless given, frechet,kernel-distance,memorisation and retrieval for captions"""
    extractor: str = "effnet-lite0"
    """what sees the pictures: effnet-lite0, fashion-cnn, pixels:size=16, ..."""
    count: OptionalWhole = None
    """pictures to draw, the held-out captions or classes in turn; unless given, one for each, at most 1000"""
    seed: Whole = 0
    """decides the noise"""
    steps: OptionalWhole = None
    """steps of the sampler; unless given, the model's own number"""
    guidance: OptionalText = None
    """a guidance scale or rule; unless given, the model's own"""
    sampler: OptionalText = None
    """a sampler; unless given, the model's own"""
    using: UseAppendAction[tuple[str, ...]] = ()
    """a method such as NAME:KEY=VALUE"""
    batch_size: Whole = 32
    """pictures drawn together"""
    out: OptionalPath = None
    """the folder to write; unless given, runs/evaluate- and the model's name"""

    def run(self) -> Answer:
        from ditloom.loading import load
        from ditloom.measure.evidence import Real

        self._check_names()
        model = load(self.model)
        settings_of(model, steps=self.steps, guidance=self.guidance, sampler=self.sampler, size=None, using=self.using)
        known = self.data or _said_source(model)
        training = source_of(known)
        held_out = source_of(self.held_out) if self.held_out else beside(known)
        real = Real.of(held_out)
        found = self._evaluated(model, Real.of(training), real, held_out.info.captioned)
        return self._answer(found)

    @property
    def folder(self) -> Path:
        """Where pictures and numbers go."""
        return (self.out or Path("runs") / f"evaluate-{Path(self.model).name}").expanduser()

    def _check_names(self) -> None:
        """Before anything is loaded or drawn."""
        from ditloom.measure import EXTRACTORS, METRICS

        for metric in self._metrics(captioned=False):
            METRICS.info(parse(metric)[0])
        EXTRACTORS.info(parse(self.extractor)[0])
        for name, value in (("--count", self.count), ("--batch-size", self.batch_size)):
            if value is not None and value < 1:
                raise UserError(f"{name} must be at least 1; got {value}")

    def _metrics(self, captioned: bool) -> list[str]:
        usual = f"{COMMON},retrieval" if captioned else COMMON
        return [name.strip() for name in (self.metrics or usual).split(",")]

    def _evaluated(self, model: Model, training: Real, held_out: Real, captioned: bool) -> Evaluation:
        from ditloom.cli.progress import DrawingProgress
        from ditloom.data.fetch import cache_folder
        from ditloom.measure.drawing import Sampling
        from ditloom.measure.evaluate import evaluate

        cases = chosen_cases(held_out, self.count)
        sampling = Sampling(
            steps=self.steps,
            guidance=guidance_of(self.guidance),
            sampler=self.sampler,
            seed=self.seed,
            using=self.using,
            batch_size=self.batch_size,
        )
        with DrawingProgress(len(cases), 1, label="evaluate") as bar:
            return evaluate(
                model,
                cases,
                training,
                held_out,
                metrics=self._metrics(captioned),
                extractor=self.extractor,
                sampling=sampling,
                folder=self.folder / "pictures",
                cache=cache_folder() / "features",
                on_drawn=lambda done, total: bar.follow(done),
            )

    def _answer(self, found: Evaluation) -> Answer:
        from ditloom.cli.grid import squarest
        from ditloom.measure.contact_sheet import Sheet, contact_sheet, save_png

        numbers, sheet = self.folder / "measurements.json", self.folder / "sheet.png"
        found.save(numbers)
        shown = found.evidence.drawn[:ON_SHEET]
        titles = [str(case.input) for case in found.evidence.cases[:ON_SHEET]]
        save_png(contact_sheet(list(shown), titles, sheet=Sheet(columns=squarest(len(shown)))), sheet)
        measured = [measurement.to_dict() for measurement in found.measurements]
        document = {"measurements": measured, "folder": self.folder, "sheet": sheet}
        said = found.measurements[0].protocol
        told = f"{said.model}: {said.samples} pictures, {said.sampler}, {said.steps} steps, {said.guidance}, "
        told += f"seed {said.seeds}; seen by {said.extractor}"
        rows = [(m.protocol.metric, f"{m.value:.4g}", _error(m.error), m.protocol.hash) for m in found.measurements]
        made = table(("metric", "value", "error", "protocol"), rows, right=("value", "error"))
        return Answer(document, [told, made, shown_path(numbers), shown_path(sheet)])


def chosen_cases(real: Real, count: int | None) -> list[Case]:
    """The cases in the order of a hash of their names, so that no order of the source decides; repeated if need be."""
    order = sorted(real.cases, key=lambda case: hashlib.blake2b(case.name.encode(), digest_size=8).digest())
    wanted = min(len(order), 1000) if count is None else count
    return [order[i % len(order)] for i in range(wanted)]


def beside(spec: Any, parts: Sequence[str] = BESIDE) -> DataSource:
    """The held-out part of a source: the first split of that meaning which it knows."""
    from ditloom.training.resolve import spelled

    source = spelled(spec)
    for part in parts:
        try:
            return source_of({**source, "split": part})
        except UnknownName:
            continue
    raise UserError(f"the data source {source['name']} has no held-out part: name other real pictures with --held-out")


def _said_source(model: Model) -> Any:
    source = model.info.get("source")
    if source is None:
        raise UserError("the model does not say what it was trained on: name it with --data SOURCE")
    return source


def _error(value: float | None) -> str:
    return "" if value is None else f"{value:.2g}"
