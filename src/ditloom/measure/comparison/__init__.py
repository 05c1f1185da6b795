"""Sets of methods side by side on one model: what each costs, what it changes, and which to take."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ditloom.measure.comparison.answer import Comparison
    from ditloom.measure.comparison.run import compare

__all__ = ["Comparison", "compare"]
_HOMES = {"Comparison": "answer", "compare": "run"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
