"""Parameter groups, schedules by image count, clipping, and optimiser state that moves exactly."""

import copy
import math

import pytest
import torch
from torch import nn

from ditloom.training.optim import (
    OPTIMISERS,
    Adam,
    AdamW,
    clip_gradients,
    load_state,
    parameter_groups,
    set_rate,
    state_tensors,
)
from ditloom.training.schedules import SCHEDULES, Constant, Cosine, InverseSqrt, Linear


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 4))


def train(model, optimiser, steps, start=0):
    for step in range(start, start + steps):
        x = torch.randn(5, 4, generator=torch.Generator().manual_seed(step))
        optimiser.zero_grad()
        model(x).square().mean().backward()
        optimiser.step()


def test_vectors_do_not_decay_and_scales_follow_the_first_match():
    model = network()
    groups = parameter_groups(dict(model.named_parameters()), 0.1, {"2.*": 0.5, "*": 2.0})
    seen = {id(p): (g["weight_decay"], g["scale"]) for g in groups for p in g["params"]}
    assert seen[id(model[0].weight)] == (0.1, 2.0) and seen[id(model[0].bias)] == (0.0, 2.0)
    assert seen[id(model[2].weight)] == (0.1, 0.5) and seen[id(model[1].weight)] == (0.0, 2.0)
    assert sum(len(g["params"]) for g in groups) == 6


@pytest.mark.parametrize("settings", [AdamW(lr=1e-2, weight_decay=0.1), Adam(lr=1e-2)], ids=["adamw", "adam"])
def test_a_step_is_the_plain_formula(settings):
    model = network()
    parameters = dict(model.named_parameters())
    optimiser = settings.build(parameters)
    before = {name: p.detach().double() for name, p in parameters.items()}
    moments = {name: (0.0, 0.0) for name in parameters}
    for step in (1, 2, 3):
        optimiser.zero_grad()
        x = torch.randn(5, 4, generator=torch.Generator().manual_seed(step))
        model(x).square().mean().backward()
        for name, p in parameters.items():
            g = p.grad.double()
            m, v = moments[name]
            m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
            moments[name] = m, v
            decay = getattr(settings, "weight_decay", 0.0) if p.ndim > 1 else 0.0
            update = (m / (1 - 0.9**step)) / ((v / (1 - 0.999**step)).sqrt() + 1e-8)
            before[name] = before[name] * (1 - 1e-2 * decay) - 1e-2 * update
        optimiser.step()
    for name, p in parameters.items():
        torch.testing.assert_close(p.double(), before[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", OPTIMISERS)
def test_state_moves_to_a_fresh_optimiser_bit_for_bit(name):
    straight, parted = network(), network()
    optimiser = OPTIMISERS[name](lr=1e-2).build(dict(straight.named_parameters()))
    train(straight, optimiser, 6)
    first = OPTIMISERS[name](lr=1e-2).build(dict(parted.named_parameters()))
    train(parted, first, 3)
    saved = {key: value.clone() for key, value in state_tensors(first, dict(parted.named_parameters())).items()}
    resumed = copy.deepcopy(parted)
    second = OPTIMISERS[name](lr=1e-2).build(dict(resumed.named_parameters()))
    load_state(second, dict(resumed.named_parameters()), saved)
    train(resumed, second, 3, start=3)
    for a, b in zip(straight.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)


def test_the_rate_keeps_each_group_s_scale():
    optimiser = AdamW(lr=1.0, scales={"0.*": 0.25}).build(dict(network().named_parameters()))
    set_rate(optimiser, 0.5)
    assert {group["lr"] for group in optimiser.param_groups} == {0.125, 0.5}


def test_clipping_limits_the_joint_norm_and_reports_the_one_before():
    model = network()
    model(torch.ones(2, 4)).square().sum().backward()
    before = {name: p.grad.clone() for name, p in model.named_parameters()}
    total = math.sqrt(sum(float(g.double().square().sum()) for g in before.values()))
    assert float(clip_gradients(model.parameters(), None)) == pytest.approx(total, rel=1e-6)
    assert all(torch.equal(before[name], p.grad) for name, p in model.named_parameters())
    assert float(clip_gradients(model.parameters(), total / 2)) == pytest.approx(total, rel=1e-6)
    assert float(clip_gradients(model.parameters(), None)) == pytest.approx(total / 2, rel=1e-5)


def test_schedules_match_their_closed_forms():
    assert [Constant(warmup=100).factor(n) for n in (10, 100, 500)] == [0.1, 1.0, 1.0]
    line = Linear(warmup=100, total=1100, floor=0.2)
    assert [line.factor(n) for n in (50, 100, 600, 1100, 9999)] == pytest.approx([0.5, 1.0, 0.6, 0.2, 0.2])
    cosine = Cosine(warmup=0, total=1000, floor=0.0)
    assert [cosine.factor(n) for n in (0, 250, 500, 1000)] == pytest.approx([1, (1 + math.sqrt(0.5)) / 2, 0.5, 0])
    decay = InverseSqrt(warmup=10, reference=100)
    assert [decay.factor(n) for n in (5, 50, 100, 400)] == pytest.approx([0.5, 1.0, 1.0, 0.5])


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_schedule_is_continuous_and_between_0_and_1(name):
    settings = {"total": 5000} if name in ("linear", "cosine") else {}
    settings |= {"reference": 700} if name == "inverse-sqrt" else {}
    schedule = SCHEDULES[name](warmup=300, **settings)
    values = [schedule.factor(n) for n in range(1, 6000)]
    assert all(0 <= value <= 1 for value in values)
    assert max(abs(a - b) for a, b in zip(values, values[1:], strict=False)) < 0.01


@pytest.mark.parametrize("name", ["linear", "cosine", "inverse-sqrt"])
def test_schedules_equal_torch_s_own(name):
    from torch.optim import lr_scheduler as official

    optimiser = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    ours, theirs = {
        "linear": (Linear(total=50), official.LinearLR(optimiser, 1.0, 0.0, 50)),
        "cosine": (Cosine(total=50), official.CosineAnnealingLR(optimiser, 50)),
        "inverse-sqrt": (
            InverseSqrt(reference=10),
            official.LambdaLR(optimiser, lambda k: (10 / max(k, 10)) ** 0.5),
        ),
    }[name]
    for step in range(50):
        assert ours.factor(step) == pytest.approx(optimiser.param_groups[0]["lr"], abs=1e-9)
        optimiser.step()
        theirs.step()
