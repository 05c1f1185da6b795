"""The caches that diffusers has as hooks of its own, beside ours on the same transformer: step by step the same.

Compared without guidance, where the definitions agree. Batched guidance differs: diffusers judges by all rows together,
ours by the conditional ones. Its TaylorSeer computes the steps 0..2, 4, 9, 14, ... and forecasts step 3, ours counts
the interval from the warm-up on; its FasterCache extrapolates from outputs that were extrapolated themselves, ours
from computed ones only. Neither can be set to the other.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ditloom
from tests.adapters.driving import SAMPLES, blocks
from tests.adapters.tiny import CASES, Case, drawer

diffusers = pytest.importorskip("diffusers")
STEPS = 12
Computed = list[bool]


def walk(case: Case) -> tuple[list[Tensor], list[float]]:
    """A random walk of x, and its times."""
    draw, first, last = drawer(7), case.times[0], case.times[-1]
    x, times = draw(SAMPLES, *case.latent), torch.linspace(first, last, STEPS).tolist()
    if not case.time.is_floating_point:
        times = [float(round(t)) for t in times]
    moves = torch.stack([0.3 * draw(SAMPLES, *case.latent) for _ in range(STEPS)]).cumsum(0)
    return [x + move for move in moves], times


@torch.no_grad()
def steps(case: Case, around: Callable[[float], Any], watched: nn.Module) -> tuple[list[Tensor], Computed]:
    """Outputs of a conditional loop, and on which steps `watched` was computed."""
    calls: list[int] = []
    handle = watched.register_forward_hook(lambda *_: calls.append(1))
    outputs, computed = [], []
    try:
        for x, t in zip(*walk(case), strict=True):
            before = len(calls)
            with around(t):
                outputs.append(case.module(**case.arguments(x, t, (0,)), return_dict=False)[0])
            computed.append(len(calls) > before)
    finally:
        handle.remove()
    return outputs, computed


def ours(case: Case, method: str, watched: nn.Module) -> tuple[list[Tensor], Computed]:
    """With a method of ours."""
    with ditloom.using(case.module, method, timesteps=walk(case)[1]) as run, torch.no_grad():
        x, t = walk(case)[0][0], walk(case)[1][0]
        case.module(**case.arguments(x, t, (0,)))  # the first call is also made by the original
        run.restart()
        return steps(case, lambda t: run.branch("cond"), watched)


def theirs(case: Case, config: Any, watched: nn.Module) -> tuple[list[Tensor], Computed]:
    """With a cache of diffusers."""
    module, now = case.module, [0.0]
    if hasattr(config, "current_timestep_callback"):
        config.current_timestep_callback = lambda: now[0]

    @contextmanager
    def around(t: float) -> Any:
        now[0] = t
        with module.cache_context("cond"):
            yield

    module.enable_cache(config)
    try:
        return steps(case, around, watched)
    finally:
        module.disable_cache()
        for part in module.modules():
            vars(part).pop("_diffusers_hook", None)
            vars(part).pop("forward", None)


def query(case: Case, index: int) -> nn.Module:
    """The projection of queries of a block."""
    block = blocks(case)[index]
    return (getattr(block, "attn", None) or block.attn1).to_q


def measured(case: Case) -> list[float]:
    """What the first block's change differs by, over a plain run."""
    seen: list[Tensor] = []

    def note(module: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
        x = args[0] if args else kwargs["hidden_states"]
        seen.append((out[case.order[0]] if isinstance(out, tuple) else out) - x)

    handle = blocks(case)[0].register_forward_hook(note, with_kwargs=True)
    steps(case, lambda t: torch.no_grad(), query(case, 1))
    handle.remove()
    return [float((b - a).abs().mean() / a.abs().mean()) for a, b in zip(seen, seen[1:], strict=False)]


def alike(a: tuple[list[Tensor], Computed], b: tuple[list[Tensor], Computed]) -> None:
    assert a[1] == b[1]
    assert not all(a[1]) and a[1].count(True) > 1
    for x, y in zip(a[0], b[0], strict=True):
        assert torch.allclose(x, y, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["flux", "cogvideox", "wan", "hunyuan-video"])
def test_first_block_cache(name: str) -> None:
    case = CASES[name]
    threshold = 0.9 * max(measured(case))
    config = diffusers.FirstBlockCacheConfig(threshold=threshold)
    watched = query(case, 2)
    alike(ours(case, f"fbcache:threshold={threshold}", watched), theirs(case, config, watched))


@pytest.mark.parametrize("name", ["flux", "cogvideox", "hunyuan-video"])
def test_pyramid_attention_broadcast(name: str) -> None:
    case = CASES[name]
    scale = 1000 if case.times[0] <= 1 else 1
    config = diffusers.PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=3,
        spatial_attention_timestep_skip_range=(100 / scale, 800 / scale),
        spatial_attention_block_identifiers=("transformer_blocks", "single_transformer_blocks"),
    )
    watched = query(case, 1)
    alike(ours(case, "pab:spatial=3,temporal=1,cross=1", watched), theirs(case, config, watched))


def test_magcache() -> None:
    case, watched = CASES["flux"], query(CASES["flux"], 2)
    ratios = [1.0, *(1.0 - 0.02 * (s % 3) for s in range(1, STEPS))]
    config = diffusers.MagCacheConfig(
        threshold=0.06, max_skip_steps=3, retention_ratio=0.2, num_inference_steps=STEPS, mag_ratios=ratios
    )
    method = f"magcache:threshold=0.06,max_consecutive=3,warmup=0.2,ratios={tuple(ratios)}"
    alike(ours(case, method, watched), theirs(case, config, watched))
