"""Pyramid attention broadcast: exact counts by kind and window, its table of feed-forwards, refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ditloom.contracts.errors import UserError
from ditloom.contracts.plan import BlockPlan
from ditloom.contracts.streams import Context, Streams
from tests.caches.acting import COMPUTE, REUSE, bound, counted, drawn, steps_of
from tests.caches.pyramid import pyramid
from tests.sites import toys
from tests.sites.driving import by_hand, by_run, follow, loop, same, start

ALL = "low=-1.0,high=2.0"
MODEL = pyramid()
KIND = {"spatial": "attn", "temporal": "temporal", "cross": "cross"}


@given(
    ranges=st.fixed_dictionaries({kind: st.integers(1, 7) for kind in KIND}),
    low=st.floats(-0.1, 0.4),
    high=st.floats(0.5, 1.1),
    steps=st.integers(1, 9),
)
@settings(max_examples=10, deadline=None)
def test_calls_by_kind(ranges: dict[str, int], low: float, high: float, steps: int) -> None:
    """S - #{s: low < t_s < high and s mod n != 0} computations of every attention; feed-forwards untouched."""
    listed = ",".join(f"{kind}={n}" for kind, n in ranges.items())
    model = MODEL
    run = start(model, [bound(f"pab:{listed},low={low},high={high}", model)], steps=steps)
    follow(run)
    times = run.schedule.times
    for kind, n in ranges.items():
        reused = [s for s in range(steps) if low < times[s] < high and s % n]
        assert run.report.count(KIND[kind], REUSE) == 2 * 3 * len(reused)
        if n > 1:
            assert run.report.count(KIND[kind], COMPUTE) == 2 * 3 * (steps - len(reused))
            assert steps_of(run, f"{KIND[kind]}(1)") == reused
    assert run.report.count("mlp", REUSE) == run.report.count("mlp", COMPUTE) == 0


@pytest.mark.parametrize("spec", ["pab:spatial=1,temporal=1,cross=1", "pab:low=0.7,high=0.8", "pab:low=5.0,high=6.0"])
def test_nothing_to_broadcast_changes_no_bit(spec: str) -> None:
    """All ranges 1, or no step in the window (noise levels are sixths)."""
    assert same(drawn(pyramid(), spec)[0], by_run(pyramid())[0])


def test_broadcast_over_the_whole_run_computes_once() -> None:
    _, run = drawn(pyramid(), f"pab:spatial=6,temporal=6,cross=6,{ALL}")
    for kind in KIND.values():
        assert run.report.counts[f"{kind}(2)", "compute"] == 2
    assert run.report.bytes_held == 3 * 3 * 4 * 16 * 64 * 4, "one output by attention, branch and sample"


def test_against_a_loop() -> None:
    """Each kind by its own interval; the output stored outside the window serves inside it."""
    model, stored = pyramid(), {}
    ranges, inside = {"attn": 2, "temporal": 3, "cross": 4}, (1, 2, 3, 4)

    def step(s: int, streams: Streams, context: Context) -> Streams:
        def call(i: int, block: Any, streams: Streams, context: Context, given: Any) -> Any:
            reused = [kind for kind, n in ranges.items() if s in inside and s % n]
            plan = BlockPlan(tuple((k, REUSE) for k in reused), tuple(k for k in ranges if k not in reused))
            out, kept = block(streams, context, plan, {**given, **{k: stored[i, k] for k in reused}})
            stored.update({(i, k): v for k, v in kept.items()})
            return out, kept

        return loop(model, streams, context, call)

    expected = by_hand(model, step)
    got, run = drawn(model, "pab:spatial=2,temporal=3,cross=4,low=0.3,high=0.9")
    torch.testing.assert_close(got, expected, atol=1e-6, rtol=1e-6)
    assert [steps_of(run, f"{kind}(0)") for kind in ranges] == [[1, 3], [1, 2, 4], [1, 2, 3]]


def test_joint_attention_keeps_both_streams() -> None:
    model = toys.make("mmdit")
    _, run = drawn(model, f"pab:{ALL}")
    assert steps_of(run, "attn(0)") == [1, 3, 5]
    assert run.report.bytes_held > 4 * 3 * (16 + toys.WORDS) * 64 * 4


@pytest.mark.parametrize(
    "table, reused",
    [
        ("0.84,", [2, 3]),
        ("0.8333,0.3333", [2, 3, 5]),
        ("0.8333,0.66", [3, 4]),
        ("0.0,", []),
    ],
)
def test_feed_forwards_by_table(table: str, reused: list[int]) -> None:
    """At the step nearest to each level they are computed, the next two reuse them; a later entry starts anew."""
    spec = f"pab:spatial=1,temporal=1,cross=1,mlp_at=({table}),mlp_blocks=2"
    _, run = drawn(toys.make("dit"), spec)
    assert steps_of(run, "mlp(0)") == steps_of(run, "mlp(1)") == reused and steps_of(run, "mlp(2)") == []
    assert run.report.count("attn", REUSE) == 0


def test_macs() -> None:
    model = pyramid()
    run = start(model, [bound("pab:mlp_at=(0.5,),mlp_blocks=3", model)])
    with counted() as macs:
        follow(run)
    assert run.report.macs == macs[0] < run.report.full_macs


def test_before_and_after_the_gate_differ_only_where_gates_follow_time() -> None:
    """Post-gate storing freezes the old gate: the same while time stands still, another once it moves."""
    model, stored = toys.make("dit"), {}

    def gated(s: int, streams: Streams, context: Context) -> Streams:
        def call(i: int, block: Any, streams: Streams, context: Context, given: Any) -> Any:
            gate = block.modulation(context.modulation["image"])[2]
            if s:
                old = {"attn": stored[i] / gate.view(4, -1, 64)}
                return block(streams, context, BlockPlan((("attn", REUSE),)), {**given, **old})
            streams, kept = block(streams, context, BlockPlan(keep=("attn",)), given)
            stored[i] = kept["attn"] * gate.view(4, -1, 64)
            return streams, kept

        return loop(model, streams, context, call)

    pre_gate, _ = drawn(model, f"pab:spatial=6,{ALL}")
    assert not torch.allclose(by_hand(model, gated), pre_gate, atol=1e-3)


@pytest.mark.parametrize(
    "spec, name, sentence",
    [
        ("pab:spatial=0", "dit", "^spatial is a whole number of at least 1; got 0$"),
        ("pab:low=0.5,high=0.5", "dit", "^the window between the noise levels 0.5 and 0.5 is empty"),
        ("pab:spatial=1,cross=1", "dit", "^pab needs the site 'temporal': DiT has no temporal attention$"),
        ("pab:spatial=1,temporal=1", "mmdit", "^pab needs the site 'cross': MMDiT reads text in its joint attention"),
        ("pab:mlp_at=(0.5,),mlp_blocks=9", "dit", "^pab reuses 9 feed-forwards, and this model has 5 blocks$"),
    ],
)
def test_bad_input(spec: str, name: str, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        bound(spec, toys.make(name))
