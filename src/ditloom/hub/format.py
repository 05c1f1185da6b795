"""What a foreign format is, and the check of a checkpoint's keys and shapes against a model."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any, ClassVar

from torch import Tensor

from ditloom.contracts.backbone import BackboneConfig
from ditloom.contracts.errors import UserError
from ditloom.hub.keymap import KeyMap

SHOWN = 3


@dataclass(frozen=True)
class Foreign:
    """What was read: tensors by name, the settings beside them (a config.json), and what the file calls the model."""

    tensors: Mapping[str, Tensor]
    settings: Mapping[str, Any] = field(default_factory=dict)
    name: str = "the checkpoint"
    model: str = ""

    def shape(self, key: str) -> tuple[int, ...]:
        """Shape of a tensor that the format cannot do without."""
        if key not in self.tensors:
            near = nearest(key, self.tensors)
            raise UserError(f"{self.name} has no tensor {key!r}" + (f"; nearest is {near!r}" if near else ""))
        return tuple(self.tensors[key].shape)

    def count(self, pattern: str) -> int:
        """How many block numbers occur in names that match a pattern with one group."""
        found = (re.match(pattern, key) for key in self.tensors)
        return len({match[1] for match in found if match})


class Format(ABC):
    """One foreign format: how it is known, what model it holds, and which tensor is which.

    folder: a config.json beside the weights, as diffusers writes it; otherwise one file. unused: tensors that some
    files hold and the network does not read.
    """

    family: ClassVar[str]
    keymap: ClassVar[KeyMap]
    folder: ClassVar[bool] = False
    unused: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def recognises(self, foreign: Foreign) -> bool:
        """Whether the names of the tensors are this format's."""

    @abstractmethod
    def config(self, foreign: Foreign) -> BackboneConfig:
        """The settings of the model, from shapes and from what is written beside them."""

    def settings(self, config: Any) -> dict[str, Any]:
        """What to write beside the weights; `UserError` for a model that the format cannot hold."""
        return {}


def check(foreign: Foreign, expected: Mapping[str, Tensor]) -> None:
    """One sentence that names what is missing, extra or of another shape."""
    given = foreign.tensors
    missing = [key for key in expected if key not in given]
    extra = [key for key in given if key not in expected]
    reshaped = [key for key in expected if key in given and expected[key].shape != given[key].shape]
    faults = []
    if missing:
        hints = {key: nearest(key, extra) for key in missing[:SHOWN]}
        named = [f"{k} (nearest: {near})" if near else k for k, near in hints.items()]
        faults.append(_listed("missing", named, len(missing)))
    if extra:
        faults.append(_listed("extra", extra[:SHOWN], len(extra)))
    if reshaped:
        named = [f"{k} is {list(given[k].shape)} and should be {list(expected[k].shape)}" for k in reshaped[:SHOWN]]
        faults.append(_listed("of another shape", named, len(reshaped)))
    if faults:
        raise UserError(f"{foreign.name} does not fit the model: {'; '.join(faults)}")


def _listed(what: str, named: list[str], total: int) -> str:
    more = f" and {total - len(named)} more" if total > len(named) else ""
    return f"{total} {what}: {', '.join(named)}{more}"


def nearest(key: str, known: Iterable[str]) -> str | None:
    """The most similar name, if any is similar."""
    found = get_close_matches(key, list(known), n=1, cutoff=0.75)
    return found[0] if found else None


def refuse_unless(config: Any, format: str, **needed: Any) -> None:
    """`UserError` for a setting that a format cannot express."""
    for name, value in needed.items():
        if getattr(config, name) != value:
            raise UserError(f"{format} has only {name} = {value!r}; this model has {getattr(config, name)!r}")


def known_heads(presets: Mapping[str, Any], depth: int, width: int, family: str) -> int:
    """Attention heads, which no tensor shows: from the published sizes."""
    for config in presets.values():
        if (config.depth, config.width) == (depth, width):
            return config.heads
    raise UserError(
        f"the number of attention heads cannot be read from weights, and no published {family} has depth {depth} and "
        f"width {width}: give the configuration"
    )


def square_side(tokens: int, name: str) -> int:
    """Side of a square grid of tokens."""
    side = round(tokens**0.5)
    if side * side != tokens:
        raise UserError(f"{name} covers {tokens} tokens, which is no square grid: give the configuration")
    return side


def split_null(rows: int) -> tuple[int, bool]:
    """(classes, null row?) of a label table: round hundreds and tens have no null row, as 1000 and not 999 + 1."""
    return (rows, False) if rows % 10 == 0 else (rows - 1, True)
