"""Delta-DiT against a loop written by hand, its counts, and what its boundary does."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from ditloom.contracts.errors import UserError
from ditloom.contracts.method import Control, Handler, Steps
from ditloom.contracts.streams import Context, Streams
from ditloom.sites.codecs import HOLD, VALUE
from tests.caches.acting import bound, calls_of, drawn, steps_of
from tests.sites import toys
from tests.sites.driving import by_hand, by_run, follow, loop, same, start


def plus(streams: Streams, delta: dict[str, Tensor]) -> Streams:
    return Streams({k: v + delta[k] for k, v in streams.tokens.items()}, streams.layout)


def minus(a: Streams, b: Streams) -> dict[str, Tensor]:
    return {k: a.tokens[k] - b.tokens[k] for k in a.tokens}


@pytest.mark.parametrize("name", ["dit", "mmdit"])
def test_against_a_loop(name: str) -> None:
    """Rear range on step 1, front range on steps 3 and 5; both changes of every full step are at hand."""
    model = toys.make(name)
    total, count = len(model.blocks), 3
    rear: dict[str, Any] = {}
    front: dict[str, Any] = {}

    def step(s: int, streams: Streams, context: Context) -> Streams:
        if s == 1:
            return plus(loop(model, streams, context, last=total - count), rear)
        if s in (3, 5):
            return loop(model, plus(streams, front), context, first=count)
        early, at = loop(model, streams, context, last=count), loop(model, streams, context, last=total - count)
        out = loop(model, at, context, first=total - count)
        front.update(minus(early, streams))
        rear.update(minus(out, at))
        return out

    expected = by_hand(model, step)
    got, run = drawn(model, "delta-dit:blocks=3,boundary=2")
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    assert steps_of(run, f"range({total - count},{total})") == [1] and steps_of(run, "range(0,3)") == [3, 5]


@pytest.mark.parametrize("steps, interval", [(1, 2), (2, 2), (7, 2), (8, 3), (9, 4), (6, 100)])
@pytest.mark.parametrize("spec, count", [("blocks=1", 1), ("blocks=0.75", 4), ("blocks=5", 5), ("blocks=1.0", 5)])
def test_block_calls(steps: int, interval: int, spec: str, count: int) -> None:
    """S L minus N_c for every step that is no multiple of the interval; odd depth, 1 and 2 steps among them."""
    model = toys.make("dit")
    calls = calls_of(model)
    drawn(model, f"delta-dit:interval={interval},{spec}", steps=steps)
    cached = sum(s % interval != 0 for s in range(steps))
    assert len(calls) == steps * 5 - cached * count


def test_interval_one_changes_no_bit() -> None:
    assert same(drawn(toys.make("mmdit"), "delta-dit:interval=1")[0], by_run(toys.make("mmdit"))[0])


@pytest.mark.parametrize("boundary, rear, front", [("1.0", [1, 3, 5], []), ("0", [], [1, 3, 5]), ("0.5", [1], [3, 5])])
def test_the_boundary(boundary: str, rear: list[int], front: list[int]) -> None:
    _, run = drawn(toys.make("dit"), f"delta-dit:blocks=3,boundary={boundary}")
    assert (steps_of(run, "range(2,5)"), steps_of(run, "range(0,3)")) == (rear, front)


def test_the_step_before_the_boundary_keeps_what_the_late_ones_need() -> None:
    """Step 0 is computed, 1 is early and 2 late: both changes are stored, of one model's width each."""
    model = toys.make("dit")
    run = start(model, [bound("delta-dit:interval=3,blocks=3,boundary=2", model)], steps=3)
    follow(run)
    assert (steps_of(run, "range(2,5)"), steps_of(run, "range(0,3)")) == ([1], [2])
    one = 4 * 16 * 64 * 4
    assert run.report.bytes_held == 2 * one


def test_at_rest_it_is_exact() -> None:
    """Input and time as at the stored step: the same prediction, up to the rounding of one sum."""
    model = toys.make("mmdit")
    _, seen = follow(start(model, [bound("delta-dit:interval=6", model)]), still=True)
    for later in seen[1:]:
        torch.testing.assert_close(later["cond"], seen[0]["cond"], atol=1e-5, rtol=1e-5)


class Plain(Handler):
    """The same ranges reused as they were, forgetting the current input."""

    key = "plain"

    def __init__(self, inner: Handler):
        self.inner = inner

    def controls(self, surface: Any) -> Any:
        return [Control(c.site, VALUE, HOLD) for c in self.inner.controls(surface)]

    def plan(self, schedule: Any, surface: Any) -> Steps:
        return self.inner.plan(schedule, surface)


def test_a_front_range_reused_as_it_was_forgets_the_input() -> None:
    model = toys.make("dit")
    cache = bound("delta-dit:blocks=5,boundary=0", model)
    changes = []
    for handler in (cache, Plain(cache)):
        outs = []
        for x in (toys.latent(), toys.latent(seed=3)):
            run = start(model, [handler], steps=2)
            with torch.no_grad():
                run.predict(toys.latent(), run.schedule.clock(0))
                outs.append(run.predict(x, run.schedule.clock(1))["cond"])
        changes.append(float((outs[0] - outs[1]).abs().max()))
    assert changes[1] == 0 < changes[0]


def test_long_skips_leave_the_whole_stack_only() -> None:
    model = toys.make("u-vit")
    with pytest.raises(UserError, match="cannot be reused: the long skip from block"):
        bound("delta-dit:blocks=3", model)
    _, run = drawn(model, "delta-dit:blocks=1.0")
    assert steps_of(run, "range(0,5)") == [1, 3, 5]


@pytest.mark.parametrize(
    "spec, sentence",
    [
        ("delta-dit:blocks=6", "^delta-dit reuses 6 consecutive blocks, and this model has 5: take 1 to 5$"),
        ("delta-dit:blocks=0.0", "^delta-dit reuses 0 consecutive blocks"),
        ("delta-dit:interval=0", "^interval is a whole number of at least 1"),
        ("delta-dit:boundary=-1", "^boundary is a count of at least 0 or a share"),
        ("delta-dit:start=0.9,end=0.2", "^the window from 0.9 to 0.2 of the steps is empty"),
    ],
)
def test_bad_input(spec: str, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        bound(spec, toys.make("dit"))
