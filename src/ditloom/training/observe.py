"""A training forward that hands out what objectives want to see of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from ditloom.contracts.backbone import Backbone
from ditloom.contracts.clock import Clock, Rows, Schedule
from ditloom.contracts.condition import Condition
from ditloom.contracts.errors import UserError
from ditloom.contracts.method import Handler, Tap
from ditloom.sites.executor import Forward
from ditloom.sites.program import Placed, StepProgram
from ditloom.sites.run import Run

ONE_STEP = Schedule(times=(1.0, 0.0), native=(1.0,))
TRAINING = Clock(step=0, steps=1, purpose="optimise")


class Captures(Handler):
    """Takes what taps deliver during one forward."""

    key = "objectives"

    def __init__(self) -> None:
        self.values: dict[Tap, Any] = {}

    def captured(self, tap: Tap, value: Any, clock: Clock, rows: Rows) -> None:
        self.values[tap] = value


class Observer:
    """Runs one backbone's training forwards; with nothing to capture it is the backbone's own forward."""

    def __init__(self, backbone: Backbone):
        self.backbone = backbone
        self.run = Run(backbone, schedule=ONE_STEP, conditions={"cond": Condition()})

    def __call__(
        self, x: Tensor, t: Tensor, condition: Condition, taps: Sequence[Tap] = ()
    ) -> tuple[Tensor, Mapping[Tap, Any]]:
        """The prediction for x at noise levels t [B], and the captured tensor of each tap."""
        if not taps:
            return self.backbone(x, t, condition), {}
        captures = Captures()
        program = StepProgram()
        for tap in taps:
            self._check(tap)
            program.taps.setdefault(int(tap.block or 0), []).append(Placed(captures, tap, ""))
        forward = Forward(self.run, program, TRAINING, Rows(("cond",), len(x)), reuse=False)
        prediction = forward(x, self.backbone.preset.time.native(t), self.backbone.prepare(condition))
        assert prediction is not None
        return prediction, captures.values

    def _check(self, tap: Tap) -> None:
        blocks = sum(not block.is_transition for block in self.backbone.blocks)
        if tap.op != "capture":
            raise UserError(f"an objective may capture, not {tap.op}: {tap.stage} of block {tap.block}")
        if tap.block is None or not 0 <= tap.block < blocks:
            have = f"this model has blocks 0 to {blocks - 1}"
            raise UserError(f"an objective wants {tap.stage} of block {tap.block}; {have}")
