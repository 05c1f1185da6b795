"""Every random draw follows from (seed, stream name, global image index, step, evaluation) and nothing else."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor


def key(seed: int, name: str, index: int = 0, step: int = 0, evaluation: int = 0) -> int:
    """A 63-bit seed that is a stable hash of its arguments, equal on every machine and Python."""
    text = f"{seed}/{name}/{index}/{step}/{evaluation}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") >> 1


def stream(seed: int, name: str, index: int = 0, step: int = 0, evaluation: int = 0) -> torch.Generator:
    """A CPU generator for one purpose (`name`), image, step and evaluation."""
    return torch.Generator().manual_seed(key(seed, name, index, step, evaluation))


def normal(
    shape: Sequence[int], seed: int, name: str, indices: Sequence[int], step: int = 0, evaluation: int = 0
) -> Tensor:
    """Standard normal draws [len(indices), *shape], one generator per image, so that batches never matter."""
    draws = [torch.randn(*shape, generator=stream(seed, name, i, step, evaluation)) for i in indices]
    return torch.stack(draws) if draws else torch.empty(0, *shape)


def uniform(
    shape: Sequence[int], seed: int, name: str, indices: Sequence[int], step: int = 0, evaluation: int = 0
) -> Tensor:
    """Uniform draws in [0, 1), float64, [len(indices), *shape], one generator per image."""
    draws = [
        torch.rand(*shape, generator=stream(seed, name, i, step, evaluation), dtype=torch.float64) for i in indices
    ]
    return torch.stack(draws) if draws else torch.empty(0, *shape, dtype=torch.float64)


def integers(
    high: int, shape: Sequence[int], seed: int, name: str, indices: Sequence[int], step: int = 0, evaluation: int = 0
) -> Tensor:
    """Integers in [0, high), int64, [len(indices), *shape], one generator per image."""
    draws = [torch.randint(high, tuple(shape), generator=stream(seed, name, i, step, evaluation)) for i in indices]
    return torch.stack(draws) if draws else torch.empty(0, *shape, dtype=torch.int64)
