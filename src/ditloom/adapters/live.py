"""One foreign module with methods attached: what stands in the place of its root forward."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from ditloom.adapters import slots
from ditloom.adapters.call import Call, Signature
from ditloom.adapters.contract import Adapter
from ditloom.adapters.known import Known
from ditloom.adapters.live_run import LiveRun, refuse_unsupported
from ditloom.adapters.sources import Source
from ditloom.adapters.timeline import Timeline
from ditloom.adapters.view import View
from ditloom.caches.presets import expanded
from ditloom.contracts.clock import Clock, Rows, Schedule
from ditloom.contracts.errors import UserError
from ditloom.contracts.layout import Layout
from ditloom.contracts.method import Handler, Method
from ditloom.contracts.registries import METHODS
from ditloom.contracts.settings import registered
from ditloom.sites.combine import canonical, check_sites

Using = Sequence[str | Method | Handler]
HELD = "_ditloom_attached"


class Live:
    """Answers the calls of a module's root forward while it is held.

    The first call is also answered by the original; where the bits differ, methods are refused.
    """

    original: Callable[..., Any]
    schedule: Schedule

    def __init__(
        self, adapter: Adapter, module: nn.Module, methods: Using, source: Source, memory_limit: int | None = None
    ):
        check_free(module)
        self.adapter, self.module, self.source, self.memory_limit = adapter, module, source, memory_limit
        self.view, self.signature = View(adapter, module), Signature(module)
        self.methods = [m if isinstance(m, Method | Handler) else registered(METHODS, m) for m in expanded(methods)]
        self.known = Known(self.view, module, self.methods)
        self._try(adapter.layout(module))
        self.run: LiveRun | None = None
        self.line: Timeline | None = None
        self.generation, self.checked = -1, False
        self.thread = threading.get_ident()

    def _try(self, layout: Layout) -> None:
        """Refuse before the first call what this architecture cannot do."""
        for method in self.methods:
            if isinstance(method, Method) and type(method).sampling is not Method.sampling:
                name = type(method).__registration__.name
                raise UserError(
                    f"{name} changes how a run is sampled, which is said to the pipeline where it is called"
                )
        surface = self.known.surface(layout, ("cond", "uncond"))
        handlers = canonical(self.known.handlers(surface))
        refuse_unsupported(handlers)
        check_sites({h.key: h.controls(surface) for h in handlers}, surface)

    def hold(self, stack: ExitStack) -> None:
        """Take the place of the innermost forward until the stack unwinds."""
        self.source.listen(self.module, stack)
        vars(self.module)[HELD] = self
        stack.callback(vars(self.module).pop, HELD, None)
        answer: Callable[..., Any] = self.__call__
        if self.adapter.lora_scale:
            answer = _lora_scaled(self.adapter.lora_scale, self.module, answer)
        self.original = stack.enter_context(slots.innermost(self.module, answer))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """In the place of the root forward."""
        if threading.get_ident() != self.thread:
            raise UserError("methods were attached in another thread: attach and call in one and the same")
        values = self.signature.bind(args, kwargs)
        if any(values.get(name) is not None for name in self.adapter.passes):
            return self.original(*args, **kwargs)
        try:
            self.adapter.check(values)
            call, clock = self._place(values)
            output = self._first(call, clock) if self.run is None else self.run.answer(call, clock)
            if not self.checked:
                self._check(call, output, self.original(*args, **kwargs))
            return self.adapter.result(output, call)
        except BaseException:
            self.run, self.generation = None, -1
            raise

    def _place(self, values: Mapping[str, Any]) -> tuple[Call, Clock]:
        """Whose rows a call holds, and when it comes."""
        source, given = self.source, _as_tensor(values[self.adapter.timestep])
        source.hear(values, lambda: self._goes_back(given))
        if self.generation != source.generation:
            self.run, self.generation = None, source.generation
            self.line = source.timeline(self.adapter, self.module)
            time = self.adapter.time_of(self.module)
            self.schedule = self.line.schedule(time, source.branches, source.guidance_scale)
        call = self._call(values, source.rows(values))
        assert self.line is not None
        branches = call.rows.branches
        position = self.line.place(given, branches, source.hint())
        step, evaluation = self.line.visit(position, branches)
        return call, self.schedule.clock(step, evaluation)

    def _goes_back(self, given: Tensor) -> bool:
        """Whether a call's time lies before that of the last one."""
        return self.line is not None and self.line.place(given, self.source.branches) < self.line.last

    def _call(self, values: Mapping[str, Any], branches: tuple[str, ...]) -> Call:
        batch = len(values[self.adapter.sample])
        if batch % len(branches):
            listed = ", ".join(branches)
            raise UserError(f"a batch of {batch} rows cannot hold the guidance branches {listed} in equal parts")
        return Call(values, Rows(branches, batch // len(branches)), self.adapter.static)

    def _first(self, call: Call, clock: Clock) -> Tensor:
        """The first call of a run: methods are bound to it, at its layout."""
        schedule = self.schedule
        with self.view.knowing(call) as layout:
            handlers = self.known.handlers(self.known.surface(layout, schedule.branches))
            self.run = LiveRun(self.view, handlers, schedule, self.source.report, self.known, self.memory_limit)
            return self.run.answer(call, clock)

    def _check(self, call: Call, output: Tensor, result: Any) -> None:
        """The view must compute what the original does, bit for bit; methods may have changed `output` already."""
        expected = self.adapter.prediction(result)
        if not torch.equal(output, expected) and not torch.equal(self.view.plain(call), expected):
            name = type(self.module).__name__
            raise UserError(
                f"this {name} does not compute what its adapter says, so methods are not attached: it may be in "
                "training mode with dropout, changed by its user, or of a version that was not checked"
            )
        self.checked = True


def check_free(module: nn.Module) -> None:
    """Refuse a module to which something is attached already, or that is compiled as a whole."""
    name = type(module).__name__
    if HELD in vars(module):
        raise UserError(f"methods are attached to this {name} already: name all of them in one using(...)")
    if getattr(module, "is_cache_enabled", False):
        raise UserError(f"a cache of diffusers is enabled on this {name}: disable it first (disable_cache)")
    if module._compiled_call_impl is not None or name == "OptimizedModule":
        raise UserError("a transformer compiled as a whole cannot be entered: compile its blocks instead")


def _as_tensor(value: Any) -> Tensor:
    return value if isinstance(value, Tensor) else torch.as_tensor(value, dtype=torch.float64)


def _lora_scaled(name: str, module: nn.Module, function: Callable[..., Any]) -> Callable[..., Any]:
    """With the scale of LoRA layers applied around it, as diffusers does around its own forwards."""
    from diffusers.utils.peft_utils import apply_lora_scale

    scaled = apply_lora_scale(name)(lambda module, *args, **kwargs: function(*args, **kwargs))
    return scaled.__get__(module)
