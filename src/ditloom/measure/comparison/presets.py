"""Named lists of sets to compare. `caches` holds every cache that is installed, at settings that people start from."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from ditloom.caches.presets import STACKS
from ditloom.contracts.errors import UnknownName
from ditloom.contracts.registries import METHODS
from ditloom.measure.comparison.candidates import CONTROL

CURATED: Mapping[str, tuple[str, ...]] = {
    "adacache": ("adacache", "adacache:max_consecutive=2,warmup=3,predictor=taylor"),
    "dbcache": ("dbcache:first=2,warmup=4,threshold=0.12",),
    "dbprune": ("dbprune:first=1,warmup=4",),
    "fbcache": ("fbcache", "fbcache:threshold=0.15"),
    "fora": ("fora:interval=2", "fora"),
    "guidance-gate": ("guidance-gate", "guidance-gate:start=0.7"),
    "magcache": ("magcache", "magcache:threshold=0.12,max_consecutive=2,predictor=taylor"),
    "taocache": ("taocache", "taocache:start=0.2,max_consecutive=1"),
    "taylorseer": ("taylorseer:interval=2,order=1", "taylorseer:interval=3,order=1", "taylorseer"),
    "teacache": (
        "teacache:threshold=0.05",
        "teacache:threshold=0.1",
        "teacache:fit=identity,threshold=0.15,predictor=taylor",
    ),
}
"""Settings by method, where the published defaults alone are not what one would begin with on a model of few blocks."""


def caches() -> list[str]:
    """Every registered cache once or twice, then the named stacks; the control is placed by the comparison itself."""
    alone = [text for name in METHODS.names() if _is_cache(name) for text in CURATED.get(name, (name,))]
    return [*alone, *(" + ".join(methods) for methods in STACKS.values())]


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
