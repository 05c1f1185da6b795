"""Evaluates the models that ship with the package and writes what `docs/results.md` shows.

    OMP_NUM_THREADS=1 python recipes/evaluate_reference.py emoji
    OMP_NUM_THREADS=1 python recipes/evaluate_reference.py fashion
    (--model, --count, --steps, --guidance, --sampler, --batch-size, --out, --work; see --help)

For each model: contact sheets of seed 0 in `docs/images`, and `docs/images/<model>-measurements.json`. Nothing on a
sheet is picked: its captions are the first of the data set in the order of a hash of their file names. Drawn pictures
are kept in the work folder, so an interrupted run goes on. Needs `pip install 'ditloom[eval]'` for `emoji` and the
Debian package dataset-fashion-mnist for `fashion`.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import tyro

from ditloom.contracts.metric import Measurement
from ditloom.data.emoji import Emoji
from ditloom.data.fashion_mnist import CLASSES, FashionMnist
from ditloom.data.fetch import cache_folder
from ditloom.loading import load
from ditloom.measure.accuracy import Accuracy
from ditloom.measure.contact_sheet import Sheet, beside, contact_sheet, save_png
from ditloom.measure.drawing import Sampling
from ditloom.measure.evaluate import Evaluation, anchors, evaluate, save_measurements
from ditloom.measure.evidence import Case, Metric, Real
from ditloom.measure.features import built
from ditloom.measure.frechet import Frechet
from ditloom.measure.kernel_distance import KernelDistance
from ditloom.measure.memorisation import Memorisation, nearest_training
from ditloom.measure.retrieval import Retrieval
from ditloom.model import Model

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Common:
    """What both evaluations are told; the sampling settings default to the model's own."""

    model: str = ""
    """bundled name or folder; by default the bundled one"""
    steps: int | None = None
    guidance: float | None = None
    sampler: str | None = None
    batch_size: int = 32
    on_sheet: int = 80
    """pictures on a contact sheet"""
    out: Path = ROOT / "docs" / "images"
    work: Path = field(default_factory=lambda: cache_folder() / "evaluation")

    @property
    def sampling(self) -> Sampling:
        return Sampling(
            steps=self.steps, guidance=self.guidance, sampler=self.sampler, seed=0, batch_size=self.batch_size
        )


@dataclass(frozen=True)
class EmojiRun(Common):
    """Captions to emoji: as many known captions as there are held-out ones by default, one picture each."""

    count: int = 163
    """known captions drawn; all held-out captions always are"""


@dataclass(frozen=True)
class FashionRun(Common):
    """Classes to clothes: the same number of each class."""

    count: int = 1000


def stable_order(cases: Sequence[Case]) -> list[int]:
    """Places of the cases in the order of a hash of their names."""
    keys = [hashlib.blake2b(case.name.encode(), digest_size=8).digest() for case in cases]
    return sorted(range(len(cases)), key=keys.__getitem__)


def progress(what: str) -> Callable[[int, int], None]:
    def show(done: int, total: int) -> None:
        end = "\n" if done == total or not sys.stderr.isatty() else "\r"
        print(f"{what}: {done} of {total} drawn", end=end, file=sys.stderr, flush=True)

    return show


def evaluate_emoji(run: EmojiRun) -> list[Measurement]:
    """Known and held-out captions apart, and the same metrics of held-out real pictures as anchors."""
    model = load(run.model or "emoji")
    size = _drawn_size(model)
    training, held_out = Real.of(Emoji("train", size)), Real.of(Emoji("held-out", size))
    extractor = built("effnet-lite0")
    metrics: list[Metric] = [Retrieval(), KernelDistance(), Frechet(), Memorisation()]
    measured = []
    for split, real in (("known", training), ("held-out", held_out)):
        order = stable_order(real.cases)[: run.count if split == "known" else None]
        found = evaluate(
            model,
            [real.cases[place] for place in order],
            training,
            held_out,
            metrics=metrics,
            extractor=extractor,
            sampling=run.sampling,
            folder=run.work / f"emoji-{split}",
            cache=run.work / "features",
            on_drawn=progress(f"emoji, {split} captions"),
        )
        measured += [_labelled(m, split) for m in found.measurements]
        _emoji_sheets(run, found, split)
    return measured + anchors(training, held_out, [KernelDistance(), Frechet()], extractor, run.work / "features")


def _emoji_sheets(run: EmojiRun, found: Evaluation, split: str) -> None:
    """The drawings alone; and each beside the real picture of its caption and the nearest training picture."""
    evidence, count = found.evidence, run.on_sheet
    titles = [str(case.input) for case in evidence.cases[:count]]
    drawn = list(evidence.drawn[:count])
    said = _protocol_line(found)
    sheet = Sheet(columns=10, scale=1, gap=10)
    save_png(contact_sheet(drawn, titles, f"{split} captions, {said}", sheet), run.out / f"emoji-{split}.png")
    every = evidence.training + evidence.held_out
    by_name = {case.name: image for case, image in zip(every.cases, every.images, strict=True)}
    _, rows = nearest_training(evidence.drawn_features[:count], evidence.training_features)
    triples = [
        beside(image, by_name[case.name], evidence.training.images[row])
        for image, case, row in zip(drawn, evidence.cases, rows.tolist(), strict=False)
    ]
    heading = f"{split} captions: drawn | real | nearest training picture, {said}"
    save_png(contact_sheet(triples, titles, heading, Sheet(columns=5, gap=10)), run.out / f"emoji-{split}-compared.png")


def evaluate_fashion(run: FashionRun) -> list[Measurement]:
    """Balanced classes in rotation, so that any first part of the drawing is balanced too."""
    model = load(run.model or "fashion")
    size = _drawn_size(model)
    training, held_out = Real.of(FashionMnist(size=size)), Real.of(FashionMnist(split="test", size=size))
    labels = [index % len(CLASSES) for index in range(run.count)]
    cases = [Case(label, "", CLASSES[label], label) for label in labels]
    metrics: list[Metric] = [Accuracy(), KernelDistance(), Frechet(), Memorisation()]
    found = evaluate(
        model,
        cases,
        training,
        held_out,
        metrics=metrics,
        extractor="fashion-cnn",
        sampling=run.sampling,
        folder=run.work / "fashion",
        cache=run.work / "features",
        on_drawn=progress("fashion"),
    )
    shown = found.evidence.drawn[: 10 * len(CLASSES)]
    titles = [CLASSES[int(case.input)] for case in cases[: len(shown)]]
    heading = f"Fashion-MNIST classes, {_protocol_line(found)}"
    sheet = Sheet(columns=len(CLASSES), scale=2, gap=8, lines=2)
    save_png(contact_sheet(list(255 - shown), titles, heading, sheet), run.out / "fashion.png")
    rows = np.array(stable_order([Case(0, f"test/{i}") for i in range(len(held_out.cases))])[: run.count])
    part = Real(held_out.images[rows], tuple(held_out.cases[row] for row in rows))
    extractor = found.evidence.extractor
    return found.measurements + anchors(training, part, [KernelDistance(), Frechet()], extractor, run.work / "features")


def _drawn_size(model: Model) -> int:
    """Side in pixels of what the model draws."""
    _, height, _ = model.latent_shape()
    return height * model.latents.factor


def _protocol_line(found: Evaluation) -> str:
    said = found.measurements[0].protocol
    return f"seed 0, not picked; {said.sampler}, {said.steps} steps, {said.guidance}"


def _labelled(measurement: Measurement, split: str) -> Measurement:
    protocol = measurement.protocol
    extra = {**protocol.extra, "captions": split}
    return Measurement(measurement.value, type(protocol)(**{**vars(protocol), "extra": extra}), measurement.error)


def shown(measurement: Measurement) -> str:
    said = measurement.protocol
    error = "" if measurement.error is None else f" +- {measurement.error:.4g}"
    about = said.extra.get("captions", "") or (said.model if said.model.startswith("real") else "")
    return f"{said.metric:34} {measurement.value:10.4g}{error:12} N={said.samples:<6} {about:24} [{said.hash}]"


def main(run: EmojiRun | FashionRun) -> None:
    name = "emoji" if isinstance(run, EmojiRun) else "fashion"
    measured = evaluate_emoji(run) if isinstance(run, EmojiRun) else evaluate_fashion(run)
    save_measurements(measured, run.out / f"{name}-measurements.json")
    for measurement in measured:
        print(shown(measurement))


if __name__ == "__main__":
    main(tyro.extras.subcommand_cli_from_dict({"emoji": EmojiRun, "fashion": FashionRun}))
