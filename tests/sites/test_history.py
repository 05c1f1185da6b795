"""What is stored: computed values only, while a later step can use them, within the announced memory."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from ditloom.contracts.backbone import Backbone
from ditloom.contracts.clock import Schedule
from ditloom.contracts.errors import UserError
from ditloom.contracts.plan import Action
from ditloom.sites.codecs import DELTA, VALUE
from ditloom.sites.store import Store
from ditloom.sites.surface import Surface
from tests.sites import toys
from tests.sites.driving import BOTH, by_run, follow, same, start
from tests.sites.scripted import Line, Planned
from tests.sites.walkthroughs import Broadcast, FirstBlockCache, Gap, GuidanceGate, HoldOutput, LearnedGate, SomeRows

COMPUTE, REUSE = Action.COMPUTE, Action.REUSE


def reference(actions: Sequence[Action], depth: int, least: int) -> tuple[list[int], dict[int, tuple[int, ...]]]:
    """By brute force: which steps must be stored, and what each reuse may look at."""
    effective, computed = [], 0
    for action in actions:
        reused = action is REUSE and computed >= least
        computed += not reused
        effective.append(reused)
    uses = {}
    for step, reused in enumerate(effective):
        if reused:
            uses[step] = tuple([s for s in range(step) if not effective[s]][-depth:])
    needed = sorted({s for seen in uses.values() for s in seen})
    return needed, uses


class Watched(Store):
    """Notes at which steps something was stored."""

    def __init__(self) -> None:
        super().__init__()
        self.pushed: list[int] = []

    def push(self, *args: Any) -> None:
        self.pushed.append(args[2])
        super().push(*args)


PLANS = st.lists(st.sampled_from([COMPUTE, REUSE]), min_size=2, max_size=9)
SITE = st.sampled_from(["attn(1)", "mlp(2)", "range(1,3)", "output", "branch(uncond)"])
MODEL = toys.make("dit")


@given(PLANS, SITE, st.integers(1, 3), st.data())
@settings(max_examples=25, deadline=None)
def test_stored_is_exactly_what_a_later_step_uses(plan: list[Action], label: str, depth: int, data: Any) -> None:
    least = data.draw(st.integers(1, depth))
    line = Line(depth, least)
    codec = Gap() if label.startswith("branch") else VALUE
    run = start(MODEL, [Planned({label: plan}, line, codec)], steps=len(plan))
    run.store = Watched()
    follow(run)
    needed, uses = reference(plan, depth, least)
    assert sorted(set(run.store.pushed)) == needed
    assert dict(line.given) == uses
    assert run.report.counts[label, "reuse"] == len(uses) * (1 if label.startswith("branch") else 2)


@given(PLANS, PLANS)
@settings(max_examples=20, deadline=None)
def test_under_an_outer_plan_nothing_more_is_stored(inner: list[Action], outer: list[Action]) -> None:
    """Steps whose output is reused are no steps for the sites inside."""
    steps = min(len(inner), len(outer))
    line = Line(1, 1)
    handlers = [Planned({"output": outer[:steps]}), Planned({"mlp(1)": inner[:steps]}, line, key="inner")]
    run = start(MODEL, handlers, steps=steps)
    run.store = Watched()
    follow(run)
    _, skipped = reference(outer[:steps], 1, 1)
    visited = [s for s in range(steps) if s not in skipped]
    _, uses = reference([inner[s] for s in visited], 1, 1)
    expected = {visited[s]: tuple(visited[u] for u in seen) for s, seen in uses.items()}
    assert dict(line.given) == expected


@pytest.mark.parametrize("depth", [2, 3])
def test_too_short_a_history_is_computed_and_counted(depth: int) -> None:
    line = Line(depth, depth)
    run = start(MODEL, [Planned({"attn(0)": [REUSE] * 6}, line)])
    follow(run)
    assert [s for s, _ in line.given] == list(range(depth, 6))
    assert run.report.counts["attn(0)", "compute"] == 2 * depth


def test_what_no_step_can_use_any_more_is_freed() -> None:
    plan = [COMPUTE, REUSE, COMPUTE, COMPUTE, COMPUTE, REUSE]
    run = start(MODEL, [Planned({"mlp(0)": plan})])
    sizes: list[int] = []
    follow(run, before=lambda s: sizes.append(run.store.bytes))
    one = 4 * 16 * 64 * 4
    assert sizes == [0, one, one, 0, 0, one]


REUSERS: Mapping[str, Any] = {
    "delta over a range": lambda: FirstBlockCache(9.0),
    "value over a range": lambda: Planned({"range(0,3)": [COMPUTE, *[REUSE] * 5]}),
    "change over a range": lambda: Planned({"range(1,4)": [COMPUTE, *[REUSE] * 5]}, codec=DELTA),
    "attention": lambda: Broadcast(6),
    "feed-forward": lambda: Broadcast(6, kind="mlp"),
    "rows": lambda: SomeRows(5),
    "mix": lambda: LearnedGate(5, 0.3),
    "branch": lambda: GuidanceGate(1),
    "output": lambda: HoldOutput((1, 2, 3, 4, 5)),
}


@pytest.mark.parametrize("name", REUSERS)
def test_where_nothing_moves_reuse_is_computation(name: str) -> None:
    run = start(MODEL, [REUSERS[name]()])
    _, seen = follow(run, still=True)
    assert any(action in ("reuse", "rows", "mix") for _, action in run.report.counts)
    for later in seen[1:]:
        for b in BOTH:
            torch.testing.assert_close(later[b], seen[0][b], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["u-vit", "u-toy", "mmdit", "mmdit-dual"])
def test_where_nothing_moves_on_other_families(name: str) -> None:
    run = start(toys.make(name), [Broadcast(3), SomeRows(4), HoldOutput((5,))])
    _, seen = follow(run, still=True)
    for later in seen[1:]:
        torch.testing.assert_close(later["cond"], seen[0]["cond"], atol=1e-5, rtol=1e-5)


def test_a_predicted_value_is_never_stored() -> None:
    """What a predictor makes up shows in the result and nowhere in the store."""

    class Wild(Line):
        def __call__(self, history: Sequence[tuple[int, Any]], step: int) -> Any:
            return tree_map(lambda t: torch.full_like(t, 77.0), super().__call__(history, step))

    for label in ("attn(1)", "range(1,3)", "output"):
        run = start(MODEL, [Planned({label: [COMPUTE, REUSE, REUSE, COMPUTE, REUSE, REUSE]}, Wild(2, 1))])
        held: list[Any] = []
        follow(run, before=lambda s, run=run, held=held: held.extend(stored(run.store)))  # type: ignore[misc]
        assert held and not any(bool((t == 77).any()) for t in held)


def stored(store: Store) -> list[Tensor]:
    entries = (e for hs in store._entries.values() for history in hs.values() for e in history)
    return [t for e in entries for t in tree_leaves(e.whole)]


@pytest.mark.parametrize("name", toys.NAMES)
@pytest.mark.parametrize("depth", [1, 2])
def test_memory_held_is_counted_and_within_the_bound(name: str, depth: int) -> None:
    model = toys.make(name)
    streams, _ = model.embed(toys.latent(), torch.zeros(2), model.prepare(toys.condition(model, 2)))
    surface = Surface(model, streams.layout)
    plan = [COMPUTE, COMPUTE, REUSE, COMPUTE, REUSE, REUSE]
    labels = [s.label for kind in ("attn", "mlp") for s in surface.sites(kind)]
    handler = Planned({**dict.fromkeys(labels, plan), "output": [COMPUTE] * 5 + [REUSE]}, Line(depth, 1))
    run = start(model, [handler])
    counted = []
    follow(run, before=lambda s: counted.append((run.store.bytes, unique_storages(run.store))))
    assert run.program is not None
    bound = run.program.bytes_needed(4, 4, surface.layout.length(), 64, 4 * toys.latent(1).nbytes)
    assert all(said == real for said, real in counted)
    assert 0 < max(said for said, _ in counted) == run.report.bytes_held <= bound


def unique_storages(store: Store) -> int:
    """Memory that is really kept alive, whatever views look at it."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in stored(store)}
    return sum(storages.values())


def test_more_than_the_memory_limit_is_refused_before_anything_runs() -> None:
    calls: list[int] = []
    hooks = [b.register_forward_pre_hook(lambda *_: calls.append(1)) for b in MODEL.blocks]
    run = start(MODEL, [Broadcast(2)], memory_limit=50_000)
    with pytest.raises(UserError, match=r"broadcast would hold up to 81.9 kB; the limit is 50 kB"):
        follow(run)
    for hook in hooks:
        hook.remove()
    assert not calls
    follow(start(MODEL, [Broadcast(2)], memory_limit=82_000))


@pytest.mark.parametrize("label", ["attn(0)", "range(1,4)", "output"])
def test_gradients_do_not_flow_into_what_is_stored(label: str) -> None:
    run = start(MODEL, [Planned({label: [COMPUTE, REUSE]})], steps=2, branches=("cond",))
    x = toys.latent().requires_grad_()
    run.predict(x, run.schedule.clock(0))
    assert not any(t.requires_grad for t in stored(run.store))


def test_the_same_step_twice_is_one_entry() -> None:
    """A step that is walked again replaces what it stored."""
    run = start(MODEL, [Planned({"mlp(0)": [COMPUTE, COMPUTE, REUSE]}, Line(2, 2))], steps=3)
    with torch.no_grad():
        for s in (0, 0, 0, 1):
            run.predict(toys.latent(), run.schedule.clock(s))
    assert run.store.steps(("planned", "mlp(0)"), "cond") == [0, 1]


def test_a_codec_rewrites_what_is_stored() -> None:
    @dataclass(frozen=True)
    class Halved:
        def encode(self, x: Any, y: Tensor) -> Tensor:
            return y.to(torch.bfloat16)

        def decode(self, x: Any, z: Tensor) -> Tensor:
            return z.to(torch.float32)

    plan = {"mlp(1)": [COMPUTE, *[REUSE] * 5]}
    exact, run = by_run(MODEL, [Planned(plan)])
    rounded, small = by_run(MODEL, [Planned(plan, codec=Halved())])
    assert small.report.bytes_held * 2 == run.report.bytes_held
    torch.testing.assert_close(rounded, exact, atol=3e-2, rtol=3e-2)
    assert not torch.equal(rounded, exact)


def test_a_change_cannot_be_stored_inside_a_block() -> None:
    with pytest.raises(ValueError, match="inside a block, store the value"):
        by_run(MODEL, [Planned({"mlp(1)": [COMPUTE] * 6}, codec=DELTA)])


def test_a_change_over_a_pool_cannot_be_stored() -> None:
    model: Backbone = toys.make("u-toy")
    model.skips = {}
    with pytest.raises(UserError, match=r"change over range\(0,2\).*laid out differently"):
        by_run(model, [Planned({"range(0,2)": [COMPUTE] * 6}, codec=DELTA)])


def test_histories_are_rings() -> None:
    """The newest values of each branch, oldest first."""
    from ditloom.contracts.clock import Rows

    store, rows = Store(), Rows(BOTH, 1)
    for step in range(5):
        store.push(("a", "site"), rows, step, torch.full((2, 1), float(step)), 3, {"cond": 0, "uncond": 0})
    seen = deque[int](store.steps(("a", "site"), "cond"))
    assert list(seen) == [2, 3, 4]


@dataclass(frozen=True)
class Scheduled:
    """Holds, and knows the steps of its run."""

    steps: int = 0
    depth: int = 1

    def on(self, schedule: Schedule) -> Scheduled:
        return Scheduled(schedule.steps)

    def __call__(self, history: Sequence[tuple[int, Any]], step: int) -> Any:
        assert self.steps == 6
        return history[-1][1]


def test_a_predictor_may_ask_for_the_steps_of_the_run() -> None:
    script = {"attn(0)": [COMPUTE, *[REUSE] * 5]}
    asked, _ = by_run(toys.make("dit"), [Planned(script, Scheduled())])
    assert same(asked, by_run(toys.make("dit"), [Planned(script)])[0])


@pytest.mark.parametrize("keys", [("a", "a"), ("a", "b"), ("b", "a")])
def test_a_range_that_another_jumped_into_keeps_what_it_had(keys: tuple[str, str]) -> None:
    """On step 1 the second range is reused, so that the first one never reaches its end: on step 2 it is 2 old."""
    scripts = {"range(0,3)": [COMPUTE, COMPUTE, REUSE], "range(2,5)": [COMPUTE, REUSE, COMPUTE]}
    line = Line()
    if keys[0] == keys[1]:
        handlers = [Planned(scripts, line)]
    else:
        handlers = [Planned({s: a}, line, key=k) for k, (s, a) in zip(keys, scripts.items(), strict=True)]
    run = start(toys.make("dit"), handlers, steps=3)
    follow(run)
    assert line.given == [(1, (0,)), (2, (0,))]
    assert run.report.counts["range(0,3)", "reuse"] == run.report.counts["range(2,5)", "reuse"] == 2
