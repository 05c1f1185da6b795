"""Kernel distance against torchmetrics, a direct sum, and its unbiasedness."""

import pytest
import torch
from torchmetrics.image.kid import poly_mmd

from ditloom.contracts.errors import UserError
from ditloom.measure.kernel_distance import kernel, kernel_distance, squared_mmd


def draws(count: int, shift: float = 0.0, seed: int = 0, width: int = 16) -> torch.Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + shift


def test_the_estimate_is_that_of_torchmetrics():
    x, y = draws(40, seed=1), draws(40, 0.3, seed=2)
    assert float(squared_mmd(x, y)) == pytest.approx(float(poly_mmd(x, y)), rel=1e-10)


def test_the_estimate_is_the_sum_over_pairs_for_unlike_counts():
    x, y = draws(5, seed=1), draws(7, 0.5, seed=2)
    k = lambda a, b: float(kernel(a[None], b[None]))  # noqa: E731
    within_x = sum(k(a, b) for i, a in enumerate(x) for j, b in enumerate(x) if i != j) / 20
    within_y = sum(k(a, b) for i, a in enumerate(y) for j, b in enumerate(y) if i != j) / 42
    between = sum(k(a, b) for a in x for b in y) / 35
    assert float(squared_mmd(x, y)) == pytest.approx(within_x + within_y - 2 * between, rel=1e-9)


def test_it_is_unbiased_at_equal_distributions_and_far_from_zero_at_unlike_ones():
    mean, deviation, size = kernel_distance(draws(400, seed=1), draws(400, seed=2), 50, 200)
    assert size == 50
    assert abs(mean) < deviation
    repeated = torch.stack([squared_mmd(draws(30, seed=2 * i), draws(30, seed=2 * i + 1)) for i in range(300)])
    assert abs(repeated.mean()) < 3 * repeated.std() / 300**0.5
    far, spread, _ = kernel_distance(draws(400, seed=1), draws(400, 1.0, seed=2), 50, 50)
    assert far > 5 * spread


def test_subsets_follow_from_the_seed_and_are_at_most_half_of_the_smaller_set():
    x, y = draws(30, seed=1), draws(90, seed=2)
    assert kernel_distance(x, y) == kernel_distance(x, y)
    assert kernel_distance(x, y) != kernel_distance(x, y, seed=1)
    assert kernel_distance(x, y)[2] == 15


def test_too_few_pictures_are_refused():
    with pytest.raises(UserError, match="4 pictures a side"):
        kernel_distance(draws(3), draws(90))
