"""Forecasts of stored values: exact where their definition says so, and equal to an implementation of others."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ditloom.caches.predictors import Extrapolate, Newton, Taylor, newton_weights, predictor, taylor_weights
from ditloom.contracts.clock import Schedule
from ditloom.contracts.errors import UserError
from ditloom.contracts.method import Predictor
from ditloom.sites.codecs import HOLD

STEPS = st.lists(st.integers(0, 60), min_size=1, max_size=5, unique=True).map(sorted)
ANY = [HOLD, Extrapolate(0.5), Extrapolate(2.0), Taylor(0), Taylor(1), Taylor(4), Newton(1), Newton(3)]


def history(steps: list[int], feature: object) -> list[tuple[int, Tensor]]:
    return [(s, feature(s)) for s in steps]  # type: ignore[operator]


def random(seed: int = 0) -> Tensor:
    return torch.randn(3, 5, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("rule", ANY, ids=str)
@given(steps=STEPS, ahead=st.integers(1, 6))
def test_a_constant_is_predicted_bit_for_bit(rule: Predictor, steps: list[int], ahead: int) -> None:
    constant, kept = random(), steps[-rule.depth :]
    if len(kept) < getattr(rule, "least", rule.depth):
        return
    assert torch.equal(rule(history(kept, lambda s: constant.clone()), steps[-1] + ahead), constant)


@pytest.mark.parametrize("rule", [Taylor(1), Taylor(3), Newton(1), Newton(4)], ids=str)
@given(steps=STEPS, ahead=st.integers(1, 6))
def test_what_is_linear_in_the_step_is_predicted_whatever_the_gaps(
    rule: Predictor, steps: list[int], ahead: int
) -> None:
    kept = steps[-rule.depth :]
    if len(kept) < 2:
        return
    slope, start = random(1).double(), random(2).double()
    got = rule(history(kept, lambda s: start + s * slope), steps[-1] + ahead)
    scale = 1 + sum(map(abs, rule.weights(tuple(kept), steps[-1] + ahead)))  # type: ignore[attr-defined]
    torch.testing.assert_close(got, start + (steps[-1] + ahead) * slope, atol=1e-12 * scale * 60, rtol=1e-12)


@given(steps=STEPS, ahead=st.integers(1, 6))
def test_newton_is_exact_to_its_degree(steps: list[int], ahead: int) -> None:
    degree, to = len(steps) - 1, steps[-1] + ahead
    values = [float((s - 30) / 30) ** degree for s in steps]
    got = sum(w * v for w, v in zip(newton_weights(tuple(steps), to), values, strict=True))
    size = sum(abs(w * v) for w, v in zip(newton_weights(tuple(steps), to), values, strict=True))
    assert got == pytest.approx(((to - 30) / 30) ** degree, abs=1e-9 * (1 + size))


@given(steps=STEPS, ahead=st.integers(1, 6))
def test_weights_add_up_to_one(steps: list[int], ahead: int) -> None:
    for weigh in (taylor_weights, newton_weights):
        weights = weigh(tuple(steps), steps[-1] + ahead)
        assert sum(weights) == pytest.approx(1, abs=1e-9 * sum(map(abs, weights)))


def test_order_one_is_the_chord_through_two_points() -> None:
    assert taylor_weights((2, 5), 7) == pytest.approx((-2 / 3, 5 / 3))
    assert newton_weights((2, 5), 7) == pytest.approx((-2 / 3, 5 / 3))


def test_taylor_divides_by_the_latest_gap_only() -> None:
    """Where gaps differ its second order is not the parabola's, as published."""
    assert taylor_weights((0, 1, 2), 3) == pytest.approx((0.5, -2, 2.5)), "backward differences are not derivatives"
    assert newton_weights((0, 1, 2), 3) == pytest.approx((1, -3, 3))
    d1, d2 = (4 - 1) / 3, ((4 - 1) / 3 - (1 - 0) / 1) / 3
    assert sum(w * v for w, v in zip(taylor_weights((0, 1, 4), 6), (0, 1, 4), strict=True)) == 4 + 2 * d1 + 2 * d2


@pytest.mark.parametrize("order", [0, 1, 2, 4])
@pytest.mark.parametrize("computed", [(0, 1, 2, 6, 10), (0, 3, 4, 9, 11), (0, 5)])
def test_taylor_equals_the_factors_of_diffusers(order: int, computed: tuple[int, ...]) -> None:
    hooks = pytest.importorskip("diffusers.hooks.taylorseer_cache")
    state = hooks.TaylorSeerState(torch.float32, order)
    rule, kept = Taylor(order), []
    for step in range(computed[-1] + 4):
        state.current_step = step
        if step in computed:
            state.update((random(step),))
            kept = [*kept, (step, random(step))][-rule.depth :]
            continue
        torch.testing.assert_close(rule(kept, step), state.predict()[0], atol=1e-4, rtol=1e-4)


def test_low_precision_is_summed_in_float32() -> None:
    values = [(0, torch.full((4,), 256.0, dtype=torch.bfloat16)), (1, torch.full((4,), 257.0).bfloat16())]
    got = Taylor(1)(values, 5)
    assert got.dtype == torch.bfloat16
    exact = values[1][1].float() + 4 * (values[1][1].float() - values[0][1].float())
    assert torch.equal(got, exact.bfloat16())


def test_streams_are_predicted_one_by_one() -> None:
    values = [(s, {"image": random(s), "text": random(s + 10)}) for s in (0, 1)]
    got = Extrapolate(0.5)(values, 2)
    for stream in ("image", "text"):
        torch.testing.assert_close(got[stream], 1.5 * values[1][1][stream] - 0.5 * values[0][1][stream])


def test_a_rising_weight_goes_from_nothing_to_the_whole() -> None:
    plan = Schedule(tuple(1 - s / 5 for s in range(6)), ())
    rule = Extrapolate(1.0, rising=True).on(plan)
    values = [(0, random(0)), (1, random(1))]
    assert torch.equal(rule(values, 0), random(1))
    torch.testing.assert_close(rule(values, 4), 2 * random(1) - random(0))
    assert Extrapolate(0.5).on(plan) == Extrapolate(0.5)
    assert Extrapolate(1.0, rising=True).on(Schedule((1.0, 0.0), ())).by_step == (0.0,)


def test_stored_values_are_not_written_to() -> None:
    values = [(s, random(s)) for s in range(5)]
    for rule in (Taylor(4), Newton(4), Extrapolate(0.5)):
        rule(values[-rule.depth :], 7)
    assert all(torch.equal(z, random(s)) for s, z in values)


def test_predictors_by_name() -> None:
    assert predictor("hold") == HOLD and predictor("taylor:order=2") == Taylor(2)
    assert predictor(Newton(3)) == Newton(3)
    with pytest.raises(UserError, match="did you mean 'taylor'"):
        predictor("tailor")
    with pytest.raises(UserError, match="the order of a forecast lies in 0..8; got 9"):
        predictor("newton:order=9")
