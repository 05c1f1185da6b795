"""What is off costs nothing: not a bit of the result, not a key of the weights, not a graph."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch

from ditloom.contracts.backbone import Backbone
from ditloom.contracts.clock import Schedule, Window
from ditloom.contracts.method import Control, Handler, Steps, Tap
from ditloom.contracts.plan import Action
from ditloom.sites.surface import Surface
from tests.sites import toys
from tests.sites.driving import by_hand, by_run, loop, same
from tests.sites.walkthroughs import (
    Added,
    Broadcast,
    Captures,
    FirstBlockCache,
    GuidanceGate,
    HoldOutput,
    Inject,
    LearnedGate,
    SkipBlock,
    SomeRows,
)


class Off(Handler):
    """A handler whose schedule never lets it act."""

    def __init__(self, inner: Handler, key: str = ""):
        self.inner, self.key = inner, key or inner.key

    def controls(self, surface: Surface) -> Sequence[Control]:
        return self.inner.controls(surface)

    def plan(self, schedule: Schedule, surface: Surface) -> Steps:
        return [{c.site: Action.COMPUTE for c in self.controls(surface)} for _ in range(schedule.steps)]

    def taps(self, schedule: Schedule, surface: Surface) -> Sequence[Sequence[Tap]]:
        return [()] * schedule.steps

    def rule(self, *_: Any) -> None:
        return None

    def velocity(self, predictions: dict[str, Any], clock: Any) -> dict[str, Any]:
        return predictions


def everything(model: Backbone) -> list[Handler]:
    blocks = sum(not b.is_transition for b in model.blocks)
    image = torch.randn(1, toys.CHANNELS, toys.SIZE, toys.SIZE, generator=torch.Generator().manual_seed(1))
    last = 1 if model.skips else 0
    return [
        FirstBlockCache(0.3, last=last if blocks == 5 else 0),
        Broadcast(2),
        SomeRows(3),
        Inject((1,)),
        Added(image),
        Captures([Tap("block_out", 1)]),
        LearnedGate(blocks),
        GuidanceGate(2),
        HoldOutput((3,)),
    ]


@pytest.mark.parametrize("name", toys.FAMILIES)
def test_registered_but_disabled_is_bitwise_nothing(name: str) -> None:
    model = toys.make(name)
    handlers = [Off(h, f"{i}-{h.key}") for i, h in enumerate(everything(model))]
    got, run = by_run(model, handlers)
    plain, bare = by_run(model, [])
    assert same(got, plain)
    assert run.store.bytes == run.keys.bytes == 0
    assert run.report.full_macs == bare.report.macs
    assert run.report.count("attn", Action.REUSE) == 0 < run.report.count("attn", Action.COMPUTE)


ASLEEP: Mapping[str, Callable[[], Handler]] = {
    "never alike": lambda: FirstBlockCache(-1.0),
    "every step": lambda: Broadcast(1),
    "empty window": lambda: Broadcast(2, Window(0, 0)),
    "after the end": lambda: GuidanceGate(99),
    "no steps": lambda: HoldOutput(()),
    "no blocks": lambda: Inject(()),
    "only looking": lambda: Captures([Tap("block_in", 0), Tap("v_proj", 1), Tap("logits", 2), Tap("mlp", 0)]),
}


@pytest.mark.parametrize("why", ASLEEP)
@pytest.mark.parametrize("name", ["mmdit", "u-toy", "dit"])
def test_asleep_by_its_own_settings_is_bitwise_nothing(name: str, why: str) -> None:
    model = toys.make(name)
    assert same(by_run(model, [ASLEEP[why]()])[0], by_run(model, [])[0])


def test_asleep_on_a_u_vit() -> None:
    model = toys.make("u-vit")
    assert same(by_run(model, [FirstBlockCache(-1.0, last=1), Broadcast(1)])[0], by_run(model, [])[0])


@pytest.mark.parametrize("name", toys.FAMILIES)
def test_nothing_attached_is_the_plain_loop(name: str) -> None:
    """The run, the backbone's own forward and a loop over the blocks are one computation."""
    model = toys.make(name)
    assert same(by_run(model, [])[0], by_hand(model, lambda s, streams, context: loop(model, streams, context)))
    x, t, condition = toys.latent(), torch.full((2,), 0.4, dtype=torch.float64), toys.condition(model, 2)
    with torch.no_grad():
        streams, context = model.embed(x, model.preset.time.native(t), model.prepare(condition))
        assert same(model(x, t, condition), model.head(loop(model, streams, context), context))


@pytest.mark.parametrize("name", toys.NAMES)
def test_a_run_leaves_the_network_as_it_was(name: str) -> None:
    """Names, values, hooks and attributes of every module are those from before, also after a failing run."""
    model = toys.make(name)
    before = traces(model)
    by_run(model, [Broadcast(2), SomeRows(2), Captures([Tap("block_out", 0)])])
    assert traces(model) == before
    with pytest.raises(RuntimeError, match="stop here"):
        by_run(model, [Stops()])
    assert traces(model) == before


class Stops(Captures):
    """Raises in the middle of a forward."""

    def __init__(self) -> None:
        super().__init__([Tap("block_out", 1)])

    def captured(self, *_: Any) -> None:
        raise RuntimeError("stop here")


def traces(model: Backbone) -> dict[str, Any]:
    weights = {name: (p.data_ptr(), p._version, float(p.sum())) for name, p in model.state_dict().items()}
    modules = {
        name: (sorted(vars(m)), len(m._forward_hooks), len(m._forward_pre_hooks), type(m))
        for name, m in model.named_modules()
    }
    return {"weights": weights, "modules": modules}


def test_skipping_a_block_is_leaving_it_out() -> None:
    model = toys.make("dit")

    def step(s: int, streams: Any, context: Any) -> Any:
        return loop(model, streams, context, lambda i, b, st, c, g: (st, {}) if i == 2 else b(st, c, None, g))

    assert same(by_run(model, [SkipBlock(2)])[0], by_hand(model, step))
