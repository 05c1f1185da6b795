"""TaylorSeer: its schedule, order 0 as plain reuse, exactness, and a loop with factors kept as published."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from ditloom.caches.predictors import Taylor
from ditloom.contracts.errors import UserError
from ditloom.contracts.plan import BlockPlan
from ditloom.contracts.streams import Context, Streams
from tests.caches.acting import REUSE, bound, drawn, steps_of
from tests.sites import toys
from tests.sites.driving import by_hand, by_run, follow, loop, same, start


class Factors:
    """The derivatives of one feature as TaylorSeer keeps them: refreshed at full steps, summed at the others."""

    def __init__(self, order: int):
        self.order, self.factors, self.last = order, [], 0

    def learn(self, step: int, feature: Tensor) -> None:
        fresh = [feature]
        for before in self.factors[: self.order]:
            fresh.append((fresh[-1] - before) / (step - self.last))
        self.factors, self.last = fresh, step

    def forecast(self, step: int) -> Tensor:
        return sum(f * (step - self.last) ** i / math.factorial(i) for i, f in enumerate(self.factors))  # type: ignore


@pytest.mark.parametrize("name", ["dit", "u-vit"])
@pytest.mark.parametrize("order", [0, 1, 3])
def test_against_a_loop(name: str, order: int) -> None:
    """Full: 0, 1, 3, 5. Orders grow with what is known, and no further than asked."""
    model = toys.make(name)
    kept: dict[Any, Factors] = {}

    def step(s: int, streams: Streams, context: Context) -> Streams:
        def call(i: int, block: Any, streams: Streams, context: Context, given: Any) -> Any:
            if s in (0, 1, 3, 5):
                streams, now = block(streams, context, BlockPlan(keep=block.sites), given)
                for site, value in now.items():
                    kept.setdefault((i, site), Factors(order)).learn(s, value)
                return streams, now
            forecast = {site: kept[i, site].forecast(s) for site in block.sites}
            return block(streams, context, BlockPlan(tuple((k, REUSE) for k in forecast)), {**given, **forecast})

        return loop(model, streams, context, call)

    expected = by_hand(model, step)
    got, run = drawn(model, f"taylorseer:interval=2,order={order}")
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    assert steps_of(run, "mlp(0)") == [2, 4]


@pytest.mark.parametrize(
    "steps, settings, full",
    [
        (12, "interval=4,warm_up=2", [0, 1, 5, 9]),
        (12, "interval=6,warm_up=3", [0, 1, 2, 8]),
        (7, "interval=3,warm_up=1", [0, 3, 6]),
        (3, "interval=1", [0, 1, 2]),
        (1, "interval=4", [0]),
        (2, "interval=4", [0, 1]),
    ],
)
def test_the_published_schedule(steps: int, settings: str, full: list[int]) -> None:
    """The counter of the official code: all of the first steps, then one in `interval`."""
    _, run = drawn(toys.make("dit"), f"taylorseer:{settings}", steps=steps)
    assert [s for s in range(steps) if s not in steps_of(run, "attn(0)")] == full
    assert run.report.counts["attn(0)", "compute"] == 2 * len(full)


@pytest.mark.parametrize("name", ["dit", "mmdit"])
def test_order_zero_is_fora_where_their_steps_agree(name: str) -> None:
    model = toys.make(name)
    seer = drawn(model, "taylorseer:interval=3,order=0,warm_up=1", steps=7)[0]
    assert same(seer, drawn(model, "fora:interval=3", steps=7)[0])


@pytest.mark.parametrize("lite", [False, True])
def test_interval_one_changes_no_bit(lite: bool) -> None:
    model = toys.make("mmdit")
    assert same(drawn(model, f"taylorseer:interval=1,lite={lite}")[0], by_run(model)[0])


@pytest.mark.parametrize("name", ["dit", "mmdit", "u-vit", "u-toy"])
def test_lite_forecasts_what_leaves_the_last_block(name: str) -> None:
    """Nothing of the blocks runs; embedding and head do, at the current time."""
    model, factors = toys.make(name), {}

    def step(s: int, streams: Streams, context: Context) -> Streams:
        if s in (0, 1, 4):
            out = loop(model, streams, context)
            for k, v in out.tokens.items():
                factors.setdefault(k, Factors(1)).learn(s, v)
            return out
        return Streams({k: f.forecast(s) for k, f in factors.items()}, streams.layout)

    expected = by_hand(model, step)
    got, run = drawn(model, "taylorseer:interval=3,order=1,lite=True")
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    held = 4 * (16 * 64 + (toys.WORDS * 64 if name == "mmdit" else 0) + (2 * 64 if name == "u-vit" else 0)) * 4
    assert run.report.bytes_held == 2 * held, "two values of one feature"


@pytest.mark.parametrize("newton", [False, True])
def test_a_feature_at_rest_is_exact_at_any_order(newton: bool) -> None:
    model = toys.make("dit")
    cache = bound(f"taylorseer:interval=3,order=3,newton={newton}", model)
    _, seen = follow(start(model, [cache], steps=8), still=True)
    for later in seen[1:]:
        torch.testing.assert_close(later["cond"], seen[0]["cond"], atol=1e-5, rtol=1e-5)


def test_newton_is_another_forecast_from_order_two_on() -> None:
    model = toys.make("dit")
    ends = {
        (order, newton): drawn(model, f"taylorseer:interval=2,order={order},newton={newton}")[0]
        for order in (1, 2)
        for newton in (False, True)
    }
    torch.testing.assert_close(ends[1, False], ends[1, True], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(ends[2, False], ends[2, True], atol=1e-5)


def test_values_held() -> None:
    """order + 1 of every feature, less where fewer can be known."""
    model = toys.make("dit")
    one = 2 * 5 * 4 * 16 * 64 * 4
    held = [drawn(model, f"taylorseer:interval=2,order={m}", steps=8)[1].report.bytes_held for m in (0, 1, 2, 8)]
    assert held == [one, 2 * one, 3 * one, 4 * one], "four full steps before the last forecast"
    assert Taylor(8).depth == 9


@pytest.mark.parametrize(
    "spec, sentence",
    [
        ("taylorseer:order=-1", "^the order of a forecast lies in 0..8; got -1$"),
        ("taylorseer:interval=0", "^interval is a whole number of at least 1"),
        ("taylorseer:warm_up=0", "^warm_up is a whole number of at least 1"),
    ],
)
def test_bad_input(spec: str, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        bound(spec, toys.make("dit"))
