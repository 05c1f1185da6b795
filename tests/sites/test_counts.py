"""The report: every visit counted once, and MACs equal to those an independent counter sees being executed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ditloom.contracts.backbone import Backbone
from ditloom.contracts.clock import Clock, Rows
from ditloom.contracts.layout import Layout
from ditloom.contracts.method import Handler, Probe, Tap
from ditloom.contracts.plan import Action
from ditloom.contracts.site import Site
from ditloom.sites.rules import Isolate, LocalWindow, Only, Rule, Term, rule
from ditloom.sites.run import Run
from tests.sites import toys
from tests.sites.driving import by_run, follow, start
from tests.sites.scripted import Line, Planned
from tests.sites.walkthroughs import Added, Broadcast, Captures, FirstBlockCache, GuidanceGate, SkipBlock, SomeRows

COMPUTE, REUSE, ROWS, SKIP, MIX = Action.COMPUTE, Action.REUSE, Action.ROWS, Action.SKIP, Action.MIX
MODELS = {name: toys.make(name) for name in toys.FAMILIES}


@contextmanager
def counted() -> Iterator[list[int]]:
    """Multiply-accumulates of every matrix product and convolution that runs."""
    macs: list[int] = []
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        yield macs
    macs.append(counter.get_total_flops() // 2)


def check(model: Backbone, handlers: Sequence[Handler], drive: Callable[[Run], Any] = follow, **options: Any) -> Run:
    """A run whose report must agree with the counter."""
    run = start(model, handlers, **options)
    with counted() as macs:
        drive(run)
    assert run.report.macs == macs[0]
    return run


@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize("name", toys.FAMILIES)
def test_a_plain_run(name: str, batched: bool) -> None:
    run = check(MODELS[name], [], batched=batched)
    assert run.report.macs == run.report.full_macs and run.report.share_saved == 0
    assert run.report.forwards == 12


INNER = ("attn(0)", "attn(2)", "mlp(1)", "mlp(2)")
OUTER = ("range(0,1)", "range(1,3)", "output", "branch(uncond)")


@st.composite
def scripts(draw: Any) -> dict[str, list[Action]]:
    """Random plans for some sites: ranges and run-level sites compute or reuse, inner ones may do all."""
    steps = draw(st.integers(2, 5))
    labels = draw(st.sets(st.sampled_from([*INNER, *OUTER]), min_size=1, max_size=4))

    def actions(label: str) -> list[Action]:
        possible = [COMPUTE, REUSE]
        if label in INNER:
            possible += [SKIP, MIX] + ([ROWS] if label.startswith("mlp") else [])
        if label.startswith("range"):
            possible += [SKIP]
        return draw(st.lists(st.sampled_from(possible), min_size=steps, max_size=steps))

    return {label: actions(label) for label in sorted(labels)}


UNSHRUNK = (Phase.explicit, Phase.generate)
"""Shrinking takes minutes at this price per example."""
ALONE = st.sets(st.integers(0, 4))
FAMILY = st.sampled_from(["dit", "mmdit", "mmdit-dual"])


@given(scripts(), FAMILY, st.booleans(), st.booleans(), ALONE)
@settings(max_examples=10, phases=UNSHRUNK, deadline=None)
def test_random_plans(script: dict[str, list[Action]], name: str, batched: bool, one: bool, alone: set[int]) -> None:
    check_plans(script, name, batched, one, alone)


@pytest.mark.slow
@given(scripts(), FAMILY, st.booleans(), st.booleans(), ALONE)
@settings(max_examples=150, phases=UNSHRUNK, deadline=None)
def test_many_random_plans(
    script: dict[str, list[Action]], name: str, batched: bool, one: bool, alone: set[int]
) -> None:
    check_plans(script, name, batched, one, alone)


def check_plans(script: dict[str, list[Action]], name: str, batched: bool, one: bool, alone: set[int]) -> None:
    """Static plans at every level together, by one method or several, with a guidance interval."""
    model, steps = MODELS[name], len(next(iter(script.values())))
    drive = lambda run: follow(run, asked=lambda s: ("cond",) if s in alone else None)  # noqa: E731
    calls: Counter[int] = Counter()
    hooks = count_calls(model, calls)
    run = check(model, handlers_of(script, one), drive, steps=steps, batched=batched)
    for hook in hooks:
        hook.remove()
    visits: Counter[str] = Counter()
    for (label, _), times in run.report.counts.items():
        visits[label] += times
    for label in {*script} & {*INNER}:
        assert visits[label] == calls[int(label[-2])], "computed + reused = visits"
    asked = sum(1 if s in alone else 2 for s in range(steps))
    assert visits["output"] == (asked if "output" in script else 0)
    plain = start(model, steps=steps, batched=batched)
    drive(plain)
    assert run.report.full_macs == plain.report.macs


def handlers_of(script: dict[str, list[Action]], one: bool) -> list[Handler]:
    if one:
        return [Planned(script, Line())]
    outside = {label: actions for label, actions in script.items() if label in ("output", "branch(uncond)")}
    inside = [Planned({label: script[label]}, Line(), key=label) for label in script if label not in outside]
    return [*inside, *([Planned(outside, Line(), key="outside")] if outside else [])]


def count_calls(model: Backbone, calls: Counter[int]) -> list[Any]:
    def note(index: int) -> Callable[..., None]:
        def hook(_: Any, inputs: tuple[Any, ...]) -> None:
            calls[index] += len(inputs[0]["image"]) // 2

        return hook

    return [block.register_forward_pre_hook(note(i)) for i, block in enumerate(model.blocks)]


@pytest.mark.parametrize("name", ["u-vit", "u-vit-text", "u-toy"])
def test_static_plans_on_other_families(name: str) -> None:
    script = {"range(1,4)": [COMPUTE, REUSE, COMPUTE, SKIP, REUSE, COMPUTE], "attn(0)": [COMPUTE, REUSE] * 3}
    run = check(MODELS[name], [Planned(script), SomeRows(3)])
    assert run.report.share_saved > 0.2


def test_a_learned_schedule_counts_what_it_decided() -> None:
    run = check(MODELS["mmdit"], [FirstBlockCache(0.35)])
    assert run.report.count("range", REUSE) > 0 < run.report.share_saved


@dataclass
class ByModulation(FirstBlockCache):
    """Looks at the modulated input of the first block."""

    def probes(self, site: Site) -> Sequence[Probe]:
        return (Probe("modulated_in"), Probe("time_embedding"))

    def decide(self, site: Site, probes: Any, clock: Clock, ready: bool, memo: Any) -> Action:
        return REUSE if clock.step % 2 else COMPUTE


@pytest.mark.parametrize("name", ["dit", "u-toy", "u-vit"])
def test_probes_are_paid_for(name: str) -> None:
    plain = check(MODELS[name], [])
    run = check(MODELS[name], [ByModulation(0.0, last=1 if name == "u-vit" else 0)])
    block: Any = MODELS[name].blocks[0]
    layout = run.surface_of(run.program.surface.layout)  # type: ignore[union-attr]
    assert run.report.full_macs == plain.report.macs
    assert block.modulated_in_macs(layout.layout) == (0 if name == "u-vit" else 6 * 64 * 64)


@pytest.mark.parametrize("evaluation, purpose", [(1, "sample"), (0, "optimise"), (0, "teacher"), (0, "search")])
def test_further_evaluations_and_other_purposes(evaluation: int, purpose: Any) -> None:
    """They compute everything; what is not sampling is no part of a plain run."""

    def drive(run: Run) -> None:
        with torch.no_grad():
            run.predict(toys.latent(), run.schedule.clock(0))
            for s in (1, 2):
                run.predict(toys.latent(), run.schedule.clock(s, evaluation, purpose))

    run = check(MODELS["mmdit"], [Broadcast(6), GuidanceGate(1)], drive)
    assert run.report.count("attn", REUSE) == 0
    once = start(MODELS["mmdit"])
    once.predict(toys.latent(), once.schedule.clock(0))
    both = start(MODELS["mmdit"], steps=3)
    follow(both)
    assert run.report.full_macs == (both if evaluation else once).report.macs


@pytest.mark.parametrize("name", toys.NAMES)
def test_a_forward_that_stops_early(name: str) -> None:
    run = check(
        MODELS[name],
        [Captures([Tap("block_out", 1)])],
        lambda run: run.until(toys.latent(), run.schedule.clock(0), block=1),
    )
    assert run.program is not None
    assert run.report.full_macs == 4 * run.program.surface.ends["prepare"], "nothing was sampled"


@pytest.mark.parametrize("name", toys.NAMES)
def test_logits_are_paid_for(name: str) -> None:
    check(MODELS[name], [Captures([Tap("logits", 0), Tap("logits", 2)])])


IMAGE = torch.randn(2, toys.CHANNELS, toys.SIZE // 2, toys.SIZE, generator=torch.Generator().manual_seed(7))


@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize("static", [True, False])
@pytest.mark.parametrize("name", ["dit", "mmdit", "mmdit-dual"])
def test_segments_and_their_kept_keys(name: str, static: bool, batched: bool) -> None:
    """A segment is embedded, runs through every block, lengthens attention; kept, it only lengthens attention."""
    run = check(MODELS[name], [Added(IMAGE, static=static)], batched=batched)
    assert run.report.share_saved < 0
    plain = start(MODELS[name], batched=batched)
    follow(plain)
    assert run.report.full_macs == plain.report.macs


def test_kept_keys_and_reuse_together() -> None:
    run = check(MODELS["mmdit"], [Added(IMAGE), Broadcast(3), SomeRows(5)])
    assert run.report.count("attn", REUSE) > 0


@dataclass
class Ruled(Handler):
    """A rule on every step."""

    given: Rule
    key: str = "ruled"

    def rule(self, layout: Layout, clock: Clock, rows: Rows) -> Any:
        return self.given, {"half": torch.full((rows.total, layout.length()), 0.5)}


RULES = {
    "dense": rule(LocalWindow(1)),
    "split": rule(Only(("text",), ("text",))),
    "two terms": Rule((Term((Only(("text",), ("text",)),), "half"), Term((), "half"))),
    "nothing": rule(),
}


@pytest.mark.parametrize("name", RULES)
def test_rules(name: str) -> None:
    """Split attention costs less, two attentions twice as much."""
    run = check(MODELS["mmdit"], [Ruled(RULES[name])])
    assert run.program is not None
    more = run.report.macs - run.report.full_macs - 4 * run.program.surface.entry
    pairs = {"dense": 0, "nothing": 0, "split": -6 * 16, "two terms": 22 * 22 - 6 * 16}[name]
    assert more == 6 * 4 * 4 * pairs * 2 * 64, "steps, rows, blocks, pairs, products of the width"
    check(MODELS["mmdit"], [Ruled(RULES[name]), Broadcast(2), Added(IMAGE)])
    check(MODELS["mmdit-dual"], [Ruled(RULES[name]), Planned({"attn2(0)": [COMPUTE, REUSE] * 3})])


def test_an_isolated_segment_costs_less_than_one_that_sees_all() -> None:
    seen = [check(MODELS["dit"], [Added(IMAGE, static=False), *more]).report.macs for more in ([], [Ruled(HIDDEN)])]
    assert seen[1] < seen[0]


HIDDEN = rule(Isolate(("condition",)))


@dataclass
class Appends(Handler):
    """Appends keys and values in two blocks."""

    count: int
    key: str = "appends"

    def taps(self, schedule: Any, surface: Any) -> Any:
        return [[Tap("attend", b, "append") for b in (0, 2)]] * schedule.steps

    def provide(self, tap: Tap, clock: Clock, rows: Rows) -> tuple[Tensor, Tensor]:
        g = torch.Generator().manual_seed(tap.block or 0)
        keys, values = (torch.randn(rows.total, self.count, 4, 16, generator=g) for _ in range(2))
        return keys, values


@pytest.mark.parametrize("name", toys.NAMES)
def test_appended_keys(name: str) -> None:
    check(MODELS[name], [Appends(3)])


def test_appended_keys_beside_kept_ones() -> None:
    check(MODELS["mmdit"], [Appends(3), Added(IMAGE)])


def test_the_map_of_steps_and_blocks() -> None:
    """Share of each block's MACs that was not executed."""
    model = MODELS["dit"]
    run = check(model, [Planned({"range(1,3)": [COMPUTE, REUSE, SKIP], "mlp(0)": [COMPUTE, REUSE, ROWS]})], steps=3)
    costs = model.blocks[0].macs(run.program.surface.layout)  # type: ignore[union-attr]
    share = costs["mlp"] / sum(costs.values())
    expected = {(1, 1): 1.0, (1, 2): 1.0, (2, 1): 1.0, (2, 2): 1.0, (1, 0): share, (2, 0): share * 12 / 16}
    assert run.report.cells == pytest.approx(expected)
    skipped = check(model, [SkipBlock(4)], steps=1).report
    assert skipped.cells == {(0, 4): 1.0} and skipped.counts == {("range(4,5)", "skip"): 2}


def test_plain_values_for_a_file() -> None:
    import json

    _, run = by_run(MODELS["dit"], [Broadcast(2)])
    run.report.note("once")
    run.report.note("once")
    values = json.loads(json.dumps(run.report.to_dict()))
    assert values["counts"]["attn(0) reuse"] == 6 and values["notes"] == ["once"]
    assert values["share_saved"] == pytest.approx(1 - values["macs"] / values["full_macs"])
