"""A source of examples: indexable, named, and with a fingerprint of its content."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, runtime_checkable

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True)
class SourceInfo:
    """What a source holds; `size` is (height, width), or None where examples differ."""

    name: str
    channels: int
    size: tuple[int, int] | None
    classes: tuple[str, ...] | None
    captioned: bool
    licence: str


@dataclass(frozen=True)
class Example:
    """One example: image uint8 [H, W, C] with what is known about it."""

    image: np.ndarray
    label: int | None
    caption: str | None
    group: str | None
    name: str


@runtime_checkable
class DataSource(Protocol):
    """What the loader reads. `fingerprint` changes whenever any example does."""

    info: SourceInfo

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Example: ...

    def fingerprint(self) -> str: ...
