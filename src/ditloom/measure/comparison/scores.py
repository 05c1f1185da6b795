"""How the pictures of a set compare with the plain run's at equal seeds, and with real pictures."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ditloom.contracts.errors import UserError
from ditloom.measure import EXTRACTORS
from ditloom.measure.accuracy import agreement
from ditloom.measure.comparison.row import Score
from ditloom.measure.features import Classifier, Extractor, built, extract
from ditloom.measure.fidelity import psnr, ssim, to_unit
from ditloom.measure.frechet import Moments, frechet_distance
from ditloom.measure.lpips import Lpips

if TYPE_CHECKING:
    from ditloom.measure.evidence import Pictures, Real
    from ditloom.model import Input, Model

EQUAL = 100.0
"""The PSNR in dB that equal pictures count as, as in video benchmarks, so that a mean exists."""
PER_FEATURE = 2
"""A Frechet distance needs so many pictures for each feature; with fewer its bias drowns the differences."""
NO_DATA = "no real pictures are at hand"
CHUNK = 64


@dataclass
class Scorer:
    """Scores pictures uint8 [N, H, W, C] against the plain run's. real: gives real pictures, when they are needed.

    labels: the class of each picture, where a classifier knows what the model draws.
    """

    extractor: Extractor
    labels: Sequence[int] | None = None
    real: Callable[[], Real] | None = None
    _lpips: list[Lpips] = field(default_factory=list)

    def __call__(self, drawn: Pictures, plain: Pictures) -> tuple[dict[str, Score], dict[str, str]]:
        """Scores by metric, and for every metric without one the reason."""
        a, b = _tensor(drawn), _tensor(plain)
        measures: dict[str, Callable[[], Score]] = {
            "psnr": lambda: _mean(psnr(a, b).clamp(max=EQUAL)),
            "ssim": lambda: _mean(ssim(a, b)),
            "lpips": lambda: _mean(self._perceived(a, b)),
            "accuracy": lambda: self._accuracy(drawn),
            "frechet": lambda: self._frechet(drawn),
        }
        found: dict[str, Score] = {}
        absent: dict[str, str] = {}
        for name, measure in measures.items():
            try:
                found[name] = measure()
            except UserError as why:
                absent[name] = str(why)
        return found, absent

    def _perceived(self, a: Tensor, b: Tensor) -> Tensor:
        if not self._lpips:
            self._lpips.append(Lpips.load())
        pairs = zip(a.split(CHUNK), b.split(CHUNK), strict=True)
        with torch.no_grad():
            return torch.cat([self._lpips[0](to_unit(x) * 2 - 1, to_unit(y) * 2 - 1) for x, y in pairs])

    def _accuracy(self, drawn: Pictures) -> Score:
        classifier = self.extractor
        if self.labels is None or not isinstance(classifier, Classifier):
            raise UserError("no classifier at hand knows what this model draws")
        with torch.no_grad():
            return _mean(agreement(classifier.logits(extract(classifier, drawn)), torch.tensor(self.labels)))

    def _frechet(self, drawn: Pictures) -> Score:
        needed = PER_FEATURE * self.extractor.dimension
        if len(drawn) < needed:
            raise UserError(
                f"a Fréchet distance in the {self.extractor.dimension} features of {self.extractor.tag} needs "
                f"{needed:,} pictures; this comparison draws {len(drawn):,}"
            )
        return Score(frechet_distance(Moments.of(extract(self.extractor, drawn)), self._real_moments))

    @cached_property
    def _real_moments(self) -> Moments:
        if self.real is None:
            raise UserError(NO_DATA)
        return Moments.of(extract(self.extractor, self.real().images))


def scorer(
    model: Model, inputs: Sequence[Input], extractor: str | None = None, real: Callable[[], Real] | None = None
) -> Scorer:
    """The scorer for pictures of these inputs; unless named, the extractor is a classifier of the model's classes, or
    effnet-lite0."""
    classes = _classes(model)
    seen_with = built(extractor or _classifying(classes) or _general())
    known = isinstance(seen_with, Classifier) and classes is not None and tuple(seen_with.classes) == classes
    asked = known and all(value is not None for value in inputs)
    labels = [model.conditioner.index(value) for value in inputs] if asked else None  # type: ignore[operator]
    return Scorer(seen_with, labels, real)


def _general() -> str:
    """effnet-lite0 where it is installed; pixels need nothing."""
    try:
        built("effnet-lite0")
    except UserError:
        return "pixels"
    return "effnet-lite0"


def _classes(model: Any) -> tuple[str, ...] | None:
    names = getattr(model.conditioner, "names", None)
    return tuple(names) if names else None


def _classifying(classes: tuple[str, ...] | None) -> str | None:
    """The registered classifier of exactly these classes."""
    for name in EXTRACTORS.names() if classes is not None else ():
        target = EXTRACTORS.get(name)
        if isinstance(target, type) and issubclass(target, Classifier) and tuple(target.classes) == classes:
            return name
    return None


def _tensor(pictures: Pictures) -> Tensor:
    return torch.from_numpy(pictures.transpose(0, 3, 1, 2).copy())


def _mean(values: Tensor) -> Score:
    """Mean and standard error of the mean."""
    values = values.double()
    return Score(float(values.mean()), float(values.std() / len(values) ** 0.5) if len(values) > 1 else None)


MEANINGS: Mapping[str, str] = {
    "psnr": "peak signal-to-noise ratio to the plain run's picture of the same seed; equal pictures count as 100 dB",
    "ssim": "structural similarity to the plain run's picture, 1 for equal pictures",
    "lpips": "learned perceptual distance to the plain run's picture, 0 for equal pictures",
    "accuracy": "share of pictures that a classifier reads as the class that was asked for",
    "frechet": "distance of the drawn pictures' features to those of real pictures, as wholes",
}
