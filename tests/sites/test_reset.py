"""When stored values no longer hold: a new run, other shapes, weights or conditions, a changed latent."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from ditloom.contracts.backbone import Backbone
from ditloom.contracts.clock import Clock
from ditloom.contracts.method import Handler, Probe
from ditloom.contracts.plan import Action
from ditloom.contracts.site import Site
from ditloom.sites.run import Run
from tests.sites import toys
from tests.sites.driving import by_run, follow, same, start
from tests.sites.walkthroughs import (
    Added,
    Broadcast,
    FirstBlockCache,
    GuidanceGate,
    HoldOutput,
    LearnedGate,
    SomeRows,
)

REUSERS: Mapping[str, Callable[[], Handler]] = {
    "range": lambda: FirstBlockCache(9.0),
    "attention": lambda: Broadcast(6),
    "rows": lambda: SomeRows(3),
    "mix": lambda: LearnedGate(4, 0.3),
    "branch": lambda: GuidanceGate(1),
    "output": lambda: HoldOutput((1, 2, 3, 4, 5)),
}


@pytest.mark.parametrize("name", REUSERS)
def test_two_runs_in_a_row_are_identical(name: str) -> None:
    """With the very same handler object: what it learns lies in the run."""
    model, handler = toys.make("mmdit"), REUSERS[name]()
    first, a = by_run(model, [handler])
    second, b = by_run(model, [handler])
    assert same(first, second)
    assert a.report.to_dict() == b.report.to_dict()


def test_interleaved_runs_never_meet() -> None:
    model, handler = toys.make("mmdit"), FirstBlockCache(0.35)
    alone = by_run(model, [handler])[0]
    runs = [start(model, [handler]) for _ in range(2)]
    xs = [toys.latent(), toys.latent(seed=3)]
    with torch.no_grad():
        for s in range(6):
            for i, run in enumerate(runs):
                out = run.predict(xs[i], run.schedule.clock(s))
                xs[i] = xs[i] - 0.2 * (out["cond"] + out["uncond"])
    assert same(xs[0], alone)


def reused(run: Run) -> int:
    return sum(n for (_, action), n in run.report.counts.items() if action in ("reuse", "rows", "mix"))


def predict(run: Run, step: int, x: Tensor | None = None, clock: Clock | None = None) -> dict[str, Tensor]:
    with torch.no_grad():
        return run.predict(toys.latent() if x is None else x, clock or run.schedule.clock(step))


def warm(model: Backbone, handler: Handler, **options: Any) -> Run:
    """A run after its first step, about to reuse."""
    run = start(model, [handler], **options)
    predict(run, 0)
    return run


def touch_weights(model: Backbone, run: Run) -> None:
    with torch.no_grad():
        next(model.blocks[-1].parameters()).mul_(1.5)


def load_weights(model: Backbone, run: Run) -> None:
    model.load_state_dict({k: v * 1.1 if v.is_floating_point() else v for k, v in model.state_dict().items()})


def other_condition(model: Backbone, run: Run) -> None:
    run.conditions["cond"] = toys.condition(model, 2, seed=9)


def written_condition(model: Backbone, run: Run) -> None:
    text = run.conditions["uncond"].text
    assert text is not None
    text.mul_(2.0)


def longer_prompt(model: Backbone, run: Run) -> None:
    run.conditions["cond"] = toys.condition(model, 2, seed=9, words=9)


CHANGES = [touch_weights, load_weights, other_condition, written_condition, longer_prompt]
BRANCH_ONLY = {(other_condition, "branch"), (longer_prompt, "branch")}
"""A stored gap belongs to the unconditional branch: its own prompt, not the conditional one, is part of it."""


@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
@pytest.mark.parametrize("name", REUSERS)
def test_a_change_mid_run_makes_stored_values_absent(name: str, change: Callable[..., None]) -> None:
    """The next step is computed afresh, and is what a plain run gives; the one after reuses again."""
    model = toys.make("mmdit")
    run = warm(model, REUSERS[name]())
    change(model, run)
    got = predict(run, 1)
    if (change, name) in BRANCH_ONLY:
        return
    assert reused(run) == 0
    plain = start(model, conditions=dict(run.conditions))
    for b, expected in predict(plain, 1).items():
        torch.testing.assert_close(got[b], expected, atol=1e-6, rtol=1e-6)
    predict(run, 2)
    predict(run, 3)
    assert reused(run) > 0


@pytest.mark.parametrize("name", ["attention", "range", "output"])
@pytest.mark.parametrize("batched", [True, False])
def test_a_changed_condition_concerns_its_own_branch(name: str, batched: bool) -> None:
    """Asked alone, the branch whose prompt stayed still has its values."""
    model = toys.make("mmdit")
    run = warm(model, REUSERS[name](), batched=batched)
    other_condition(model, run)
    with torch.no_grad():
        run.predict(toys.latent(), run.schedule.clock(1), ["uncond"])
    assert reused(run) > 0
    before = reused(run)
    with torch.no_grad():
        run.predict(toys.latent(), run.schedule.clock(1), ["cond"])
    assert reused(run) == before


@pytest.mark.parametrize("name", REUSERS)
def test_another_size_mid_run(name: str) -> None:
    model = toys.make("mmdit")
    run = warm(model, REUSERS[name]())
    wide = torch.randn(2, toys.CHANNELS, toys.SIZE, 2 * toys.SIZE, generator=torch.Generator().manual_seed(1))
    got = predict(run, 1, wide)
    assert reused(run) == 0
    expected = predict(start(model), 1, wide)
    torch.testing.assert_close(got["cond"], expected["cond"])


@pytest.mark.parametrize("name", REUSERS)
def test_another_dtype_mid_run(name: str) -> None:
    model = toys.make("mmdit")
    run = warm(model, REUSERS[name]())
    model.double()
    run.conditions = {b: c.to(dtype=torch.float64) for b, c in run.conditions.items()}
    got = predict(run, 1, toys.latent().double())
    assert reused(run) == 0
    assert got["cond"].dtype == torch.float64


@pytest.mark.parametrize("name", REUSERS)
def test_a_changed_latent_clears(name: str) -> None:
    model = toys.make("mmdit")
    run = warm(model, REUSERS[name]())
    assert run.store.bytes > 0
    run.changed()
    assert run.store.bytes == 0
    got = predict(run, 1)
    assert reused(run) == 0
    assert same(got["cond"], predict(start(model), 1)["cond"])


class Remembering(FirstBlockCache):
    """Counts its decisions in its memo."""

    def decide(self, site: Site, probes: Mapping[Probe, Tensor], clock: Clock, ready: bool, memo: Any) -> Action:
        memo["asked"] = memo.get("asked", 0) + 1
        return Action.COMPUTE


def test_a_changed_latent_empties_the_notes_of_caches() -> None:
    model, handler = toys.make("dit"), Remembering(0.0)
    run = warm(model, handler)
    predict(run, 1)
    assert run.memo(handler) == {"asked": 2}
    run.changed()
    assert run.memo(handler) == {}
    predict(run, 1)
    assert run.memo(handler) == {"asked": 1}, "a step walked again is decided again"


def test_kept_keys_outlive_a_changed_latent() -> None:
    """They depend on their image, not on the latent."""
    model = toys.make("dit")
    run = warm(model, Added(toys.latent(1)))
    held = run.keys.bytes
    run.changed()
    assert run.keys.bytes == held > 0


@pytest.mark.parametrize("purpose", ["optimise", "teacher", "search"])
@pytest.mark.parametrize("name", REUSERS)
def test_only_sampling_reads_and_writes(name: str, purpose: Any) -> None:
    model, handler = toys.make("mmdit"), REUSERS[name]()
    run = warm(model, handler)
    held, plan = dict(run.store._entries), run.schedule
    entries = {k: {b: list(h) for b, h in hs.items()} for k, hs in held.items()}
    memo = dict(run.memo(handler))
    got = predict(run, 1, toys.latent(seed=4), plan.clock(1, purpose=purpose))
    assert same(got["cond"], predict(start(model), 1, toys.latent(seed=4))["cond"])
    assert {k: {b: list(h) for b, h in hs.items()} for k, hs in run.store._entries.items()} == entries
    assert run.memo(handler).keys() == memo.keys() and reused(run) == 0
    fresh = start(model, [handler])
    predict(fresh, 0, clock=plan.clock(0, purpose=purpose))
    assert fresh.store.bytes == fresh.keys.bytes == 0


@pytest.mark.parametrize("name", REUSERS)
def test_a_second_evaluation_computes(name: str) -> None:
    """Heun's second stage neither reads nor writes by default."""
    model = toys.make("mmdit")
    run = warm(model, REUSERS[name]())
    before = run.store.bytes
    got = predict(run, 0, toys.latent(seed=4), run.schedule.clock(0, evaluation=1))
    assert same(got["cond"], predict(start(model), 0, toys.latent(seed=4))["cond"])
    assert reused(run) == 0 and run.store.bytes == before


@pytest.mark.parametrize("handlers", [(), (Broadcast(1),)], ids=["bare", "attached"])
@pytest.mark.parametrize("name", ["mmdit", "u-vit-text", "dit"])
def test_gradients_reach_every_parameter_on_every_prediction(name: str, handlers: tuple[Handler, ...]) -> None:
    """Those of the condition's embedding, too, which a run otherwise prepares once; also after a look without."""
    model = toys.make(name)
    run = start(model, handlers, branches=("cond",))
    predict(run, 0)
    for step in (1, 2):
        model.zero_grad()
        run.predict(toys.latent(), run.schedule.clock(step))["cond"].square().mean().backward()
        got = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        model.zero_grad()
        t = torch.full((2,), run.schedule.times[step], dtype=torch.float64)
        model(toys.latent(), t, run.conditions["cond"]).square().mean().backward()
        assert got.keys() == {n for n, p in model.named_parameters() if p.grad is not None}
        for n, p in model.named_parameters():
            if p.grad is not None:
                torch.testing.assert_close(got[n], p.grad, atol=1e-6, rtol=1e-4)


class Watching(Handler):
    """Notes what it observes."""

    key = "watching"

    def __init__(self) -> None:
        self.seen: list[tuple[int, tuple[str, ...]]] = []

    def observe(self, clock: Clock, outputs: Mapping[str, Tensor], memo: dict[str, Any]) -> None:
        self.seen.append((clock.step, tuple(outputs)))


def test_observers_learn_from_what_was_really_computed() -> None:
    model, watching = toys.make("dit"), Watching()
    run = start(model, [watching, GuidanceGate(2), HoldOutput(())])
    follow(run)
    predict(run, 5, clock=run.schedule.clock(5, evaluation=1))
    predict(run, 5, clock=run.schedule.clock(5, purpose="optimise"))
    both, cond = ("cond", "uncond"), ("cond",)
    assert watching.seen == [(0, both), (1, both), (2, cond), (3, cond), (4, cond), (5, cond)]
    held = Watching()
    follow(start(model, [held, HoldOutput((1, 3))]))
    assert [s for s, _ in held.seen] == [0, 2, 4, 5]


def test_a_cancelled_run_leaves_nothing() -> None:
    """Dropped in the middle, a run takes everything it stored with it."""
    model = toys.make("mmdit")
    keys = list(model.state_dict())
    run = warm(model, Broadcast(6))
    tensors = [weakref.ref(e.whole["image"]) for hs in run.store._entries.values() for h in hs.values() for e in h]
    alive = weakref.ref(run.store)
    del run
    gc.collect()
    assert alive() is None and all(t() is None for t in tensors)
    assert list(model.state_dict()) == keys
    assert same(by_run(model, [Broadcast(6)])[0], by_run(toys.make("mmdit"), [Broadcast(6)])[0])


class Fails(Broadcast):
    """Raises once, in the middle of the second step."""

    failed = False

    def observe(self, clock: Clock, outputs: Mapping[str, Tensor], memo: dict[str, Any]) -> None:
        if clock.step == 1 and not self.failed:
            self.failed = True
            raise RuntimeError("a failing step")


def test_a_step_that_failed_can_be_walked_again() -> None:
    model, handler = toys.make("mmdit"), Fails(2)
    expected = by_run(model, [Broadcast(2)])[0]
    run, x = start(model, [handler]), toys.latent()
    with torch.no_grad():
        for s in range(6):
            if s == 1:
                with pytest.raises(RuntimeError, match="a failing step"):
                    run.predict(x, run.schedule.clock(s))
            out = run.predict(x, run.schedule.clock(s))
            x = x - 0.2 * (out["cond"] + out["uncond"])
    assert same(x, expected)


@torch.inference_mode()
def test_inside_inference_mode() -> None:
    """Tensors without version counters are told apart by identity."""
    model = toys.make("mmdit")
    run = start(model, [Broadcast(3)])
    follow(run)
    assert reused(run) > 0


@pytest.mark.parametrize("name", ["attention", "range", "rows"])
def test_stopping_early_neither_reads_nor_writes(name: str) -> None:
    model = toys.make("mmdit")
    run = warm(model, REUSERS[name]())
    before = run.store.bytes
    run.until(toys.latent(), run.schedule.clock(1), block=2)
    assert reused(run) == 0 and run.store.bytes == before
    predict(run, 1)
    assert reused(run) > 0
