"""ditloom: define, train, sample, accelerate, compress, control, edit and measure Diffusion Transformers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ditloom.adapters.using import using
    from ditloom.contracts.condition import Condition
    from ditloom.measure.comparison import compare
    from ditloom.model import Model, build, load

__version__ = "0.1.0"
__all__ = ["Condition", "Model", "build", "compare", "load", "using"]

_HOMES = dict.fromkeys(("Model", "build", "load"), "ditloom.model")
_HOMES["using"] = "ditloom.adapters.using"
_HOMES |= {"Condition": "ditloom.contracts.condition", "compare": "ditloom.measure.comparison"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'ditloom' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)
