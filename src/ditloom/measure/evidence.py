"""What a metric looks at: the drawn pictures, what each was asked to be, and the real ones beside them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ditloom.contracts.data import DataSource
from ditloom.contracts.errors import UserError
from ditloom.measure.features import Extractor, extract_cached

Pictures = NDArray[np.uint8]


@dataclass(frozen=True)
class Case:
    """One picture asked for: the model's input, and the name, group and label of the real picture it stands for."""

    input: str | int
    name: str = ""
    group: str | None = None
    label: int | None = None


@dataclass(frozen=True)
class Real:
    """Real pictures uint8 [M, H, W, C] with what is known of each."""

    images: Pictures
    cases: tuple[Case, ...]

    def __post_init__(self) -> None:
        if len(self.images) != len(self.cases):
            raise UserError(f"{len(self.images)} pictures came with {len(self.cases)} descriptions")

    @classmethod
    def of(cls, source: DataSource, rows: Sequence[int] | None = None) -> Real:
        """The given rows of a source (all by default); captions are the inputs where there are any, else labels."""
        examples = [source[i] for i in (range(len(source)) if rows is None else rows)]
        cases = tuple(
            Case(e.caption if e.caption is not None else int(e.label or 0), e.name, e.group, e.label) for e in examples
        )
        return cls(np.stack([e.image for e in examples]), cases)

    def __add__(self, other: Real) -> Real:
        return Real(np.concatenate([self.images, other.images]), self.cases + other.cases)

    def fingerprint(self) -> str:
        """Sixteen hex digits that change with any picture or name."""
        digest = hashlib.blake2b(repr((self.images.shape, self.cases)).encode(), digest_size=8)
        digest.update(self.images.tobytes())
        return digest.hexdigest()


@dataclass(frozen=True)
class Evidence:
    """Drawn pictures with their cases, the training pictures, the held-out ones, and the extractor to see them with.

    Features are computed when a metric first asks for them; those of real pictures are kept in `cache`.
    """

    drawn: Pictures
    cases: tuple[Case, ...]
    training: Real
    held_out: Real
    extractor: Extractor
    cache: Path | None = None

    def __post_init__(self) -> None:
        if len(self.drawn) != len(self.cases):
            raise UserError(f"{len(self.drawn)} drawn pictures came with {len(self.cases)} cases")

    @cached_property
    def drawn_features(self) -> Tensor:
        return extract_cached(self.extractor, self.drawn, None)

    @cached_property
    def training_features(self) -> Tensor:
        return extract_cached(self.extractor, self.training.images, self.cache)

    @cached_property
    def held_out_features(self) -> Tensor:
        return extract_cached(self.extractor, self.held_out.images, self.cache)


@dataclass(frozen=True)
class Reading:
    """One number of a metric, before it gets its protocol; `facts` is what else must be equal to compare it."""

    name: str
    value: float
    error: float | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)


class Metric(Protocol):
    """What a file of this folder registers: a frozen dataclass of settings, called with evidence."""

    def __call__(self, evidence: Evidence) -> list[Reading]: ...
