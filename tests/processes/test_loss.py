"""Losses against the official codes' numbers, and the identities that connect targets and weights."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from ditloom.contracts.errors import UnknownName
from ditloom.processes.discrete_vp import DiscreteVP
from ditloom.processes.edm import EDM
from ditloom.processes.gvp import GVP
from ditloom.processes.linear import Linear
from ditloom.processes.posterior import decoder_nll, normal_kl
from ditloom.processes.targets import TARGETS
from ditloom.processes.vp import VP
from ditloom.processes.weights import P2, WEIGHTS, MinSNR
from tests.processes.waves import wave

SHAPE = (3, 2, 2, 2)
X0, NOISE, OUT = wave(SHAPE, 0.37, 0.1), wave(SHAPE, 1.7, 0.5, 1.3), wave(SHAPE, 0.9, 0.2, 0.8)
T = 1 - torch.tensor([0.1, 0.5, 0.93], dtype=torch.float64)
PATHS = {"linear": Linear, "gvp": GVP, "vp": VP}
TARGET = {"noise": "eps", "score": "score", "velocity": "v"}

# willisma/SiT, commit 947f95bd, Transport.training_losses in float64 on the waves above, t (data time) .1, .5, .93
SIT = {
    ("linear", "noise", "uniform"): [1.1259228115700246, 1.1620480883879507, 1.1446264817995264],
    ("linear", "noise", "velocity"): [112.59228115700252, 4.648192353551803, 1.3234206056185989],
    ("linear", "noise", "likelihood"): [12.510253461889164, 4.648192353551803, 17.582588046075685],
    ("linear", "score", "uniform"): [0.9117150175004028, 1.0468830229469783, 0.8734569066257991],
    ("linear", "score", "velocity"): [91.17150175004033, 4.187532091787913, 1.009893521361775],
    ("linear", "score", "likelihood"): [10.130166861115589, 4.187532091787913, 13.417156783806451],
    ("linear", "velocity", "uniform"): [1.6774500834081163, 1.5747199312812383, 1.715355914584006],
    ("gvp", "noise", "velocity"): [113.52290330794396, 5.7344774637155975, 2.85867572460075],
    ("gvp", "noise", "likelihood"): [11.446589986069457, 3.6506817375976484, 16.484352773455768],
    ("gvp", "score", "uniform"): [0.951144889633622, 1.1531250740970598, 0.8785477150454347],
    ("gvp", "score", "velocity"): [95.90064987417416, 5.690444153157419, 2.194150725881695],
    ("gvp", "velocity", "uniform"): [1.7917386627567982, 1.876650745762665, 2.5542574924798465],
    ("vp", "noise", "velocity"): [91.32749160245021, 31.861534934372006, 11.7622494871228],
    ("vp", "noise", "likelihood"): [10.14186469766243, 6.340603967039205, 15.756529788510122],
    ("vp", "score", "uniform"): [0.9569597515185009, 1.322781370161504, 0.9012197521656128],
    ("vp", "score", "velocity"): [77.62231369024292, 36.26858927534056, 9.260987524095654],
    ("vp", "velocity", "uniform"): [0.313053261832548, 1.2316129649137628, 8.593983823297199],
}


@pytest.mark.parametrize("case", SIT, ids=" ".join)
def test_sit(case):
    path, target, weight = case
    p = PATHS[path](predicts=TARGET[target], weight=weight)
    out = -OUT if target == "velocity" else OUT  # the velocity changes sign with the direction of time
    torch.testing.assert_close(p.loss(out, X0, NOISE, T).total.tolist(), SIT[case], rtol=1e-12, atol=0)


def test_lightning_dit_direction_loss():
    # hustvl/LightningDiT, commit 2725fed4, use_cosine_loss, same waves
    golden = [1.016363697590063, 0.7889484528442158, 0.9688651110143126]
    loss = Linear(direction=1.0).loss(-OUT, X0, NOISE, T)
    torch.testing.assert_close(loss.terms["direction"].tolist(), golden, rtol=1e-12, atol=0)
    torch.testing.assert_close(loss.total, loss.terms["mse"] + loss.terms["direction"])
    assert loss.terms["mse"].tolist() == pytest.approx(SIT["linear", "velocity", "uniform"])


@given(scale=st.floats(0.1, 50))
def test_the_direction_term_sees_only_direction(scale):
    p = Linear(direction=1.0)
    one, many = (p.loss(k * OUT, X0, NOISE, T).terms["direction"] for k in (1.0, scale))
    torch.testing.assert_close(one, many)
    parallel = p.loss(scale * (NOISE - X0), X0, NOISE, T).terms["direction"]
    assert parallel.abs().max() < 1e-12 < one.min()


# facebookresearch/DiT, commit ed81ce22, training_losses with float64 tables, indices 0, 1, 500, 999
DIT_MSE = [1.1164126485214518, 1.1024210906571383, 1.3095970464671178, 1.2195095440343053]
DIT_VB = {
    "linear": [2.256172089354482, 0.790589812346989, 0.010413455149281478, 0.01795359263089741],
    "cosine": [1.6424713545759748, 0.7438155141355933, 0.005898641712736169, 878.8115244935889],
}


def dit_batch():
    shape = (4, 2, 3, 3)
    t = DiscreteVP().level_of(torch.tensor([0, 1, 500, 999]).double())
    return wave((4, 4, 3, 3), 0.9, 0.2, 0.8), wave(shape, 0.37, 0.1), wave(shape, 1.7, 0.5, 1.3), t


@pytest.mark.parametrize("schedule", DIT_VB)
def test_dit_learned_variance(schedule):
    p = DiscreteVP(predicts="eps+var", schedule=schedule)
    loss = p.loss(*dit_batch())
    torch.testing.assert_close(loss.terms["mse"].tolist(), DIT_MSE, rtol=1e-12, atol=0)
    torch.testing.assert_close(loss.terms["vb"].tolist(), DIT_VB[schedule], rtol=1e-8, atol=0)
    torch.testing.assert_close(loss.total, loss.terms["mse"] + loss.terms["vb"])


def test_float32_training_of_the_variance_is_close_to_float64():
    p, (out, x0, noise, t) = DiscreteVP(predicts="eps+var"), dit_batch()
    single = p.loss(out.float(), x0.float(), noise.float(), t.float()).terms["vb"]
    torch.testing.assert_close(single.tolist(), DIT_VB["linear"], rtol=2e-4, atol=0)


def test_the_bound_cannot_disturb_the_mean():
    p, (out, x0, noise, t) = DiscreteVP(predicts="eps+var"), dit_batch()
    out.requires_grad_()
    p.loss(out, x0, noise, t).terms["vb"].sum().backward()
    assert torch.count_nonzero(out.grad[:, :2]) == 0 and torch.count_nonzero(out.grad[:, 2:]) > 0


@given(raw=st.floats(-1, 1), k=st.integers(0, 999))
def test_the_learned_variance_lies_between_its_bounds(raw, k):
    p = DiscreteVP(predicts="eps+var")
    t, t_next = p.level_of(k), k / 1000
    q = p.posterior(t, t_next)
    value = p.log_variance(torch.full((1, 1), raw, dtype=torch.float64), t, t_next).item()
    assert q.log_small - 1e-12 <= value <= q.log_large + 1e-12
    assert q.log_large == pytest.approx(math.log(p.betas()[k].item()), rel=1e-9)


def test_posterior_log_variance_is_clipped_as_published():
    # facebookresearch/DiT, commit ed81ce22, posterior_log_variance_clipped
    golden = {0: -9.81672513529595, 1: -9.81672513529595, 499: -4.602039550085141, 999: -3.912023829100454}
    p = DiscreteVP()
    for k, value in golden.items():
        assert p.posterior(p.level_of(k), k / 1000).log_small == pytest.approx(value, rel=1e-9)


def test_kl_and_decoder_against_torch_distributions():
    generator = torch.Generator().manual_seed(0)
    mean, model_mean, log_var, model_log_var = (torch.randn(50, generator=generator).double() for _ in range(4))
    Normal = torch.distributions.Normal
    exact = torch.distributions.kl_divergence(
        Normal(mean, (0.5 * log_var).exp()), Normal(model_mean, (0.5 * model_log_var).exp())
    )
    torch.testing.assert_close(normal_kl(mean, log_var, model_mean, model_log_var), exact)
    values = (torch.arange(256).double() - 127.5) / 127.5
    nll = decoder_nll(values, torch.full_like(values, 0.3), torch.full_like(values, -1.0))
    assert torch.exp(-nll).sum().item() == pytest.approx(1, abs=1e-6)
    inside = values.abs() < 0.9
    normal = Normal(0.3, math.exp(-1.0))
    bins = normal.cdf(values + 1 / 255) - normal.cdf(values - 1 / 255)
    torch.testing.assert_close(torch.exp(-nll)[inside], bins[inside], rtol=0.02, atol=1e-5)


@pytest.mark.parametrize("weight", [w for w in WEIGHTS if w != "uniform"])
@pytest.mark.parametrize("path", PATHS.values())
def test_a_weight_means_the_same_for_every_target(path, weight):
    truth = path(predicts="v").estimate(path().add_noise(X0, NOISE, T), T, -OUT)
    totals = []
    for name in TARGETS:
        p = path(predicts=name, weight=weight)
        c = p.at(T.reshape(3, 1, 1, 1))
        a, b = p.kind.of_data(c)
        totals.append(p.loss(a * truth.x0 + b * truth.eps, X0, NOISE, T).total)
    for total in totals[1:]:
        torch.testing.assert_close(total, totals[0], rtol=1e-8, atol=0)


def test_noise_with_velocity_weight_is_the_velocity_loss():
    p = Linear(predicts="eps", weight="velocity")
    estimate = Linear().estimate(p.add_noise(X0, NOISE, T), T, OUT)
    torch.testing.assert_close(p.loss(estimate.eps, X0, NOISE, T).total, Linear().loss(OUT, X0, NOISE, T).total)


def test_weights_by_the_reference_card():
    trig, eps, v = (GVP(predicts=k) for k in ("v-trig", "eps", "v"))
    c = eps.at(T)
    snr = (c.alpha / c.sigma) ** 2
    capped = snr.clamp(max=5.0)
    rule = MinSNR()
    torch.testing.assert_close(rule.for_target(eps.kind, c), capped / snr)
    torch.testing.assert_close(rule.for_target(trig.kind, c), capped / (snr + 1))
    torch.testing.assert_close(P2(k=1.0, gamma=0.5).for_target(eps.kind, c), (1 + snr) ** -0.5)
    c = Linear().at(T)
    snr = (c.alpha / c.sigma) ** 2
    torch.testing.assert_close(1 / v.kind.x0(c).b ** 2, (1 + snr.sqrt()) ** 2)


def test_the_raw_output_of_edm_has_weight_one_in_its_loss():
    p, t = EDM(), torch.tensor([0.4, 0.6, 0.9], dtype=torch.float64)
    denoised = p.estimate(p.add_noise(X0, NOISE, t), t, OUT).x0
    sigma = p.at(t).sigma
    official = (sigma**2 + 0.25) / (sigma * 0.5) ** 2 * (denoised - X0).square().flatten(1).mean(1)
    torch.testing.assert_close(p.loss(OUT, X0, NOISE, t).total, official)
    torch.testing.assert_close(EDM(weight="edm").loss(OUT, X0, NOISE, t).total, official)


def test_only_density_times_weight_matters():
    """Uniform t weighted by 2 (1 - t), and t from the density 2 (1 - t) unweighted, have the same expected loss."""
    u = (torch.arange(4000, dtype=torch.float64) + 0.5) / 4000
    dense = 1 - torch.sqrt(1 - u)
    x0, noise, out = (wave((4000, 1, 1, 1), 0.0, 1.0 + k) for k in range(3))
    weighted = (2 * (1 - u) * Linear(predicts="x0").loss(out * u.view(-1, 1, 1, 1), x0, noise, u).total).mean()
    resampled = Linear(predicts="x0").loss(out * dense.view(-1, 1, 1, 1), x0, noise, dense).total.mean()
    assert weighted.item() == pytest.approx(resampled.item(), rel=1e-3)


def test_zero_output_has_a_mean_squared_error_near_one():
    p = DiscreteVP(predicts="eps")
    noise = torch.randn(8, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    loss = p.loss(torch.zeros_like(noise), torch.randn_like(noise), noise, torch.full((8,), 0.3))
    assert loss.total.mean().item() == pytest.approx(1, abs=0.05)


def test_a_mask_leaves_parts_out():
    p = Linear(direction=0.5)
    mask = torch.zeros(3, 1, 2, 2)
    mask[:, :, 0] = 1
    other = OUT.clone()
    other[:, :, 1] += 7
    for name in ("mse", "direction"):
        torch.testing.assert_close(
            p.loss(OUT, X0, NOISE, T, mask).terms[name], p.loss(other, X0, NOISE, T, mask).terms[name]
        )
    half = p.loss(OUT[:, :, :1], X0[:, :, :1], NOISE[:, :, :1], T).total
    torch.testing.assert_close(p.loss(OUT, X0, NOISE, T, mask).total, half)


def test_bfloat16_predictions_are_compared_in_float32():
    loss = Linear().loss(OUT.bfloat16(), X0.bfloat16(), NOISE.bfloat16(), T)
    assert loss.total.dtype == torch.float32
    wide = [v.bfloat16().float() for v in (OUT, X0, NOISE)]
    torch.testing.assert_close(loss.total, F.mse_loss(wide[0], wide[2] - wide[1], reduction="none").flatten(1).mean(1))


def test_an_unknown_weight_or_setting_names_the_nearest():
    with pytest.raises(UnknownName, match="did you mean 'min-snr'"):
        Linear(weight="minsnr")
    with pytest.raises(UnknownName, match="'gamma'"):
        Linear(weight="min-snr:gama=3")
    assert Linear(weight="min-snr:gamma=3").loss_weight == MinSNR(gamma=3)
