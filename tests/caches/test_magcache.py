"""MagCache: its plan against a loop written out, its table, golden decisions of diffusers."""

from __future__ import annotations

import pytest
import torch

from ditloom.caches.magcache import FLUX, MagCache, nearest, reused_steps
from ditloom.contracts.errors import UserError
from ditloom.contracts.method import Assets
from ditloom.contracts.plan import Action
from tests.caches import acting
from tests.caches.deciding import LAYOUTS, ByHand, drawn, reused, waits
from tests.caches.test_guards import schedule
from tests.sites import toys
from tests.sites.driving import STEPS, by_run, same

RATIOS = (1.0, 1.1, 1.02, 1.01, 0.97, 0.9)


def by_rule(settings: MagCache, ratios: tuple[float, ...], retained: int) -> list[int]:
    """The steps that the rule reuses, written out."""
    product, error, row, found = 1.0, 0.0, 0, []
    for s, ratio in enumerate(ratios):
        if s >= retained:
            product, row = product * ratio, row + 1
            error += abs(1 - product)
            if error < settings.threshold and row <= settings.max_consecutive:
                found.append(s)
                continue
        product, error, row = 1.0, 0.0, 0
    return found


@pytest.mark.parametrize("threshold", [0.03, 0.06, 0.15, 0.5])
@pytest.mark.parametrize("most", [1, 2, 5])
def test_the_plan(threshold: float, most: int) -> None:
    settings = MagCache(threshold=threshold, max_consecutive=most, ratios=RATIOS)
    assert [s for s, r in enumerate(reused_steps(settings, RATIOS, schedule(6))) if r] == by_rule(settings, RATIOS, 1)


@pytest.mark.parametrize(
    "threshold, most, computed",
    [
        (0.06, 3, [0, 1, 2, 3, 4, 5, 7, 9, 13, 17, 21, 24, 26, 27]),
        (0.24, 5, [0, 1, 2, 3, 4, 5, 9, 15, 21, 26]),
        (0.12, 2, [0, 1, 2, 3, 4, 5, 8, 11, 14, 17, 20, 23, 26]),
    ],
)
def test_golden_flux(threshold: float, most: int, computed: list[int]) -> None:
    """Steps that diffusers 0.42.1 (MagCache hook) computed on a tiny FLUX: 28 steps, its table, 20 % retained."""
    settings = MagCache(threshold=threshold, max_consecutive=most, ratios="flux")
    assert [s for s, r in enumerate(reused_steps(settings, FLUX, schedule(28))) if not r] == computed


@pytest.mark.parametrize(
    "steps, computed",
    [
        (28, [0, 1, 2, 5, 9, 11, 17, 23, 26]),
        (50, [0, 1, 2, 3, 4, 6, 9, 13, 17, 20, 26, 32, 38, 44, 47]),
        (20, [0, 1, 4, 8, 14, 19]),
    ],
)
def test_golden_flux_of_the_original(steps: int, computed: list[int]) -> None:
    """The rule of Zehong-Ma/MagCache at 1a66b6d2 with its settings for FLUX, which always compute entry 11 of 28."""
    spec = "magcache:ratios=flux,threshold=0.24,max_consecutive=5,warmup=0.1,interpolate=True,always=(11,)"
    model = toys.make("dit")
    plan = acting.bound(spec, model).plan(schedule(steps), acting.surface_of(model))
    assert [s for s, actions in enumerate(plan) if not actions] == computed


def test_equal_magnitudes_skip_all_they_may() -> None:
    """With gamma = 1 and K = 3: three of every four steps after the retained ones."""
    mask = reused_steps(MagCache(ratios="flux", warmup=0.2, max_consecutive=3), [1.0] * 30, schedule(30))
    assert mask[6:] == [True, True, True, False] * 6


@pytest.mark.parametrize("name", [*LAYOUTS, "u-vit"])
def test_the_run_follows_the_plan(name: str) -> None:
    model = toys.make(name)
    settings = MagCache(threshold=0.15, max_consecutive=2, ratios=RATIOS)
    planned = by_rule(settings, RATIOS, 1)
    hand = ByHand(model, 0, len(model.blocks), lambda s, *_: s in planned)
    expected = hand()
    x, run = drawn(settings, model)
    assert reused(run, range(run.blocks)) == planned != []
    assert run.report.count("range", Action.REUSE) == 2 * len(planned)
    torch.testing.assert_close(x, expected, atol=1e-5, rtol=1e-5)


def test_the_mask_waits_for_nothing_and_is_the_same_for_all() -> None:
    model = toys.make("dit")
    assert waits(MagCache(threshold=0.15, ratios=RATIOS), model) == 0
    one, other = (drawn(MagCache(threshold=0.15, ratios=RATIOS), toys.make("dit", seed))[1] for seed in (0, 1))
    assert reused(one) == reused(other)


def test_threshold_zero_is_off() -> None:
    model = toys.make("dit")
    x, run = drawn(MagCache(threshold=0.0, ratios=(1.0,) * STEPS), model)
    assert same(x, by_run(model)[0]) and not reused(run)


def test_a_table_of_other_steps() -> None:
    model = toys.make("dit")
    with pytest.raises(UserError, match="a table of 28 steps and this run has 6: calibrate for 6 steps, or allow"):
        drawn(MagCache(ratios="flux"), model)
    drawn(MagCache(ratios="flux", interpolate=True), model)
    assert nearest(FLUX, 28) == list(FLUX) and nearest((1.0, 2.0, 3.0), 5) == [1.0, 1.0, 2.0, 3.0, 3.0]
    assert nearest(FLUX, 1) == [1.0]


def test_without_a_calibration() -> None:
    model = toys.make("dit")
    with pytest.raises(UserError, match="magcache needs a calibration of this model: make one with  ditloom calibrate"):
        drawn(MagCache(), model)
    assets = Assets({"ratio": torch.tensor(RATIOS)})
    assert reused(drawn(MagCache(threshold=0.15), model, assets=assets)[1])


def test_refusals() -> None:
    with pytest.raises(UserError, match="ratios are numbers or 'flux'"):
        MagCache(ratios="wan")
