"""ditloom: define, train, sample, accelerate, compress, control, edit and measure Diffusion Transformers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ditloom.adapters.using import using
    from ditloom.contracts.condition import Condition
    from ditloom.loading import load
    from ditloom.measure.comparison import compare
    from ditloom.model import Model
    from ditloom.presets import build

__version__ = "0.1.0"
__all__ = ["Condition", "Model", "build", "compare", "load", "using"]

_HOMES = {
    "Condition": "ditloom.contracts.condition",
    "Model": "ditloom.model",
    "build": "ditloom.presets",
    "compare": "ditloom.measure.comparison",
    "load": "ditloom.loading",
    "using": "ditloom.adapters.using",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'ditloom' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)
