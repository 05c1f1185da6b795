"""FORA against a loop written by hand: outputs before the gate, the interval counted back from the last step."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ditloom.contracts.errors import UserError
from ditloom.contracts.plan import BlockPlan
from ditloom.contracts.streams import Context, Streams
from tests.caches.acting import COMPUTE, REUSE, bound, drawn, steps_of
from tests.sites import toys
from tests.sites.driving import by_hand, by_run, follow, loop, same, start


@pytest.mark.parametrize("name", ["dit", "mmdit", "u-vit", "u-toy"])
def test_against_a_loop(name: str) -> None:
    model, stored = toys.make(name), {}

    def step(s: int, streams: Streams, context: Context) -> Streams:
        def call(i: int, block: Any, streams: Streams, context: Context, given: Any) -> Any:
            sites = block.sites
            if s in (0, 2, 5):  # the first one, and those at 0 and 3 from the end
                streams, stored[i] = block(streams, context, BlockPlan(keep=sites), given)
                return streams, stored[i]
            return block(streams, context, BlockPlan(tuple((name, REUSE) for name in sites)), {**given, **stored[i]})

        return loop(model, streams, context, call)

    expected = by_hand(model, step)
    got, run = drawn(model, "fora")
    torch.testing.assert_close(got, expected, atol=1e-6, rtol=1e-6)
    assert steps_of(run, "attn(1)") == [1, 3, 4]
    assert run.report.count("attn", REUSE) == run.report.count("attn", COMPUTE), "three steps of six, two branches each"


@pytest.mark.parametrize("steps", [1, 2, 3, 7, 8, 9])
@pytest.mark.parametrize("interval", [1, 2, 3, 5, 100])
def test_calls_are_those_of_the_published_rule(steps: int, interval: int) -> None:
    """Full: the first step and every one whose index, counted down to 0, is a multiple of the interval."""
    full = {steps - 1 - index for index in range(steps) if index == steps - 1 or index % interval == 0}
    _, run = drawn(toys.make("dit"), f"fora:interval={interval}", steps=steps)
    assert run.report.counts["mlp(2)", "compute"] == 2 * len(full)
    assert run.report.counts["mlp(2)", "reuse"] == 2 * (steps - len(full))
    assert steps_of(run, "mlp(2)") == [s for s in range(steps) if s not in full]


def test_interval_one_changes_no_bit() -> None:
    model = toys.make("mmdit")
    assert same(drawn(model, "fora:interval=1")[0], by_run(model)[0])


def test_modulation_runs_on_every_step() -> None:
    """The current gates apply to what is reused, so that it is not the same as adding the last change."""
    model = toys.make("dit")
    fora, _ = drawn(model, "fora:interval=6")
    assert not torch.allclose(fora, drawn(model, "delta-dit:interval=6,blocks=1.0")[0], atol=1e-4)


def test_with_equal_gates_it_adds_the_last_change_of_the_stack() -> None:
    """While time stands still the gates do, too."""
    model = toys.make("dit")
    ends = [
        follow(start(model, [bound(spec, model)]), still=True)[1][-1]["cond"]
        for spec in ("fora:interval=6", "delta-dit:interval=6,blocks=1.0")
    ]
    torch.testing.assert_close(*ends, atol=1e-5, rtol=1e-5)


def test_a_window_computes_everything_outside() -> None:
    _, run = drawn(toys.make("dit"), "fora:interval=6,start=0.5,end=0.9")
    assert steps_of(run, "attn(0)") == [3, 4]


@pytest.mark.parametrize(
    "spec, sentence",
    [
        ("fora:interval=0", "^interval is a whole number of at least 1; got 0$"),
        ("fora:interval=2.5", "^interval is a whole number of at least 1; got 2.5$"),
        ("fora:start=0.5,end=0.5", "^the window from 0.5 to 0.5 of the steps is empty"),
        ("fora:intervall=2", "^unknown method fora setting 'intervall': did you mean 'interval'"),
    ],
)
def test_bad_input(spec: str, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        bound(spec, toys.make("dit"))
