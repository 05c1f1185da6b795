"""The selective scan in chunks against sequential recurrences, forward and backward.

python -m benchmarks scan

Two sequential peers: `sequential_scan`, our reference, and the loop as the Mamba repository's `selective_scan_ref`
writes it, which indexes whole tensors at every token (so that its backward pass is quadratic in the tokens).
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.timing import interleaved, ratios
from ditloom.parts.selective_scan import selective_scan, sequential_scan

TOKENS, STATES = 1024, 16
CHANNELS = (64, 256, 736)
RUNS = 3

Scan = Callable[..., Tensor]


def indexed_scan(u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """The recurrence with decays and inputs of all tokens made first and indexed one by one."""
    decays = torch.exp(torch.einsum("bld,dn->bldn", dt, A))
    given = torch.einsum("bld,bln,bld->bldn", dt, B, u)
    h, outputs = decays.new_zeros(decays[:, 0].shape), []
    for i in range(u.shape[1]):
        h = decays[:, i] * h + given[:, i]
        outputs.append(torch.einsum("bdn,bn->bd", h, C[:, i]))
    return torch.stack(outputs, dim=1)


def inputs(channels: int, tokens: int = TOKENS) -> list[Tensor]:
    """u, dt, A, B, C of a fresh Mamba: A from -1 to -16, dt up to 0.1."""
    u = torch.randn(1, tokens, channels)
    dt = 0.1 * torch.rand(1, tokens, channels)
    A = -torch.arange(1.0, STATES + 1).expand(channels, STATES).contiguous()
    return [t.requires_grad_() for t in (u, dt, A, torch.randn(1, tokens, STATES), torch.randn(1, tokens, STATES))]


def both_ways(scan: Scan, given: list[Tensor]) -> None:
    """Forward and backward."""
    torch.autograd.grad(scan(*given).sum(), given)


def largest_difference(a: Scan, b: Scan, given: list[Tensor]) -> float:
    """Over outputs and gradients, relative to the largest value of each."""
    pairs = zip(*([y, *torch.autograd.grad(y.square().sum(), given)] for y in (a(*given), b(*given))), strict=True)
    return max(float((x - y).detach().abs().max() / y.detach().abs().max()) for x, y in pairs)


def scans(channels: int, indexed: bool) -> dict[str, float]:
    """Times and ratios at one width."""
    given = inputs(channels)
    contenders = {"sequential": sequential_scan, "chunks": selective_scan}
    if indexed:
        contenders["indexed"] = indexed_scan
    runs = {k: (lambda s=s: both_ways(s, given), lambda s=s: _forward(s, given)) for k, s in contenders.items()}
    times = interleaved({k: both for k, (both, _) in runs.items()}, RUNS, 1, time.thread_time)
    forward = interleaved({k: alone for k, (_, alone) in runs.items()}, RUNS, 1, time.thread_time)
    found = {f"{k} ms": 1000 * t.median for k, t in times.items()}
    for name in contenders.keys() - {"chunks"}:
        found[f"{name} over chunks"] = ratios(times[name], times["chunks"])
        found[f"{name} over chunks, forward"] = ratios(forward[name], forward["chunks"])
    return {**found, "largest difference": largest_difference(selective_scan, sequential_scan, given)}


@torch.no_grad()
def _forward(scan: Scan, given: list[Tensor]) -> Tensor:
    return scan(*given)


def main() -> None:
    """Print all tables as JSON. Time of one thread: on several, small steps wait for each other."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    found = {f"{TOKENS} tokens, {n} channels, {STATES} states": scans(n, n == CHANNELS[0]) for n in CHANNELS}
    odd = largest_difference(selective_scan, sequential_scan, inputs(CHANNELS[0], 1000))
    print(json.dumps({"threads": torch.get_num_threads(), **found, "largest difference, 1000 tokens": odd}, indent=2))
