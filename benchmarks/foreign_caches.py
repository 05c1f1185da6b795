"""Our caches on a transformer of diffusers beside diffusers' own hooks and cache-dit: the same steps, and at what cost.

python -m benchmarks foreign_caches

Every contender has a copy of the same random weights and walks the same latents. "same steps": whether a block in the
middle was computed on the same steps. "difference": the largest one of all outputs. "time": ours over theirs, at that
threshold. "us a call over plain": what deciding and storing costs where nothing is ever reused. On one thread all times
are the thread's own.
"""

from __future__ import annotations

import contextlib
import copy
import io
import json
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

import ditloom
from benchmarks.machine import clock
from benchmarks.timing import Timing, interleaved, ratios

STEPS, RUNS = 12, 15
TIMES = torch.linspace(999, 20, STEPS).round().tolist()
NEVER = 1e-9
Loop = Callable[[], tuple[list[Tensor], list[bool]]]


@dataclass(frozen=True)
class Shape:
    """A CogVideoX transformer: heads of 32 channels, latents [frames, 4, side, side] in patches of 2."""

    name: str
    heads: int
    layers: int
    frames: int
    side: int

    def transformer(self) -> nn.Module:
        """With random weights."""
        torch.manual_seed(0)
        module = diffusers.CogVideoXTransformer3DModel(
            num_attention_heads=self.heads,
            attention_head_dim=32,
            in_channels=4,
            out_channels=4,
            num_layers=self.layers,
            text_embed_dim=64,
            time_embed_dim=64,
            sample_width=self.side,
            sample_height=self.side,
            sample_frames=4 * (self.frames - 1) + 1,
            max_text_seq_length=16,
        )
        return module.eval().requires_grad_(False)

    def latents(self) -> list[Tensor]:
        """A random walk."""
        generator = torch.Generator().manual_seed(1)
        moves = torch.randn(STEPS, 1, self.frames, 4, self.side, self.side, generator=generator)
        return list((0.25 * moves).cumsum(0) + moves[:1])


SHAPES = (Shape("tiny", 1, 8, 2, 4), Shape("small", 8, 8, 3, 8))


def loop(module: nn.Module, shape: Shape, around: Callable[[], Any] = contextlib.nullcontext) -> Loop:
    """A whole run of a module, every call inside `around()`."""
    latents, text = shape.latents(), torch.randn(1, 16, 64, generator=torch.Generator().manual_seed(2))
    times, calls = [torch.tensor([int(t)]) for t in TIMES], [0]
    middle = module.get_submodule(f"transformer_blocks.{shape.layers // 2}.attn1.to_q")
    middle.register_forward_hook(lambda *_: calls.__setitem__(0, calls[0] + 1))

    @torch.no_grad()
    def run() -> tuple[list[Tensor], list[bool]]:
        outputs, computed = [], []
        for x, t in zip(latents, times, strict=True):
            before = calls[0]
            with around():
                outputs.append(module(x, text, t, return_dict=False)[0])
            computed.append(calls[0] > before)
        return outputs, computed

    return run


@contextlib.contextmanager
def ours(module: nn.Module, shape: Shape, method: str) -> Iterator[Loop]:
    """With a method of ours; the first call of all is also made by the original, and not part of a run."""
    run = loop(module, shape)
    with ditloom.using(module, method, timesteps=TIMES) as attached:

        def again() -> tuple[list[Tensor], list[bool]]:
            attached.restart()
            return run()

        again()
        yield again


@contextlib.contextmanager
def hooks(module: Any, shape: Shape, config: Any) -> Iterator[Loop]:
    """With a cache of diffusers."""
    run = loop(module, shape, lambda: module.cache_context("cond"))
    module.enable_cache(config)

    def again() -> tuple[list[Tensor], list[bool]]:
        module._reset_stateful_cache()
        return run()

    yield again


@contextlib.contextmanager
def cache_dit(module: Any, shape: Shape, threshold: float) -> Iterator[Loop]:
    """With DBCache of cache-dit, whose F1B0 without warm-up is first-block caching."""
    import cache_dit as library

    for name in list(logging.root.manager.loggerDict):
        if "cache_dit" in name:
            logging.getLogger(name).setLevel(logging.ERROR)
    config = library.DBCacheConfig(
        num_inference_steps=STEPS,
        Fn_compute_blocks=1,
        Bn_compute_blocks=0,
        residual_diff_threshold=threshold,
        max_warmup_steps=0,
        enable_separate_cfg=False,
    )
    with contextlib.redirect_stdout(io.StringIO()):
        library.enable_cache(module, cache_config=config)
    run = loop(module, shape)

    def again() -> tuple[list[Tensor], list[bool]]:
        library.refresh_context(module, num_inference_steps=STEPS)
        return run()

    yield again


def peers() -> dict[str, tuple[str, Callable[[Any, Shape, float], Any], Callable[[float], str]]]:
    """Name, version, how it is attached, and what ours is called at a threshold."""
    fbcache = lambda threshold: f"fbcache:threshold={threshold}"  # noqa: E731
    dbcache = lambda threshold: f"dbcache:threshold={threshold},first=1,last=0,warmup=0"  # noqa: E731
    first = lambda m, s, t: hooks(m, s, diffusers.FirstBlockCacheConfig(threshold=t))  # noqa: E731
    found = {"diffusers first-block cache": (diffusers.__version__, first, fbcache)}
    try:
        import cache_dit as library

        found["cache-dit DBCache F1B0"] = (library.__version__, cache_dit, dbcache)
    except ImportError:
        found["cache-dit DBCache F1B0"] = ("missing: pip install cache-dit", None, dbcache)  # type: ignore[assignment]
    return found


def threshold_of(module: nn.Module, shape: Shape) -> float:
    """One at which some steps are reused: nine tenths of what the first block's change differs by at most."""
    seen: list[Tensor] = []

    def note(_: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
        seen.append(out[0] - kwargs["hidden_states"])

    handle = module.get_submodule("transformer_blocks.0").register_forward_hook(note, with_kwargs=True)
    loop(module, shape)()
    handle.remove()
    pairs = zip(seen, seen[1:], strict=False)
    return 0.9 * max(float((b - a).abs().mean() / a.abs().mean()) for a, b in pairs)


def compared(shape: Shape, peer: Any, name: Callable[[float], str]) -> dict[str, Any]:
    """One peer on one shape, at a threshold that reuses and at one that never does."""
    weights = shape.transformer()
    found: dict[str, Any] = {}
    for label, threshold in (("reusing", threshold_of(weights, shape)), ("never", NEVER)):
        copies = [copy.deepcopy(weights) for _ in range(3)]
        plain = loop(copies[0], shape)
        with ours(copies[1], shape, name(threshold)) as mine, peer(copies[2], shape, threshold) as theirs:
            (a, steps), (b, others) = mine(), theirs()
            times = interleaved({"plain": plain, "ours": mine, "theirs": theirs}, RUNS, 1, clock())
        found[label] = {
            "same steps": steps == others,
            "computed steps": steps.count(True),
            "difference": max(float((x - y).abs().max()) for x, y in zip(a, b, strict=True)),
            "time": ratios(times["ours"], times["theirs"]),
        }
    found["us a call over plain"] = {key: over(times[key], times["plain"]) for key in ("ours", "theirs")}
    return {**found, "plain ms a call": 1e3 * times["plain"].median / STEPS}


def over(a: Timing, b: Timing) -> float:
    """The median of what a run takes longer, in microseconds a call."""
    extra = sorted(x - y for x, y in zip(a.seconds, b.seconds, strict=True))
    return 1e6 * extra[len(extra) // 2] / STEPS


def main() -> None:
    """Print everything as JSON."""
    found: dict[str, Any] = {"steps": STEPS, "threads": torch.get_num_threads()}
    for title, (version, peer, name) in peers().items():
        found[f"{title} ({version})"] = (
            {} if peer is None else {shape.name: compared(shape, peer, name) for shape in SHAPES}
        )
    print(json.dumps(found, indent=2))
