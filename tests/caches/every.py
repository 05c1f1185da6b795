"""Every registered cache with settings that act on toys of five blocks within six steps, and with settings that do not.

A cache that is not listed here joins with its defaults.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ditloom.contracts.backbone import Backbone
from ditloom.contracts.errors import UserError
from ditloom.contracts.method import Assets, Control, Handler, Steps, Tap
from ditloom.contracts.plan import Action
from ditloom.contracts.registries import METHODS
from ditloom.sites.run import Run
from ditloom.sites.store import Store
from tests.caches.acting import bound, counted, surface_of
from tests.sites import toys
from tests.sites.driving import STEPS, follow, start

ALL = [key for key in METHODS.names() if METHODS.info(key).facts.get("family") == "caches"]
CACHES = [key for key in ALL if key != "fewer-steps"]
"""All but the control, which changes the sampler and nothing inside a run."""
ON = {
    "dbcache": "first=1,warmup=2,threshold=0.3",
    "dbprune": "first=1,warmup=2,threshold=0.2",
    "delta-dit": "interval=3,blocks=0.6",
    "fastercache": "attention_start=0.2,guidance_start=0.2,interval=3,low=1.0,high=1.0",
    "fbcache": "threshold=0.35",
    "magcache": "threshold=0.15,ratios=(1.0,1.1,1.02,1.01,0.97,0.9)",
    "mixcache": "kappa=1e9,stable=1",
    "pab": "low=0.0,high=2.0",
    "skip-dit": "high=2.0",
    "taocache": "start=0.0,alpha=0.7",
    "taylorseer": "interval=2,order=1",
    "teacache": "threshold=0.4,fit=identity",
    "toca": "interval=2,ratio=0.1,step_weight=0",
}
OFF = {
    "adacache": "warmup=1.0",
    "dbcache": "first=1,threshold=0",
    "dbprune": "first=1,threshold=0",
    "delta-dit": "interval=1",
    "fastercache": "attention_start=1.0,guidance_start=1.0",
    "fbcache": "threshold=0",
    "fora": "interval=1",
    "guidance-gate": "start=1.0",
    "magcache": "threshold=0,ratios=(1.0,1.1,1.02,1.01,0.97,0.9)",
    "mixcache": "tau=0.0",
    "pab": "spatial=1,temporal=1,cross=1",
    "skip-dit": "interval=1",
    "taocache": "warmup=1.0,alpha=0.7",
    "taylorseer": "interval=1",
    "teacache": "threshold=0,fit=identity",
    "toca": "interval=1",
}
ON_SKIPS = {"delta-dit": "interval=3,blocks=1.0"}
"""Where long skips leave no other range."""
LEARNED = ("harmonica", "learning-to-cache")


@cache
def model_of(name: str) -> Backbone:
    """A toy that tests may share, as no cache may change it."""
    return toys.make(name)


@cache
def acting(key: str, name: str, on: bool = True) -> Handler | None:
    """The handler of a cache on a toy, or None where the toy lacks what it needs. It learns nothing, so is shared."""
    model = model_of(name)
    settings = OFF if not on else {**ON, **ON_SKIPS} if model.skips else ON
    spec = f"{key}:{settings[key]}" if key in settings else key
    try:
        return bound(spec, model, scores(model, not on) if key in LEARNED else None)
    except UserError as error:
        assert "skip" in str(error) or "lack" in str(error) or "no " in str(error), error
        return None


def scores(model: Backbone, all_high: bool) -> Assets:
    """Router scores: all high computes everything."""
    count = len(surface_of(model).submodules)
    drawn = torch.rand(STEPS, count, generator=torch.Generator().manual_seed(0))
    return Assets({"scores": torch.full((STEPS, count), 0.99) if all_high else drawn.round()})


def running(key: str, name: str, on: bool = True, **options: Any) -> Run | None:
    """A run of a toy under one cache."""
    handler = acting(key, name, on)
    return None if handler is None else start(model_of(name), [handler], **options)


@cache
def plan_of(key: str, name: str) -> Plan:
    """Everything that a cache on a toy says before a run."""
    handler, surface, schedule = acting(key, name), surface_of(model_of(name)), toys.schedule(model_of(name), STEPS)
    assert handler is not None
    return Plan(
        handler, tuple(handler.controls(surface)), handler.plan(schedule, surface), handler.taps(schedule, surface)
    )


@cache
def is_static(key: str) -> bool:
    """Whether all of its decisions are taken before the run."""
    steps = plan_of(key, "u-vit" if key == "skip-dit" else "mmdit").steps
    return not any(action is Action.DEFER for step in steps for action in step.values())


class Plan(NamedTuple):
    """A handler with its controls, actions and taps."""

    handler: Handler
    controls: Sequence[Control]
    steps: Steps
    taps: Sequence[Sequence[Tap]]


@dataclass
class Walk:
    """A trajectory with everything that was seen of it: MACs counted apart, block calls by branch, stores and uses."""

    run: Run
    end: Tensor
    macs: int
    calls: Counter[int]
    pushed: set[tuple[Any, ...]]
    predicted: set[tuple[Any, ...]]


@cache
def walked(key: str, name: str, batched: bool = True) -> Walk | None:
    """A trajectory of a toy under one cache ("": none), computed once."""
    model, handler = toys.make(name), acting(key, name) if key else None
    if key and handler is None:
        return None
    calls: Counter[int] = Counter()
    for index, block in enumerate(model.blocks):
        block.register_forward_pre_hook(lambda _, x, index=index: calls.update({index: len(x[0]["image"]) // 2}))
    run = start(model, [handler] if handler else [], batched=batched)
    pushed, predicted = watched(run.store)
    with counted() as macs:
        end, _ = follow(run)
    return Walk(run, end, macs[0], calls, pushed, predicted)


def watched(store: Store) -> tuple[set[tuple[Any, ...]], set[tuple[Any, ...]]]:
    """(place, step, branch) of what will be stored, and of what will be predicted."""
    pushed: set[tuple[Any, ...]] = set()
    predicted: set[tuple[Any, ...]] = set()
    push, predict = store.push, store.predict

    def pushing(place: Any, rows: Any, step: int, *rest: Any) -> None:
        pushed.update((place, step, branch) for branch in rows.branches)
        push(place, rows, step, *rest)

    def predicting(place: Any, rows: Any, predictor: Any, step: int, made_of: Any) -> Any:
        predicted.update((place, step, branch) for branch in rows.branches)
        return predict(place, rows, predictor, step, made_of)

    store.push, store.predict = pushing, predicting  # type: ignore[method-assign]
    return pushed, predicted


def reused(run: Run) -> int:
    """Visits of sites that used what was stored."""
    return sum(n for (_, action), n in run.report.counts.items() if action in ("reuse", "rows"))
