"""What every registered sampler answers, and the promises of the contract."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from ditloom.contracts import rng
from ditloom.contracts.errors import UnknownName, UserError
from ditloom.contracts.registries import SAMPLERS
from ditloom.contracts.sampler import Changed, Step
from ditloom.processes import process
from ditloom.processes.linear import Linear
from ditloom.samplers import sampler
from ditloom.samplers.trajectory import finish, follow, invert, tail
from tests.samplers.mixture import Mixture, no_noise

ALL = SAMPLERS.names()
STOCHASTIC = ["ddpm", "dpmpp-2m-sde", "sde", "sde-heun"]
FLOW = Linear()
SHAPE = (3, 4)


def network(x, t, *, step, evaluation=0, told=None):
    return FLOW.estimate(x, t, torch.tanh(1.5 * x) - 0.3 * x + t)


def noise_for(indices):
    return lambda step, evaluation=0: rng.normal((4,), 11, "solver", indices, step, evaluation)


def start_for(indices):
    return rng.normal((4,), 11, "prior", indices)


def run(name: str, steps: int = 7, indices=(0, 1, 2), evaluate=network, **settings) -> torch.Tensor:
    solver = sampler({"name": name, **settings})
    return finish(solver.sample(evaluate, start_for(indices), solver.grid(FLOW, steps), FLOW, noise_for(indices)))


def test_the_registered_samplers():
    assert ALL == [
        "adams-bashforth", "ddim", "ddpm", "dpmpp-2m", "dpmpp-2m-sde", "edm", "euler", "fireflow",
        "flow-dpm-solver", "heun", "midpoint", "sde", "sde-heun",
    ]  # fmt: skip


@pytest.mark.parametrize("name", ALL)
def test_config_is_plain_and_builds_the_same_again(name):
    solver = sampler(name)
    assert sampler(json.loads(json.dumps(solver.config(), allow_nan=False))) == solver
    assert SAMPLERS.info(name).target.__doc__


@pytest.mark.parametrize("name", ALL)
def test_counts_steps_and_shapes(name):
    solver, seen = sampler(name), []

    def evaluate(x, t, *, step, evaluation=0, told=None):
        seen.append((step, evaluation))
        return network(x, t, step=step, evaluation=evaluation)

    for count in (2, 5):
        seen.clear()
        grid = solver.grid(FLOW, count)
        steps = list(solver.sample(evaluate, start_for((0, 1, 2)), grid, FLOW, noise_for((0, 1, 2))))
        assert len(seen) == solver.evaluations(count) and len(set(seen)) == len(seen)
        assert [s.index for s in steps] == list(range(count))
        assert [s.t for s in steps] == grid[:-1].tolist() and [s.t_next for s in steps] == grid[1:].tolist()
        assert all(isinstance(s, Step) and s.x.shape == SHAPE and s.x.isfinite().all() for s in steps)


@pytest.mark.parametrize("name", ALL)
def test_an_image_does_not_depend_on_its_batch(name):
    together, alone = run(name, indices=(4, 7, 9)), run(name, indices=(7,))
    assert torch.equal(together[1:2], alone)
    assert torch.equal(run(name), run(name))


@pytest.mark.parametrize("name", ALL)
def test_the_state_keeps_its_dtype_and_coefficients_are_python_floats(name):
    solver = sampler(name)
    grid = solver.grid(FLOW, 5)
    rows = solver.prepare(FLOW, grid.tolist())
    assert all(isinstance(v, float) or v is FLOW for row in rows for v in row)
    half = start_for((0, 1, 2)).bfloat16()
    draws = noise_for((0, 1, 2))
    for step in solver.sample(network, half, grid, FLOW, lambda s, e=0: draws(s, e).bfloat16()):
        assert step.x.dtype == torch.bfloat16


@pytest.mark.parametrize("name", ALL)
def test_no_value_of_the_state_reaches_the_host(name):
    """On the meta device any look at a value, hence any wait for a device, would raise."""
    solver = sampler(name)
    x = torch.empty(SHAPE, device="meta")
    steps = solver.sample(network, x, solver.grid(FLOW, 4), FLOW, lambda step, evaluation=0: torch.empty_like(x))
    assert [step.x.device.type for step in steps] == ["meta"] * 4


@pytest.mark.parametrize("name", ALL)
def test_a_changed_latent_is_taken_up_and_history_forgotten(name):
    solver = sampler(name)
    grid = solver.grid(FLOW, 6)
    replaced = torch.full(SHAPE, 0.25)
    calls = []

    def evaluate(x, t, *, step, evaluation=0, told=None):
        calls.append(step)
        return network(x, t, step=step)

    steps = solver.sample(evaluate, start_for((0, 1, 2)), grid, FLOW, noise_for((0, 1, 2)))
    next(steps), next(steps)
    after = steps.send(Changed(replaced))
    assert after.index == 2
    if name == "fireflow":
        assert calls == [0, 0, 1, 2, 2]
    else:
        expected = solver.sample(evaluate, replaced, grid[2:], FLOW, lambda s, e=0: noise_for((0, 1, 2))(s + 2, e))
        torch.testing.assert_close(after.x, next(expected).x)


@pytest.mark.parametrize("name", ALL)
def test_inversion_is_the_same_code_or_a_clear_refusal(name):
    solver, path = sampler(name), process("gvp")
    grid = torch.linspace(0.97, 0, 9, dtype=torch.float64)
    x0 = start_for((0, 1)).double()
    if name in STOCHASTIC or name == "flow-dpm-solver":
        with pytest.raises(UserError, match="cannot invert|needs the linear process"):
            invert(solver, Mixture(path), x0, grid, path)
        return
    trajectory = invert(solver, Mixture(path), x0, grid, path)
    assert trajectory.t == tuple(grid.flip(0).tolist()) and len(trajectory.x) == 9
    assert trajectory.reversed().x[0] is trajectory.x[-1] and torch.equal(trajectory.x[0], x0)
    assert all(x.isfinite().all() for x in trajectory.x)


@pytest.mark.parametrize("name", [n for n in ALL if n not in (*STOCHASTIC, "midpoint", "fireflow")])
def test_the_last_step_returns_the_data_estimate(name):
    solver = sampler(name)
    *_, last = solver.sample(network, start_for((0, 1, 2)), solver.grid(FLOW, 5), FLOW, no_noise)
    assert torch.equal(last.x, last.estimate.x0)


def test_flow_euler_is_ddim():
    torch.testing.assert_close(run("euler", 20), run("ddim", 20), rtol=1e-6, atol=1e-6)


def test_dpm_solver_at_first_order_is_ddim():
    grid = sampler("ddim").grid(FLOW, 2)
    ends = [finish(sampler(n).sample(network, start_for((0,)), grid, FLOW, no_noise)) for n in ("dpmpp-2m", "ddim")]
    torch.testing.assert_close(ends[0], ends[1], rtol=1e-6, atol=1e-6)


def test_midpoint_is_rf_solvers_taylor_step():
    x, t, h = start_for((0, 1)).double(), 0.6, -0.1
    v1 = network(x, t, step=0).v
    v2 = network(x + h / 2 * v1, t + h / 2, step=0).v
    taylor = x + h * v1 + h**2 / 2 * (v2 - v1) / (h / 2)
    step = next(sampler("midpoint").sample(network, x, torch.tensor([t, t + h]).double(), FLOW, no_noise))
    torch.testing.assert_close(step.x, taylor)


def test_fireflow_reuses_the_last_midpoint_velocity():
    x, reused = start_for((0, 1)).double(), None
    times = [1.0, 0.8, 0.5, 0.3]
    steps = list(sampler("fireflow").sample(network, x, torch.tensor(times).double(), FLOW, no_noise))
    for step, t, t_next in zip(steps, times, times[1:], strict=False):
        reused = network(x, t, step=0).v if reused is None else reused
        middle = (t + t_next) / 2
        reused = network(x + (middle - t) * reused, middle, step=0).v
        x = x + (t_next - t) * reused
        torch.testing.assert_close(step.x, x, rtol=1e-6, atol=1e-6)


def test_no_churn_is_deterministic_and_churn_is_not():
    plain, churned = (run("edm", churn=c) for c in (0.0, 5.0))
    solver = sampler("edm")
    end = finish(solver.sample(network, start_for((0, 1, 2)), solver.grid(FLOW, 7), FLOW, no_noise))
    assert torch.equal(plain, end) and not torch.allclose(plain, churned)


def test_clipping_bounds_the_result():
    def wild(x, t, *, step, evaluation=0, told=None):
        return FLOW.estimate(x, t, x - 5)

    for name in ("euler", "ddim", "dpmpp-2m", "ddpm", "edm"):
        assert run(name, evaluate=wild, clip=1.0).abs().max() <= 1
        assert run(name, evaluate=wild).abs().max() > 1


def test_shift_and_spacing_are_settings():
    assert sampler("euler:shift=3").grid(FLOW, 2).tolist() == [1, 0.75, 0]
    assert sampler("flow-dpm-solver").grid(FLOW, 2).tolist() == [1, 0.75, 0]
    assert sampler("ddim:spacing=trailing").grid(process("discrete-vp"), 4).tolist() == [1, 0.75, 0.5, 0.25, 0]
    assert sampler("euler").spacing is None and dataclasses.replace(sampler("euler"), shift=2.0).shift == 2


def test_sit_counts_250_evaluations():
    solver = sampler("sde")
    grid = solver.grid(FLOW, 250)
    assert grid[0] == 1 and grid[-2].item() == pytest.approx(0.04) and len(grid) == 251
    assert solver.evaluations(250) == 250


def test_strength_takes_the_last_part_of_a_grid():
    grid = sampler("euler").grid(FLOW, 10)
    assert torch.equal(tail(grid, 1.0), grid) and torch.equal(tail(grid, 0.35), grid[7:])
    with pytest.raises(UserError, match="strength 0.05 of 10 steps leaves none"):
        tail(grid, 0.05)


def test_follow_keeps_every_state():
    solver = sampler("euler")
    grid = solver.grid(FLOW, 4)
    trajectory = follow(solver, network, start_for((0,)), grid, FLOW, no_noise)
    assert trajectory.t == tuple(grid.tolist()) and len(trajectory.x) == 5


def test_finish_hands_every_step_to_its_observer():
    solver, seen = sampler("euler"), []
    grid = solver.grid(FLOW, 3)

    def after(step):
        seen.append(step.index)
        return Changed(torch.zeros(1, 4)) if step.index == 2 else None

    end = finish(solver.sample(network, start_for((0,)), grid, FLOW, no_noise), after)
    assert seen == [0, 1, 2] and not end.any()


@pytest.mark.parametrize(
    ("spec", "path", "error", "message"),
    [
        ("eular", "linear", UnknownName, "did you mean 'euler'"),
        ("ddim:etaa=1", "linear", UnknownName, "did you mean 'eta'"),
        ("sde:diffusion=sigmas", "linear", UnknownName, "did you mean 'sigma'"),
        ("sde:last=men", "linear", UnknownName, "did you mean 'mean'"),
        ("flow-dpm-solver", "gvp", UserError, "needs the linear process, got GVP"),
        ("edm:spacing=uniform", "linear", UserError, "use spacing karras or log-snr"),
        ("ddim", "joint", UserError, "needs a Gaussian process, got Joint"),
        ("euler:spacing=trailing", "linear", UserError, "needs a discrete process, got Linear"),
    ],
)
def test_mistakes_are_named(spec, path, error, message):
    built = process({"name": path, "parts": {"a": "linear"}} if path == "joint" else path)
    with pytest.raises(error, match=message):
        solver = sampler(spec)
        list(solver.sample(network, start_for((0,)), solver.grid(built, 4), built, no_noise))


def test_inversion_of_stochastic_settings_is_refused():
    up = torch.tensor([0.1, 0.5, 0.9]).double()
    for spec in ("ddim:eta=0.5", "edm:churn=3"):
        with pytest.raises(UserError, match="inversion is deterministic"):
            list(sampler(spec).sample(network, start_for((0,)), up, FLOW, no_noise))
    path = Linear(predicts="x0")
    with pytest.raises(UserError, match="cannot start at noise level 0 with a 'x0' prediction"):
        invert(sampler("ddim"), Mixture(path), start_for((0,)).double(), torch.tensor([0.9, 0.5, 0.0]).double(), path)


def test_an_infinite_diffusion_is_refused():
    with pytest.raises(UserError, match="'sbdm' is infinite at noise level 1.0"):
        sampler("sde:diffusion=sbdm").prepare(FLOW, [1.0, 0.5, 0.0])


def test_ddim_inversion_tells_the_network_the_level_it_goes_to():
    told = []

    def evaluate(x, t, *, step, evaluation=0, **where):
        told.append(where.get("told"))
        return network(x, t, step=step)

    list(sampler("ddim").sample(evaluate, start_for((0,)), torch.tensor([0.125, 0.5, 0.75]).double(), FLOW, no_noise))
    assert told == [0.5, 0.75]
