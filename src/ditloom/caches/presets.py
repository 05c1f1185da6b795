"""Stacks of caches that make sense together, by name: ``--using preset:NAME``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from ditloom.contracts.errors import UnknownName

PREFIX = "preset:"
STACKS: Mapping[str, tuple[str, ...]] = {
    "early-tea-late-tao": ("teacache:end=0.4", "taocache:start=0.5"),
    "gated-dbcache": ("dbcache:first=2,warmup=4,end=0.6", "guidance-gate:start=0.6"),
    "dbcache-taylor": ("dbcache:first=2,warmup=4,predictor=taylor",),
    "broadcast-under-teacache": ("pab", "teacache:threshold=0.1"),
    "faster-guidance-over-dbcache": (
        "dbcache:first=2,warmup=4,end=0.4",
        "fastercache:attention=False,guidance_start=0.4",
    ),
    "delta-then-fora": ("delta-dit:end=0.5", "fora:start=0.5"),
    "toca-text": (
        "toca:score=text,ratio=0.3,bonus=0.4,window=4,step_weight=-0.9,layer_weight=0.6,interval_weight=0.2,"
        "sensitive=(),feed_forward=1.6,cross=0.6,forward=True",
    ),
}
"""Approximations of one step are not nested: where two levels meet, each has its own part of the run, or the outer one
decides first and the inner one acts on what is still computed. TaoCache starts from two outputs of all blocks.
toca-text is ToCa as in PixArt-alpha at 20 steps of DPM-Solver.
"""


def expanded(using: Iterable[Any]) -> list[Any]:
    """What is asked for, each preset replaced by its methods."""
    found: list[Any] = []
    for item in using:
        named = isinstance(item, str) and item.startswith(PREFIX)
        found += _stack(item.removeprefix(PREFIX).strip()) if named else [item]
    return found


def _stack(name: str) -> tuple[str, ...]:
    if name not in STACKS:
        raise UnknownName("preset", name, STACKS)
    return STACKS[name]
