"""Kernel distance: squared maximum mean discrepancy with the cubic kernel of KID (Binkowski et al. 2018, "Demystifying
MMD GANs", section 4).

    k(x, y) = (x . y / d + 1)^3
    MMD^2   = mean of k(x, x') over x != x'  +  mean of k(y, y') over y != y'  -  2 mean of k(x, y)

Unbiased at any N, unlike the Frechet distance, so it is the one to read when pictures are few; it may fall below 0.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ditloom.contracts.errors import UserError
from ditloom.contracts.registry import register
from ditloom.contracts.rng import stream
from ditloom.measure.evidence import Evidence, Reading


def kernel(x: Tensor, y: Tensor) -> Tensor:
    """[N, d], [M, d] to [N, M]."""
    return (x @ y.T / x.shape[1] + 1) ** 3


def squared_mmd(x: Tensor, y: Tensor) -> Tensor:
    """The unbiased estimate from features [N, d] and [M, d], float64."""
    x, y = x.double(), y.double()
    return _mean_off_diagonal(kernel(x, x)) + _mean_off_diagonal(kernel(y, y)) - 2 * kernel(x, y).mean()


def kernel_distance(
    a: Tensor, b: Tensor, subset_size: int = 1000, subsets: int = 100, seed: int = 0
) -> tuple[float, float, int]:
    """Mean and standard deviation over random subsets, and their size.

    The size is at most half of the smaller set, so that subsets differ; the standard deviation, which is what KID
    is published with, then overstates the standard error of the mean.
    """
    size = min(subset_size, len(a) // 2, len(b) // 2)
    if size < 2 or subsets < 2:
        raise UserError(f"the kernel distance needs 4 pictures a side and 2 subsets, got {len(a)}, {len(b)}, {subsets}")
    values = []
    for index in range(subsets):
        draw = stream(seed, "kernel-distance", index)
        rows = [torch.randperm(len(x), generator=draw)[:size] for x in (a, b)]
        values.append(squared_mmd(a[rows[0]], b[rows[1]]))
    found = torch.stack(values)
    return float(found.mean()), float(found.std()), size


def _mean_off_diagonal(matrix: Tensor) -> Tensor:
    count = len(matrix)
    return (matrix.sum() - matrix.diagonal().sum()) / (count * (count - 1))


@register("kernel-distance", paper="Binkowski et al. 2018, arXiv:1801.01401")
@dataclass(frozen=True, kw_only=True)
class KernelDistance:
    """Kernel distance of the drawn pictures to the training pictures; its error is the deviation over subsets."""

    subset_size: int = 1000
    subsets: int = 100
    seed: int = 0

    def __call__(self, evidence: Evidence) -> list[Reading]:
        real = evidence.training_features
        mean, deviation, size = kernel_distance(
            evidence.drawn_features, real, self.subset_size, self.subsets, self.seed
        )
        facts = {"reference": "training", "reference_samples": len(real), "subset": size, "subsets": self.subsets}
        return [Reading("kernel-distance", mean, deviation, facts)]
