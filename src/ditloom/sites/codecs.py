"""What is stored of a site and how it is added back; and the plainest predictor."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor


def zip_map(fn: Callable[..., Any], *trees: Any) -> Any:
    """`fn` over the tensors of equally built trees: a tensor, or dicts and tuples of them."""
    first = trees[0]
    if isinstance(first, dict):
        return {key: zip_map(fn, *(tree[key] for tree in trees)) for key in first}
    if isinstance(first, tuple):
        return tuple(zip_map(fn, *parts) for parts in zip(*trees, strict=True))
    return fn(*trees)


@dataclass(frozen=True)
class Value:
    """Stores the output itself: z = y."""

    def encode(self, x: Any, y: Any) -> Any:
        return y

    def decode(self, x: Any, z: Any) -> Any:
        return z


@dataclass(frozen=True)
class Delta:
    """Stores the change: z = y - x, taken in float32 and kept in the compute dtype; y = x + z."""

    def encode(self, x: Any, y: Any) -> Any:
        return zip_map(_difference, x, y)

    def decode(self, x: Any, z: Any) -> Any:
        return zip_map(lambda a, b: a + b, x, z)


def _difference(x: Tensor, y: Tensor) -> Tensor:
    return (y.float() - x.float()).to(y.dtype)


@dataclass(frozen=True)
class Hold:
    """The last computed value, however old."""

    depth: int = 1

    def __call__(self, history: Sequence[tuple[int, Any]], step: int) -> Any:
        return history[-1][1]


VALUE, DELTA, HOLD = Value(), Delta(), Hold()
