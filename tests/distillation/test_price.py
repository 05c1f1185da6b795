"""What a computed sub-module costs: the gradient it adds, and the penalty at which a share is computed."""

from __future__ import annotations

import pytest
import torch

from ditloom.caches.routers import Gates
from ditloom.distillation.price import Price


def test_the_price_is_what_the_last_sub_module_within_the_share_is_worth() -> None:
    gates = Gates(3, 4, 0.1, active=range(1, 3))
    price = Price(gates, torch.ones(4, dtype=torch.float64), penalty=7.0, target=0.75, threshold=0.1)
    worth = torch.tensor([[torch.inf] * 4, [4.0, 1.0, 3.0, 2.0], [8.0, 5.0, 7.0, 6.0]])
    price.settle()
    assert price.penalty == 7.0
    for step in (1, 2):
        error = (worth[step] / (2 * 0.9) * (1 - gates.logits[step].sigmoid()).square()).sum()
        error.backward()
        price.charge(step)
    torch.testing.assert_close(price.worth, worth)
    price.settle()
    assert price.penalty == pytest.approx(3.0)
    everything = Price(gates, price.costs, penalty=7.0, target=0.0, threshold=0.1)
    everything.worth = worth
    everything.settle()
    assert everything.penalty == 7.0


def test_a_price_adds_its_gradient_to_that_of_the_error() -> None:
    gates = Gates(2, 3, 0.1, active=[1])
    scores = gates.logits[1].sigmoid()
    (scores.square().sum() + 0.5 * scores.sum()).backward()
    whole = gates.logits[1].grad.clone()  # type: ignore[union-attr]
    gates.zero_grad()
    gates.logits[1].sigmoid().square().sum().backward()
    Price(gates, torch.ones(3, dtype=torch.float64), penalty=0.5, target=0.0, threshold=0.1).charge(1)
    torch.testing.assert_close(gates.logits[1].grad, whole)
