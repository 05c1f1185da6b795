"""The same questions to every adapter: nothing changes while off, every site is real, caches equal a loop by hand."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import ditloom
from ditloom.adapters.call import Call
from ditloom.adapters.finding import adapter_of
from ditloom.adapters.view import View
from ditloom.contracts.clock import Clock, Rows
from ditloom.contracts.errors import UserError
from ditloom.contracts.method import Tap
from ditloom.contracts.plan import Action
from ditloom.sites.surface import KINDS, Surface
from tests.adapters.driving import BRANCHES, SAMPLES, HandMade, attached, latents, middle, plain
from tests.adapters.tiny import CASES, Case
from tests.sites.walkthroughs import (
    Broadcast,
    Captures,
    FirstBlockCache,
    GuidanceGate,
    HoldOutput,
    SkipBlock,
    SomeRows,
)

pytest.importorskip("diffusers")


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]


def call_of(case: Case, branches: tuple[str, ...] = BRANCHES) -> Call:
    adapter = adapter_of(case.module)
    values = case.arguments(latents(case)[0], case.times[0])
    return Call(values, Rows(branches, SAMPLES), frozenset(adapter.static))


def surface_of(case: Case) -> Surface:
    view, call = View(adapter_of(case.module), case.module), call_of(case)
    with torch.no_grad():
        streams, _ = view.adapter.embed(view.live, call)
    return Surface(view, streams.layout, BRANCHES)


def equal(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def close(a: list[Tensor], b: list[Tensor], tolerance: float = 1e-5) -> bool:
    return all(torch.allclose(x, y, atol=tolerance, rtol=tolerance) for x, y in zip(a, b, strict=True))


def self_contained(case: Case) -> tuple[int, int]:
    """First and last blocks that always run, so that the range between is allowed."""
    return (1, 1) if case.skips else (1, 0)


def test_off_is_bit_identical(case: Case) -> None:
    expected = plain(case)
    assert equal(attached(case)[0], expected)
    assert equal(attached(case, Broadcast(1))[0], expected)
    first, last = self_contained(case)
    assert equal(attached(case, FirstBlockCache(0.0, first, last))[0], expected)
    assert equal(attached(case, *(Broadcast(1, kind=k, key=k) for k in case.kinds))[0], expected)


def test_attach_and_detach_leave_the_module_as_it_was(case: Case) -> None:
    module = case.module
    before = {name: set(vars(m)) for name, m in module.named_modules()}
    identity = {name: (id(m), type(m)) for name, m in module.named_modules()}
    state = {k: v.clone() for k, v in module.state_dict().items()}
    first, last = self_contained(case)
    attached(case, FirstBlockCache(0.2, first, last))
    assert {name: set(vars(m)) for name, m in module.named_modules()} == before
    assert {name: (id(m), type(m)) for name, m in module.named_modules()} == identity
    assert all(torch.equal(v, state[k]) for k, v in module.state_dict().items())
    assert list(module.state_dict()) == list(state)


def test_nothing_is_left_after_an_exception(case: Case) -> None:
    module, before = case.module, set(vars(case.module))
    expected = plain(case)
    x, t = latents(case)[0], case.times[0]

    class Stop(Exception):
        pass

    class Stops(Captures):
        def captured(self, tap: Tap, value: Any, clock: Clock, rows: Rows) -> None:
            raise Stop

    with pytest.raises(Stop), ditloom.using(module, Stops([Tap("block_out", 1)]), timesteps=case.times):
        module(**case.arguments(x, t, (0,)))
    assert set(vars(module)) == before
    assert equal(plain(case), expected)


def test_its_sites_are_those_it_declares(case: Case) -> None:
    surface = surface_of(case)
    found = {KINDS.get(s, s) for i in range(surface.blocks) for s in surface.block(i).sites}
    assert found == set(case.kinds)


def test_blocks_inside_equal_blocks_called_whole(case: Case) -> None:
    taps = [Tap("block_out", i) for i in range(surface_of(case).blocks)]
    whole = Captures(taps)
    attached(case, whole)
    forced = Captures([*taps, *all_sites(case)], key="forced")
    attached(case, forced)
    for tap in taps:
        assert equal(whole.seen[tap], forced.seen[tap])


def all_sites(case: Case) -> list[Tap]:
    """A capture of every stream of every site of every block."""
    surface, taps = surface_of(case), []
    for i in range(surface.blocks):
        for site in surface.block(i).sites:
            taps.append(Tap(site, i, stream="text" if site.endswith("_text") else "image"))
    return taps


def one_of_each(case: Case, taps: list[Tap]) -> list[Tap]:
    """Every site of every kind of block once."""
    surface = surface_of(case)
    found = {(type(surface.block(t.block)), surface.block(t.block).sites, t.stage): t for t in reversed(taps)}
    return list(found.values())


@dataclass
class Replaces(Captures):
    """Puts back, at every stage, what was captured there before, times a factor."""

    factor: float = 1.0
    key: str = "replaces"

    def taps(self, schedule: Any, surface: Any) -> Any:
        return [[Tap(t.stage, t.block, "replace", t.stream) for t in self.wanted]] * schedule.steps

    def provide(self, tap: Tap, clock: Clock, rows: Rows) -> Tensor:
        captured = Tap(tap.stage, tap.block, stream=tap.stream)
        return self.factor * self.seen[captured][clock.step]


def test_every_site_is_captured_and_replaced(case: Case) -> None:
    expected = plain(case)
    captures = Captures(all_sites(case))
    assert equal(attached(case, captures)[0], expected)
    assert all(len(values) == len(case.times) for values in captures.seen.values())
    assert equal(attached(case, Replaces(captures.wanted, captures.seen))[0], expected)
    for tap in one_of_each(case, captures.wanted):
        out = attached(case, Replaces([tap], captures.seen, factor=0.0))[0]
        assert not equal(out, expected), f"{tap.stage} of block {tap.block} has no effect"


def test_counts_of_every_site_equal_the_plan(case: Case) -> None:
    steps = len(case.times)
    for kind in case.kinds:
        _, run = attached(case, Broadcast(3, kind=kind))
        reused = sum(s % 3 != 0 for s in range(steps))
        sites = surface_of(case).sites(kind)
        assert sites
        for site in sites:
            assert run.report.counts[site.label, "reuse"] == 2 * reused
            assert run.report.counts[site.label, "compute"] == 2 * (steps - reused)


def test_first_block_cache_equals_a_loop_over_the_blocks(case: Case) -> None:
    first, last = self_contained(case)
    probe = HandMade(case, 0.0, first, last)
    probe.outputs()
    threshold = middle(probe.measured)
    hand = HandMade(case, threshold, first, last)
    expected = hand.outputs()
    handler = FirstBlockCache(threshold, first, last)
    out, run = attached(case, handler)
    assert not all(hand.computed) and hand.computed.count(True) > 1
    assert run.report.count("range", Action.COMPUTE) == 2 * hand.computed.count(True)
    assert run.report.count("range", Action.REUSE) == 2 * hand.computed.count(False)
    assert close(out, expected, 1e-6)


@pytest.mark.parametrize(
    "methods",
    [
        lambda f, b, t: [FirstBlockCache(t, f, b)],
        lambda f, b, t: [Broadcast(2)],
        lambda f, b, t: [HoldOutput((2, 3))],
        lambda f, b, t: [GuidanceGate(3)],
        lambda f, b, t: [GuidanceGate(4), Broadcast(3)],
        lambda f, b, t: [SkipBlock(2)],
    ],
    ids=["first-block", "broadcast", "hold-output", "gate", "gate+broadcast", "skip-block"],
)
def test_branches_together_equal_branches_apart(case: Case, methods: Any) -> None:
    first, last = self_contained(case)
    if case.skips and methods(1, 1, 0.1)[0].key == "skip-block":
        pytest.skip("one block of a long skip cannot be left out")
    probe = HandMade(case, 0.0, first, last)
    probe.outputs()
    threshold = middle(probe.measured)
    together, one = attached(case, *methods(first, last, threshold))
    apart, two = attached(case, *methods(first, last, threshold), apart=True)
    assert not equal(together, plain(case))
    assert close(together, apart, 1e-4)
    assert one.report.counts == two.report.counts


def test_two_runs_in_a_row_are_alike(case: Case) -> None:
    first, last = self_contained(case)
    outputs = []
    with (
        torch.no_grad(),
        ditloom.using(case.module, FirstBlockCache(0.3, first, last), timesteps=case.times, branches=BRANCHES) as run,
    ):
        reports = []
        for _ in range(2):
            for x, t in zip(latents(case), case.times, strict=True):
                outputs.append(case.module(**case.arguments(x, t)).sample)
            reports.append(run.report)
    half = len(case.times)
    assert equal(outputs[:half], outputs[half:])
    assert reports[0] is not reports[1]
    assert reports[0].counts == reports[1].counts


def test_macs_equal_an_independent_counter(case: Case) -> None:
    view, call = View(adapter_of(case.module), case.module), call_of(case)
    with torch.no_grad():
        streams, _ = view.adapter.embed(view.live, call)
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            case.module(**call.values)
    counted = counter.get_total_flops() / 2 / (2 * SAMPLES)
    assert view.macs(streams.layout) == pytest.approx(counted, rel=1e-9)


def test_some_rows_are_computed_alone(case: Case) -> None:
    sites = [s for s in surface_of(case).sites("mlp") if s.rows]
    if not sites:
        pytest.skip("its feed-forward does not work token by token")
    tokens = surface_of(case).layout.length("image")
    assert close(attached(case, SomeRows(tokens))[0], plain(case))
    out, run = attached(case, SomeRows(3))
    assert not close(out, plain(case))
    assert run.report.count("mlp", Action.ROWS) == 2 * len(sites) * sum(s % 2 for s in range(len(case.times)))


def test_the_probe_is_what_the_block_reads(case: Case) -> None:
    view, call = View(adapter_of(case.module), case.module), call_of(case)
    captures = Captures([Tap("modulated_in", 0)])
    attached(case, captures)
    with torch.no_grad():
        streams, context = view.adapter.embed(view.live, call)
        probe = view.blocks[0].modulated_in(streams, context)
    assert torch.equal(probe, next(iter(captures.seen.values()))[0])


def test_a_range_it_cannot_reuse_is_refused(case: Case) -> None:
    if not case.skips:
        pytest.skip("no long skips")
    with pytest.raises(UserError, match="long skip"):
        attached(case, FirstBlockCache(0.1))


def test_another_module_of_the_same_class_is_not_touched(case: Case) -> None:
    other = copy.deepcopy(case.module)
    x, t = latents(case)[0], case.times[0]
    with torch.no_grad(), ditloom.using(case.module, HoldOutput((0,)), timesteps=case.times, branches=BRANCHES):
        assert torch.equal(other(**case.arguments(x, t)).sample, plain(case)[0])
