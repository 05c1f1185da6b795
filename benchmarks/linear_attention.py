"""ReLU linear attention from 256 to 16,384 tokens: is its time linear, and where does it pass softmax attention?

python -m benchmarks linear_attention
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.timing import interleaved
from ditloom.parts.attention import kernel
from ditloom.parts.linear_attention import linear_attention

TOKENS = tuple(256 * 4**k for k in range(4))
HEADS, HEAD = 8, 32
SOFTMAX_UP_TO = 4096
RUNS = 15


def inputs(tokens: int) -> list[Tensor]:
    """q, k, v of one image."""
    return [torch.randn(1, tokens, HEADS, HEAD) for _ in range(3)]


def slope(times: dict[int, float]) -> float:
    """The exponent p of time = c tokens^p, by least squares in logarithms: 1 is linear, 2 quadratic."""
    x, y = (torch.tensor([math.log(v) for v in values]) for values in (times.keys(), times.values()))
    x, y = x - x.mean(), y - y.mean()
    return float((x * y).sum() / (x * x).sum())


def best(contenders: dict[int, Callable[[], object]]) -> dict[int, float]:
    """Seconds of the fastest run of every size."""
    named = {str(n): run for n, run in contenders.items()}
    return {int(n): min(t.seconds) for n, t in interleaved(named, RUNS, clock=time.thread_time).items()}


@torch.no_grad()
def main() -> None:
    """Print times and exponents as JSON. Time of one thread, all sizes in turn, the best of every size's runs."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    given = {n: inputs(n) for n in TOKENS}
    few = [n for n in TOKENS if n <= SOFTMAX_UP_TO]
    linear = best({n: lambda g=given[n]: linear_attention(*g) for n in TOKENS})
    softmax = best({n: lambda g=given[n]: kernel(*g) for n in few})
    print(
        json.dumps(
            {
                "linear ms": {n: 1000 * t for n, t in linear.items()},
                "linear ns per token": {n: 1e9 * t / n for n, t in linear.items()},
                "softmax ms": {n: 1000 * t for n, t in softmax.items()},
                "exponent of linear": slope(linear),
                "exponent of softmax": slope(softmax),
                "softmax over linear": {n: softmax[n] / linear[n] for n in few},
            },
            indent=2,
        )
    )
