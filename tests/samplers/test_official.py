"""Whole runs of the official samplers of DiT, SiT and EDM, on inputs that can be written down."""

from __future__ import annotations

import math

import pytest
import torch

from ditloom.processes import process
from ditloom.processes.discrete_vp import DiscreteVP
from ditloom.processes.edm import EDM
from ditloom.processes.grids import respaced_grid
from ditloom.samplers import sampler
from ditloom.samplers.trajectory import finish
from tests.processes.waves import wave

SHAPE = (2, 2, 2, 2)
START = wave(SHAPE, 0.77)


def noise(step: int, evaluation: int = 0) -> torch.Tensor:
    return wave(SHAPE, 0.31, step + 1.0)


# facebookresearch/DiT, commit ed81ce22, respacing "4", float64 tables, clip_denoised=False
DIT = {
    "ddpm": [-47.96336749490138, -31.333178039355012, -24.401892313675543, -31.179626502807693, -47.594150760903425],
    "ddim": [-53.8889077423279, -34.12652758245832, -25.513660594971913, -32.90950254232879, -52.14147721934255],
    "ddim:eta=0.7": [
        -50.648198902966485,
        -31.778017037187617,
        -23.701033514233718,
        -31.00883684733288,
        -49.72316880455527,
    ],
}


@pytest.mark.parametrize("spec", DIT)
def test_dit(spec):
    path = DiscreteVP(predicts="eps+var")

    def evaluate(x, t, *, step, evaluation=0, told=None):
        index = round(1000 * t - 1)
        return path.estimate(x, t, torch.cat([0.5 * x + 0.001 * index, torch.sin(x)], 1))

    end = finish(sampler(spec).sample(evaluate, START, respaced_grid(path, "4"), path, noise))
    assert end.flatten()[:5].tolist() == pytest.approx(DIT[spec], rel=1e-9)


# willisma/SiT, commit 947f95bd, Sampler.sample_sde(num_steps=5) in float64, velocity model
SIT = {
    ("linear", "constant", "mean", "sde"): [1.9512733489, 1.9265482834, 1.9070320588, 1.8767709776],
    ("linear", "sbdm", "mean", "sde"): [1.3995677895, 0.9712094979, 0.3147320421, -1.1739196202],
    ("linear", "sbdm", "mean", "sde-heun"): [1.6933235434, 1.4513486125, 0.8714350189, 0.5916470411],
    ("linear", "sigma", "mean", "sde"): [1.6571488393, 1.6785835375, 1.5974648169, 1.4478158511],
    ("linear", "sigma", "mean", "sde-heun"): [1.8201880482, 1.8717691743, 1.8263869848, 1.6827456901],
    ("linear", "sigma", "tweedie", "sde"): [1.6491815013, 1.6721111315, 1.5855264341, 1.4271742552],
    ("linear", "linear", "mean", "sde"): [1.6571488393, 1.6785835375, 1.5974648169, 1.4478158511],
    ("linear", "decreasing", "mean", "sde"): [1.9381826403, 2.1374348253, 2.0681149943, 1.8419688743],
    ("linear", "increasing-decreasing", "mean", "sde"): [1.0946355654, 1.2816041323, 1.1785567485, 0.9647513684],
    ("gvp", "sbdm", "mean", "sde"): [1.8510073395, -3.03755901, -5.9000595367, -4.0782470965],
    ("gvp", "sigma", "mean", "sde"): [1.862192759, 1.8847431667, 1.7653480866, 1.545935803],
    ("gvp", "sigma", "tweedie", "sde"): [1.8194144531, 1.8425034002, 1.7204868638, 1.4978305128],
    ("gvp", "sigma", "euler", "sde-heun"): [2.067107057, 2.1143867049, 2.0364572049, 1.8208793692],
    ("vp", "sbdm", "mean", "sde"): [0.107443419, -0.5374335938, -1.1056300436, -1.522856738],
    ("vp", "sbdm", "mean", "sde-heun"): [1.0559507015, 0.8904972562, 0.6577756903, 0.5181082973],
    ("vp", "sigma", "mean", "sde"): [1.3951901813, 1.3806130869, 1.2122851387, 0.9336988382],
    ("vp", "sigma", "euler", "sde"): [1.3780044067, 1.3633180391, 1.1940676107, 0.9152484185],
}


@pytest.mark.parametrize("case", SIT, ids=" ".join)
def test_sit(case):
    spec, diffusion, last, name = case
    path = process(spec)
    solver = sampler({"name": name, "diffusion": diffusion, "last": last})

    def evaluate(x, t, *, step, evaluation=0, told=None):
        return path.estimate(x, t, -(torch.sin(1.3 * x) + 1 - t))

    end = finish(solver.sample(evaluate, START, solver.grid(path, 5), path, noise))
    assert end.flatten()[:4].tolist() == pytest.approx(SIT[case], abs=2e-9)


# NVlabs/edm, commit 008a4e53, edm_sampler(num_steps=6) around a small preconditioned function
EDM_RUNS = {
    "edm": [-0.08024692048352476, 1.41679831613147, 1.5403416199647932, 1.4365177670255649, 0.46851605320468054],
    "edm:churn=40,s_min=0.05,s_max=50,s_noise=1.003": [
        1.1411016197889254, 1.1021718898098125, 0.6944984278946449, -0.9377955167325795, -2.2135283045320358,
    ],
}  # fmt: skip


@pytest.mark.parametrize("spec", EDM_RUNS)
def test_edm(spec):
    path, solver = EDM(), sampler(spec)
    calls = 0

    def evaluate(x, t, *, step, evaluation=0, told=None):
        nonlocal calls
        calls += 1
        raw = torch.sin(1.7 * path.scale_input(x, t) + path.network_time(t))
        return path.estimate(x, t, raw)

    start = path.prior(wave((2, 1, 2, 2), 0.77))
    draws = lambda step, evaluation=0: wave((2, 1, 2, 2), 0.31, step + 1.0)  # noqa: E731
    end = finish(solver.sample(evaluate, start, solver.grid(path, 6), path, draws))
    assert end.flatten()[:5].tolist() == pytest.approx(EDM_RUNS[spec], rel=1e-9)
    assert calls == solver.evaluations(6) == 11
    assert math.isclose(path.at(solver.grid(path, 6)[0].item()).sigma, 80)
