"""Classes by index or name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ditloom.contracts.condition import Condition
from ditloom.contracts.conditioner import Conditioner
from ditloom.contracts.errors import UnknownName, UserError
from ditloom.contracts.registry import register


@register("labels", paper="Peebles and Xie 2022, arXiv:2212.09748 (the null class of classifier-free guidance)")
class Labels(Conditioner):
    """Class indices 0 .. num_classes - 1, or names where `names` gives them; unconditional is index `num_classes`."""

    place: Tensor

    def __init__(self, num_classes: int | None = None, names: Sequence[str] | None = None):
        super().__init__()
        self.names = None if names is None else tuple(names)
        self.num_classes = _count(num_classes, self.names)
        self._index = {name.casefold(): index for index, name in enumerate(self.names or ())}
        self.register_buffer("place", torch.empty(0), persistent=False)

    def config(self) -> dict[str, Any]:
        return {"num_classes": self.num_classes, "names": None if self.names is None else list(self.names)}

    def encode(self, inputs: Sequence[str | int | None]) -> Condition:
        indices = [self.index(value) for value in inputs]
        return Condition(label=torch.tensor(indices, dtype=torch.long, device=self.place.device))

    def index(self, value: str | int | None) -> int:
        """The class index of one input; a name wins over a number written as text."""
        if value is None or value == "":
            return self.num_classes
        if isinstance(value, str) and value.strip().casefold() in self._index:
            return self._index[value.strip().casefold()]
        if isinstance(value, str) and not value.strip().lstrip("-").isdecimal():
            raise UnknownName("class", value, self.names or [f"0 to {self.num_classes - 1}"])
        if not 0 <= int(value) < self.num_classes:
            raise UserError(f"class {value} does not exist: classes are 0 to {self.num_classes - 1}")
        return int(value)


def _count(num_classes: int | None, names: tuple[str, ...] | None) -> int:
    if names is not None and num_classes not in (None, len(names)):
        raise UserError(f"num_classes is {num_classes} and {len(names)} class names are given")
    count = len(names) if names is not None else num_classes
    if not count or count < 1:
        raise UserError("labels need num_classes of at least 1, or names")
    return count
