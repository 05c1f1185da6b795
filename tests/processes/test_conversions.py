"""Every target on every path: the true target must give back data, noise, velocity and score."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ditloom.contracts.errors import UnknownName, UserError
from ditloom.processes.discrete_vp import DiscreteVP
from ditloom.processes.edm import EDM
from ditloom.processes.gvp import GVP
from ditloom.processes.linear import Linear
from ditloom.processes.targets import TARGETS
from ditloom.processes.vp import VP

PATHS = [Linear, GVP, VP, DiscreteVP, EDM]
X0 = torch.linspace(-2, 2, 24, dtype=torch.float64).reshape(2, 3, 2, 2)
EPS = torch.sin(torch.arange(24, dtype=torch.float64) * 1.7).reshape(2, 3, 2, 2)


def close(a: torch.Tensor, b: torch.Tensor, scale: float = 1.0) -> None:
    torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8 * scale)


@pytest.mark.parametrize("predicts", TARGETS)
@pytest.mark.parametrize("path", PATHS)
@given(t=st.floats(0.05, 0.9))
def test_the_true_target_gives_everything_back(path, predicts, t):
    p = path(predicts=predicts)
    c = p.at(t)
    x = p.add_noise(X0, EPS, t)
    estimate = p.estimate(x, t, p.target(X0, EPS, t))
    close(estimate.x0, X0, 1 + c.sigma / c.alpha)
    close(estimate.eps, EPS, 1 + c.alpha / c.sigma)
    close(estimate.v, c.d_alpha * X0 + c.d_sigma * EPS, abs(c.d_alpha) + c.d_sigma * (1 + c.alpha / c.sigma))
    close(estimate.score, -EPS / c.sigma, (1 + c.alpha / c.sigma) / c.sigma)


@pytest.mark.parametrize("path", PATHS)
@given(t=st.floats(0.05, 0.9))
def test_score_and_velocity_conversions_invert_each_other(path, t):
    x, v = X0, EPS
    score = path(predicts="v").estimate(x, t, v).score
    close(path(predicts="score").estimate(x, t, score).v, v, 1 + path().at(t).d_sigma)


@pytest.mark.parametrize("predicts", TARGETS)
def test_a_batch_of_levels_equals_its_rows(predicts):
    p, t = VP(predicts=predicts), torch.tensor([0.2, 0.7])
    x, target = p.add_noise(X0, EPS, t), p.target(X0, EPS, t)
    both = p.estimate(x, t, target)
    for row in range(2):
        alone = p.estimate(x[row : row + 1], t[row].double().item(), target[row : row + 1])
        close(both.x0[row : row + 1], alone.x0)
        close(both.v[row : row + 1], alone.v)


def test_levels_per_token():
    p, t = Linear(), torch.tensor([[0.0, 0.5, 1.0], [0.25, 0.25, 0.25]])
    x0, eps = torch.randn(2, 3, 8), torch.randn(2, 3, 8)
    x = p.add_noise(x0, eps, t)
    assert torch.equal(x[0, 0], x0[0, 0]) and torch.equal(x[0, 2], eps[0, 2])
    torch.testing.assert_close(p.estimate(x, t, eps - x0).x0, x0)


def test_the_velocity_of_gvp_is_half_pi_times_the_trigonometric_one():
    close(GVP(predicts="v").target(X0, EPS, 0.3), math.pi / 2 * GVP(predicts="v-trig").target(X0, EPS, 0.3))


def test_salimans_and_ho():
    p = DiscreteVP(predicts="v-trig")
    c, x, v = p.at(0.4), X0, EPS
    close(p.estimate(x, 0.4, v).x0, c.alpha * x - c.sigma * v)
    close(p.estimate(x, 0.4, v).eps, c.sigma * x + c.alpha * v)


def test_linear_velocity_is_exact_at_both_ends():
    p = Linear()
    assert torch.equal(p.estimate(X0, 0.0, EPS).x0, X0)
    assert torch.equal(p.estimate(EPS, 1.0, X0).eps, EPS)
    close(p.estimate(EPS, 1.0, EPS - X0).x0, X0)
    assert p.estimate(X0, 0.3, EPS).v is EPS


@pytest.mark.parametrize("sigma", [0.01, 0.5, 3.0, 60.0])
def test_edm_preconditioning_is_the_published_one(sigma):
    p = EDM(sigma_data=0.7)
    t = p.level(-torch.tensor(sigma).double().log()).item()
    c_skip, c_out = 0.49 / (sigma**2 + 0.49), sigma * 0.7 / math.sqrt(sigma**2 + 0.49)
    torch.testing.assert_close(p.estimate(X0, t, EPS).x0, c_skip * X0 + c_out * EPS)


@pytest.mark.parametrize("t", [0.01, 0.3, 0.8, 1.0])
def test_the_edm_target_has_unit_variance(t):
    p, n = EDM(sigma_data=0.5), 200_000
    generator = torch.Generator().manual_seed(0)
    x0, eps = (torch.randn(1, n, generator=generator, dtype=torch.float64) for _ in range(2))
    assert p.target(0.5 * x0, eps, t).std().item() == pytest.approx(1, abs=5e-3)
    assert p.scale_input(p.add_noise(0.5 * x0, eps, t), t).std().item() == pytest.approx(1, abs=5e-3)


def test_estimates_keep_the_dtype_of_x():
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        estimate = VP(predicts="eps").estimate(X0.to(dtype), torch.tensor([0.2, 0.7]), EPS.to(dtype))
        assert estimate.x0.dtype == estimate.v.dtype == dtype


def test_an_estimate_can_be_rewritten_and_clipped():
    p = DiscreteVP(predicts="eps+var")
    prediction = torch.cat([EPS, X0], 1)
    estimate = p.estimate(X0, 0.4, prediction)
    clipped = estimate.clipped(0.5)
    assert clipped.x0.abs().max() <= 0.5
    close(clipped.eps, (X0 - p.at(0.4).alpha * clipped.x0) / p.at(0.4).sigma)
    assert torch.equal(clipped.log_variance(0.399), estimate.log_variance(0.399))
    close(estimate.of("v", EPS).v, EPS)


def test_what_is_undefined_is_said():
    with pytest.raises(UserError, match="x0 of a 'eps' prediction is undefined at noise level 1.0"):
        _ = Linear(predicts="eps").estimate(X0, 1.0, EPS).x0
    with pytest.raises(UnknownName, match="unknown target 'epsilon'.*'eps'"):
        Linear(predicts="epsilon")
    with pytest.raises(UserError, match="even number"):
        DiscreteVP(predicts="eps+var").split(X0)
