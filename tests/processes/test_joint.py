"""Processes of several components: the same as their parts, together; and the arithmetic of named tensors."""

from __future__ import annotations

import pytest
import torch
from torch.utils import _pytree

from ditloom.contracts.errors import UserError
from ditloom.contracts.process import Components
from ditloom.processes import process
from ditloom.processes.joint import Joint
from ditloom.samplers import sampler
from ditloom.samplers.trajectory import finish

PARTS = {"lattice": "linear", "coords": "discrete-vp:predicts=eps+var"}


def batch():
    generator = torch.Generator().manual_seed(0)
    shapes = {"lattice": (3, 2, 4), "coords": (3, 5, 4)}
    x0, noise = (Components({k: torch.randn(s, generator=generator) for k, s in shapes.items()}) for _ in range(2))
    out = Components({"lattice": torch.randn(3, 2, 4), "coords": torch.randn(3, 10, 4)})
    return x0, noise, out, torch.tensor([0.2, 0.5, 0.9])


def test_components_do_arithmetic_and_are_a_pytree():
    a, b = (Components({"x": torch.full((2,), v), "y": torch.full((3,), 2 * v)}) for v in (1.0, 3.0))
    mixed = 0.5 * (a + b) - a / 2 + 1
    assert mixed["x"].tolist() == [2.5, 2.5] and mixed["y"].tolist() == [4.0] * 3
    assert (-a)["x"].tolist() == [-1, -1] and (a * b)["y"].tolist() == [12.0] * 3
    assert a.to(torch.float64)["y"].dtype == torch.float64
    doubled = _pytree.tree_map(lambda v: 2 * v, a)
    assert isinstance(doubled, Components) and doubled["y"].tolist() == [4.0] * 3


def test_every_part_is_what_it_is_alone():
    joint, (x0, noise, out, t) = Joint(parts=PARTS), batch()
    x, target, loss = joint.add_noise(x0, noise, t), joint.target(x0, noise, t), joint.loss(out, x0, noise, t)
    estimate, total = joint.estimate(x, t, out), 0
    for name, spec in PARTS.items():
        alone = process(spec)
        assert torch.equal(x[name], alone.add_noise(x0[name], noise[name], t))
        assert torch.equal(target[name], alone.target(x0[name], noise[name], t))
        assert torch.equal(estimate.x0[name], alone.estimate(x[name], t, out[name]).x0)
        assert torch.equal(estimate.v[name], alone.estimate(x[name], t, out[name]).v)
        own = alone.loss(out[name], x0[name], noise[name], t)
        assert all(torch.equal(loss.terms[f"{name}/{k}"], v) for k, v in own.terms.items())
        total = total + own.total
    torch.testing.assert_close(loss.total, total)
    assert joint.span == (1 / 1000, 1.0)


def test_weights_and_given_parts():
    joint, (x0, noise, out, t) = Joint(parts=PARTS, weights={"coords": 3.0}), batch()
    alone = Joint(parts=PARTS).loss(out, x0, noise, {"lattice": None, "coords": t})
    given = joint.loss(out, x0, noise, {"lattice": None, "coords": t})
    torch.testing.assert_close(given.total, 3 * alone.total)
    x = joint.add_noise(x0, noise, {"lattice": None, "coords": t})
    assert torch.equal(x["lattice"], x0["lattice"]) and not torch.equal(x["coords"], x0["coords"])
    estimate = joint.estimate(x, {"lattice": None, "coords": 0.5}, out)
    assert torch.equal(estimate.x0["lattice"], x0["lattice"]) and not estimate.v["lattice"].any()
    with pytest.raises(UserError, match="nothing is left to predict"):
        joint.loss(out, x0, noise, {"lattice": None, "coords": None})


@pytest.mark.parametrize("name", ["euler", "heun", "midpoint", "fireflow", "adams-bashforth", "ddpm"])
def test_solvers_on_velocities_and_ancestral_steps_run_on_components(name):
    parts = {"a": "linear", "b": "gvp"}
    joint, solver = Joint(parts=parts), sampler({"name": name})
    x0 = Components({"a": torch.full((2, 3), 0.7).double(), "b": torch.full((2, 5), -0.4).double()})
    start = Components(
        {k: torch.randn(v.shape, generator=torch.Generator().manual_seed(1)).double() for k, v in x0.items()}
    )

    def evaluate(x, t, *, step, evaluation=0, told=None):
        guesses = {k: p.estimate(x[k], t, 0 * x[k]).of("x0", x0[k]) for k, p in joint.processes.items()}
        return joint.estimate(x, t, Components({k: g.v for k, g in guesses.items()}))

    def noise(step, evaluation=0):
        return joint.draw({"a": (3,), "b": (5,)}, 0, "solver", [0, 1], step, evaluation)

    grid = torch.linspace(0.98, 0, 21, dtype=torch.float64)
    end = finish(solver.sample(evaluate, start, grid, joint, noise))
    for k, v in end.items():
        tolerance = 1e-9 if name in ("euler", "heun", "adams-bashforth", "ddpm") else 0.1
        torch.testing.assert_close(v, x0[k].to(v.dtype), rtol=0, atol=tolerance)


def test_draws_are_separate_and_independent_of_the_batch():
    joint = Joint(parts=PARTS)
    shape = {"lattice": (4,), "coords": (4,)}
    both = joint.draw(shape, 7, "prior", [3, 9])
    assert torch.equal(both["coords"][1:], joint.draw(shape, 7, "prior", [9])["coords"])
    assert not torch.equal(both["lattice"], both["coords"])


def test_config_round_trip_and_guidance():
    joint, (_, _, out, _) = Joint(parts=PARTS, weights={"coords": 2.0}), batch()
    again = process(joint.config())
    assert again.config() == joint.config() and again.processes == joint.processes
    strong, rest = joint.split(out)
    weak, _ = joint.split(out * 0)
    guided = joint.join(joint.guide(strong, weak, 2.0), rest)
    torch.testing.assert_close(guided["lattice"], 2 * out["lattice"])
    torch.testing.assert_close(guided["coords"], torch.cat([2 * out["coords"][:, :5], out["coords"][:, 5:]], 1))


def test_one_network_time_for_equal_processes():
    assert Joint(parts={"a": "linear", "b": "linear"}).network_time(0.3) == 0.3
    times = Joint(parts={"a": "linear", "b": "edm"}).network_time(0.5)
    assert times["a"] == 0.5 and times["b"] < 0
    with pytest.raises(UserError, match="at least one component"):
        _ = Joint().processes
