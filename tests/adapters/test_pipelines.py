"""Whole pipelines of diffusers: steps come from their schedulers, branches from what they say."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import ditloom
from ditloom.contracts.clock import Clock, Rows
from ditloom.contracts.errors import UserError
from ditloom.contracts.method import Tap
from ditloom.contracts.plan import Action
from tests.adapters.pipelines import PIPES, Clocks, PipeCase
from tests.adapters.tiny import CASES, shaken
from tests.sites.walkthroughs import Broadcast, Captures, FirstBlockCache, GuidanceGate, HoldOutput

pytest.importorskip("diffusers")
STEPS = 6


@pytest.fixture(params=PIPES)
def case(request: pytest.FixtureRequest) -> PipeCase:
    return PIPES[request.param]


def test_off_is_bit_identical(case: PipeCase) -> None:
    expected = case.run()
    with ditloom.using(case.pipe):
        assert torch.equal(case.run(), expected)
    with ditloom.using(case.pipe, Broadcast(1)):
        assert torch.equal(case.run(), expected)
    assert torch.equal(case.run(), expected)


def test_clocks_and_branches(case: PipeCase) -> None:
    clocks = Clocks()
    with ditloom.using(case.pipe, clocks) as run:
        case.run()
    calls = 2 if case.apart else 1
    assert [c.step for c in clocks.clocks] == [s for s in range(STEPS) for _ in range(calls)]
    assert {c.steps for c in clocks.clocks} == {STEPS}
    assert all(c.evaluation == 0 for c in clocks.clocks)
    assert all(0 <= c.t_next < c.t <= 1 for c in clocks.clocks)
    expected = [("cond",), ("uncond",)] if case.apart else [case.rows]
    assert clocks.rows == expected * STEPS
    assert run.report.forwards == 2 * STEPS


def test_without_guidance_there_is_one_branch(case: PipeCase) -> None:
    clocks = Clocks()
    with ditloom.using(case.pipe, clocks):
        case.run(**case.off)
    assert clocks.rows == [("cond",)] * STEPS


def test_a_new_call_starts_anew(case: PipeCase) -> None:
    with ditloom.using(case.pipe, HoldOutput((1, 2)), FirstBlockCache(0.5)) as run:
        first, counts = case.run(), run.report.counts
        case.run(steps=3, seed=1)
        assert run.report.count("output", Action.REUSE) == 2 * 2
        assert torch.equal(case.run(), first)
        assert run.report.counts == counts


def test_the_guidance_gate_leaves_out_rows(case: PipeCase) -> None:
    plain = case.run()
    with ditloom.using(case.pipe, GuidanceGate(3)) as run:
        out = case.run()
    assert not torch.equal(out, plain)
    assert run.report.count("branch", Action.REUSE) == 3
    assert run.report.forwards == 2 * 3 + 3


def test_an_exception_in_the_middle_leaves_nothing_behind(case: PipeCase) -> None:
    expected = case.run()

    class Stop(Exception):
        pass

    class Stops(Captures):
        armed = True

        def captured(self, tap: Tap, value: Tensor, clock: Clock, rows: Rows) -> None:
            if clock.step == 3 and self.armed:
                raise Stop

    stops = Stops([Tap("block_out", 1)])
    with ditloom.using(case.pipe, stops, Broadcast(2)) as run:
        with pytest.raises(Stop):
            case.run()
        stops.armed = False
        out = case.run()
    with ditloom.using(case.pipe, Broadcast(2)):
        assert torch.equal(case.run(), out)
    assert run.report.count("attn", Action.REUSE) > 0
    assert torch.equal(case.run(), expected)


def test_two_pipelines_do_not_disturb_each_other() -> None:
    one, two = PIPES["dit"], PIPES["pixart"]
    with ditloom.using(one.pipe, Broadcast(2)):
        alone = one.run()
    with ditloom.using(one.pipe, Broadcast(2)) as a, ditloom.using(two.pipe, HoldOutput((2,))) as b:
        other = two.run()
        assert torch.equal(one.run(), alone)
        assert torch.equal(two.run(), other)
    assert a.report.count("attn", Action.REUSE) and b.report.count("output", Action.REUSE)


def test_the_two_transformers_of_wan_have_state_of_their_own() -> None:
    from diffusers import UniPCMultistepScheduler, WanPipeline

    parts = dict.fromkeys(("tokenizer", "text_encoder", "vae"))
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)
    first, second = (shaken(CASES["wan"].make()) for _ in range(2))
    pipe = WanPipeline(transformer=first, transformer_2=second, scheduler=scheduler, boundary_ratio=0.5, **parts)
    pipe.set_progress_bar_config(disable=True)
    scheduler.set_timesteps(STEPS)
    change = int((scheduler.timesteps >= 500).sum())
    assert 2 < change < STEPS - 1
    clocks = Clocks()
    with ditloom.using(pipe, clocks, HoldOutput((1, change, change + 1))) as run:
        PIPES["wan"].call(pipe, num_inference_steps=STEPS, generator=torch.Generator().manual_seed(0))
    computed = [s for s in range(STEPS) if s not in (1, change + 1)]  # at the change nothing is stored yet
    assert [c.step for c in clocks.clocks] == [s for s in computed for _ in range(2)]
    assert run.report.count("output", Action.REUSE) == 2 * 2


def test_skip_layer_guidance_is_left_to_the_pipeline() -> None:
    case, more = PIPES["sd3"], {"skip_guidance_layers": [1], "skip_layer_guidance_stop": 0.9}
    expected = case.run(**more)
    with ditloom.using(case.pipe, Broadcast(1)) as run:
        assert torch.equal(case.run(**more), expected)
    assert run.report.forwards == 2 * STEPS


def test_a_controlnet_is_refused() -> None:
    module, arguments = CASES["sd3"].module, CASES["sd3"].arguments(torch.zeros(1, 4, 8, 8), 1000.0, (0,))
    with (
        ditloom.using(module, Broadcast(2), timesteps=[1000.0]),
        pytest.raises(UserError, match="block_controlnet_hidden_states"),
    ):
        module(**arguments, block_controlnet_hidden_states=[torch.zeros(1, 16, 16)])
