"""Short guided trajectories through `Run`, and the same by hand."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ditloom.contracts.backbone import Backbone
from ditloom.contracts.clock import Clock, Schedule
from ditloom.contracts.condition import Condition
from ditloom.contracts.method import Handler
from ditloom.contracts.streams import Context, Streams
from ditloom.sites.run import Run
from tests.sites import toys

STEPS = 6
BOTH = ("cond", "uncond")
Call = Callable[[int, Any, Streams, Context, dict[str, Any]], tuple[Streams, dict[str, Any]]]


def start(model: Backbone, handlers: Sequence[Handler] = (), steps: int = STEPS, **options: Any) -> Run:
    """A run of a toy with its own random conditions."""
    branches = options.pop("branches", BOTH)
    conditions = options.pop("conditions", None) or toys.conditions(model, 2, branches)
    return Run(model, handlers, schedule=toys.schedule(model, steps, branches), conditions=conditions, **options)


@torch.no_grad()
def follow(
    run: Run,
    *,
    still: bool = False,
    asked: Callable[[int], Sequence[str] | None] = lambda s: None,
    before: Callable[[int], None] = lambda s: None,
) -> tuple[Tensor, list[dict[str, Tensor]]]:
    """All steps of a run: the last x and every step's predictions. still: x and the time never change."""
    x, seen = toys.latent(), []
    for s in range(run.schedule.steps):
        before(s)
        out = run.predict(x, frozen(run.schedule, s) if still else run.schedule.clock(s), asked(s))
        seen.append(out)
        if not still:
            x = moved(x, out)
    return x, seen


def moved(x: Tensor, out: dict[str, Tensor]) -> Tensor:
    """One step of a made-up solver."""
    return x - 0.2 * sum(out.values())


def frozen(plan: Schedule, step: int) -> Clock:
    """The clock of a step that always tells the time of the first."""
    first = plan.clock(0)
    return Clock(step, plan.steps, first.t, first.t_next, first.native)


def by_run(
    model: Backbone, handlers: Sequence[Handler] = (), branches: tuple[str, ...] = BOTH, **options: Any
) -> tuple[Tensor, Run]:
    """A short guided trajectory through `Run`."""
    run = start(model, handlers, branches=branches, **options)
    return follow(run)[0], run


def by_hand(model: Backbone, step: Callable[[int, Streams, Context], Streams]) -> Tensor:
    """The same trajectory with `step(s, streams, context)` in place of the blocks."""
    plan, conditions = toys.schedule(model, STEPS), toys.conditions(model)
    memory = model.prepare(Condition.cat([conditions["cond"], conditions["uncond"]]))
    x = toys.latent()
    with torch.no_grad():
        for s in range(STEPS):
            time = torch.full((4,), plan.native[s], dtype=torch.float64)
            streams, context = model.embed(torch.cat([x, x]), time, memory)
            out = model.head(step(s, streams, context), context)
            x = moved(x, {"cond": out[:2], "uncond": out[2:]})
    return x


def loop(
    model: Backbone,
    streams: Streams,
    context: Context,
    call: Call | None = None,
    first: int = 0,
    last: int | None = None,
) -> Streams:
    """Flat positions first..last with long skips; `call` may act on blocks (given their index among blocks)."""
    saved: dict[int, Any] = {}
    index = -1
    for p, block in enumerate(model.blocks):
        index += not block.is_transition
        given = {"skip": saved[model.skips[p]]} if p in model.skips else {}
        if first <= p < (len(model.blocks) if last is None else last):
            if call is None or block.is_transition:
                streams, _ = block(streams, context, None, given)
            else:
                streams, _ = call(index, block, streams, context, given)
        saved[p] = streams.tokens
    return streams


def same(a: Tensor, b: Tensor) -> bool:
    """Bit for bit."""
    return torch.equal(a, b)
