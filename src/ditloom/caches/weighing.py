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
CACHED = 1 << 17


class Linear(ABC):
    """A predictor that weighs what is stored; with too little stored for its order it takes a lower one."""

    @abstractmethod
    def weights(self, steps: tuple[int, ...], step: int) -> Weights:
        """The weight of the value computed at each of `steps` (ascending) for an estimate at `step`; their sum is 1."""

    def __call__(self, history: Sequence[tuple[int, Any]], step: int) -> Any:
        weights = self.weights(tuple(s for s, _ in history), step)
        return zip_map(lambda *z: _weighted(z, weights), *(z for _, z in history))


def _weighted(values: Sequence[Tensor], weights: Weights) -> Tensor:
    """The weighted sum, in float32 at least, in the dtype of the values.

    Of two values `lerp` makes it in one pass. Of more, piece by piece, so that what is added up stays in the cache.
    """
    newest = values[-1]
    if len(values) == 1:
        return newest
    if len(values) == 2:
        return torch.lerp(newest, values[0], weights[0])
    total, size = torch.empty(newest.shape, dtype=newest.dtype, device=newest.device), _piece(newest)
    for into, *parts in zip(*(t.reshape(-1).split(size) for t in (total, *values)), strict=True):
        into.copy_(_exactly(parts, weights))
    return total


def _exactly(values: Sequence[Tensor], weights: Weights) -> Tensor:
    first, *others, newest = values
    exact = torch.promote_types(newest.dtype, torch.float32)
    base = newest.to(exact)
    total = torch.lerp(base, first.to(exact), weights[0])
    for z, w in zip(others, weights[1:], strict=False):
        total = total.add_(z.to(exact) - base, alpha=w)
    return total


def _piece(tensor: Tensor) -> int:
    """How many values are summed at a time: on a processor as many as its cache holds, elsewhere all."""
    return min(CACHED, tensor.numel()) if tensor.device.type == "cpu" else tensor.numel()
