"""Training-time distributions: their laws, their wrappers, and that a draw depends on its own uniform only."""

from __future__ import annotations

import math

import pytest
import torch
from scipy import stats

from ditloom.contracts.errors import UnknownName, UserError
from ditloom.processes.discrete_vp import DiscreteVP
from ditloom.processes.edm import EDM as EDMProcess
from ditloom.processes.linear import Linear
from ditloom.processes.shift import shift
from ditloom.processes.times import EDM, TIMES, CosMap, LogitNormal, Mode, Stratified, Uniform, time_sampler
from ditloom.processes.vp import VP

N = 20_000
GRID = (torch.arange(N, dtype=torch.float64) + 0.5) / N
FLOW = Linear()


def process_for(name: str):
    return {"discrete": DiscreteVP(), "edm": EDMProcess()}.get(name, FLOW)


@pytest.mark.parametrize("name", TIMES)
def test_levels_stay_within_the_span_and_rows_are_independent(name):
    sampler, process = time_sampler(name), process_for(name)
    u = torch.rand(257, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    u[:2] = torch.tensor([0.0, 1.0])
    t = sampler(u, process)
    assert t.dtype == torch.float64 and t.min() >= process.span[0] and t.max() <= process.span[1]
    assert torch.equal(t[5:9], sampler(u[5:9], process))


def test_uniform_covers_the_span():
    t = Uniform()(GRID, VP())
    assert t.min() > 1e-5 and t.mean().item() == pytest.approx(0.500005, abs=1e-6)


def test_discrete_hits_every_index_equally():
    t = time_sampler("discrete")(GRID, DiscreteVP())
    counts = torch.bincount((t * 1000 - 1).round().long(), minlength=1000)
    assert (counts == N // 1000).all() and t.min() == 0.001 and t.max() == 1
    with pytest.raises(UserError, match="discrete process"):
        time_sampler("discrete")(GRID, FLOW)


def test_logit_normal():
    t = LogitNormal(mean=0.7, std=1.3)(GRID, FLOW)
    assert t.median().item() == pytest.approx(1 / (1 + math.exp(-0.7)), abs=1e-3)
    assert stats.kstest(torch.logit(t).numpy(), "norm", args=(0.7, 1.3)).pvalue > 0.99


def test_mode_has_the_density_of_the_paper():
    """SD3's closed forms: the mean is 1/2 for every scale, and the ends stay reachable."""
    for scale in (0.0, 0.81, 1.29):
        t = Mode(scale=scale)(GRID, FLOW)
        assert t.mean().item() == pytest.approx(0.5, abs=1e-4) and t.max() > 0.999 and t.min() < 1e-3
    middle = ((Mode(scale=1.29)(GRID, FLOW) - 0.5).abs() < 0.1).double().mean()
    assert middle > 0.25


def test_cosmap_has_the_density_of_the_paper():
    """pi(t) = 2 / (pi - 2 pi t + 2 pi t^2)."""
    t = CosMap()(GRID, FLOW)
    grid = torch.linspace(0, 1, 2001, dtype=torch.float64)
    density = 2 / (math.pi - 2 * math.pi * grid + 2 * math.pi * grid**2)
    cdf = torch.cumulative_trapezoid(density, grid)
    for q in (0.1, 0.25, 0.5, 0.8):
        position = grid[1:][torch.searchsorted(cdf, q)]
        assert torch.quantile(t[::10], q).item() == pytest.approx(position.item(), abs=2e-3)


def test_edm_is_log_normal_in_sigma():
    process = EDMProcess()
    sigma = process.sigma(EDM()(GRID, process))
    inside = (sigma > 0.0021) & (sigma < 79)
    assert inside.double().mean() > 0.999
    assert stats.kstest(sigma[inside].log().numpy(), "norm", args=(-1.2, 1.2)).statistic < 2e-3
    half = FLOW.half_log_snr(EDM(mean=-0.4, std=1.0)(GRID, FLOW))
    assert half.median().item() == pytest.approx(0.4, abs=1e-3)


def test_scaling_data_is_shifting_the_logit_normal():
    """FasterDiT: data of std k under (m, s) sees the log-SNR distribution of unit data under m - log k."""
    k, m = 1.6, 0.3
    scaled = 2 * (FLOW.half_log_snr(LogitNormal(mean=m)(GRID, FLOW)) + math.log(k))
    shifted = 2 * FLOW.half_log_snr(LogitNormal(mean=m - math.log(k))(GRID, FLOW))
    torch.testing.assert_close(scaled, shifted)
    assert scaled.mean().item() == pytest.approx(2 * (math.log(k) - m), abs=1e-3)
    assert scaled.std().item() == pytest.approx(2.0, abs=1e-2)


def test_shift_as_a_wrapper():
    plain, moved = (time_sampler("logit-normal", amount=s)(GRID, FLOW) for s in (1.0, 3.0))
    torch.testing.assert_close(moved, shift(plain, 3.0))
    torch.testing.assert_close(moved, LogitNormal(mean=math.log(3.0))(GRID, FLOW))


def test_stratified_draws_are_one_per_slice_whatever_the_split():
    sampler, batch = time_sampler("uniform", stratified=True), 16
    u = torch.rand(batch, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    place = torch.randperm(batch, generator=torch.Generator().manual_seed(2))
    t = sampler(u, FLOW, (place, batch))
    assert sorted((t * batch).floor().long().tolist()) == list(range(batch))
    halves = [sampler(u[part], FLOW, (place[part], batch)) for part in (slice(0, 8), slice(8, 16))]
    assert torch.equal(torch.cat(halves), t)
    with pytest.raises(UserError, match="place in the global batch"):
        sampler(u, FLOW)


def test_stratified_draws_have_the_same_law_and_lower_variance():
    batch, rounds = 8, 3000
    u = torch.rand(rounds, batch, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    sampler = Stratified(LogitNormal())
    strata = sampler(u, FLOW, (torch.arange(batch).expand(rounds, batch), batch))
    plain = LogitNormal()(u, FLOW)
    assert stats.ks_2samp(strata.flatten()[::7], plain.flatten()[::7]).pvalue > 0.01
    assert strata.mean(1).var() < plain.mean(1).var() / 20


def test_unknown_names():
    with pytest.raises(UnknownName, match="did you mean 'logit-normal'"):
        time_sampler("logitnormal")
    assert time_sampler("logit-normal:mean=-0.5,std=2") == LogitNormal(mean=-0.5, std=2)
