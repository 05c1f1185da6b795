"""Step by step beside diffusers' schedulers, on the same model outputs and the same noise."""

from __future__ import annotations

import pytest
import torch

from ditloom.contracts.sampler import Changed
from ditloom.processes.discrete_vp import DiscreteVP
from ditloom.processes.edm import EDM
from ditloom.processes.linear import Linear
from ditloom.samplers import sampler
from tests.samplers.mixture import no_noise

diffusers = pytest.importorskip("diffusers")
TARGET = {"epsilon": "eps", "sample": "x0", "v_prediction": "v-trig"}
X = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def network(x: torch.Tensor, native: float, channels: int = 4) -> torch.Tensor:
    """Some smooth function of x and the scheduler's own time."""
    out = torch.sin(1.3 * x + 0.002 * native) + 0.4 * x
    return out if channels == 4 else torch.cat([out, torch.cos(2 * x)], 1)


def levels(timesteps: torch.Tensor) -> torch.Tensor:
    return torch.cat([(timesteps.double() + 1) / 1000, torch.zeros(1).double()])


def compare(solver, path, scheduler, native, grid, channels=4, tolerance=2e-5, start=X, noise=None):
    """Both walk on their own; after every step the states must agree."""

    def evaluate(x, t, *, step, evaluation=0, told=None):
        return path.estimate(x, t, network(path.scale_input(x, t), native(t if told is None else told), channels))

    theirs, gaps = start.clone(), []
    steps = solver.sample(evaluate, start.clone(), grid, path, noise or (lambda step, evaluation=0: None))
    for step, timestep in zip(steps, scheduler.timesteps, strict=True):
        given = scheduler.scale_model_input(theirs, timestep) if hasattr(scheduler, "scale_model_input") else theirs
        output = network(given, native(path_time(path, timestep, step)), channels)
        theirs = scheduler.step(output, timestep, theirs).prev_sample
        gaps.append(((step.x - theirs).abs().max() / theirs.abs().max()).item())
    assert len(gaps) == len(grid) - 1
    assert max(gaps) < tolerance, f"largest relative difference {max(gaps):.1e}"


def path_time(path, timestep, step) -> float:
    return (float(timestep) + 1) / 1000 if isinstance(path, DiscreteVP) else step.t


def index(t: float) -> float:
    return 1000 * t - 1


@pytest.fixture
def shared_noise(monkeypatch):
    """The n-th draw of a scheduler is the n-th step's noise of ours."""
    draws = torch.randn(200, *X.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    count = iter(range(200))
    for module in ("ddpm", "ddim", "dpmsolver_multistep", "edm_euler"):
        target = f"diffusers.schedulers.scheduling_{module}.randn_tensor"
        monkeypatch.setattr(target, lambda *args, **kwargs: draws[next(count)].clone())
    return lambda step, evaluation=0: draws[step]


@pytest.mark.parametrize("prediction", TARGET)
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
@pytest.mark.parametrize("eta", [0.0, 0.6, 1.0])
def test_ddim(prediction, spacing, eta, monkeypatch):
    scheduler = diffusers.DDIMScheduler(
        prediction_type=prediction, timestep_spacing=spacing, clip_sample=False, set_alpha_to_one=True
    )
    scheduler.set_timesteps(20)
    draws = torch.randn(20, *X.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    plain, count = scheduler.step, iter(range(20))
    monkeypatch.setattr(
        scheduler, "step", lambda o, t, x: plain(o, t, x, eta=eta, variance_noise=draws[next(count)] if eta else None)
    )
    path = DiscreteVP(predicts=TARGET[prediction])
    solver = sampler({"name": "ddim", "eta": eta})
    compare(solver, path, scheduler, index, levels(scheduler.timesteps), noise=lambda step, evaluation=0: draws[step])


@pytest.mark.parametrize("prediction", TARGET)
def test_ddim_clipped(prediction):
    scheduler = diffusers.DDIMScheduler(
        prediction_type=prediction, timestep_spacing="leading", clip_sample=True, clip_sample_range=0.8
    )
    scheduler.set_timesteps(10)
    step = scheduler.step
    scheduler.step = lambda o, t, x: step(o, t, x, use_clipped_model_output=True)
    path = DiscreteVP(predicts=TARGET[prediction])
    compare(sampler("ddim:clip=0.8"), path, scheduler, index, levels(scheduler.timesteps))


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_ddim_inversion(prediction):
    scheduler = diffusers.DDIMInverseScheduler(
        prediction_type=prediction, timestep_spacing="leading", clip_sample=False
    )
    scheduler.set_timesteps(20)
    path, ascending = DiscreteVP(predicts=TARGET[prediction]), scheduler.timesteps
    # diffusers carries x from 20 indices below each time step to it, starting below index 0 at the data
    grid = torch.cat([torch.zeros(1).double(), (ascending.double() + 1) / 1000])
    compare(sampler("ddim"), path, scheduler, index, grid[: len(ascending) + 1])


@pytest.mark.parametrize("prediction", TARGET)
@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
def test_ddpm(prediction, variance, shared_noise):
    scheduler = diffusers.DDPMScheduler(
        prediction_type=prediction, variance_type=variance, clip_sample=False, timestep_spacing="leading"
    )
    scheduler.set_timesteps(20)
    path = DiscreteVP(predicts=TARGET[prediction], variance=variance.removeprefix("fixed_"))
    compare(sampler("ddpm"), path, scheduler, index, levels(scheduler.timesteps), noise=shared_noise)


def test_ddpm_with_learned_range(shared_noise):
    scheduler = diffusers.DDPMScheduler(variance_type="learned_range", clip_sample=False, timestep_spacing="leading")
    scheduler.set_timesteps(25)
    path = DiscreteVP(predicts="eps+var")
    grid = levels(scheduler.timesteps)
    compare(sampler("ddpm"), path, scheduler, index, grid, channels=8, noise=shared_noise)


@pytest.mark.parametrize("prediction", TARGET)
@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("steps", [8, 25])
def test_dpm_solver(prediction, order, steps):
    scheduler = diffusers.DPMSolverMultistepScheduler(
        prediction_type=prediction, solver_order=order, timestep_spacing="linspace", beta_schedule="scaled_linear",
        beta_start=0.00085, beta_end=0.012,
    )  # fmt: skip
    scheduler.set_timesteps(steps)
    path = DiscreteVP(predicts=TARGET[prediction], schedule="scaled-linear", beta_start=0.00085, beta_end=0.012)
    solver = sampler("dpmpp-2m") if order == 2 else sampler("ddim")
    compare(solver, path, scheduler, index, levels(scheduler.timesteps), tolerance=1e-4)


@pytest.mark.parametrize("steps", [8, 25])
def test_dpm_solver_on_a_grid_that_ends_above_zero(steps):
    """Its last step is first order when there are fewer than 15, and only then."""
    scheduler = diffusers.DPMSolverMultistepScheduler(timestep_spacing="linspace", final_sigmas_type="sigma_min")
    scheduler.set_timesteps(steps)
    grid = (torch.cat([scheduler.timesteps, torch.zeros(1)]).double() + 1) / 1000
    compare(sampler("dpmpp-2m"), DiscreteVP(), scheduler, index, grid, tolerance=1e-4)


@pytest.mark.parametrize("steps", [8, 25])
def test_sde_dpm_solver(steps, shared_noise):
    scheduler = diffusers.DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++", timestep_spacing="linspace")
    scheduler.set_timesteps(steps)
    path, grid = DiscreteVP(), levels(scheduler.timesteps)
    compare(sampler("dpmpp-2m-sde"), path, scheduler, index, grid, tolerance=1e-4, noise=shared_noise)


@pytest.mark.parametrize("steps", [8, 20])
def test_flow_dpm_solver(steps):
    scheduler = diffusers.DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    scheduler.set_timesteps(steps)
    compare(
        sampler("flow-dpm-solver"), Linear(), scheduler, lambda t: 1000 * t, scheduler.sigmas.double(), tolerance=1e-4
    )


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_euler(shift):
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(28)
    compare(sampler("euler"), Linear(), scheduler, lambda t: 1000 * t, scheduler.sigmas.double(), tolerance=1e-5)


def test_flow_heun():
    """Its scheduler counts every evaluation as a step of its own: two calls, one of our steps."""
    scheduler = diffusers.FlowMatchHeunDiscreteScheduler(shift=2.0)
    scheduler.set_timesteps(12)
    grid = torch.cat([scheduler.sigmas[:1], scheduler.sigmas[1::2]]).double()
    path, theirs, x = Linear(), X.clone(), X.clone()
    for timestep in scheduler.timesteps:
        theirs = scheduler.step(network(theirs, float(timestep)), timestep, theirs).prev_sample

    def evaluate(x, t, *, step, evaluation=0, told=None):
        return path.estimate(x, t, network(x, 1000 * t))

    *_, last = sampler("heun").sample(evaluate, x, grid, path, no_noise)
    assert ((last.x - theirs).abs().max() / theirs.abs().max()).item() < 1e-5


def test_edm_euler():
    """Euler in sigma is DDIM on this path."""
    scheduler = diffusers.EDMEulerScheduler(sigma_min=0.002, sigma_max=80.0, sigma_data=0.5)
    scheduler.set_timesteps(18)
    path = EDM(sigma_data=0.5)
    grid = sampler("ddim").grid(path, 18)
    start = 80 * X

    def native(t: float) -> float:
        return 4 * path.network_time(t)

    compare(sampler("ddim"), path, scheduler, native, grid, tolerance=1e-4, start=start)


def test_a_changed_latent_starts_the_history_anew():
    """After `send`, 2M continues as a fresh first-order step would from the new latent."""
    path, solver = Linear(), sampler("dpmpp-2m")
    grid = solver.grid(path, 6)

    def evaluate(x, t, *, step, evaluation=0, told=None):
        return path.estimate(x, t, network(x, 1000 * t))

    steps = solver.sample(evaluate, X, grid, path, no_noise)
    next(steps), next(steps)
    changed = steps.send(Changed(0.5 * X))
    fresh = next(solver.sample(evaluate, 0.5 * X, grid[2:], path, no_noise))
    assert torch.equal(changed.x, fresh.x) and changed.index == 2
