"""Several components, each with a process of its own, denoised together by one network."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from torch import Tensor

from ditloom.contracts.errors import UserError
from ditloom.contracts.process import Components, Estimate, Loss, Process
from ditloom.contracts.registries import PROCESSES
from ditloom.contracts.registry import register
from ditloom.contracts.settings import registered


@register("joint")
@dataclass(frozen=True, kw_only=True, eq=False)
class Joint(Process):
    """x, noise and predictions are `Components`; t is shared, or a mapping of name to t.

    A t of None marks a component that is given: it stays clean, and has no loss. weights: factor of each
    component's loss (1 where absent).
    """

    parts: Mapping[str, Any] = field(default_factory=dict)
    weights: Mapping[str, float] = field(default_factory=dict)

    @cached_property
    def processes(self) -> dict[str, Process]:
        """The component processes."""
        if not self.parts:
            raise UserError("a joint process needs at least one component in parts, got none")
        return {name: registered(PROCESSES, spec) for name, spec in self.parts.items()}

    @property
    def span(self) -> tuple[float, float]:
        """Where all components are well defined."""
        lows, highs = zip(*(p.span for p in self.processes.values()), strict=True)
        return max(lows), min(highs)

    def _each(self, fn: Callable[..., Any], *signals: Any, t: Any) -> Components:
        """``fn(process, t, *parts)`` per component; a component whose t is None passes its first part on."""
        out: dict[str, Any] = {}
        for name, process in self.processes.items():
            parts, own = [s if s is None else s[name] for s in signals], time_of(t, name)
            out[name] = parts[0] if own is None else fn(process, own, *parts)
        return Components(out)

    def draw(
        self, shape: Any, seed: int, name: str, indices: Sequence[int], step: int = 0, evaluation: int = 0
    ) -> Components:
        """One draw per component, from a stream of its own."""
        draws = {k: p.draw(shape[k], seed, f"{name}/{k}", indices, step, evaluation) for k, p in self.processes.items()}
        return Components(draws)

    def prior(self, noise: Any, t: float = 1.0) -> Components:
        """Every component's prior."""
        return self._each(lambda p, u, n: p.prior(n, u), noise, t=t)

    def add_noise(self, x0: Any, noise: Any, t: Any) -> Components:
        """Every component at its level; a given one stays clean."""
        return self._each(lambda p, u, x, n: p.add_noise(x, n, u), x0, noise, t=t)

    def target(self, x0: Any, noise: Any, t: Any) -> Components:
        """Every component's target; the data itself for a given one."""
        return self._each(lambda p, u, x, n: p.target(x, n, u), x0, noise, t=t)

    def scale_input(self, x: Any, t: Any) -> Components:
        """Every component as the network wants it."""
        return self._each(lambda p, u, part: p.scale_input(part, u), x, t=t)

    def network_time(self, t: Any) -> Any:
        """Every component's time; one value where the components agree on a shared t."""
        times = {k: None if (u := time_of(t, k)) is None else p.network_time(u) for k, p in self.processes.items()}
        return next(iter(times.values())) if isinstance(t, float) and len(set(times.values())) == 1 else times

    def loss(self, prediction: Any, x0: Any, noise: Any, t: Any, mask: Any = None) -> Loss:
        """Weighted sum over the components; terms are named "component/term"."""
        total: Any = 0.0
        terms: dict[str, Tensor] = {}
        for name, process in self.processes.items():
            if (own := time_of(t, name)) is None:
                continue
            seen = None if mask is None else mask[name]
            loss = process.loss(prediction[name], x0[name], noise[name], own, seen)
            total = total + self.weights.get(name, 1.0) * loss.total
            terms.update({f"{name}/{term}": value for term, value in loss.terms.items()})
        if not terms:
            raise UserError("every component of the joint process is given: nothing is left to predict")
        return Loss(total, terms)

    def estimate(self, x: Any, t: Any, prediction: Any) -> JointEstimate:
        """What the predictions say, component by component."""
        pairs = ((k, p, time_of(t, k)) for k, p in self.processes.items())
        known = {k: None if u is None else p.estimate(x[k], u, prediction[k]) for k, p, u in pairs}
        return JointEstimate(x, t, prediction, known)

    def step(self, estimate: Estimate, t_next: float, noise: Any) -> Components:
        """One ancestral step of every component."""
        assert isinstance(estimate, JointEstimate)
        out = {}
        for name, process in self.processes.items():
            known = estimate.known[name]
            draw = None if noise is None else noise[name]
            out[name] = estimate.x[name] if known is None else process.step(known, t_next, draw)
        return Components(out)

    def split(self, prediction: Any) -> tuple[Components, dict[str, Any]]:
        """The guided parts, and the rests by name."""
        halves = {k: p.split(prediction[k]) for k, p in self.processes.items()}
        return Components({k: h[0] for k, h in halves.items()}), {k: h[1] for k, h in halves.items()}

    def join(self, guided: Any, rest: Any) -> Components:
        """The inverse of `split`."""
        return Components({k: p.join(guided[k], rest[k]) for k, p in self.processes.items()})

    def guide(self, strong: Any, weak: Any, scale: float) -> Components:
        """Every component by its own rule."""
        return Components({k: p.guide(strong[k], weak[k], scale) for k, p in self.processes.items()})

    def config(self) -> dict[str, Any]:
        """Plain values, the components' own configurations nested."""
        parts = {k: p.config() for k, p in self.processes.items()}
        return {"name": "joint", "parts": parts, "weights": dict(self.weights)}


@dataclass(frozen=True)
class JointEstimate(Estimate):
    """One estimate per component; None for a given one, whose data is x itself and whose velocity is 0."""

    x: Any
    t: Any
    prediction: Any
    known: Mapping[str, Estimate | None]

    @cached_property
    def x0(self) -> Components:
        """Data estimates."""
        return Components({k: self.x[k] if e is None else e.x0 for k, e in self.known.items()})

    @cached_property
    def v(self) -> Components:
        """Velocities."""
        return Components({k: self.x[k] * 0 if e is None else e.v for k, e in self.known.items()})

    def clipped(self, limit: float) -> JointEstimate:
        """Every estimate clamped."""
        known = {k: None if e is None else e.clipped(limit) for k, e in self.known.items()}
        return JointEstimate(self.x, self.t, self.prediction, known)


def time_of(t: Any, name: str) -> Any:
    """A component's own t of a shared or a named one."""
    return t[name] if isinstance(t, Mapping) else t
