"""Measured orders of convergence against the exact flow of a Gaussian mixture, and evaluation counts."""

from __future__ import annotations

import pytest
import torch

from ditloom.contracts.registries import SAMPLERS
from ditloom.processes import process
from ditloom.samplers import sampler
from ditloom.samplers.trajectory import finish, invert
from tests.samplers.mixture import Mixture, no_noise, starts

DETERMINISTIC = ["euler", "ddim", "heun", "midpoint", "fireflow", "adams-bashforth", "dpmpp-2m", "edm"]
ORDER = {name: SAMPLERS.info(name).facts["order"] for name in DETERMINISTIC}
# Grids on which every step of the solver shrinks with 1 / S; a last step of fixed length costs an order.
SPACING = {"dpmpp-2m": "log-snr", "edm": "karras"}


def error(path, name: str, steps: int, **settings) -> float:
    solver = sampler({"name": name, "spacing": SPACING.get(name), **settings})
    grid = solver.grid(path, steps)
    start = grid[0].item()
    x, oracle = starts(path, start), Mixture(path)
    end = finish(solver.sample(oracle, x, grid, path, no_noise))
    assert oracle.calls == solver.evaluations(steps)
    return (end - oracle.flow(x, start, 0.0)).abs().mean().item()


@pytest.mark.parametrize("name", DETERMINISTIC)
@pytest.mark.parametrize("spec", ["linear", "gvp", "edm"])
def test_order(spec, name):
    path = process(spec)
    coarse, fine = error(path, name, 40), error(path, name, 80)
    ideal = 2 ** ORDER[name]
    assert 0.9 * ideal < coarse / fine < 1.25 * ideal, f"{spec} {name}: {coarse:.2e} -> {fine:.2e}"


def test_adams_bashforth_keeps_its_order_on_unequal_steps():
    path = process("linear")
    coarse, fine = (error(path, "adams-bashforth", n, shift=3.0) for n in (80, 160))
    assert 3.6 < coarse / fine < 5


@pytest.mark.parametrize("name", ["ddim", "heun", "midpoint", "dpmpp-2m", "edm"])
def test_order_on_the_discrete_chain(name):
    """sigma' is infinite at t = 0 on this chain, so a grid that also refines there is used."""
    path, spacing = process("discrete-vp"), SPACING.get(name, "respaced")
    coarse, fine = (error(path, name, n, spacing=spacing) for n in (40, 80))
    assert coarse / fine > 0.9 * 2 ** ORDER[name]


@pytest.mark.parametrize(
    ("name", "order"), [("euler", 1), ("ddim", 1), ("midpoint", 2), ("fireflow", 2), ("dpmpp-2m", 2)]
)
@pytest.mark.parametrize("spec", ["linear", "gvp"])
def test_order_of_inversion(spec, name, order):
    """Up from slightly noised data: the same code on the reversed grid, against the exact flow."""
    path, solver = process(spec), sampler({"name": name, **({"told_next": False} if name == "ddim" else {})})
    x = Mixture(path).flow(starts(path), 1.0, 0.02)
    errors = []
    for steps in (40, 80):
        grid = path.level(torch.linspace(-3.8, 3.8, steps + 1, dtype=torch.float64))
        grid[-1] = 0.02
        oracle = Mixture(path)
        top = invert(solver, oracle, x, grid, path).x[-1]
        assert oracle.calls == solver.evaluations(steps)
        errors.append((top - oracle.flow(x, 0.02, grid[0].item())).abs().mean().item())
    assert 0.85 * 2**order < errors[0] / errors[1] < 1.5 * 2**order, errors


@pytest.mark.parametrize("name", [n for n in DETERMINISTIC if n != "edm"])
def test_there_and_back(name):
    """Inversion of samples and sampling again: the error vanishes with the order of the solver."""
    path, solver = process("linear"), sampler({"name": name})
    x0 = Mixture(path).flow(starts(path), 1.0, 0.0)
    gaps = []
    for steps in (20, 80):
        grid = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
        oracle = Mixture(path)
        trajectory = invert(solver, oracle, x0, grid, path)
        assert oracle.calls == solver.evaluations(steps)
        back = finish(solver.sample(Mixture(path), trajectory.x[-1], grid, path, no_noise))
        gaps.append((back - x0).abs().mean().item())
    assert gaps[1] < gaps[0] / 3 and gaps[1] < 0.025


def test_a_straight_coupling_needs_one_euler_step():
    path = process("linear")
    point = Mixture(path, weights=(1.0,), means=(0.6,), deviations=(0.0,))
    x = starts(path)
    end = finish(sampler("euler").sample(point, x, torch.tensor([1.0, 0.0]).double(), path, no_noise))
    torch.testing.assert_close(end, torch.full_like(x, 0.6))


def test_ddim_with_a_thousand_steps_is_the_ode():
    path = process("discrete-vp")
    assert error(path, "ddim", 1000) < 3e-3


def test_a_second_order_solver_beats_its_first_order_part_at_equal_cost():
    path = process("linear")
    assert error(path, "midpoint", 10) < error(path, "euler", 20) / 10
    assert error(path, "dpmpp-2m", 20) < error(path, "ddim", 20, spacing="log-snr") / 3
