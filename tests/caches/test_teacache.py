"""TeaCache: decisions against a hand-written loop, its sum, its indicators, its polynomial, its remarks."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from ditloom.caches.polynomials import PUBLISHED
from ditloom.caches.teacache import DEGREE, TeaCache, estimate, reused_at, threshold_for
from ditloom.caches.trace import Trace
from ditloom.contracts.errors import UserError
from ditloom.contracts.method import Assets, mean_change
from ditloom.contracts.plan import Action
from ditloom.contracts.streams import Context, Streams
from tests.caches.deciding import LAYOUTS, ByHand, bound, drawn, planning, reused, waits
from tests.sites import toys
from tests.sites.driving import STEPS, by_run, follow, same, start

CUBIC = (2.0, -0.5, 1.0, 0.01)


def by_rule(threshold: float, indicator: str, coefficients: tuple[float, ...] = (1.0, 0.0)) -> Any:
    def alike(s: int, before: Streams, entered: Streams, context: Context, notes: dict[str, Any]) -> bool:
        block = notes["model"].blocks[0]
        now = (block.modulated_in(before, context) if indicator == "modulated_in" else context.time)[:2]
        last, notes["z"] = notes.get("z"), now
        if s in (0, STEPS - 1):
            notes["sum"] = 0.0
            return False
        notes["sum"] += max(float(np.polyval(coefficients, float(mean_change(now, last)))), 0.0)
        if notes["sum"] < threshold:
            return True
        notes["sum"] = 0.0
        return False

    return alike


@pytest.mark.parametrize(
    "indicator, threshold", [("modulated_in", 0.3), ("modulated_in", 0.6), ("time_embedding", 0.2)]
)
@pytest.mark.parametrize("name", [*LAYOUTS, "u-vit"])
def test_decisions(name: str, indicator: str, threshold: float) -> None:
    model = toys.make(name)
    hand = ByHand(model, 0, len(model.blocks), by_rule(threshold, indicator), {"model": model})
    expected = hand()
    x, run = drawn(TeaCache(threshold=threshold, indicator=indicator), model)
    assert reused(run) == hand.reused
    torch.testing.assert_close(x, expected, atol=1e-5, rtol=1e-5)


def test_the_thresholds_of_these_tests_decide_both_ways() -> None:
    found = [reused(drawn(TeaCache(threshold=t), toys.make("dit"))[1]) for t in (0.3, 0.6)]
    assert found[0] != found[1] and any(0 < len(steps) < STEPS - 2 for steps in found)


def test_a_polynomial_in_the_sum() -> None:
    model = toys.make("dit")
    hand = ByHand(model, 0, len(model.blocks), by_rule(0.5, "modulated_in", CUBIC), {"model": model})
    hand()
    _, run = drawn(TeaCache(threshold=0.5, coefficients=CUBIC), model)
    assert reused(run) == hand.reused
    assert estimate((1.0, -3.0), 0.5) == 0.0, "where it is negative it counts as 0"


@pytest.mark.parametrize("name", LAYOUTS)
def test_threshold_zero_is_off(name: str) -> None:
    model = toys.make(name)
    x, run = drawn(TeaCache(threshold=0.0), model)
    assert same(x, by_run(model)[0]) and run.report.macs - planning(run) == run.report.full_macs


def test_a_huge_threshold_computes_the_first_and_the_last_step() -> None:
    model = toys.make("dit")
    _, run = drawn(TeaCache(threshold=1e9), model)
    assert reused(run, range(5)) == list(range(1, STEPS - 1))
    assert run.report.count("range", Action.COMPUTE) == 2 * 2
    assert any("reused whenever it could" in note for note in run.report.notes)


def test_reuse_never_grows_when_the_threshold_falls() -> None:
    """Exactly so for the time embedding, which does not depend on the trajectory."""
    counts = [
        len(reused(drawn(TeaCache(threshold=t, indicator="time_embedding"), toys.make("dit"))[1]))
        for t in (0.01, 0.05, 0.1, 0.2, 0.4, 5.0)
    ]
    assert counts == sorted(counts) and len(set(counts)) > 2


def test_standing_still_is_exact() -> None:
    """Equal inputs: the difference is 0, so that all is reused, and the output is that of computing."""
    model = toys.make("dit")
    run = start(model, [bound(TeaCache(threshold=1e-9), model)])
    _, seen = follow(run, still=True)
    assert reused(run) == list(range(1, STEPS - 1))
    for out in seen[1:]:
        torch.testing.assert_close(out["cond"], seen[0]["cond"], atol=1e-5, rtol=1e-5)


def test_a_reused_step_hears_the_current_time() -> None:
    """Equal x, another time: the head of a reused step sees it."""
    model = toys.make("dit")
    run = start(model, [bound(TeaCache(threshold=1e9), model)])
    x = toys.latent()
    with torch.no_grad():
        first = run.predict(x, run.schedule.clock(0))
        second = run.predict(x, run.schedule.clock(1))
    assert reused(run) == [1] and not same(first["cond"], second["cond"])


def test_one_wait_a_decision() -> None:
    model = toys.make("dit")
    assert waits(TeaCache(threshold=0.3), model) == STEPS - 2, "the first and the last step are not decided on"


def test_batched_and_separate_guidance_agree() -> None:
    model = toys.make("mmdit")
    one, together = drawn(TeaCache(threshold=0.4), model)
    other, apart = drawn(TeaCache(threshold=0.4), model, batched=False)
    assert reused(together) == reused(apart)
    torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


def test_published_polynomials() -> None:
    """Five coefficients each; FLUX's as in ali-vilab/TeaCache, TeaCache4FLUX/teacache_flux.py."""
    assert all(len(p) == DEGREE + 1 for p in PUBLISHED.values())
    assert estimate(PUBLISHED["flux"], 0.0) == pytest.approx(0.264230861)
    _, run = drawn(TeaCache(threshold=0.25, fit="flux"), toys.make("dit"))
    assert not any("no calibration" in note for note in run.report.notes)


def quartic_trace(noise: float = 0.0) -> Trace:
    torch.manual_seed(0)
    x = torch.rand(8, 12, dtype=torch.float64) * 0.5
    y = torch.from_numpy(np.polyval((3.0, -2.0, 1.0, 0.5, 0.1), x.numpy())) + noise * torch.randn(8, 12)
    nothing = torch.full_like(x, torch.nan)
    return Trace({"modulated_in": x}, y, nothing, nothing, nothing, nothing, {})


def test_the_fit() -> None:
    exact = TeaCache.from_trace(quartic_trace())
    assert exact["modulated_in"].tolist() == pytest.approx([3.0, -2.0, 1.0, 0.5, 0.1], abs=1e-6)
    assert float(exact["modulated_in.r2"]) == pytest.approx(1.0)
    assert 0.0 < float(TeaCache.from_trace(quartic_trace(0.3))["modulated_in.r2"]) < 0.9


def test_a_calibration_is_used_and_its_steps_are_checked() -> None:
    assets = Assets({"modulated_in": torch.tensor(CUBIC)}, {"steps": STEPS})
    model = toys.make("dit")
    _, run = drawn(TeaCache(threshold=0.5), model, assets=assets)
    _, given = drawn(TeaCache(threshold=0.5, coefficients=CUBIC), model)
    assert reused(run) == reused(given)
    assert not any("no calibration" in note for note in run.report.notes)
    plain = drawn(TeaCache(threshold=0.5), model)[1].report.notes
    assert any("as there is no calibration for these settings" in note for note in plain)
    other = Assets(assets.tensors, {"steps": 50})
    with pytest.raises(UserError, match="made for steps 50 and this run has 6: calibrate again"):
        drawn(TeaCache(threshold=0.5), model, assets=other)


def test_suggested_thresholds_reuse_what_they_say() -> None:
    changes = [0.2 + 0.15 * np.sin(s) for s in range(19)]
    for share in (0.3, 0.5):
        assert reused_at(changes, threshold_for(changes, share)) / 20 == pytest.approx(share, abs=0.1)


def test_a_model_without_a_modulated_input_is_judged_by_its_time() -> None:
    model = toys.make("dit")
    block: Any = model.blocks[0]
    block.stages = tuple(s for s in block.stages if s != "modulated_in")
    _, run = drawn(TeaCache(threshold=0.2), model)
    _, told = drawn(TeaCache(threshold=0.2, indicator="time_embedding"), model)
    assert reused(run) == reused(told)
    with pytest.raises(UserError, match="teacache needs the site 'modulated_in'"):
        drawn(TeaCache(indicator="modulated_in"), model)


def test_refusals() -> None:
    with pytest.raises(UserError, match="unknown indicator 'modulated-in': did you mean 'modulated_in'"):
        TeaCache(indicator="modulated-in")
    with pytest.raises(UserError, match="unknown fit 'flx': did you mean 'flux'"):
        TeaCache(fit="flx")
