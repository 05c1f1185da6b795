"""Compare sets of methods on a model: what each costs, what it changes, and which to use."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tyro.conf import UseAppendAction

from ditloom.cli.command import Answer, Command, OptionalPath, OptionalText, OptionalWhole, Whole
from ditloom.cli.place import device_of, dtype_of
from ditloom.cli.show import say, shown_path, table
from ditloom.cli.wanted import guidance_of, inputs_of, seeds_of, size_of
from ditloom.contracts.registry import register

if TYPE_CHECKING:
    from ditloom.measure.comparison.answer import Comparison
    from ditloom.measure.comparison.row import Row
    from ditloom.measure.evidence import Real
    from ditloom.model import Input, Model

LEFT_TO_THE_PAGE = ("macs",)


@register("compare")
@dataclass(frozen=True, kw_only=True)
class Compare(Command):
    """Run sets of methods on the same pictures and hold them against the plain run and against fewer steps.

    A set is written 'fora:interval=2', several methods together 'teacache:threshold=0.1 + guidance-gate'. The answer is
    a table, comparison.json and the page comparison.html. A comparison that was interrupted goes on with its --out.
    """

    sets: UseAppendAction[tuple[tuple[str, ...], ...]] = ()
    """sets of methods, such as "fora:interval=2" "dbcache + guidance-gate\""""
    sweep: UseAppendAction[tuple[tuple[str, ...], ...]] = ()
    """a set over lists of values, every combination: "fbcache:threshold=0.05|0.1|0.2\""""
    preset: OptionalText = None
    """a named list of sets: caches holds every cache there is"""
    model: str = "emoji"
    """a bundled model, a model folder or a hub name"""
    prompts: OptionalPath = None
    """a text file with a prompt a line; unless given, every class or a few prompts"""
    classes: OptionalText = None
    """classes in place of prompts: names or numbers with commas between, or all"""
    count: OptionalWhole = None
    """pictures for each seed, the inputs taken in turn; unless given, one for each input"""
    seed: Whole = 0
    """decides the noise"""
    seeds: OptionalText = None
    """several seeds, such as 0,7,12 or 0-15: every picture with each"""
    check_seeds: OptionalText = None
    """seeds on which what --budget or --quality picked is measured again; none of --seeds may be among them"""
    steps: OptionalWhole = None
    """steps of the plain run; unless given, the model's own number"""
    sampler: OptionalText = None
    """a sampler; unless given, the model's own, or euler where that evaluates the network several times a step"""
    guidance: OptionalText = None
    """a guidance scale or rule; unless given, the model's own"""
    size: OptionalText = None
    """side, or HEIGHTxWIDTH, in pixels; unless given, the model's own"""
    negative: OptionalText = None
    """what guidance leads away from"""
    batch_size: Whole = 4
    """pictures drawn together"""
    repeats: Whole = 3
    """turns in which wall time is taken"""
    budget: OptionalText = None
    """pick the best set that is so much faster than the plain run, such as 2x"""
    quality: OptionalText = None
    """pick the fastest set that stays so close to the plain run: psnr>30, ssim>0.95 or lpips<0.05"""
    extractor: OptionalText = None
    """what sees whole samples; unless given, a classifier of the model's classes, or effnet-lite0"""
    data: OptionalText = None
    """real pictures for the Frechet distance, as SOURCE:KEY=VALUE; unless given, what the model was trained on"""
    out: OptionalPath = None
    """the folder to write; unless given, out/compare- and the model's name"""
    dtype: str = "fp32"
    """fp32, bf16 or fp16"""
    device: str = "auto"
    """auto, cpu, cuda or mps"""

    def run(self) -> Answer:
        from ditloom.cli.compare_progress import CompareProgress
        from ditloom.measure.comparison.run import compare
        from ditloom.training.durable import exclusive

        self._check()
        model = self._model()
        (sets, sweep), folder = self._texts, self.folder
        with exclusive(folder), _told_on_stop(folder), CompareProgress() as bar:
            found = compare(
                model,
                sets,
                sweep=sweep,
                preset=self.preset,
                inputs=self._inputs(model),
                seeds=seeds_of(self.seeds, self.seed),
                check_seeds=() if self.check_seeds is None else seeds_of(self.check_seeds, 0),
                steps=self.steps,
                sampler=self.sampler,
                guidance=guidance_of(self.guidance),
                size=size_of(self.size),
                negative=self.negative,
                batch_size=self.batch_size,
                repeats=self.repeats,
                budget=self.budget,
                quality=self.quality,
                extractor=self.extractor,
                real=self._real(model),
                folder=folder,
                follow=bar.follow,
            )
            numbers, page = found.save(folder)
        return answer(found, folder, numbers, page)

    @property
    def folder(self) -> Path:
        """Where everything goes."""
        return (self.out or Path("out") / f"compare-{Path(self.model).name}").expanduser()

    @property
    def _texts(self) -> tuple[list[str], list[str]]:
        """Sets and sweeps, however many were given behind how many flags."""
        return [text for several in self.sets for text in several], [text for several in self.sweep for text in several]

    def _check(self) -> None:
        """Whatever can be refused before a model is loaded."""
        from ditloom.cli.wanted import check_spec
        from ditloom.contracts.registries import GUIDANCE, SAMPLERS
        from ditloom.measure import EXTRACTORS
        from ditloom.measure.comparison.candidates import candidates
        from ditloom.measure.comparison.choice import Budget, Quality
        from ditloom.measure.comparison.presets import preset

        candidates(*self._texts, preset(self.preset))
        for reader, text in ((Budget.read, self.budget), (Quality.read, self.quality)):
            if text is not None:
                reader(text)
        if self.extractor is not None:
            EXTRACTORS.info(self.extractor.partition(":")[0])
        for registry, spec in ((SAMPLERS, self.sampler), (GUIDANCE, guidance_of(self.guidance))):
            if isinstance(spec, str):
                check_spec(registry, spec)

    def _model(self) -> Model:
        from ditloom.loading import load

        return load(self.model, dtype=dtype_of(self.dtype), device=device_of(self.device))

    def _inputs(self, model: Model) -> list[Input]:
        from ditloom.contracts.errors import UserError
        from ditloom.measure.comparison.run import default_inputs

        asked = self.prompts is not None or self.classes is not None
        inputs = inputs_of(model, (), self.prompts, self.classes) if asked else list(default_inputs(model))
        if self.count is not None and self.count < 1:
            raise UserError(f"--count must be at least 1; got {self.count}")
        count = len(inputs) if self.count is None else self.count
        return [inputs[i % len(inputs)] for i in range(count)]

    def _real(self, model: Model) -> Any:
        """Gives the real pictures, if they are ever asked for."""
        from ditloom.cli.commands.data import source_of
        from ditloom.measure.evidence import Real

        known = self.data or model.info.get("source")
        if known is None:
            return None

        def real() -> Real:
            return Real.of(source_of(known))

        return real


def answer(found: Comparison, folder: Path, numbers: Path, page: Path) -> Answer:
    """The table, the verdict in words, and where everything is."""
    from ditloom.measure.comparison.columns import empty_because
    from ditloom.measure.comparison.verdict import choice_in_words, headline, reasons

    told = [
        shown_table(found),
        *refusals(found.rows),
        *empty_because(found),
        *found.remarks,
        f"protocol {found.protocol.hash}",
        "",
        headline(found),
        *reasons(found),
        *choice_in_words(found),
        shown_path(numbers),
        shown_path(page),
    ]
    document = {**found.to_dict(), "folder": folder, "page": page, "answer": headline(found)}
    return Answer(document, told)


def shown_table(found: Comparison) -> Any:
    """What fits on a terminal; the plain run first, then by falling speed-up."""
    from ditloom.measure.comparison.columns import filled

    columns = [column for column in filled(found) if column.key not in LEFT_TO_THE_PAGE]
    first, *others = found.rows
    ordered = [first, *sorted((row for row in others if row.refused is None), key=lambda row: -row.speedup)]
    cells = [[row.name, *(c.shown(c.value(found, row)) or "-" for c in columns[1:])] for row in ordered]
    titles = [column.title for column in columns]
    return table(titles, cells, right=titles[1:])


def refusals(rows: Sequence[Row]) -> list[str]:
    """What could not run, and why."""
    return [f"{row.name}: {row.refused}" for row in rows if row.refused is not None]


@contextlib.contextmanager
def _told_on_stop(folder: Path) -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        say(f"the sets measured so far are in {shown_path(folder)}; the same command goes on there")
        raise
