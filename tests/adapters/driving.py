"""Short loops over a tiny foreign transformer: with methods attached, plain, and by hand around its own blocks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

import ditloom
from ditloom.contracts.method import Handler, mean_change
from tests.adapters.tiny import Case, drawer

SAMPLES = 2
BRANCHES = ("cond", "uncond")


def latents(case: Case) -> list[Tensor]:
    """x of every step: a slow walk."""
    draw = drawer(7)
    x = draw(SAMPLES, *case.latent)
    return [x + 0.15 * s * draw(SAMPLES, *case.latent) for s in range(len(case.times))]


@torch.no_grad()
def plain(case: Case) -> list[Tensor]:
    """Every step's predictions [cond, uncond] with nothing attached."""
    steps = zip(latents(case), case.times, strict=True)
    return [case.module(**case.arguments(x, t), return_dict=False)[0] for x, t in steps]


@torch.no_grad()
def attached(
    case: Case, *methods: str | Handler, apart: bool = False, **options: Any
) -> tuple[list[Tensor], ditloom.adapters.using.Attached]:  # type: ignore[name-defined]
    """The same with methods, both branches in one call or one after the other."""
    outputs = []
    with ditloom.using(case.module, *methods, timesteps=case.times, branches=BRANCHES, **options) as run:
        for x, t in zip(latents(case), case.times, strict=True):
            outputs.append(_apart(case, run, x, t) if apart else case.module(**case.arguments(x, t)).sample)
    return outputs, run


def _apart(case: Case, run: Any, x: Tensor, t: float) -> Tensor:
    parts = []
    for number, name in enumerate(BRANCHES):
        with run.branch(name):
            parts.append(case.module(**case.arguments(x, t, (number,)))[0])
    return torch.cat(parts)


def blocks(case: Case) -> list[nn.Module]:
    """Its blocks in execution order."""
    lists = [list(getattr(case.module, name)) for name in case.lists]
    return [b for turn in zip(*lists, strict=True) for b in turn] if case.turns else [b for part in lists for b in part]


class HandMade:
    """First-block caching written around the forwards of the blocks themselves.

    threshold: of the relative change of the cond rows' residual. Blocks first..end are left out on reused steps.
    """

    def __init__(self, case: Case, threshold: float, first: int = 1, last: int = 0):
        self.case, self.threshold, self.first = case, threshold, first
        self.blocks = blocks(case)
        self.end = len(self.blocks) - last
        self.entered: Tensor | None = None
        self.reference: Tensor | None = None
        self.change: list[Tensor | None] = []
        self.measured: list[float] = []
        self.computed: list[bool] = []

    @torch.no_grad()
    def outputs(self) -> list[Tensor]:
        """All steps."""
        with forwards([self._around(i) for i in range(len(self.blocks))], self.blocks):
            return plain(self.case)

    def _around(self, index: int) -> Callable[..., Any]:
        original = self.blocks[index].forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            streams = [self._common(s, index) for s in self._streams(args, kwargs)]
            if index == 0:
                self.entered = streams[0]
            if index == self.first:
                self._decide()
            if self.first <= index < self.end and not self.computed[-1]:
                return self._returned([_plus(s, c) for s, c in zip(self.left, self.change, strict=True)], index)
            out = original(*args, **kwargs)
            if index == self.first - 1:
                self.left = [self._common(o, index) for o in self._taken(out)]
            if index == self.end - 1:
                taken = [self._common(o, index) for o in self._taken(out)]
                self.change = [_minus(o, s) for o, s in zip(taken, self.left, strict=True)]
            return out

        return forward

    def _decide(self) -> None:
        residual = (self.left[0] - self.entered)[:SAMPLES]
        if self.reference is not None:
            self.measured.append(float(mean_change(residual, self.reference)))
        reuse = self.reference is not None and self.measured[-1] < self.threshold
        self.computed.append(not reuse)
        if not reuse:
            self.reference = residual

    def _streams(self, args: Sequence[Any], kwargs: dict[str, Any]) -> list[Tensor]:
        names = ("hidden_states", "encoder_hidden_states")[: len(self.case.order)]
        return [args[i] if i < len(args) else kwargs[name] for i, name in enumerate(names)]

    def _common(self, x: Any, index: int, back: bool = False) -> Any:
        """Tokens [B, F N, D], where blocks over a frame and blocks over time take turns; else as they are."""
        if not self.case.turns or x is None:
            return x
        frames, batch, over_time = self.case.latent[1], 2 * SAMPLES, index % 2 == 1
        if back:
            x = x.reshape(batch, frames, -1, x.shape[-1])
            return x.transpose(1, 2).flatten(0, 1) if over_time else x.flatten(0, 1)
        x = x.reshape(batch, -1, *x.shape[1:])
        return (x.transpose(1, 2) if over_time else x).flatten(1, 2)

    def _taken(self, out: Any) -> list[Any]:
        return [out] if len(self.case.order) == 1 else [out[i] for i in self.case.order]

    def _returned(self, streams: list[Any], index: int) -> Any:
        """As the block returns them, each left out block the same."""
        if len(streams) == 1:
            return self._common(streams[0], index, back=True)
        return tuple(streams[self.case.order.index(i)] for i in range(len(streams)))


def _plus(a: Tensor, b: Tensor | None) -> Tensor:
    return a if b is None else a + b


def _minus(a: Tensor | None, b: Tensor) -> Tensor | None:
    return None if a is None else (a.float() - b.float()).to(b.dtype)


@contextmanager
def forwards(replacements: Sequence[Callable[..., Any]], modules: Sequence[nn.Module]) -> Any:
    """Forwards replaced on the modules themselves."""
    for module, forward in zip(modules, replacements, strict=True):
        module.forward = forward  # type: ignore[method-assign]
    try:
        yield
    finally:
        for module in modules:
            del module.forward


def middle(values: Sequence[float]) -> float:
    """A threshold in the widest gap between sorted values, so that rounding decides nothing."""
    ordered = sorted(values)
    gaps = [(b - a, (a + b) / 2) for a, b in zip(ordered, ordered[1:], strict=False)]
    return max(gaps)[1]
