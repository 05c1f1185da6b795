"""Predictors that are a weighted sum of computed values, with weights that are numbers of the step indices alone.

The weights add up to one. The sum is evaluated as ``z + sum_k w_k (z_k - z)`` around the newest value z, so that a
constant is predicted exactly.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ditloom.sites.codecs import zip_map

Weights = tuple[float, ...]


class Linear(ABC):
    """A predictor that weighs what is stored; with too little stored for its order it takes a lower one."""

    @abstractmethod
    def weights(self, steps: tuple[int, ...], step: int) -> Weights:
        """The weight of the value computed at each of `steps` (ascending) for an estimate at `step`; their sum is 1."""

    def __call__(self, history: Sequence[tuple[int, Any]], step: int) -> Any:
        weights = self.weights(tuple(s for s, _ in history), step)
        return zip_map(lambda *z: _weighted(z, weights), *(z for _, z in history))


def _weighted(values: Sequence[Tensor], weights: Weights) -> Tensor:
    """The weighted sum, in float32 at least, in the dtype of the values."""
    *others, newest = values
    if not others:
        return newest
    exact = torch.promote_types(newest.dtype, torch.float32)
    base = newest.to(exact)
    total = torch.lerp(base, others[0].to(exact), weights[0])
    for z, w in zip(others[1:], weights[1:], strict=False):
        total = total.add_(z.to(exact) - base, alpha=w)
    return total.to(newest.dtype)
