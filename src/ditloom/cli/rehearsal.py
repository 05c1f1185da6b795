"""A drawing gone through without computing it: every forward it will ask for, on tensors that have only a shape.

Plans, guards and accounts are those of a real run, so that what it reports is exact where no decision depends on what
is seen. Where one does, two rehearsals bound it: nothing is reused; everything is that may be.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from ditloom.contracts.backbone import Backbone
from ditloom.contracts.clock import Clock
from ditloom.contracts.method import Handler, Probe
from ditloom.contracts.plan import Action
from ditloom.contracts.site import Site
from ditloom.model import Batch, Model
from ditloom.samplers.drawing import Drawing
from ditloom.sites.report import Report
from ditloom.sites.run import Run
from ditloom.training.estimate import forget_tables

Probes = Mapping[Probe, Tensor]


class Asked(NamedTuple):
    """One evaluation that a sampler and its guidance ask for."""

    clock: Clock
    branches: tuple[str, ...]


@dataclass
class Listing(Drawing):
    """A drawing that computes nothing and lists what it asks for."""

    asked: list[Asked] = field(default_factory=list)

    def predictions(
        self, x: Tensor, t: Any, branches: Sequence[str], *, step: int, evaluation: int
    ) -> Mapping[str, Tensor]:
        native = float(self.backbone.preset.time.native(torch.as_tensor(t, dtype=torch.float64)))
        clock = replace(self._clock(step, evaluation), native=native)
        self.asked.append(Asked(clock, tuple(name for name in branches if name != "weak")))
        channels = 2 if getattr(self.process, "learns_variance", False) else 1
        return {name: torch.cat([x] * channels, dim=1) for name in branches}


def listed(batch: Batch) -> Listing:
    """The evaluations of a batch, found by walking its sampler; no handler changes the latent meanwhile."""
    given = {f.name: getattr(batch.drawing, f.name) for f in fields(Drawing)}
    listing = Listing(**{**given, "handlers": (), "report": Report()})
    for _ in listing.walk(batch.shape, batch.steps_total):
        pass
    return listing


def rehearsed(model: Model, batch: Batch) -> list[Report]:
    """The reports of a batch: one where all is planned, else the one of the least reuse and the one of the most."""
    listing, handlers = listed(batch), batch.drawing.handlers
    with shapes_only():
        backbone = hollow(model)
        for name in ("embed", "call", "head"):
            vars(backbone)[name] = Remembered(getattr(backbone, name))
        run = _walked(backbone, batch, listing, [_computing(handler) for handler in handlers])
        if not _decides(run):
            return [run.report]
        return [run.report, _walked(backbone, batch, listing, [_reusing(handler) for handler in handlers]).report]


def _walked(backbone: Backbone, batch: Batch, listing: Listing, handlers: Sequence[Handler]) -> Run:
    drawing, samples = batch.drawing, len(batch.indices)
    names = listing.schedule.branches
    conditions = {name: drawing.conditions[name].map(_empty) for name in names}
    run = Run(backbone, handlers, schedule=listing.schedule, conditions=conditions, batched=drawing.batched)
    x = torch.empty(samples, *batch.shape, dtype=backbone.dtype)
    for clock, branches in listing.asked:
        if branches:
            run.predict(x, clock, branches)
    return run


def _decides(run: Run) -> bool:
    steps = run.program.steps if run.program is not None else ()
    return any(planned.action is Action.DEFER for step in steps for planned in step.planned())


def _computing(handler: Handler) -> Handler:
    """A twin that reuses nothing it decides on, and notes what the handler would."""

    def decide(site: Site, probes: Probes, clock: Clock, ready: bool, memo: dict[str, Any]) -> Action:
        handler.decide(site, probes, clock, False, memo)
        return Action.COMPUTE

    return _deciding(handler, decide)


def _reusing(handler: Handler) -> Handler:
    """A twin that reuses all it may decide to, and notes what the handler would."""
    notes: dict[str, Any] = {}

    def decide(site: Site, probes: Probes, clock: Clock, ready: bool, memo: dict[str, Any]) -> Action:
        handler.decide(site, probes, clock, False, memo)
        return handler.at_most(site, clock, ready, notes)

    return _deciding(handler, decide)


def _deciding(handler: Handler, decide: Callable[..., Action]) -> Handler:
    twin = copy.copy(handler)
    vars(twin)["decide"] = decide
    return twin


class _Zero(TorchDispatchMode):
    """Asked for the value of a tensor that has none, it says 0."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        return 0 if func is torch.ops.aten._local_scalar_dense.default else func(*args, **(kwargs or {}))


@contextlib.contextmanager
def shapes_only() -> Iterator[None]:
    """While entered, new tensors have shapes and neither content nor memory; no table of them outlives this."""
    forget_tables()
    try:
        with torch.device("meta"), _Zero(), torch.no_grad():
            yield
    finally:
        forget_tables()


def hollow(model: Model) -> Backbone:
    """The model's network anew, of its dtype; to be made where new tensors have no content."""
    with made_in(model.backbone.dtype):
        return model.backbone.preset.build().eval()


@contextlib.contextmanager
def made_in(dtype: torch.dtype) -> Iterator[None]:
    """New floating tensors have this dtype: modules without content cannot be converted afterwards."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


class Remembered:
    """What a function of a backbone returned, by the shapes of what it was given: it runs once for each of them."""

    def __init__(self, fn: Callable[..., Any]):
        self.fn, self.known = fn, dict[Any, Any]()

    def __call__(self, *given: Any) -> Any:
        key = tuple(map(_shape, tree_leaves(given)))
        if key not in self.known:
            self.known[key] = self.fn(*given)
        return tree_map(_empty, self.known[key])


def _shape(value: Any) -> Any:
    return tuple(value.shape) if isinstance(value, Tensor) else value


def _empty(value: Any) -> Any:
    return torch.empty(value.shape, dtype=value.dtype) if isinstance(value, Tensor) else value
