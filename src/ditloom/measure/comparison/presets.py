"""Named lists of sets to compare. `caches` holds every cache that is installed, at settings that people start from."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from ditloom.contracts.errors import UnknownName
from ditloom.contracts.registries import METHODS
from ditloom.measure.comparison.candidates import CONTROL

CURATED: Mapping[str, tuple[str, ...]] = {}
"""Settings by method, where the published defaults are not what one would begin with on a small model."""


def caches() -> list[str]:
    """Every registered cache once or twice, then the named stacks; the control is placed by the comparison itself."""
    from importlib import import_module
    from importlib.util import find_spec

    alone = [text for name in METHODS.names() if _is_cache(name) for text in CURATED.get(name, (name,))]
    stacks: Mapping[str, tuple[str, ...]] = {}
    if find_spec("ditloom.caches.presets") is not None:
        stacks = import_module("ditloom.caches.presets").STACKS
    return [*alone, *(" + ".join(methods) for methods in stacks.values())]


PRESETS: Mapping[str, Callable[[], list[str]]] = {"caches": caches}


def preset(name: str | None) -> list[str]:
    """The sets of a preset; none without a name."""
    if name is None:
        return []
    if name not in PRESETS:
        raise UnknownName("preset", name, PRESETS)
    return PRESETS[name]()


def _is_cache(name: str) -> bool:
    noted = METHODS.info(name)
    family = noted.facts.get("family") or getattr(noted.target, "__module__", "").split(".")[-2:][0]
    return family in ("cache", "caches") and name != CONTROL
