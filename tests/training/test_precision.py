"""fp32 masters beside lower-precision compute weights."""

import pytest
import torch
from torch import nn

from ditloom.contracts.errors import UnknownName
from ditloom.training.precision import MasterWeights, precision_of


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))


def test_fp32_training_has_no_copies():
    model = network()
    masters = MasterWeights(model, torch.float32)
    assert all(masters.named[name] is p for name, p in model.named_parameters())


def test_masters_hold_the_weights_exactly_and_copies_their_rounding():
    model, original = network(), network()
    masters = MasterWeights(model, torch.bfloat16)
    for name, p in original.named_parameters():
        assert torch.equal(masters.named[name], p)
        assert torch.equal(model.get_parameter(name), p.bfloat16())


def test_small_updates_add_up_in_the_masters_though_each_is_lost_in_bf16():
    model = network()
    masters = MasterWeights(model, torch.bfloat16)
    weight = masters.named["0.weight"]
    weight.data.fill_(1.0)
    for _ in range(100):
        weight.data.add_(1e-4)
    masters.publish()
    assert torch.equal(model[0].weight, torch.full_like(model[0].weight, 1.01))
    assert torch.tensor(1.0).bfloat16() + torch.tensor(1e-4).bfloat16() == 1.0


def test_gradients_of_several_passes_add_up_in_fp32():
    model = network()
    masters = MasterWeights(model, torch.bfloat16)
    total = {name: torch.zeros(p.shape) for name, p in model.named_parameters()}
    for seed in range(4):
        x = torch.randn(8, 16, generator=torch.Generator().manual_seed(seed)).bfloat16()
        model(x).float().square().mean().backward()
        for name, p in model.named_parameters():
            total[name] += p.grad.float()
        masters.collect()
        assert all(p.grad is None for p in model.parameters())
    for name, master in masters.named.items():
        assert master.grad.dtype == torch.float32 and torch.equal(master.grad, total[name])
    masters.forget_gradients()
    assert all(master.grad is None for master in masters.named.values())


def test_frozen_weights_keep_an_exact_master_and_are_not_trained():
    model = network()
    model[0].weight.requires_grad_(False)
    exact = model[0].weight.clone()
    masters = MasterWeights(model, torch.bfloat16)
    assert "0.weight" not in masters.trained and torch.equal(masters.named["0.weight"], exact)


def test_an_unknown_policy_names_the_nearest():
    with pytest.raises(UnknownName, match="did you mean 'bf16'"):
        precision_of("bf61")
