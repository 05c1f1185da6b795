"""Guidance branches: batched and separate share state and decisions, and never each other's values."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from ditloom.contracts.clock import Clock, Rows
from ditloom.contracts.condition import Condition
from ditloom.contracts.method import Handler, Probe, Tap
from ditloom.contracts.plan import Action, BlockPlan
from ditloom.contracts.site import Site
from tests.sites import toys
from tests.sites.driving import BOTH, by_run, follow, loop, same, start
from tests.sites.walkthroughs import (
    Added,
    Broadcast,
    Captures,
    FirstBlockCache,
    GuidanceGate,
    HoldOutput,
    Inject,
    LearnedGate,
    Regional,
    SkipBlock,
    SomeRows,
)


def image(samples: int = 1) -> Tensor:
    return torch.randn(samples, toys.CHANNELS, toys.SIZE, toys.SIZE, generator=torch.Generator().manual_seed(7))


def regional() -> Handler:
    hidden = torch.zeros(1, toys.WORDS, dtype=torch.bool)
    hidden[:, toys.WORDS // 2 :] = True
    return Regional(torch.rand(1, 16 + toys.WORDS, generator=torch.Generator().manual_seed(3)), hidden)


HANDLERS: Mapping[str, Callable[[], Handler]] = {
    "first block cache": lambda: FirstBlockCache(0.35),
    "broadcast": lambda: Broadcast(3),
    "rows": lambda: SomeRows(3),
    "injection": lambda: Inject((1, 2), ("cond",)),
    "one condition image": lambda: Added(image(1)),
    "condition images": lambda: Added(image(2)),
    "condition image, not static": lambda: Added(image(2), static=False),
    "regional": regional,
    "captures": lambda: Captures([Tap("attn", 1), Tap("logits", 0)]),
    "learned gate": lambda: LearnedGate(4, 0.7),
    "skipped block": lambda: SkipBlock(1),
    "guidance gate": lambda: GuidanceGate(3),
    "held output": lambda: HoldOutput((2, 4)),
}


@pytest.mark.parametrize("name", HANDLERS)
def test_batched_is_separate(name: str) -> None:
    model = toys.make("mmdit")
    together, first = by_run(model, [HANDLERS[name]()])
    apart, second = by_run(model, [HANDLERS[name]()], batched=False)
    torch.testing.assert_close(together, apart, atol=1e-5, rtol=1e-5)
    assert first.report.counts == second.report.counts
    assert (first.report.full_macs, first.report.forwards) == (second.report.full_macs, second.report.forwards)
    assert not torch.allclose(together, by_run(model, [])[0], atol=1e-4) or name in ("captures",)


@pytest.mark.parametrize("name", ["u-vit", "u-toy"])
def test_batched_is_separate_with_long_skips(name: str) -> None:
    model = toys.make(name)
    handlers = lambda: [Broadcast(3), SomeRows(3)]  # noqa: E731
    together, apart = by_run(model, handlers())[0], by_run(model, handlers(), batched=False)[0]
    torch.testing.assert_close(together, apart, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["mmdit", "u-vit-text"])
def test_prompts_of_unequal_length(name: str) -> None:
    """Padding makes a branch look the same alone and in a batch, so that it may be kept from one to the other."""
    model = toys.make(name)
    conditions = {"cond": toys.condition(model, 2, words=7), "uncond": toys.condition(model, 2, 1, words=3)}
    runs = [start(model, [Broadcast(3)], conditions=conditions, batched=b) for b in (True, False)]
    together, apart = (follow(run)[0] for run in runs)
    torch.testing.assert_close(together, apart, atol=1e-5, rtol=1e-5)
    alone = start(model, conditions={"cond": conditions["uncond"]}, branches=("cond",)).predict(
        toys.latent(), runs[0].schedule.clock(0)
    )
    padded = start(model, conditions=conditions).predict(toys.latent(), runs[0].schedule.clock(0))
    torch.testing.assert_close(alone["cond"], padded["uncond"], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize("handler", [Broadcast(6), HoldOutput((1, 2, 3, 4, 5))], ids=["inside", "output"])
def test_scrambling_one_branch_leaves_the_other(handler: Handler, batched: bool) -> None:
    model = toys.make("mmdit")
    outputs = []
    for scrambled in (False, True):
        run = start(model, [handler], batched=batched)
        x = toys.latent()
        with torch.no_grad():
            run.predict(x, run.schedule.clock(0))
            if scrambled:
                run.store.scramble("cond")
            outputs.append(run.predict(x, run.schedule.clock(1)))
    clean, noisy = outputs
    assert same(clean["uncond"], noisy["uncond"]) or batched
    torch.testing.assert_close(clean["uncond"], noisy["uncond"], atol=1e-6, rtol=1e-6)
    assert not torch.allclose(clean["cond"], noisy["cond"], atol=1e-3)


@dataclass
class Deciding(FirstBlockCache):
    """Notes what it was asked, and answers by a list."""

    answers: tuple[Action, ...] = ()
    asked: list[tuple[int, tuple[int, ...]]] = field(default_factory=list)

    def decide(self, site: Site, probes: Mapping[Probe, Tensor], clock: Clock, ready: bool, memo: Any) -> Action:
        (residual,) = probes.values()
        self.asked.append((clock.step, tuple(residual.shape)))
        return self.answers[clock.step]


@pytest.mark.parametrize("batched", [True, False])
def test_one_decision_a_step_by_the_conditional_rows(batched: bool) -> None:
    model = toys.make("mmdit")
    answers = (Action.REUSE, Action.REUSE, Action.COMPUTE, Action.REUSE, Action.REUSE, Action.COMPUTE)
    handler = Deciding(0.0, answers=answers)
    _, run = by_run(model, [handler], batched=batched)
    assert handler.asked == [(s, (2, 16, 64)) for s in range(6)]
    assert run.report.count("range", Action.REUSE) == 2 * 3, "the first one cannot be reused"
    assert run.report.count("range", Action.COMPUTE) == 2 * 3


@pytest.mark.parametrize("batched", [True, False])
def test_the_probe_is_of_the_conditional_rows(batched: bool) -> None:
    """Whatever the unconditional prompt is, the same is decided."""
    model = toys.make("mmdit")
    decided = []
    for seed in (5, 6):
        conditions = {"cond": toys.condition(model, 2), "uncond": toys.condition(model, 2, seed)}
        handler = Probing(0.35)
        run = start(model, [handler], conditions=conditions, batched=batched)
        x = toys.latent()
        with torch.no_grad():
            for s in range(4):
                run.predict(x * (1 - 0.1 * s), run.schedule.clock(s))
        decided.append(handler.seen)
    for a, b in zip(*decided, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-6)


@dataclass
class Probing(FirstBlockCache):
    """Keeps what it was shown."""

    seen: list[Tensor] = field(default_factory=list)

    def decide(self, site: Site, probes: Mapping[Probe, Tensor], clock: Clock, ready: bool, memo: Any) -> Action:
        self.seen.extend(probes.values())
        return Action.COMPUTE


ALONE = (2, 3)
"""Steps of a guidance interval on which only "cond" runs."""


def interval(s: int) -> tuple[str, ...] | None:
    return ("cond",) if s in ALONE else None


@pytest.mark.parametrize("batched", [True, False])
def test_a_guidance_interval_keeps_ages_per_branch(batched: bool) -> None:
    """Computed on 0 and 3 and reused between: on 4 the branches are one and four steps old."""
    model = toys.make("mmdit")
    run = start(model, [Broadcast(3)], batched=batched)
    ages: dict[int, tuple[list[int], list[int]]] = {}

    def look(s: int) -> None:
        ages[s] = tuple(run.store.steps(("broadcast", "attn(1)"), b) for b in BOTH)  # type: ignore[assignment]

    got, _ = follow(run, asked=interval, before=look)
    assert ages == {0: ([], []), 1: ([0], [0]), 2: ([0], [0]), 3: ([0], [0]), 4: ([3], [0]), 5: ([3], [0])}
    torch.testing.assert_close(got, interval_by_hand(model), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def interval_by_hand(model: Any) -> Tensor:
    plan, conditions = toys.schedule(model, 6), toys.conditions(model)
    stored: dict[tuple[str, int], Any] = {}
    x = toys.latent()
    for s in range(6):
        total: Any = 0
        for branch in interval(s) or BOTH:

            def call(i: int, block: Any, streams: Any, context: Any, given: Any, s: int = s, b: str = branch) -> Any:
                if s % 3:
                    return block(streams, context, BlockPlan((("attn", Action.REUSE),)), {"attn": stored[b, i]})
                streams, kept = block(streams, context, BlockPlan(keep=("attn",)), given)
                stored[b, i] = kept["attn"]
                return streams, kept

            time = torch.full((2,), plan.native[s], dtype=torch.float64)
            streams, context = model.embed(x, time, model.prepare(conditions[branch]))
            total = total + model.head(loop(model, streams, context, call), context)
        x = x - 0.2 * total
    return x


@pytest.mark.parametrize("name", ["broadcast", "first block cache", "condition images", "guidance gate", "held output"])
def test_an_interval_is_the_same_batched_and_separate(name: str) -> None:
    """Also where a branch comes back and has less in store than the other."""
    model = toys.make("mmdit")
    results = []
    for batched in (True, False):
        run = start(model, [HANDLERS[name]()], batched=batched)
        results.append((follow(run, asked=lambda s: ("cond",) if s in (0, 1, 3) else None)[0], run.report.counts))
    torch.testing.assert_close(results[0][0], results[1][0], atol=1e-5, rtol=1e-5)
    assert results[0][1] == results[1][1]


def test_what_a_branch_keeps_alone_is_its_own_rows_only() -> None:
    """When the branches part ways, neither holds on to the batch they once shared."""
    model = toys.make("mmdit")
    sizes = []
    for asked in (lambda s: None, interval):
        run = start(model, [Broadcast(3)])
        follow(run, asked=asked, before=lambda s, run=run: sizes.append((s, run.store.bytes)))  # type: ignore[misc]
    full = dict(sizes[:6])
    assert dict(sizes[6:]) == full and full[4] > 0


def test_a_method_may_act_on_one_branch_only() -> None:
    """Taps limited to a branch leave the other bit for bit."""
    model = toys.make("mmdit")
    for tap in (Tap("k_proj", 1, "add"), Tap("block_out", 1, "add"), Tap("mlp", 0, "add"), Tap("skip", 0, "add")):
        if tap.stage == "skip":
            model = toys.make("u-vit")
        limited = Tap(tap.stage, tap.block, tap.op, branches=("cond",))
        run, plain = start(model, [Constant(limited)]), start(model)
        x, clock = toys.latent(), run.schedule.clock(0)
        with torch.no_grad():
            got, expected = run.predict(x, clock), plain.predict(x, clock)
        assert same(got["uncond"], expected["uncond"])
        assert not torch.allclose(got["cond"], expected["cond"], atol=1e-4)


@dataclass
class Constant(Handler):
    """Adds something that is not constant over tokens and channels at a stage."""

    tap: Tap
    key: str = "constant"

    def taps(self, schedule: Any, surface: Any) -> Any:
        return [[self.tap]] * schedule.steps

    def provide(self, tap: Tap, clock: Clock, rows: Rows) -> Tensor:
        return torch.linspace(0, 3, 16 if tap.stage == "k_proj" else 64)


def test_conditions_of_one_run_may_differ_in_kind() -> None:
    """A third branch with its own state."""
    model = toys.make("mmdit")
    conditions = {k: toys.condition(model, 2, i) for i, k in enumerate(("cond", "uncond", "weak"))}
    results = [by_run(model, [Broadcast(2)], tuple(conditions), conditions=conditions, batched=b)[0] for b in (1, 0)]
    torch.testing.assert_close(*results, atol=1e-5, rtol=1e-5)


def test_an_empty_condition_has_no_rows_to_prepare() -> None:
    assert Condition().batch is None
