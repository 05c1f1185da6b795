"""What the dynamic caches' tests share: who reused when, and the same decisions taken by hand."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ditloom.contracts.backbone import Backbone
from ditloom.contracts.method import Handler, Method
from ditloom.contracts.streams import Context, Streams
from ditloom.sites.run import Run
from ditloom.sites.surface import Surface
from tests.sites import toys
from tests.sites.driving import by_hand, by_run, follow, start

LAYOUTS = ("dit", "mmdit", "u-toy")


def surface(model: Backbone) -> Surface:
    """The sites of a toy, as its handlers see them when they are bound."""
    with torch.no_grad():
        memory = model.prepare(toys.condition(model, 1))
        streams, _ = model.embed(toys.latent(1), torch.zeros(1, dtype=torch.float64), memory)
    return Surface(model, streams.layout, ("cond", "uncond"))


def bound(method: Method, model: Backbone, assets: Any = None) -> Handler:
    """The handler of a method on a toy."""
    return method.bind(surface(model), assets)


def drawn(method: Method, model: Backbone, **options: Any) -> tuple[Tensor, Run]:
    """A short guided trajectory under one method."""
    return by_run(model, [bound(method, model, options.pop("assets", None))], **options)


def reused(run: Run, blocks: Sequence[int] | None = None) -> list[int]:
    """The steps on which some block was jumped over (all of `blocks`)."""
    steps = sorted({s for (s, _), share in run.report.cells.items() if share == 1.0})
    return [s for s in steps if blocks is None or all(run.report.cells.get((s, b)) == 1.0 for b in blocks)]


def subtract(a: Streams, b: Streams) -> dict[str, Tensor]:
    return {k: a.tokens[k] - b.tokens[k] for k in a.tokens}


def added(a: Streams, change: dict[str, Tensor]) -> Streams:
    return Streams({k: v + change[k] for k, v in a.tokens.items()}, a.layout)


@dataclass
class ByHand:
    """Blocks `first` to `last` positions reused on the steps where `alike(step, probe, notes)` says so."""

    model: Backbone
    first: int
    last: int
    alike: Callable[[int, Streams, Streams, Context, dict[str, Any]], bool]
    notes: dict[str, Any] = field(default_factory=dict)
    reused: list[int] = field(default_factory=list)

    def __call__(self) -> Tensor:
        return by_hand(self.model, self.step)

    def step(self, s: int, before: Streams, context: Context) -> Streams:
        skips: dict[int, Any] = {}
        entered = self._blocks(before, context, 0, self.first, skips)
        if self.alike(s, before, entered, context, self.notes) and s:
            self.reused.append(s)
            left = added(entered, self.notes["change"])
        else:
            left = self._blocks(entered, context, self.first, self.last, skips)
            self.notes["change"] = subtract(left, entered)
        return self._blocks(left, context, self.last, len(self.model.blocks), skips)

    def _blocks(self, streams: Streams, context: Context, first: int, last: int, skips: dict[int, Any]) -> Streams:
        """Positions first..last - 1; what long skips hand over is kept in `skips`."""
        for p in range(first, last):
            given = {"skip": skips[self.model.skips[p]]} if p in self.model.skips else {}
            streams, _ = self.model.blocks[p](streams, context, None, given)
            skips[p] = streams.tokens
        return streams


def first_residual(before: Streams, entered: Streams) -> Tensor:
    """The change of the image tokens, of the conditional rows."""
    return (entered["image"] - before["image"])[:2]


def planning(run: Run, rows: int = 4) -> int:
    """MACs of the embedding from which a run is planned, which a run without methods does not need."""
    assert run.program is not None
    return run.program.surface.entry * rows


def waits(method: Method, model: Backbone) -> int:
    """How often a run under a method waits for the device, beyond what a plain run does."""
    counted = []
    for handlers in ([], [bound(method, model)]):
        run = start(model, handlers)
        with Waits() as seen:
            follow(run)
        counted.append(seen.count)
    return counted[1] - counted[0]


class Waits(TorchDispatchMode):
    """Counts how often a number is read off a tensor: each is a wait for the device."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))
