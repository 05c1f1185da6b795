"""Stochastic samplers leave the right distribution behind, on Gaussian data whose exact scores are known."""

from __future__ import annotations

import math

import pytest
import torch

from ditloom.processes import process
from ditloom.processes.discrete_vp import DiscreteVP
from ditloom.samplers import sampler
from ditloom.samplers.sde import FORMS
from ditloom.samplers.trajectory import finish
from tests.samplers.mixture import Mixture

N = 8_000
GAUSSIAN = {"weights": (1.0,), "means": (0.4,), "deviations": (0.7,)}


def final(spec: str, path, steps: int, data=GAUSSIAN) -> torch.Tensor:
    solver, oracle = sampler(spec), Mixture(path, **data)
    grid = solver.grid(path, steps)
    generator = torch.Generator().manual_seed(0)

    def noise(step: int = 0, evaluation: int = 0) -> torch.Tensor:
        return torch.randn(N, generator=generator, dtype=torch.float64)

    c = path.at(grid[0].item())
    start = c.alpha * 0.4 + math.sqrt(c.alpha**2 * 0.49 + c.sigma**2) * noise()
    end = finish(solver.sample(oracle, start, grid, path, noise))
    assert oracle.calls == solver.evaluations(steps)
    return end


@pytest.mark.parametrize("diffusion", FORMS)
@pytest.mark.parametrize("spec", ["linear", "gvp"])
def test_every_diffusion_form_keeps_the_moments(spec, diffusion):
    end = final(f"sde:diffusion={diffusion},last=tweedie", process(spec), 250)
    assert end.mean().item() == pytest.approx(0.4, abs=0.02)
    assert end.std().item() == pytest.approx(0.7, abs=0.03)


@pytest.mark.parametrize("last", ["mean", "tweedie", "euler"])
def test_every_last_step_is_close(last):
    """From 0.04 on, "mean" keeps about 2 w h of variance that is not removed; the others shrink to the estimate."""
    end = final(f"sde:last={last}", process("linear"), 100)
    assert end.std().item() == pytest.approx(0.7, abs=0.03)


def test_without_a_last_step_the_end_is_noised_data():
    solver, path = sampler("sde:last=none"), process("linear")
    assert solver.grid(path, 50)[-1] == 1e-3 and solver.evaluations(50) == 50
    assert final("sde:last=none", path, 100).std().item() == pytest.approx(0.7, abs=0.03)


def test_the_stochastic_heun_method_needs_fewer_steps():
    gaps = [abs(final(name, process("linear"), 16).std().item() - 0.7) for name in ("sde", "sde-heun")]
    assert gaps[1] < gaps[0]


@pytest.mark.parametrize("spec", ["ddpm", "ddim:eta=1", "dpmpp-2m-sde"])
@pytest.mark.parametrize("path", [process("linear"), process("discrete-vp"), process("vp")], ids=str)
def test_ancestral_samplers_keep_the_moments(spec, path):
    end = final(spec, path, 100)
    assert end.mean().item() == pytest.approx(0.4, abs=0.02)
    assert end.std().item() == pytest.approx(0.7, abs=0.04)


def test_unit_gaussian_data_gives_unit_variance_under_ddpm():
    """For N(0, 1) data the exact noise estimate is sigma x."""
    path, solver = DiscreteVP(), sampler("ddpm")
    generator = torch.Generator().manual_seed(0)

    def noise(step: int = 0, evaluation: int = 0) -> torch.Tensor:
        return torch.randn(N, generator=generator, dtype=torch.float64)

    def evaluate(x, t, *, step, evaluation=0, told=None):
        return path.estimate(x, t, path.at(t).sigma * x)

    end = finish(solver.sample(evaluate, noise(), solver.grid(path, 1000), path, noise))
    assert end.std().item() == pytest.approx(1, abs=0.03)


def test_ddim_at_eta_one_is_ancestral_sampling_with_the_small_variance():
    path, grid = DiscreteVP(), sampler("ddpm").grid(DiscreteVP(), 12)
    draws = torch.randn(12, 500, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    start = torch.randn(500, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    ends = [
        finish(sampler(s).sample(Mixture(path), start, grid, path, lambda step, evaluation=0: draws[step]))
        for s in ("ddpm", "ddim:eta=1")
    ]
    torch.testing.assert_close(ends[0], ends[1], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("churn", [10, 40])
def test_churn_keeps_the_moments(churn):
    end = final(f"edm:churn={churn},s_min=0.05,s_max=50", process("edm"), 64)
    assert end.mean().item() == pytest.approx(0.4, abs=0.02) and end.std().item() == pytest.approx(0.7, abs=0.02)
