"""Flow-DPM-Solver: DPM-Solver++(2M) on the straight path."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ditloom.contracts.errors import UserError
from ditloom.contracts.process import Process
from ditloom.contracts.registry import register
from ditloom.processes.linear import Linear
from ditloom.samplers.dpmpp_2m import DPMpp2M, Row


@register("flow-dpm-solver", paper="SANA: Efficient High-Resolution Image Synthesis with Linear Diffusion Transformers")
@dataclass(frozen=True, kw_only=True)
class FlowDPMSolver(DPMpp2M):
    """alpha = 1 - t, sigma = t, ``x0 = x - t v``, on a grid shifted by 3; Sana takes 14 to 20 steps.

    lambda is -infinite at t = 1, where the first step is taken in closed form.
    """

    shift: float = 3.0

    def prepare(self, process: Process, times: Sequence[float]) -> Sequence[Row]:
        if not isinstance(process, Linear):
            raise UserError(f"flow-dpm-solver needs the linear process, got {type(process).__name__}; try dpmpp-2m")
        return super().prepare(process, times)
