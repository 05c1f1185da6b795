"""Grids of noise levels and shifts, against the official lists and diffusers."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ditloom.contracts.errors import UnknownName, UserError
from ditloom.processes.discrete_vp import DiscreteVP
from ditloom.processes.edm import EDM
from ditloom.processes.grids import GRIDS, Indices, grid, respaced, respaced_grid
from ditloom.processes.gvp import GVP
from ditloom.processes.linear import Linear
from ditloom.processes.shift import dimension_shift, resolution_shift, shift
from ditloom.processes.vp import VP

DISCRETE = [name for name, rule in GRIDS.items() if issubclass(rule, Indices)]


@pytest.mark.parametrize("spacing", GRIDS)
@pytest.mark.parametrize("path", [Linear(), Linear(predicts="eps"), GVP(), VP(), EDM(), DiscreteVP()], ids=str)
@pytest.mark.parametrize("steps", [1, 2, 25, 50])
def test_every_grid_falls_strictly_to_zero(path, spacing, steps):
    if spacing in DISCRETE and not isinstance(path, DiscreteVP):
        with pytest.raises(UserError, match="needs a discrete process"):
            grid(path, steps, spacing)
        return
    if spacing == "ddim" and steps == 1:
        return
    levels = grid(path, steps, spacing)
    assert levels.dtype == torch.float64 and len(levels) == steps + 1
    assert levels[-1] == 0 and levels[0] <= path.span[1] and (levels.diff() < 0).all()


# facebookresearch/DiT, commit ed81ce22, space_timesteps(1000, ...): count, first six, last three, sum, sum of squares
RESPACED = {
    "250": (250, [0, 4, 8, 12, 16, 20], [991, 995, 999], 124875, 83340681),
    "100": (100, [0, 10, 20, 30, 40, 50], [979, 989, 999], 49950, 33435630),
    "50": (50, [0, 20, 41, 61, 82, 102], [958, 979, 999], 24975, 16803653),
    "27": (27, [0, 38, 77, 115, 154, 192], [922, 961, 999], 13486, 9154550),
    "7": (7, [0, 166, 333, 500, 666, 832], [666, 832, 999], 3496, 2522226),
    "3": (3, [0, 500, 999], [0, 500, 999], 1499, 1248001),
    "ddim50": (50, [0, 20, 40, 60, 80, 100], [940, 960, 980], 24500, 16170000),
    "ddim25": (25, [0, 40, 80, 120, 160, 200], [880, 920, 960], 12000, 7840000),
    "10,15,20": (45, [0, 37, 74, 111, 148, 185], [964, 982, 999], 25825, 18378979),
    "1": (1, [0], [0], 0, 0),
}


@pytest.mark.parametrize("spec", RESPACED)
def test_respacing_keeps_the_official_indices(spec):
    kept = respaced(1000, spec)
    assert (len(kept), kept[:6], kept[-3:], sum(kept), sum(k * k for k in kept)) == RESPACED[spec]
    levels = respaced_grid(DiscreteVP(), spec)
    assert (levels[:-1] * 1000 - 1).round().long().tolist() == kept[::-1]


def test_respacing_to_all_steps_changes_nothing():
    everything = grid(DiscreteVP(), 1000)
    assert torch.equal(everything[:-1].flip(0), (torch.arange(1000).double() + 1) / 1000)


def test_respacing_that_cannot_be_is_refused():
    with pytest.raises(UserError, match="no integer stride gives 60"):
        respaced(1000, "ddim60")
    with pytest.raises(UserError, match="cannot keep 600"):
        respaced(1000, "600,3")
    with pytest.raises(UserError, match="steps must be from 1 to 1000, got 1001"):
        grid(DiscreteVP(), 1001)


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("steps", [4, 7, 20, 50])
def test_discrete_grids_equal_those_of_diffusers(spacing, steps):
    scheduler = pytest.importorskip("diffusers").DDPMScheduler(timestep_spacing=spacing)
    scheduler.set_timesteps(steps)
    ours = (grid(DiscreteVP(), steps, spacing)[:-1] * 1000 - 1).round().long()
    assert torch.equal(ours, scheduler.timesteps[:steps])


def test_karras_equals_diffusers():
    scheduler = pytest.importorskip("diffusers").EDMEulerScheduler(sigma_min=0.002, sigma_max=80.0)
    scheduler.set_timesteps(18)
    path = EDM()
    torch.testing.assert_close(path.sigma(grid(path, 18)).float(), scheduler.sigmas, rtol=1e-5, atol=0)
    torch.testing.assert_close(grid(path, 18)[:-1].diff(), torch.full((17,), (path.span[0] - 1) / 17).double())


def test_karras_on_a_flow_reaches_the_same_noise_to_signal_ratios():
    flow, edm = Linear(), EDM()
    ratio = torch.exp(-flow.half_log_snr(grid(flow, 12, "karras")))
    torch.testing.assert_close(ratio, edm.sigma(grid(edm, 12)), rtol=1e-9, atol=0)


def test_a_karras_grid_takes_the_limits_of_its_process():
    path = EDM(sigma_max=160.0, sigma_min=0.01)
    sigmas = path.sigma(grid(path, 5))
    assert sigmas[0].item() == pytest.approx(160) and sigmas[-2].item() == pytest.approx(0.01)
    assert path.sigma(grid(path, 5, "karras:sigma_max=10"))[0].item() == pytest.approx(10)


def test_flow_grid_equals_diffusers_and_flux():
    scheduler = pytest.importorskip("diffusers").FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    tokens, steps = 1024, 28
    mu = 0.5 + (1.15 - 0.5) / (4096 - 256) * (tokens - 256)
    scheduler.set_timesteps(sigmas=torch.linspace(1, 1 / steps, steps).tolist(), mu=mu)
    ours = grid(Linear(), steps, amount=resolution_shift(tokens))
    torch.testing.assert_close(ours.float(), scheduler.sigmas, rtol=1e-6, atol=1e-7)


def test_lightning_dit_grid():
    # hustvl/LightningDiT, commit 2725fed4: 6 points from noise to data in data time, shift 0.3
    golden = [0.0, 0.0698, 0.1667, 0.3103, 0.5455, 1.0]
    assert (1 - grid(Linear(), 5, amount=1 / 0.3)).tolist() == pytest.approx(golden, abs=5e-5)


@given(t=st.floats(0, 1), amount=st.floats(0.05, 20))
def test_a_shift_is_undone_by_its_inverse(t, amount):
    moved = shift(t, amount)
    assert 0 <= moved <= 1 and shift(moved, 1 / amount) == pytest.approx(t, abs=1e-12)
    if 0 < t < 1:
        path = Linear()
        gap = path.lambdas([t])[0] - path.lambdas([moved])[0] if 0 < moved < 1 else math.log(amount)
        assert gap == pytest.approx(math.log(amount), abs=1e-6)


def test_published_shifts():
    assert math.log(resolution_shift(256)) == pytest.approx(0.5) and math.log(resolution_shift(4096)) == pytest.approx(
        1.15
    )
    assert dimension_shift(4 * 4096) == 2 and shift(0.5, 3.0) == 0.75
    with pytest.raises(UserError, match="shift must be above 0, got -1"):
        shift(0.5, -1)


def test_bad_requests():
    with pytest.raises(UserError, match="steps must be at least 1, got 0"):
        grid(Linear(), 0)
    with pytest.raises(UnknownName, match="unknown spacing 'karas': did you mean 'karras'"):
        grid(Linear(), 5, "karas")
