"""What one run of a live module leaves to the next: its surfaces, the methods bound to them, and the last plan."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from ditloom.adapters.view import View
from ditloom.contracts.clock import Schedule
from ditloom.contracts.layout import Layout
from ditloom.contracts.method import Handler, Method
from ditloom.sites.fingerprint import Weights
from ditloom.sites.program import Program, build
from ditloom.sites.surface import Surface


class Known:
    """Of one module and its methods. A bound method keeps nothing of a run, so that it may serve every one of them."""

    def __init__(self, view: View, module: nn.Module, methods: Sequence[Method | Handler]):
        self.view, self.methods, self.weights = view, methods, Weights(module)
        self._surfaces: dict[tuple[str, ...], dict[Layout, Surface]] = {}
        self._bound: dict[Surface, list[Handler]] = {}
        self._last: tuple[Any, Schedule, Program] | None = None

    def surfaces(self, branches: tuple[str, ...]) -> dict[Layout, Surface]:
        """The surfaces of runs with these branches."""
        return self._surfaces.setdefault(branches, {})

    def surface(self, layout: Layout, branches: tuple[str, ...]) -> Surface:
        """The surface at a layout."""
        known = self.surfaces(branches)
        if layout not in known:
            known[layout] = Surface(self.view, layout, branches)
        return known[layout]

    def handlers(self, surface: Surface) -> list[Handler]:
        """The methods bound at a surface, but for those that act nowhere."""
        if surface not in self._bound:
            bound = [m if isinstance(m, Handler) else m.bind(surface) for m in self.methods]
            self._bound[surface] = [handler for handler in bound if type(handler) is not Handler]
        return self._bound[surface]

    def program(self, handlers: Sequence[Handler], schedule: Schedule, surface: Surface) -> Program:
        """The plan of a run: that of the last one where it has the same steps, handlers and surface."""
        key = (surface, *map(id, handlers))
        if self._last is None or self._last[0] != key or self._last[1] != schedule:
            self._last = key, schedule, build(handlers, schedule, surface)
        return self._last[2]
