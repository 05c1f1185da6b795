"""First-Block Cache: decision by decision against a hand-written loop, its counts, its drift, its price."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ditloom.caches.fbcache import FBCache
from ditloom.contracts.errors import UserError
from ditloom.contracts.method import mean_change
from ditloom.contracts.plan import Action
from ditloom.contracts.streams import Context, Streams
from ditloom.sites.compiling import compile_blocks
from tests.caches.deciding import LAYOUTS, ByHand, drawn, first_residual, planning, reused, waits
from tests.sites import toys
from tests.sites.driving import STEPS, by_run, same

THRESHOLDS = (0.25, 0.3, 0.4)


def by_rule(threshold: float) -> Any:
    def alike(s: int, before: Streams, entered: Streams, context: Context, notes: dict[str, Any]) -> bool:
        now = first_residual(before, entered)
        if s and float(mean_change(now, notes["reference"])) < threshold:
            return True
        notes["reference"] = now
        return False

    return alike


@pytest.mark.parametrize("threshold", THRESHOLDS)
@pytest.mark.parametrize("name", LAYOUTS)
def test_decisions(name: str, threshold: float) -> None:
    model = toys.make(name)
    hand = ByHand(model, 1, len(model.blocks), by_rule(threshold))
    expected = hand()
    x, run = drawn(FBCache(threshold=threshold), model)
    assert reused(run) == hand.reused
    torch.testing.assert_close(x, expected, atol=1e-5, rtol=1e-5)


def test_the_thresholds_of_these_tests_decide_both_ways() -> None:
    counts = [len(reused(drawn(FBCache(threshold=t), toys.make("dit"))[1])) for t in THRESHOLDS]
    assert any(0 < n < STEPS - 1 for n in counts) and counts == sorted(counts)


@pytest.mark.parametrize("name", LAYOUTS)
def test_threshold_zero_is_off(name: str) -> None:
    model = toys.make(name)
    x, run = drawn(FBCache(threshold=0.0), model)
    assert same(x, by_run(model)[0])
    assert run.report.macs - planning(run) == run.report.full_macs
    assert run.report.bytes_held == 0 and not run.report.notes


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_reused_step_is_one_block(name: str) -> None:
    model = toys.make(name)
    _, run = drawn(FBCache(threshold=1e9), model)
    site = run.program.surface.range(1, run.blocks)  # type: ignore[union-attr]
    assert reused(run, range(1, run.blocks)) == list(range(1, STEPS))
    assert run.report.count("range", Action.COMPUTE) == 2
    assert run.report.full_macs - run.report.macs == (STEPS - 1) * site.cost * 4 - planning(run)


def test_slow_drift_adds_up() -> None:
    """Every step is within the threshold of the one before, and not of the last computed one."""
    steps: list[float] = []

    def compare(s: int, before: Streams, entered: Streams, context: Context, notes: dict[str, Any]) -> bool:
        now = first_residual(before, entered)
        if s:
            steps.append(float(mean_change(now, notes["before"])))
        notes["before"] = now
        return s > 0

    model = toys.make("dit")
    ByHand(model, 1, len(model.blocks), compare)()
    _, run = drawn(FBCache(threshold=1.05 * max(steps)), model)
    assert 0 < len(reused(run)) < STEPS - 1


def test_what_never_and_always_reuses_is_told() -> None:
    model = toys.make("dit")
    never, always = (drawn(FBCache(threshold=t), model)[1].report.notes for t in (1e-6, 50.0))
    assert len(never) == 1 and "fbcache never reused: threshold 1e-06" in never[0] and "lay in 0." in never[0]
    assert len(always) == 1 and "fbcache reused whenever it could" in always[0]
    assert not drawn(FBCache(threshold=0.3), model)[1].report.notes
    guarded = drawn(FBCache(threshold=0.3, warmup=20), model)[1].report.notes
    assert guarded == ["fbcache computed every step: its guards left it nothing to decide"]


def test_one_wait_a_decision() -> None:
    """The first step has nothing to decide."""
    model = toys.make("mmdit")
    assert waits(FBCache(threshold=0.3), model) == STEPS - 1


@pytest.mark.parametrize("name", LAYOUTS)
def test_batched_and_separate_guidance_agree(name: str) -> None:
    model = toys.make(name)
    one, together = drawn(FBCache(threshold=0.3), model)
    other, apart = drawn(FBCache(threshold=0.3), model, batched=False)
    assert reused(together) == reused(apart)
    torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


def test_compiled_blocks_without_a_break() -> None:
    torch._dynamo.reset()
    eager, _ = drawn(FBCache(threshold=0.3), toys.make("dit"))
    model = toys.make("dit")
    compile_blocks(model, backend="eager")
    x, _ = drawn(FBCache(threshold=0.3), model)
    torch.testing.assert_close(x, eager)
    assert not torch._dynamo.utils.counters["graph_break"]
    torch._dynamo.reset()


def test_forecasts_and_fewer_channels() -> None:
    model = toys.make("dit")
    held, run = drawn(FBCache(threshold=1e9), model)
    forecast, again = drawn(FBCache(threshold=1e9, predictor="taylor", warmup=2), model)
    assert reused(again) == [2, 3, 4, 5] and not same(held, forecast)
    fewer = drawn(FBCache(threshold=0.3, channels=8), model)[1]
    assert 0 < len(reused(fewer)) < STEPS
    assert fewer.report.bytes_held < drawn(FBCache(threshold=0.3), model)[1].report.bytes_held


def test_refusals() -> None:
    with pytest.raises(
        UserError, match="the long skip from block 0 to block 4 crosses its border.*try dbcache:first=1,last=1"
    ):
        drawn(FBCache(), toys.make("u-vit"))
    with pytest.raises(UserError, match="unknown predictor"):
        FBCache(predictor="tailor")
    with pytest.raises(UserError, match="channels is a whole number of at least 1"):
        FBCache(channels=0)
