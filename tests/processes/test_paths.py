"""The curves of every Gaussian path: closed-form derivatives, log-SNR and its inverse, ends, published constants."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ditloom.processes import process
from ditloom.processes.discrete_vp import DiscreteVP
from ditloom.processes.edm import EDM
from ditloom.processes.gvp import GVP
from ditloom.processes.linear import Linear
from ditloom.processes.vp import VP

SMOOTH = [Linear(), GVP(), VP(), EDM()]
ALL = [*SMOOTH, DiscreteVP(), DiscreteVP(schedule="cosine"), DiscreteVP(schedule="scaled-linear", beta_start=0.00085)]
interior = st.floats(0.01, 0.99)


def f64(value: float) -> torch.Tensor:
    return torch.tensor(value, dtype=torch.float64)


@pytest.mark.parametrize("path", SMOOTH, ids=lambda p: type(p).__name__)
@given(t=interior)
def test_derivatives_are_those_of_the_curves(path, t):
    for curve, derivative in ((path.alpha, path.d_alpha), (path.sigma, path.d_sigma)):
        point = f64(t).requires_grad_()
        value = curve(point)
        slope = torch.autograd.grad(value, point)[0] if value.requires_grad else f64(0.0)
        assert derivative(f64(t)).item() == pytest.approx(slope.item(), rel=1e-10, abs=1e-12)


@pytest.mark.parametrize("path", ALL, ids=str)
@given(t=interior)
def test_level_inverts_half_log_snr(path, t):
    c = path.at(t)
    value = path.half_log_snr(f64(t))
    assert value.item() == pytest.approx(math.log(c.alpha / c.sigma), rel=1e-9, abs=1e-12)
    assert path.level(value).item() == pytest.approx(t, rel=1e-7)


@pytest.mark.parametrize("path", ALL, ids=str)
def test_zero_is_exactly_data_and_the_curves_fall_and_rise(path):
    assert path.at(0.0)[:2] == (1.0, 0.0)
    t = torch.linspace(0, 1, 1001, dtype=torch.float64)
    ratio = path.half_log_snr(t)
    assert (ratio.diff() < 0).all() and ratio[0] == math.inf
    assert torch.equal(path.at(t).alpha, path.alpha(t)) and path.at(t.float()).sigma.dtype == torch.float64


@pytest.mark.parametrize("path", [GVP(), VP(), *ALL[4:]], ids=str)
def test_variance_preserving_paths_preserve_variance(path):
    t = torch.linspace(0, 1, 501, dtype=torch.float64)
    torch.testing.assert_close(path.alpha(t) ** 2 + path.sigma(t) ** 2, torch.ones_like(t), rtol=0, atol=1e-14)


def test_linear_and_gvp_reach_pure_noise():
    for path in (Linear(), GVP()):
        assert path.at(1.0)[:2] == (0.0, 1.0)


def test_vp_is_the_published_one():
    c = VP().at(1.0)
    assert c.alpha == pytest.approx(math.exp(-0.25 * 19.9 - 0.05), rel=1e-14)
    t = f64(0.3)
    assert (-2 * VP().d_alpha(t) / VP().alpha(t)).item() == pytest.approx(0.1 + 0.3 * 19.9, rel=1e-12)


# facebookresearch/DiT, commit ed81ce22, create_diffusion("").alphas_cumprod in float64
LINEAR_ALPHA_BAR = {0: 0.9999, 1: 0.9997800920720721, 499: 0.07858724288177824, 999: 4.035829765375676e-05}
COSINE_ALPHA_BAR = {0: 0.999958715775178, 499: 0.4938435904406382, 998: 2.4287669070348544e-06, 999: 2.4287669e-09}


@pytest.mark.parametrize(("schedule", "golden"), [("linear", LINEAR_ALPHA_BAR), ("cosine", COSINE_ALPHA_BAR)])
def test_discrete_tables_equal_the_official_ones(schedule, golden):
    path = DiscreteVP(schedule=schedule)
    for k, alpha_bar in golden.items():
        assert path.at(path.level_of(k)).alpha ** 2 == pytest.approx(alpha_bar, rel=1e-8)


@pytest.mark.parametrize("end", [0.012, 0.02, 0.03])
def test_scaled_linear_equals_diffusers(end):
    scheduler = pytest.importorskip("diffusers").DDPMScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=end
    )
    path = DiscreteVP(schedule="scaled-linear", beta_start=0.00085, beta_end=end)
    torch.testing.assert_close(path.betas().float(), scheduler.betas, rtol=2e-6, atol=0)
    alpha_bar = path.alpha(path.level_of(torch.arange(1000).double())) ** 2
    torch.testing.assert_close(alpha_bar.float(), scheduler.alphas_cumprod, rtol=5e-5, atol=0)


def test_a_float32_level_hits_its_index_exactly():
    path, k = DiscreteVP(), torch.arange(1000)
    single = (k.float() + 1) / 1000
    assert torch.equal(path.alpha(single.double()), path.alpha(path.level_of(k.double())))


def test_another_number_of_levels_scales_the_betas():
    betas = DiscreteVP(levels=100).betas()
    assert betas[0].item() == pytest.approx(1e-3) and betas[-1].item() == pytest.approx(0.2)


def test_discrete_network_time_never_leaves_the_training_range():
    path = DiscreteVP()
    assert path.network_time(0.0) == 0.001 and path.network_time(0.5) == 0.5
    assert path.network_time(torch.tensor([0.0, 0.25])).tolist() == pytest.approx([0.001, 0.25])


def test_edm_grid_is_uniform_in_its_noise_level_and_scales_the_input():
    path = EDM()
    assert path.at(1.0).sigma == 80 and path.at(path.span[0]).sigma == pytest.approx(0.002, rel=1e-12)
    t = path.level(-torch.log(f64(1.7))).item()
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    torch.testing.assert_close(path.scale_input(x, t), x / math.sqrt(1.7**2 + 0.25))
    assert path.network_time(t) == pytest.approx(math.log(1.7) / 4, rel=1e-12)
    assert path.network_time(torch.tensor([t, 0.0])).tolist() == pytest.approx([math.log(1.7) / 4, math.log(0.002) / 4])
    assert path.prior(torch.ones(2)).tolist() == [80, 80]


@pytest.mark.parametrize("path", ALL, ids=str)
def test_config_round_trip(path):
    config = path.config()
    assert isinstance(config["name"], str) and process(config) == path


@pytest.mark.parametrize("path", ALL, ids=str)
@given(t=st.floats(0.0, 1.0))
def test_floats_and_tensors_agree(path, t):
    assert path.at(t)[:3] == tuple(v.item() for v in path.at(f64(t)))[:3]
