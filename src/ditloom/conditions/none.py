"""No condition at all."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ditloom.contracts.condition import Condition
from ditloom.contracts.conditioner import Conditioner
from ditloom.contracts.errors import UserError
from ditloom.contracts.registry import register


@register("none")
class Unconditional(Conditioner):
    """An empty condition; anything but None or an empty prompt is refused."""

    def config(self) -> dict[str, Any]:
        return {}

    def encode(self, inputs: Sequence[str | int | None]) -> Condition:
        for value in inputs:
            if value is not None and value != "":
                raise UserError(f"this model is unconditional and takes no prompt or class, got {value!r}")
        return Condition()
