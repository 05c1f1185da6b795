"""Sets of methods side by side on one model: what each costs, what it changes, and which to take."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ditloom.measure.comparison.run import Comparison, compare

__all__ = ["Comparison", "compare"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from ditloom.measure.comparison import run

    return getattr(run, name)
