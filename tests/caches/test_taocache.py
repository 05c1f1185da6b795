"""TaoCache: exact on geometric convergence, its limits, its mask and budget, what is left out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from ditloom.caches.predictors import Taylor
from ditloom.caches.taocache import Outputs, ScalarDelta, TaoCache
from ditloom.caches.trace import Recorder, Trace
from ditloom.contracts.errors import UserError
from ditloom.contracts.method import Assets
from ditloom.contracts.plan import Action
from tests.caches.deciding import bound, drawn, waits
from tests.caches.test_guards import schedule
from tests.sites import toys
from tests.sites.driving import STEPS, by_run, follow, same, start

Q = 0.8


def geometric(steps: int) -> list[Tensor]:
    """e_s = e* + q^s v."""
    torch.manual_seed(0)
    limit, v = torch.randn(2, 4, 8, 8, dtype=torch.float64), torch.randn(2, 4, 8, 8, dtype=torch.float64)
    return [limit + Q**s * v for s in range(steps)]


@pytest.mark.parametrize("before, last", [(3, 4), (2, 5), (0, 6)])
@pytest.mark.parametrize("ahead", [1, 2, 7])
def test_geometric_convergence_is_predicted_exactly(before: int, last: int, ahead: int) -> None:
    """With c = 1 and rho = q, any number of steps ahead, and also where the last two real steps lie apart."""
    outputs = geometric(20)
    predict = ScalarDelta((Q,) * 20)
    found = predict([(before, outputs[before]), (last, outputs[last])], last + ahead)
    torch.testing.assert_close(found, outputs[last + ahead], atol=1e-6, rtol=1e-6)


def test_its_limits() -> None:
    """alpha = 0 holds; alpha = 1 is Taylor's first order."""
    outputs = geometric(6)
    history = [(2, outputs[2]), (3, outputs[3])]
    assert same(ScalarDelta((0.0,) * 6)(history, 5), outputs[3])
    torch.testing.assert_close(ScalarDelta((1.0,) * 6)(history, 5), Taylor(1)(history, 5))


def test_a_learned_variance_is_held() -> None:
    outputs = geometric(6)
    found = ScalarDelta((Q,) * 6, channels=3)([(2, outputs[2]), (3, outputs[3])], 4)
    assert same(found[:, 3:], outputs[3][:, 3:])
    torch.testing.assert_close(found[:, :3], outputs[4][:, :3], atol=1e-6, rtol=1e-6)


def table(steps: int = STEPS, c: float = 0.9, rho: float = 0.8, size: float = 0.1) -> Assets:
    made = {"cosine": c, "ratio": rho, "size": size}
    return Assets({name: torch.full((steps,), value) for name, value in made.items()}, {"steps": steps})


def skipped(settings: TaoCache, steps: int, assets: Assets | None = None) -> list[int]:
    tensors = {name: t.tolist() for name, t in (assets or table(steps)).tensors.items()}
    return [s for s, skip in enumerate(Outputs(settings, tensors, 0).skipped(schedule(steps))) if skip]


def test_masks() -> None:
    """Late steps only, two real ones before each run of skipped ones."""
    assert skipped(TaoCache(), 12) == [6, 7, 10, 11]
    assert skipped(TaoCache(computed=3, max_consecutive=1), 12) == [6, 10]
    assert skipped(TaoCache(start=0.0), 8) == [2, 3, 6, 7]
    assert skipped(TaoCache(start=0.0, tail=1), 8) == [2, 3, 6]
    assert skipped(TaoCache(max_total=1), 12) == [6]
    assert skipped(TaoCache(), 1) == skipped(TaoCache(), 2) == []


def test_the_budget() -> None:
    """Each step costs 0.1 sqrt(1 - 0.81) = 0.0436: a budget of 0.1 pays for two."""
    assert skipped(TaoCache(budget=0.1), 12) == [6, 7, 10, 11]
    assert skipped(TaoCache(budget=0.05), 12) == [6, 9]
    assert skipped(TaoCache(budget=0.01), 12) == []
    assert skipped(TaoCache(budget=1.0), 12) == [*range(6, 12)]


@pytest.mark.parametrize("name", ["dit", "mmdit", "u-vit"])
def test_against_a_loop_by_hand(name: str) -> None:
    model = toys.make(name)
    run = start(model, [bound(TaoCache(start=0.0), model, table())])
    alpha = 0.9 * 0.8
    plain, x, seen = start(model), toys.latent(), []
    with torch.no_grad():
        for s in range(STEPS):
            if s in (2, 3):
                delta = {b: alpha * (seen[-1][b] - seen[-2][b]) for b in seen[-1]}
                out = {b: seen[-1][b] + delta[b] for b in delta}
            else:
                out = plain.predict(x, plain.schedule.clock(s))
            seen.append(out)
            x = x - 0.2 * sum(out.values())
    got, _ = follow(run)
    torch.testing.assert_close(got, x, atol=1e-5, rtol=1e-5)


def test_calls_and_bytes() -> None:
    model = toys.make("dit")
    _, run = drawn(TaoCache(start=0.0), model, assets=table())
    assert run.report.forwards == 2 * (STEPS - 2)
    assert run.report.count("output", Action.REUSE) == 2 * 2
    assert run.report.bytes_held == 2 * 2 * toys.latent().nbytes, "two outputs of each branch"
    assert waits(TaoCache(start=0.0, alpha=1), model) == 0


def test_an_empty_mask_is_off() -> None:
    model = toys.make("dit")
    x, run = drawn(TaoCache(start=0.0, warmup=6), model, assets=table())
    assert same(x, by_run(model)[0]) and run.report.bytes_held == 0


def test_what_is_calibrated() -> None:
    """On outputs that converge geometrically c = 1 and rho = q."""
    recorder, outputs = Recorder(), geometric(6)
    recorder._steps = 6
    for s, out in enumerate(outputs):
        recorder.observe(schedule(6).clock(s), {"cond": out, "uncond": 2 * out}, {})
    found = TaoCache.from_trace(recorder.trace())
    assert found["cosine"][2:].tolist() == pytest.approx([1.0] * 4, abs=1e-5)
    assert found["ratio"][2:].tolist() == pytest.approx([Q] * 4, abs=1e-4)
    assert found["cosine"][:2].tolist() == [0.0, 0.0]


def test_the_calibrated_factor_leaves_less_than_holding_and_extrapolating() -> None:
    """In sample, for one step: least squares."""
    torch.manual_seed(1)
    outputs = [torch.randn(1, 4, 8, 8).cumsum(0) for _ in range(3)]
    before, delta = outputs[1] - outputs[0], outputs[2] - outputs[1]
    c = float(torch.nn.functional.cosine_similarity(delta.flatten(), before.flatten(), dim=0))
    rho = float(delta.norm() / before.norm())
    errors = [
        float((ScalarDelta((a,) * 3)([(0, outputs[0]), (1, outputs[1])], 2) - outputs[2]).norm())
        for a in (c * rho, 0.0, 1.0, rho)
    ]
    assert errors[0] <= min(errors[1:])


def test_tables_of_other_steps_and_none() -> None:
    model = toys.make("dit")
    with pytest.raises(UserError, match="taocache has a table of 20 steps and this run has 6: calibrate for 6 steps"):
        drawn(TaoCache(), model, assets=table(20))
    with pytest.raises(UserError, match="taocache needs a calibration of this model"):
        drawn(TaoCache(), model)
    drawn(TaoCache(alpha=0.5), model)
    assert not TaoCache.from_trace(_short_trace())


def _short_trace() -> Trace:
    nothing: Any = torch.full((1, 2), torch.nan)
    return Trace({}, nothing, nothing, nothing, nothing, nothing, {})


def test_refusals() -> None:
    with pytest.raises(UserError, match="computed is a whole number of at least 2"):
        TaoCache(computed=1)
    with pytest.raises(UserError, match="unknown alpha 'lsq': did you mean 'ls'"):
        TaoCache(alpha="lsq")
    with pytest.raises(UserError, match="the error budget is at least 0"):
        TaoCache(budget=-1)


@pytest.mark.slow
def test_early_skips_change_the_structure_and_late_ones_do_not() -> None:
    """As many steps left out early and late, on the fashion model: the low frequencies of the result."""
    from ditloom.loading import load

    model = load("fashion")

    def drawn_with(*using: TaoCache) -> Tensor:
        latents = model.generate([0, 3, 5, 8], steps=20, sampler="euler", using=list(using)).latents
        return torch.nn.functional.avg_pool2d(latents, 4)

    plain = drawn_with()
    early = drawn_with(TaoCache(alpha=1, start=0.1, end=0.5)) - plain
    late = drawn_with(TaoCache(alpha=1, start=0.6)) - plain
    assert late.norm() < 0.5 * early.norm()
