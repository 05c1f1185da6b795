"""Sites of the whole run: guidance branches, outputs, velocities, the latent."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from ditloom.contracts.clock import Clock, Schedule
from ditloom.contracts.errors import UserError
from ditloom.contracts.method import Control, Handler, Steps
from ditloom.contracts.plan import Action
from ditloom.contracts.sampler import Sampler
from ditloom.contracts.site import OUTPUT
from ditloom.processes.linear import Linear
from ditloom.samplers.dpmpp_2m import DPMpp2M
from ditloom.samplers.drawing import Drawing
from ditloom.samplers.euler import Euler
from ditloom.samplers.guidance.cfg import CFG
from ditloom.samplers.heun import Heun
from ditloom.sites.codecs import DELTA, HOLD
from ditloom.sites.surface import Surface
from tests.sites import toys
from tests.sites.driving import by_run, follow, moved, same, start
from tests.sites.scripted import Planned
from tests.sites.walkthroughs import Broadcast, GuidanceGate, HoldOutput

COMPUTE, REUSE = Action.COMPUTE, Action.REUSE
MODEL = toys.make("mmdit")


def by_hand(rule: Any) -> Tensor:
    """The trajectory with `rule(s, x, evaluate)` giving each step's predictions."""
    run, x = start(MODEL), toys.latent()
    with torch.no_grad():
        for s in range(6):
            evaluate = lambda names=("cond", "uncond"), s=s, x=x: run.predict(x, run.schedule.clock(s), names)  # noqa: E731
            x = moved(x, rule(s, x, evaluate))
    return x


@pytest.mark.parametrize("batched", [True, False])
def test_the_guidance_gate(batched: bool) -> None:
    """After the gate the unconditional prediction is the conditional one plus the last gap that was seen."""
    known: dict[str, Tensor] = {}

    def rule(s: int, x: Tensor, evaluate: Any) -> dict[str, Tensor]:
        if s < 3:
            out = evaluate()
            known["gap"] = out["uncond"] - out["cond"]
            return out
        cond = evaluate(("cond",))["cond"]
        return {"cond": cond, "uncond": cond + known["gap"]}

    got, run = by_run(MODEL, [GuidanceGate(3)], batched=batched)
    torch.testing.assert_close(got, by_hand(rule), atol=1e-5, rtol=1e-5)
    assert run.report.forwards == 2 * 3 + 3
    counts = {action: run.report.counts["branch(uncond)", action] for action in ("compute", "reuse")}
    assert counts == {"compute": 3, "reuse": 3}


def test_the_gate_takes_no_part_where_only_one_branch_is_asked() -> None:
    run = start(MODEL, [GuidanceGate(2)])
    _, seen = follow(run, asked=lambda s: ("cond",) if s < 4 else None)
    assert [set(out) for out in seen] == [{"cond"}] * 4 + [{"cond", "uncond"}] * 2
    assert run.report.counts["branch(uncond)", "compute"] == 1, "nothing was stored before"
    assert run.report.counts["branch(uncond)", "reuse"] == 1
    alone = start(MODEL, [GuidanceGate(1)])
    follow(alone, asked=lambda s: None if s == 0 else ("uncond",))
    assert alone.report.count("branch", REUSE) == 0, "there is no branch to add the gap to"


def test_held_outputs() -> None:
    known: dict[str, Any] = {}

    def rule(s: int, x: Tensor, evaluate: Any) -> dict[str, Tensor]:
        if s not in (2, 3, 5):
            known["out"] = evaluate()
        return known["out"]

    got, run = by_run(MODEL, [HoldOutput((2, 3, 5))])
    assert same(got, by_hand(rule))
    assert run.report.forwards == 6 and run.report.cells == {(2, -1): 1.0, (3, -1): 1.0, (5, -1): 1.0}
    plain = start(MODEL)
    follow(plain)
    assert run.report.full_macs == plain.report.macs
    assert run.report.share_saved == pytest.approx(0.5, abs=0.01)


def test_the_input_of_an_output_is_the_latent() -> None:
    """A change stored over the whole network is its output minus x (EasyCache)."""
    known: dict[str, Tensor] = {}

    def rule(s: int, x: Tensor, evaluate: Any) -> dict[str, Tensor]:
        if s not in (1, 2, 4):
            out = evaluate()
            known.update({b: out[b] - x for b in out})
        return {b: x + z for b, z in known.items()}

    got, _ = by_run(MODEL, [Planned({"output": [COMPUTE, REUSE, REUSE, COMPUTE, REUSE, COMPUTE]}, codec=DELTA)])
    torch.testing.assert_close(got, by_hand(rule), atol=1e-5, rtol=1e-5)


@dataclass
class Steers(Handler):
    """Replaces the branches by their weighted sum on some steps."""

    weight: float
    steps: Sequence[int]
    key: str = "steers"

    def velocity(self, predictions: dict[str, Tensor], clock: Clock) -> dict[str, Tensor]:
        if clock.step not in self.steps:
            return predictions
        mixed = self.weight * predictions["cond"] + (1 - self.weight) * predictions["uncond"]
        return {"cond": mixed, "uncond": mixed}


def test_velocities_are_changed_before_guidance_in_canonical_order() -> None:
    def rule(s: int, x: Tensor, evaluate: Any) -> dict[str, Tensor]:
        out = evaluate()
        if s in (1, 4):
            mixed = 0.3 * out["cond"] + 0.7 * out["uncond"]
            out = {"cond": mixed, "uncond": mixed}
        return {b: v + 1 for b, v in out.items()} if s > 2 else out

    @dataclass
    class Shifts(Handler):
        key: str = "then-shifts"

        def velocity(self, predictions: dict[str, Tensor], clock: Clock) -> dict[str, Tensor]:
            return {b: v + 1 for b, v in predictions.items()} if clock.step > 2 else predictions

    expected = by_hand(rule)
    for handlers in ([Steers(0.3, (1, 4)), Shifts()], [Shifts(), Steers(0.3, (1, 4))]):
        assert same(by_run(MODEL, handlers)[0], expected)


def test_steered_velocities_are_not_what_is_stored() -> None:
    """A held output is the network's own."""
    got, _ = by_run(MODEL, [HoldOutput((2,)), Steers(0.3, (1,))])

    def rule(s: int, x: Tensor, evaluate: Any) -> dict[str, Tensor]:
        if s == 2:
            return known["out"]
        known["out"] = out = evaluate()
        if s == 1:
            mixed = 0.3 * out["cond"] + 0.7 * out["uncond"]
            return {"cond": mixed, "uncond": mixed}
        return out

    known: dict[str, Any] = {}
    assert same(got, by_hand(rule))


@dataclass
class Decides(Handler):
    """Holds outputs by what it observed: while they change little."""

    threshold: float
    key: str = "decides"

    def controls(self, surface: Surface) -> Sequence[Control]:
        return [Control(OUTPUT, Planned({}).codec, HOLD)]

    def plan(self, schedule: Schedule, surface: Surface) -> Steps:
        return [{OUTPUT: Action.DEFER}] * schedule.steps

    def observe(self, clock: Clock, outputs: Mapping[str, Tensor], memo: dict[str, Any]) -> None:
        before = memo.get("output", outputs["cond"])
        memo["change"] = float((outputs["cond"] - before).abs().mean() / before.abs().mean())
        memo["output"] = outputs["cond"]
        memo["computed"] = [*memo.get("computed", []), clock.step]

    def decide(self, site: Any, probes: Any, clock: Clock, ready: bool, memo: dict[str, Any]) -> Action:
        recent = memo.get("computed", [])[-2:] == [clock.step - 2, clock.step - 1]
        return REUSE if recent and memo["change"] < self.threshold else COMPUTE


@pytest.mark.parametrize("batched", [True, False])
def test_a_whole_output_by_decision(batched: bool) -> None:
    """After two steps in a row that were alike, one is held."""
    _, run = by_run(MODEL, [Decides(9.0)], batched=batched)
    assert sorted(s for s, _ in run.report.cells) == [2, 5]
    _, run = by_run(MODEL, [Decides(0.0)], batched=batched)
    assert not run.report.cells


def test_probes_of_a_forward_cannot_be_seen_before_it() -> None:
    from ditloom.contracts.method import Probe

    class Looks(Decides):
        def probes(self, site: Any) -> Sequence[Probe]:
            return (Probe("block_in", 0),)

    with pytest.raises(ValueError, match="which is not known there"):
        by_run(MODEL, [Looks(1.0)])


def test_an_unknown_branch_is_named() -> None:
    streams, _ = MODEL.embed(toys.latent(), torch.zeros(2), MODEL.prepare(toys.condition(MODEL, 2)))
    surface = Surface(MODEL, streams.layout, ("cond", "uncond"))
    assert surface.branch("uncond").label == "branch(uncond)"
    with pytest.raises(UserError, match="this run has no branch 'weak': it has cond, uncond"):
        surface.branch("weak")


class Nudges(Handler):
    """Changes the latent once, before or after a solver step."""

    def __init__(self, step: int, when: str, by: float = 0.5, key: str = "nudges"):
        self.step, self.when, self.by, self.key = step, when, by, key

    def latent(self, x: Tensor, clock: Clock, when: Any) -> tuple[Tensor, bool]:
        now = clock.step == self.step and when == self.when
        return (x * 1.5 + self.by, True) if now else (x, False)


def drawn(*handlers: Handler, sampler: Sampler | None = None, steps: int = 6) -> tuple[Tensor, Drawing]:
    """The end of a drawing of two images."""
    chosen = sampler or Euler()
    drawing = Drawing(MODEL, Linear(), chosen, CFG(scale=2.0), toys.conditions(MODEL), handlers, indices=(0, 1))
    *_, step = drawing.walk((toys.CHANNELS, toys.SIZE, toys.SIZE), steps)
    return step.x, drawing


def test_latent_taps_of_a_sampler() -> None:
    """After one step is before the next; what was stored for the old latent is forgotten."""
    plain, (before, _), (after, _) = drawn()[0], drawn(Nudges(2, "before")), drawn(Nudges(1, "after"))
    assert same(before, after) and not torch.allclose(before, plain, atol=1e-3)
    _, cleared = drawn(Broadcast(6), Nudges(2, "before"))
    _, kept = drawn(Broadcast(6))
    reused = [d.report.counts["attn(0)", "reuse"] for d in (kept, cleared)]
    assert reused == [2 * 5, 2 * 4]


@pytest.mark.parametrize("when", ["before", "after"])
def test_latent_taps_act_in_canonical_order(when: str) -> None:
    taps = [Nudges(0, when, 0.5, "a"), Nudges(0, when, -2.0, "b")]
    assert same(drawn(*taps)[0], drawn(*taps[::-1])[0])


def test_a_latent_tap_resets_the_history_of_a_solver() -> None:
    """A changed latent is where a multistep solver starts anew: the same as starting there."""
    got, drawing = drawn(Nudges(2, "after"), sampler=DPMpp2M(), steps=20)
    walk = Drawing(MODEL, Linear(), DPMpp2M(), CFG(scale=2.0), toys.conditions(MODEL), indices=(0, 1))
    grid = drawing.sampler.grid(Linear(), 20)
    x = walk.prior((toys.CHANNELS, toys.SIZE, toys.SIZE))
    first = list(walk.steps(x, grid))[2].x
    *_, last = walk.steps(first * 1.5 + 0.5, grid[3:])
    torch.testing.assert_close(got, last.x, atol=1e-4, rtol=1e-4)


def test_a_second_order_solver_stores_at_its_first_evaluation_only() -> None:
    """Heun: eleven evaluations in six steps; reuse happens at the first of each step."""
    _, drawing = drawn(Broadcast(2), sampler=Heun())
    assert drawing.report.counts["attn(0)", "reuse"] == 2 * 3
    assert drawing.report.counts["attn(0)", "compute"] == 2 * (11 - 3)
    exact, _ = drawn(Broadcast(1), sampler=Heun())
    assert same(exact, drawn(sampler=Heun())[0])
