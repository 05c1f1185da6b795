"""Noise processes: Gaussian paths, discrete chains, joint processes; their targets, times, weights and grids."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ditloom.contracts.registries import PROCESSES

if TYPE_CHECKING:
    from ditloom.contracts.process import Process


def process(spec: str | Mapping[str, Any] | Process) -> Process:
    """A process from "linear:predicts=v", from the mapping of `Process.config()`, or as it is."""
    from ditloom.contracts.settings import registered

    return registered(PROCESSES, spec)
