"""Ancestral sampling: the process's own reverse step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ditloom.contracts.process import Process
from ditloom.contracts.registry import register
from ditloom.contracts.sampler import Ask
from ditloom.samplers.solver import Solver, descending_only


@register("ddpm", paper="Denoising Diffusion Probabilistic Models", order=1)
@dataclass(frozen=True, kw_only=True)
class DDPM(Solver):
    """``x <- mean(x0, x) + exp(log_variance / 2) z``, the last step without noise; for every kind of process.

    On Gaussian paths the variance is the learned one where the network has it, else the process's "small" or
    "large" one.
    """

    def prepare(self, process: Process, times: Sequence[float]) -> Sequence[Any]:
        descending_only(times, "ddpm")
        return [(process, t, t_next) for t, t_next in super().prepare(process, times)]

    def advance(self, x: Any, row: Any, ask: Ask, noise: Any, history: Any) -> tuple[Any, Any, Any]:
        process, t, t_next = row
        estimate = ask(x, t)
        return process.step(estimate, t_next, noise() if t_next > 0 else None), estimate, None
