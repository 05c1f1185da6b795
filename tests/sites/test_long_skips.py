"""Backbones whose halves are joined block by block: which ranges can be kept, and what still passes when they are."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from ditloom.contracts.backbone import Backbone
from ditloom.contracts.errors import UserError
from ditloom.contracts.method import Tap
from ditloom.contracts.plan import Action
from ditloom.contracts.streams import Context, Streams
from ditloom.sites.codecs import DELTA, VALUE
from ditloom.sites.surface import Surface
from tests.sites import toys
from tests.sites.driving import by_hand, by_run, loop, same, start
from tests.sites.scripted import Planned
from tests.sites.test_counts import counted
from tests.sites.walkthroughs import Broadcast, Captures, SomeRows

COMPUTE, REUSE, SKIP = Action.COMPUTE, Action.REUSE, Action.SKIP
NAMES = ("skip-dit", "u-vit")
EVERY_SECOND = [COMPUTE, REUSE, COMPUTE, REUSE, COMPUTE, REUSE]


def surface_of(model: Backbone) -> Surface:
    streams, _ = model.embed(toys.latent(), torch.zeros(2), model.prepare(toys.condition(model, 2)))
    return Surface(model, streams.layout)


def legal(model: Backbone) -> set[tuple[int, int]]:
    surface, blocks = surface_of(model), len(model.blocks)

    def fits(i: int, j: int) -> bool:
        try:
            surface.range(i, j)
        except UserError:
            return False
        return True

    return {(i, j) for i in range(blocks) for j in range(i + 1, blocks + 1) if fits(i, j)}


def test_the_symmetric_ranges_and_no_others_can_be_kept() -> None:
    assert legal(toys.make("skip-dit")) == {(0, 6), (1, 5), (2, 4)}
    assert legal(toys.make("u-vit")) == {(0, 5), (1, 4), (2, 3)}
    message = r"from block 0 to block 5 crosses its border; range\(1,5\) is self-contained"
    with pytest.raises(UserError, match=message):
        surface_of(toys.make("skip-dit")).range(1, 6)


@pytest.mark.parametrize("codec", [VALUE, DELTA])
@pytest.mark.parametrize("branch", [1, 2])
@pytest.mark.parametrize("name", NAMES)
def test_what_leaves_the_middle_is_kept_and_the_ends_run(name: str, branch: int, codec: Any) -> None:
    """Skip-Cache, as a value or as a change: `branch` blocks at either end are computed, and read the kept feature."""
    model = toys.make(name)
    last, plan = len(model.blocks) - branch, [COMPUTE, REUSE, REUSE, COMPUTE, REUSE, COMPUTE]
    got, run = by_run(model, [Planned({f"range({branch},{last})": plan}, codec=codec)])
    kept: dict[str, Any] = {}

    def step(s: int, streams: Streams, context: Context) -> Streams:
        entering: dict[int, Streams] = {}

        def call(index: int, block: Any, streams: Streams, context: Context, given: Any) -> Any:
            entering[index] = streams
            if index == last:
                if plan[s] is COMPUTE:
                    kept["range"] = codec.encode(entering[branch].tokens, streams.tokens)
                streams = streams.updated(**codec.decode(entering[branch].tokens, kept["range"]))
            return block(streams, context, None, given)

        return loop(model, streams, context, call)

    torch.testing.assert_close(got, by_hand(model, step), atol=1e-6, rtol=1e-6)
    assert run.report.counts[f"range({branch},{last})", "reuse"] == 6


@pytest.mark.parametrize("name", NAMES)
def test_a_kept_step_runs_two_blocks_and_costs_what_runs(name: str) -> None:
    model, ran, costs = toys.make(name), [], []
    last = len(model.blocks) - 1
    for index, block in enumerate(model.blocks):
        block.register_forward_pre_hook(lambda *_, index=index: ran.append(index))
    run = start(model, [Planned({f"range(1,{last})": EVERY_SECOND})])
    for s in range(6):
        ran.clear()
        before = run.report.macs
        with torch.no_grad(), counted() as executed:
            run.predict(toys.latent(), run.schedule.clock(s))
        costs.append(run.report.macs - before)
        assert costs[-1] == executed[0]
        assert sorted(ran) == ([0, last] if s % 2 else list(range(last + 1)))
    blocks = surface_of(model).block_totals
    assert costs[2] - costs[1] == 4 * sum(blocks[1:last])


@pytest.mark.parametrize("name", NAMES)
def test_computing_always_is_nothing_attached(name: str) -> None:
    model = toys.make(name)
    last = len(model.blocks) - 1
    assert same(by_run(model, [Planned({f"range(1,{last})": [COMPUTE] * 6})])[0], by_run(model)[0])


@pytest.mark.parametrize("name", NAMES)
def test_fresh_information_passes_through_the_outermost_skip_alone(name: str) -> None:
    """On a step that reuses the middle, x_t is heard; with the skip replaced by a constant, it is not."""
    model = toys.make(name)
    last = len(model.blocks) - 1
    assert heard(model, last, model.skips[last], open_skip=True) > 0
    assert heard(model, last, model.skips[last], open_skip=False) == 0


def heard(model: Backbone, last: int, source: int, open_skip: bool) -> float:
    """The size of the gradient with respect to x of what leaves block `last`, its middle given as a constant."""
    x = toys.latent().requires_grad_()
    streams, context = model.embed(x, torch.full((2,), 0.4), model.prepare(toys.condition(model, 2)))
    skip: Tensor = loop(model, streams, context, last=source + 1)["image"]
    middle = streams.map(torch.ones_like)
    given = {"skip": {"image": skip if open_skip else torch.ones_like(skip)}}
    out, _ = model.blocks[last](middle, context, None, given)
    out["image"].square().sum().backward()
    return 0.0 if x.grad is None else float(x.grad.abs().sum())


@pytest.mark.parametrize("name", NAMES)
def test_batched_is_separate(name: str) -> None:
    model = toys.make(name)
    last = len(model.blocks) - 1
    handlers = lambda: [Broadcast(3), SomeRows(3), Planned({f"range(1,{last})": EVERY_SECOND})]  # noqa: E731
    together, apart = by_run(model, handlers())[0], by_run(model, handlers(), batched=False)[0]
    torch.testing.assert_close(together, apart, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_a_source_shows_its_skip_and_another_block_has_none(name: str) -> None:
    model = toys.make(name)
    taps = [Tap("skip", 0, "capture"), Tap("block_out", 0, "capture")]
    capturing = Captures(taps)
    by_run(model, [capturing])
    assert all(same(a, b) for a, b in zip(*(capturing.seen[tap] for tap in taps), strict=True))
    with pytest.raises(UserError, match="skip"):
        by_run(model, [Captures([Tap("skip", len(model.blocks) - 1, "capture")])])
