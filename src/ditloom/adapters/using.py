"""`ditloom.using`: attach methods to a ditloom model, a diffusers pipeline, or a bare transformer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

from torch import nn

from ditloom.adapters.contract import Adapter
from ditloom.adapters.finding import adapter_of, told_by
from ditloom.adapters.live import Live, Using
from ditloom.adapters.sources import PipelineSays, Source, UserSays
from ditloom.contracts.errors import UserError
from ditloom.contracts.method import Handler, Method
from ditloom.model import Model
from ditloom.model import using as using_model
from ditloom.sites.report import Report


class Attached:
    """Methods attached to foreign modules: what they did in the last run, and what the user of a bare one may say."""

    def __init__(self, lives: Sequence[Live], source: Source):
        self.lives, self.source = tuple(lives), source

    @property
    def report(self) -> Report:
        """What was computed and reused in the last run."""
        return self.source.report

    def branch(self, name: str) -> AbstractContextManager[None]:
        """Calls inside hold the rows of one branch: for loops that call a bare transformer once per branch."""
        return self.source.heard.calling(name)

    def restart(self) -> None:
        """The next call of a bare transformer begins a new run."""
        if isinstance(self.source, UserSays):
            self.source.begins = True


def using(
    target: Any,
    *methods: str | Method | Handler,
    adapter: Adapter | None = None,
    branches: Sequence[str] | None = None,
    timesteps: Any = None,
    steps: int | None = None,
    memory_limit: int | None = None,
) -> AbstractContextManager[Any]:
    """Attach methods for the length of a `with` block.

    target: a ditloom `Model`, a diffusers pipeline, or a transformer. A bare transformer is told `timesteps`, the
    times it will be called with in their order, and `branches`, the guidance branches of its rows. adapter: for a
    module of the user's own. memory_limit: bytes that stored tensors may take.
    """
    if isinstance(target, Model):
        return using_model(target, *methods)
    if isinstance(target, nn.Module):
        source: Source = UserSays([] if timesteps is None else timesteps, steps, branches or ("cond",))
        return _attached({target: adapter or adapter_of(target)}, methods, source, memory_limit)
    if not hasattr(target, "scheduler"):
        raise UserError(f"methods attach to a model, a diffusers pipeline or a module; got a {type(target).__name__}")
    adapters = _roots(target, adapter)
    told = told_by(target, next(iter(adapters.values())), branches)
    return _attached(adapters, methods, PipelineSays(target, told), memory_limit)


def _roots(pipe: Any, adapter: Adapter | None) -> dict[nn.Module, Adapter]:
    """The transformers of a pipeline, each with its adapter."""
    first = getattr(pipe, "transformer", None) or getattr(pipe, "transformer_2", None)
    if first is None:
        raise UserError(f"a {type(pipe).__name__} has no transformer to attach methods to")
    adapter = adapter or adapter_of(first)
    found = (getattr(pipe, name, None) for name in adapter.roots)
    return {module: adapter for module in found if module is not None}


@contextmanager
def _attached(
    adapters: dict[nn.Module, Adapter], methods: Using, source: Source, memory_limit: int | None
) -> Iterator[Attached]:
    lives = [Live(adapter, module, methods, source, memory_limit) for module, adapter in adapters.items()]
    with ExitStack() as stack:
        for live in lives:
            live.hold(stack)
        yield Attached(lives, source)
