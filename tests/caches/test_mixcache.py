"""MixCache: one grain a step, each alone equal to its own cache, its trigger, its penalties."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from ditloom.caches.mixcache import BLOCK, CFG, GRAINS, STEP, MixCache
from ditloom.contracts.clock import Clock, Schedule
from ditloom.contracts.errors import UserError
from ditloom.contracts.method import Control, Handler, Steps
from ditloom.contracts.plan import Action
from ditloom.contracts.site import branch
from ditloom.sites.codecs import DELTA, HOLD
from ditloom.sites.run import Run
from ditloom.sites.surface import Surface
from tests.caches.deciding import bound, drawn, planning
from tests.sites import toys
from tests.sites.driving import by_run, follow, same, start

ALWAYS: Any = {"kappa": 1e9, "stable": 1}
STEPS = 12


def run_of(model: Any, settings: MixCache | Handler, steps: int = STEPS, **options: Any) -> tuple[Any, Run]:
    handler = settings if isinstance(settings, Handler) else bound(settings, model)
    run = guided(start(model, [handler], steps, **options), 3.0)
    return follow(run)[0], run


def guided(run: Run, scale: float) -> Run:
    """The run with a guidance scale, which only tells methods how much the gap between the branches matters."""
    run.schedule = replace(run.schedule, guidance_scale=scale)
    return run


def used(run: Run) -> dict[str, int]:
    """How often each grain was reused, by branch visits."""
    labels = {STEP: f"range(0,{run.blocks})", BLOCK: f"range(1,{run.blocks})", CFG: "branch(uncond)"}
    return {grain: run.report.counts[labels[grain], "reuse"] for grain in GRAINS}


class Single(Handler):
    """One grain by a plan written out."""

    key = "single"

    def __init__(self, grain: str, steps: tuple[int, ...]):
        self.grain, self.steps = grain, steps

    def site(self, surface: Surface) -> Any:
        ranges = {STEP: (0, surface.blocks), BLOCK: (1, surface.blocks)}
        return branch("uncond") if self.grain == CFG else surface.range(*ranges[self.grain])

    def controls(self, surface: Surface) -> list[Control]:
        return [Control(self.site(surface), DELTA, HOLD)]

    def plan(self, schedule: Schedule, surface: Surface) -> Steps:
        return [{self.site(surface): Action.REUSE} if s in self.steps else {} for s in range(schedule.steps)]


@pytest.mark.parametrize("grain", GRAINS)
@pytest.mark.parametrize("name", ["dit", "mmdit"])
def test_one_grain_alone_is_that_cache(name: str, grain: str) -> None:
    """Three steps of warm-up, then one computed and two cached ones, the last computed."""
    model = toys.make(name)
    x, run = run_of(model, MixCache(grains=grain, **ALWAYS))
    y, _ = run_of(model, Single(grain, (3, 4, 6, 7, 9, 10)))
    assert used(run)[grain] == (6 if grain == CFG else 12)
    assert same(x, y)


@pytest.mark.parametrize("name", ["dit", "mmdit", "u-toy"])
def test_one_grain_a_step_and_the_sum_of_their_gains(name: str) -> None:
    model = toys.make(name)
    _, run = run_of(model, MixCache(**ALWAYS))
    counts, surface = used(run), run.program.surface  # type: ignore[union-attr]
    assert counts[CFG] + (counts[STEP] + counts[BLOCK]) // 2 == 6
    saved = 2 * (counts[STEP] * surface.range(0, run.blocks).cost + counts[BLOCK] * surface.range(1, run.blocks).cost)
    saved += 2 * counts[CFG] * surface.total
    assert run.report.full_macs - run.report.macs == saved - planning(run)


def test_the_penalty_spreads_the_grains() -> None:
    found = [grain for grain, n in used(run_of(toys.make("dit"), MixCache(**ALWAYS))[1]).items() if n]
    assert len(found) > 1


def test_a_trigger_that_never_fires_is_off() -> None:
    model = toys.make("dit")
    plain = follow(start(model, [], STEPS))[0]
    x, run = run_of(model, MixCache(tau=0.0))
    assert same(x, plain) and run.report.bytes_held == 0
    x, run = run_of(model, MixCache(tau=1e-9))
    assert same(x, plain) and "its trigger never fired; from one computed step to the next" in run.report.notes[0]


def test_no_guidance_makes_its_branch_free() -> None:
    """With a scale of 1 the gap does not matter: its impact is 0 and it is chosen whenever it is possible."""
    model = toys.make("dit")
    handler = bound(MixCache(interval=2, **ALWAYS), model)
    run = guided(start(model, [handler], STEPS), 1.0)
    follow(run)
    assert used(run) == {STEP: 0, CFG: 4, BLOCK: 0}


def test_a_scale_may_be_told() -> None:
    """To a run that does not know it."""
    model = toys.make("dit")
    told = guided(start(model, [bound(MixCache(scale=3.0, **ALWAYS), model)], STEPS), 1.0)
    x, known = run_of(model, MixCache(**ALWAYS))
    assert same(follow(told)[0], x) and used(told) == used(known)


def test_one_branch_has_no_gap() -> None:
    model = toys.make("dit")
    _, run = run_of(model, MixCache(**ALWAYS), branches=("cond",))
    counts = used(run)
    assert counts[CFG] == 0 and counts[STEP] + counts[BLOCK] == 6


def test_what_was_reused_is_never_stored() -> None:
    """On a step with a cached block range neither the stack's change nor the gap is new."""
    model = toys.make("dit")
    run = guided(start(model, [bound(MixCache(**ALWAYS), model)], STEPS), 3.0)
    full: set[int] = {0, 1, 2, 5, 8, 11}
    cond: set[int] = set()

    def look(s: int) -> None:
        if run.program is None:
            return
        for place in (("mixcache", f"range(0,{run.blocks})"), ("mixcache", "branch(uncond)")):
            for name in ("cond", "uncond"):
                cond.update(set(run.store.steps(place, name)) - full)

    follow(run, before=look)
    assert not cond


def test_batched_and_separate_guidance_agree() -> None:
    model = toys.make("mmdit")
    x, together = run_of(model, MixCache(**ALWAYS))
    y, apart = run_of(model, MixCache(**ALWAYS), batched=False)
    assert used(together) == used(apart)
    torch.testing.assert_close(x, y, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("steps", [1, 2, 3, 4])
def test_few_steps_are_plain(steps: int) -> None:
    model = toys.make("dit")
    x, _ = run_of(model, MixCache(**ALWAYS), steps)
    assert same(x, follow(start(model, [], steps))[0])


def test_guards() -> None:
    _, run = run_of(toys.make("dit"), MixCache(max_total=2, **ALWAYS))
    counts = used(run)
    assert counts[CFG] + (counts[STEP] + counts[BLOCK]) // 2 == 2


def test_every_impact_too_large_computes() -> None:
    model = toys.make("dit")
    x, run = run_of(model, MixCache(worst=1e-12, grains="step/block", **ALWAYS))
    assert not any(used(run).values()) and same(x, follow(start(model, [], STEPS))[0])


def test_refusals() -> None:
    with pytest.raises(UserError, match="unknown grain 'steps': did you mean 'step'"):
        MixCache(grains="steps/cfg")
    with pytest.raises(
        UserError, match="always computes the first 3 and the last 2 blocks, and this model has 5: nothing"
    ):
        drawn(MixCache(first=3, last=2), toys.make("dit"))
    with pytest.raises(UserError, match="mixcache cannot act here: .* try mixcache:first=1,last=1"):
        drawn(MixCache(), toys.make("u-vit"))
    assert Clock(0, 1).guidance_scale == 1.0
    assert by_run(toys.make("dit"))[1].report.share_saved == 0.0
