"""Who tells a live model when a run begins, where it stands, and which branches a call holds."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ditloom.adapters import slots
from ditloom.adapters.contract import Adapter
from ditloom.adapters.guidance import Heard, Told
from ditloom.adapters.timeline import Timeline
from ditloom.contracts.errors import UnknownName, UserError
from ditloom.sites.report import Report


class Source(Protocol):
    """A pipeline, or the user's own statements. `generation` grows with every run; each has a report of its own."""

    heard: Heard
    generation: int
    report: Report
    branches: tuple[str, ...]

    @property
    def guidance_scale(self) -> float:
        """The scale of this run, as far as anybody knows."""

    def listen(self, module: nn.Module, stack: ExitStack) -> None:
        """Hold what must be held to hear."""

    def hear(self, values: Mapping[str, Any], goes_back: Callable[[], bool]) -> None:
        """Before every call: notice the beginning of a run. goes_back: whether time lies before the last call's."""

    def rows(self, values: Mapping[str, Any]) -> tuple[str, ...]:
        """The branches of a call, in the order of its rows."""

    def timeline(self, adapter: Adapter, module: nn.Module) -> Timeline:
        """The times of the run that has begun."""

    def hint(self) -> int | None:
        """Where the run stands, if anybody knows."""


class PipelineSays:
    """A diffusers pipeline: a run begins when its scheduler has been given new timesteps."""

    def __init__(self, pipe: Any, told: Told):
        self.pipe, self.told = pipe, told
        self.heard, self.report, self.generation = Heard(), Report(), 0
        self.branches: tuple[str, ...] = ("cond",)
        self._timesteps: Tensor | None = None
        self._begin = 0

    @property
    def guidance_scale(self) -> float:
        return float(getattr(self.pipe, "_guidance_scale", 1.0) or 1.0)

    def listen(self, module: nn.Module, stack: ExitStack) -> None:
        if hasattr(module, "cache_context"):
            stack.enter_context(slots.attribute(module, "cache_context", self.heard.named))
        if hasattr(self.pipe, "encode_prompt") and "encode_prompt" not in vars(self.pipe):
            stack.enter_context(slots.attribute(self.pipe, "encode_prompt", self.heard.encoding))

    def hear(self, values: Mapping[str, Any], goes_back: Callable[[], bool]) -> None:
        timesteps = self.pipe.scheduler.timesteps
        if timesteps is self._timesteps:
            return
        self._timesteps, self.report = timesteps, Report()
        self._begin = int(getattr(self.pipe.scheduler, "begin_index", None) or 0)
        self.branches = self.told.branches(self.pipe, values, self.heard)
        self.heard.encodings.clear()
        self.generation += 1

    def rows(self, values: Mapping[str, Any]) -> tuple[str, ...]:
        return self.told.rows(self.branches, self.heard)

    def timeline(self, adapter: Adapter, module: nn.Module) -> Timeline:
        assert self._timesteps is not None
        order = int(getattr(self.pipe.scheduler, "order", 1))
        return Timeline(adapter.values_of(module, self._timesteps[self._begin :]), order)

    def hint(self) -> int | None:
        index = getattr(self.pipe.scheduler, "step_index", None)
        return None if index is None else int(index) - self._begin


class UserSays:
    """The caller of a bare transformer: its times, and the branches of its rows.

    A run begins with the first call, after `restart`, and when time goes back to what was before.
    """

    def __init__(self, timesteps: Any, steps: int | None, branches: Sequence[str]):
        self.times = torch.as_tensor(timesteps, dtype=torch.float64).flatten()
        self.order = _order(len(self.times), steps)
        self.branches = tuple(branches)
        self.heard, self.report, self.generation = Heard(), Report(), 0
        self.begins = True

    @property
    def guidance_scale(self) -> float:
        return 1.0

    def listen(self, module: nn.Module, stack: ExitStack) -> None:
        if hasattr(module, "cache_context"):
            stack.enter_context(slots.attribute(module, "cache_context", self.heard.named))

    def hear(self, values: Mapping[str, Any], goes_back: Callable[[], bool]) -> None:
        if self.begins or goes_back():
            self.begins, self.report = False, Report()
            self.generation += 1

    def rows(self, values: Mapping[str, Any]) -> tuple[str, ...]:
        if self.heard.context is None:
            return self.branches
        if self.heard.context not in self.branches:
            raise UnknownName("guidance branch", self.heard.context, self.branches)
        return (self.heard.context,)

    def timeline(self, adapter: Adapter, module: nn.Module) -> Timeline:
        return Timeline(self.times, self.order)

    def hint(self) -> int | None:
        return None


def _order(times: int, steps: int | None) -> int:
    """Evaluations per step: a solver of order 2 evaluates S steps at 2 S or 2 S - 1 times."""
    if times == 0:
        raise UserError("a bare transformer needs timesteps=, the times it will be called with, in their order")
    if steps is None or steps == times:
        return 1
    order = -(-times // steps) if steps > 0 else 0
    if order < 1 or times not in (order * steps, order * (steps - 1) + 1):
        raise UserError(f"{times} timesteps cannot be those of {steps} steps")
    return order
