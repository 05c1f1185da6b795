"""Every random draw follows from (seed, stream name, global image index, step, evaluation) and nothing else."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor


def digest(seed: int, name: str, index: int = 0, step: int = 0, evaluation: int = 0) -> bytes:
    """128 bits that are a stable hash of the arguments, equal on every machine and Python."""
    text = f"{seed}/{name}/{index}/{step}/{evaluation}".encode()
    return hashlib.blake2b(text, digest_size=16).digest()


def key(seed: int, name: str, index: int = 0, step: int = 0, evaluation: int = 0) -> int:
    """The digest as a 63-bit integer, for whoever takes a seed."""
    return int.from_bytes(digest(seed, name, index, step, evaluation)[:8], "little") >> 1


def stream(seed: int, name: str, index: int = 0, step: int = 0, evaluation: int = 0) -> torch.Generator:
    """A torch CPU generator for one purpose, for shuffles and the like.

    It uses only 32 bits of its seed, so that two of many streams may agree; draws per image do not come from here.
    """
    return torch.Generator().manual_seed(key(seed, name, index, step, evaluation))


def philox(seed: int, name: str, index: int = 0, step: int = 0, evaluation: int = 0) -> np.random.Generator:
    """A counter-based generator keyed by all 128 bits (Salmon et al. 2011)."""
    number = int.from_bytes(digest(seed, name, index, step, evaluation), "little")
    return np.random.Generator(np.random.Philox(key=number))


def normal(
    shape: Sequence[int], seed: int, name: str, indices: Sequence[int], step: int = 0, evaluation: int = 0
) -> Tensor:
    """Standard normal draws [len(indices), *shape], float32, one generator per image, so that batches never matter."""
    at = (seed, name, step, evaluation)
    return _per_image(lambda g: g.standard_normal(tuple(shape), dtype=np.float32), shape, torch.float32, indices, *at)


def uniform(
    shape: Sequence[int], seed: int, name: str, indices: Sequence[int], step: int = 0, evaluation: int = 0
) -> Tensor:
    """Uniform draws in [0, 1), float64, [len(indices), *shape], one generator per image."""
    at = (seed, name, step, evaluation)
    return _per_image(lambda g: g.random(tuple(shape)), shape, torch.float64, indices, *at)


def integers(
    high: int, shape: Sequence[int], seed: int, name: str, indices: Sequence[int], step: int = 0, evaluation: int = 0
) -> Tensor:
    """Integers in [0, high), int64, [len(indices), *shape], one generator per image."""
    at = (seed, name, step, evaluation)
    return _per_image(lambda g: g.integers(high, size=tuple(shape)), shape, torch.int64, indices, *at)


def _per_image(
    draw: Callable[[np.random.Generator], object],
    shape: Sequence[int],
    dtype: torch.dtype,
    indices: Sequence[int],
    seed: int,
    name: str,
    step: int,
    evaluation: int,
) -> Tensor:
    draws = [torch.as_tensor(draw(philox(seed, name, i, step, evaluation)), dtype=dtype) for i in indices]
    return torch.stack(draws) if draws else torch.empty(0, *shape, dtype=dtype)
