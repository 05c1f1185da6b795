"""Methods by what a user writes, on the tiny backbones of the mechanism's tests."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ditloom.contracts.backbone import Backbone
from ditloom.contracts.method import Assets, Handler
from ditloom.contracts.plan import Action
from ditloom.contracts.registries import METHODS
from ditloom.contracts.settings import registered
from ditloom.sites.run import Run
from ditloom.sites.surface import Surface
from tests.sites import toys
from tests.sites.driving import BOTH, follow, start

COMPUTE, REUSE, ROWS = Action.COMPUTE, Action.REUSE, Action.ROWS


@cache
def surface_of(model: Backbone) -> Surface:
    """The sites of a toy."""
    time = torch.zeros(2, dtype=torch.float64)
    streams, _ = model.embed(toys.latent(), time, model.prepare(toys.condition(model, 2)))
    return Surface(model, streams.layout, BOTH)


def bound(spec: str, model: Backbone, assets: Assets | None = None) -> Handler:
    """The handler of a method on a toy."""
    handler: Handler = registered(METHODS, spec).bind(surface_of(model), assets)
    return handler


def drawn(model: Backbone, *specs: str, **options: Any) -> tuple[Tensor, Run]:
    """A short trajectory under some methods: the last x, and the run."""
    run = start(model, [bound(spec, model) for spec in specs], **options)
    return follow(run)[0], run


def steps_of(run: Run, label: str) -> list[int]:
    """The steps on which a plan reuses a site."""
    assert run.program is not None
    return [
        s
        for s, step in enumerate(run.program.steps)
        if any(p.site.label == label and p.action in (REUSE, ROWS) for p in step.planned())
    ]


@contextmanager
def counted() -> Iterator[list[int]]:
    """Multiply-accumulates of every matrix product and convolution that runs."""
    macs: list[int] = []
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        yield macs
    macs.append(counter.get_total_flops() // 2)


def calls_of(model: Backbone) -> list[int]:
    """A list that grows by the index of every block that is called, among the blocks."""
    calls: list[int] = []
    blocks = [block for block in model.blocks if not block.is_transition]
    for index, block in enumerate(blocks):
        block.register_forward_pre_hook(lambda *_, index=index: calls.append(index))
    return calls
