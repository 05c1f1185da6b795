"""What holds for every registered cache, whoever wrote it: the identities that methods of one family owe each other.

Numbers are those of the list that the family shares. 3 and 4 (order and ratio zero are FORA) are in `test_taylorseer`
and `test_toca`, 6 (FasterCache's parts without their weights) in `test_fastercache`, 7 (MagCache is a mask) in
`test_magcache`, 10 (MixCache with one grain) in `test_mixcache`; the others are here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ditloom.contracts.plan import Action
from ditloom.sites.compiling import compile_blocks
from tests.caches.acting import bound, counted, drawn
from tests.caches.every import (
    ALL,
    CACHES,
    LEARNED,
    acting,
    is_static,
    model_of,
    reused,
    running,
    scores,
    walked,
)
from tests.sites import toys
from tests.sites.driving import STEPS, by_run, follow, moved, same, start

LAYOUTS = ("dit", "mmdit", "u-vit-text")
ONE_LAYOUT = {key: "u-vit" if key == "skip-dit" else "mmdit" for key in CACHES}
STATIC = [key for key in CACHES if is_static(key)]


@pytest.fixture(autouse=True)
def untouched() -> Iterator[None]:
    """No test may change a shared toy."""
    yield
    for name in ("dit", "mmdit", "u-vit", "u-vit-text"):
        assert not any(block._forward_pre_hooks for block in model_of(name).blocks)


def test_no_cache_is_left_out() -> None:
    known = {
        "delta-dit",
        "pab",
        "skip-dit",
        "fora",
        "toca",
        "taylorseer",
        "fastercache",
        "guidance-gate",
        "fewer-steps",
    }
    assert known <= set(ALL) and len(STATIC) >= 9
    assert acting("skip-dit", "u-vit") is not None


@pytest.mark.parametrize("key", CACHES)
def test_every_cache_acts(key: str) -> None:
    """Or the tests below would show nothing."""
    name = ONE_LAYOUT[key]
    walk, plain = walked(key, name), walked("", name)
    assert walk is not None and plain is not None
    assert reused(walk.run) > 0 and not torch.allclose(walk.end, plain.end, atol=1e-5)


def layouts() -> list[Any]:
    """Caches on their own layout; on the others in the long checks."""
    own = [(key, ONE_LAYOUT[key]) for key in CACHES]
    more = [(key, name) for key in CACHES for name in LAYOUTS if (key, name) not in own]
    return [*own, *(pytest.param(*pair, marks=pytest.mark.slow) for pair in more)]


@pytest.mark.parametrize("key, name", layouts())
def test_1_off_changes_no_bit(key: str, name: str) -> None:
    """Nor a name of the state."""
    names = list(model_of(name).state_dict())
    run = running(key, name, on=False)
    if run is None:
        return
    assert same(follow(run)[0], by_run(model_of(name))[0])
    assert reused(run) == 0 and list(model_of(name).state_dict()) == names
    assert run.store.bytes == 0


@pytest.mark.parametrize("name", ["dit", "mmdit"])
def test_2_dbcache_with_one_block_is_fbcache(name: str) -> None:
    first = drawn(toys.make(name), "dbcache:first=1,last=0,warmup=0,threshold=0.35")
    second = drawn(toys.make(name), "fbcache:threshold=0.35")
    assert same(first[0], second[0]) and first[1].report.cells == second[1].report.cells != {}


@pytest.mark.skipif("harmonica" not in ALL, reason="it is not registered")
@pytest.mark.parametrize("name", ["mmdit", "u-vit"])
def test_5_a_uniform_mask_is_fora(name: str) -> None:
    """HarmoniCa that computes everything on the steps 0, 2 and 5 and nothing on the others."""
    model = model_of(name)
    assets = scores(model, True)
    mask = torch.tensor([s in (0, 2, 5) for s in range(STEPS)]).float()
    uniform = type(assets)({"scores": mask[:, None].expand_as(assets.tensors["scores"]).contiguous()})
    got = follow(start(model, [bound("harmonica", model, uniform)]))[0]
    assert same(got, drawn(model, "fora:interval=3")[0])


@pytest.mark.skipif(not {*LEARNED} <= {*ALL}, reason="they are not registered")
def test_5_full_on_every_second_step_is_learning_to_cache() -> None:
    model = model_of("mmdit")
    drawn_scores = scores(model, False).tensors["scores"].clone()
    drawn_scores[::2] = 1.0
    ends = [
        follow(start(model, [bound(key, model, type(scores(model, True))({"scores": drawn_scores}))]))[0]
        for key in LEARNED
    ]
    assert same(*ends)


@pytest.mark.parametrize("name", ["mmdit", "u-vit"])
def test_8_delta_dit_over_all_blocks_is_a_static_teacache(name: str) -> None:
    """With a mask in the place of its threshold."""
    model = model_of(name)
    tea = drawn(model, "teacache:fit=identity,mask=1/1/1/1/1/1,policy=static,warmup=0,tail=0")
    delta = drawn(model, "delta-dit:blocks=1.0")
    assert same(tea[0], delta[0]) and reused(tea[1]) == reused(delta[1]) == 6


def test_9_taocache_holds_and_extrapolates() -> None:
    """alpha 0 is the last output; alpha 1 the line through two adjacent ones."""
    model = model_of("dit")
    from ditloom.caches.predictors import Taylor
    from tests.sites.scripted import Planned

    plan = {"output": [Action.COMPUTE, Action.COMPUTE, Action.REUSE, Action.REUSE, Action.COMPUTE, Action.COMPUTE]}
    for alpha, predictor in ((0.0, Taylor(0)), (1.0, Taylor(1))):
        tao = drawn(model, f"taocache:start=0.0,alpha={alpha}")[0]
        torch.testing.assert_close(tao, by_run(model, [Planned(plan, predictor)])[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("key", CACHES)
def test_11_at_rest_reuse_is_computation(key: str) -> None:
    """The same input at the same time again and again: every prediction is the first one, to rounding."""
    run = running(key, ONE_LAYOUT[key])
    assert run is not None
    _, seen = follow(run, still=True)
    for later in seen[1:]:
        for branch, prediction in later.items():
            torch.testing.assert_close(prediction, seen[0][branch], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("key, name", layouts())
def test_12_macs_and_visits(key: str, name: str) -> None:
    """MACs are those an independent counter sees; computed and reused visits of a site are the calls of its block."""
    for batched in (True, False):
        walk = walked(key, name, batched)
        if walk is None:
            return
        assert walk.run.report.macs == walk.macs
        visits: Counter[str] = Counter()
        for (label, _), times in walk.run.report.counts.items():
            visits[label] += times
        for label in (v for v in visits if not v.startswith(("range", "branch", "output"))):
            assert visits[label] == walk.calls[int(label.split("(")[1][:-1])]


@pytest.mark.parametrize("key", CACHES)
def test_13_history_holds_what_was_computed(key: str) -> None:
    """What is predicted on a step is not stored on it; but ToCa stores rows, and of these those it has computed."""
    walk = walked(key, ONE_LAYOUT[key])
    assert walk is not None and walk.predicted and walk.pushed
    both = walk.predicted & walk.pushed
    assert not both if key != "toca" else {place[1].split("(")[0] for place, *_ in both} <= {"mlp"}


@pytest.mark.parametrize("batched", [True, pytest.param(False, marks=pytest.mark.slow)])
@pytest.mark.parametrize("key", CACHES)
def test_14_a_scrambled_branch_leaves_the_other_unmoved(key: str, batched: bool) -> None:
    """Whatever is stored of the unconditional branch, the conditional one is predicted as before."""
    outputs: list[list[torch.Tensor]] = []
    for scrambled in (False, True):
        run = running(key, ONE_LAYOUT[key], batched=batched)
        assert run is not None
        x, seen = toys.latent(), []
        with torch.no_grad():
            for s in range(STEPS):
                if scrambled:
                    run.store.scramble("uncond")
                seen.append(run.predict(x, run.schedule.clock(s))["cond"])
                x = x - 0.3 * seen[-1]
        outputs.append(seen)
    for clean, noisy in zip(*outputs, strict=True):
        torch.testing.assert_close(clean, noisy, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("key", CACHES)
def test_15_two_runs_in_a_row_are_identical(key: str) -> None:
    """With one handler object, also after a run that was given up in the middle."""
    name = ONE_LAYOUT[key]
    handler = acting(key, name)
    assert handler is not None
    ends, reports = [], []
    for _ in range(2):
        given_up = start(model_of(name), [handler])
        with torch.no_grad():
            for s in range(3):
                given_up.predict(toys.latent(seed=s), given_up.schedule.clock(s))
        run = start(model_of(name), [handler])
        ends.append(follow(run)[0])
        reports.append(run.report.to_dict())
    assert same(*ends) and reports[0] == reports[1]


@pytest.mark.parametrize("key", STATIC)
def test_16_a_static_plan_treats_pictures_apart(key: str) -> None:
    """The first picture of a batch is what it is alone. (Dynamic caches decide from all pictures of a batch.)"""
    name = ONE_LAYOUT[key]
    model, handler = model_of(name), acting(key, name)
    assert handler is not None
    walk = walked(key, name)
    assert walk is not None
    run = start(model, [handler], conditions={b: c.rows(slice(0, 1)) for b, c in toys.conditions(model, 2).items()})
    x = toys.latent()[:1]
    with torch.no_grad():
        for s in range(STEPS):
            x = moved(x, run.predict(x, run.schedule.clock(s)))
    torch.testing.assert_close(x[0], walk.end[0], atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("key", CACHES)
def test_batched_is_separate(key: str) -> None:
    together, apart = (walked(key, ONE_LAYOUT[key], batched) for batched in (True, False))
    assert together is not None and apart is not None
    assert together.run.report.counts == apart.run.report.counts
    torch.testing.assert_close(together.end, apart.end, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize("key", [key for key in CACHES if key not in (*LEARNED, "magcache")])
def test_one_and_two_steps(key: str, steps: int) -> None:
    """The first step is always the plain one."""
    name = ONE_LAYOUT[key]
    run = running(key, name, steps=steps)
    assert run is not None
    _, seen = follow(run)
    assert same(seen[0]["cond"], follow(start(model_of(name), steps=steps))[1][0]["cond"])


@pytest.mark.parametrize("key", CACHES)
def test_what_no_longer_holds_is_not_used(key: str) -> None:
    """A solver's second stage, weights written to, a latent changed from outside, another dtype: all is computed."""
    name = ONE_LAYOUT[key]
    model, handler = toys.make(name), acting(key, name)
    assert handler is not None
    run, x = start(model, [handler]), toys.latent()

    def check(clock: Any) -> None:
        before = reused(run)
        got = run.predict(x, clock)
        assert reused(run) == before
        assert same(got["cond"], start(model, conditions=run.conditions).predict(x, clock)["cond"])

    with torch.no_grad():
        for s in range(3):
            run.predict(x, run.schedule.clock(s))
        check(run.schedule.clock(2, evaluation=1))
        for block in (model.blocks[0], model.blocks[-1]):
            next(block.parameters()).mul_(1.0)
        check(run.schedule.clock(3))
        run.changed()
        check(run.schedule.clock(4))
        model.double()
        run.conditions, x = {b: c.to(dtype=torch.float64) for b, c in run.conditions.items()}, x.double()
        check(run.schedule.clock(5))


TRACED = [k if k in ("pab", "toca") else pytest.param(k, marks=pytest.mark.slow) for k in STATIC]


@pytest.mark.parametrize("key", TRACED)
def test_compiled_blocks_compile_once(key: str) -> None:
    """No graph break, the graphs that were announced, and none after the first run."""
    counters = torch._dynamo.utils.counters
    name = ONE_LAYOUT[key]
    handler, model = acting(key, name), toys.make(name)
    assert handler is not None
    torch._dynamo.reset()
    counters.clear()
    compile_blocks(model, backend="eager")
    first, run = by_run(model, [handler])
    graphs = counters["stats"]["unique_graphs"]
    assert not counters["graph_break"]
    again, _ = by_run(model, [handler])
    torch._dynamo.reset()
    assert same(first, again) and counters["stats"]["unique_graphs"] == graphs
    torch.testing.assert_close(first, by_run(toys.make(name), [handler])[0], atol=1e-5, rtol=1e-5)


SPECS = st.one_of(
    st.builds("fora:interval={}".format, st.integers(1, 5)),
    st.builds("delta-dit:interval={},blocks=1.0".format, st.integers(1, 4)),
    st.builds("taylorseer:interval={},order={}".format, st.integers(1, 4), st.integers(0, 3)),
    st.builds("pab:spatial={},low=0.0,high={}".format, st.integers(2, 4), st.sampled_from([0.6, 1.1])),
    st.builds("toca:interval={},ratio={}".format, st.integers(1, 4), st.sampled_from([0.05, 0.2, 0.6])),
    st.builds("guidance-gate:start={},interval={}".format, st.sampled_from([0.2, 0.6]), st.integers(0, 3)),
    st.builds("fastercache:interval={},attention_start={}".format, st.integers(2, 4), st.sampled_from([0.0, 0.4])),
)


@given(
    spec=SPECS, steps=st.integers(1, 9), samples=st.integers(1, 3), name=st.sampled_from(LAYOUTS), both=st.booleans()
)
@settings(max_examples=6, deadline=None)
def test_random_static_plans(spec: str, steps: int, samples: int, name: str, both: bool) -> None:
    """Any settings, number of steps and batch, on five blocks and four, with text: exact MACs, bounded memory."""
    model = model_of(name)
    run = start(model, [bound(spec, model)], steps=steps, conditions=toys.conditions(model, samples), batched=both)
    x = toys.latent(samples)
    with torch.no_grad(), counted() as macs:
        for s in range(steps):
            x = x - 0.1 * sum(run.predict(x, run.schedule.clock(s)).values())
    assert run.report.macs == macs[0] and x.isfinite().all()
    assert run.program is not None
    layout = run.program.surface.layout
    latent = 2 * 2 * x.nbytes
    assert run.report.bytes_held <= run.program.bytes_needed(2 * samples, 4, layout.length(), 64, latent) + 4096
