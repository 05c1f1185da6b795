"""The main loss of every diffusion model: the process's own distance between prediction and target."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ditloom.contracts.method import Tap
from ditloom.contracts.objective import Objective, TrainBatch
from ditloom.contracts.process import Process


class Denoise(Objective):
    """``process.loss(prediction, x, noise, t)``: target, weight and a learned variance are the process's.

    Logs the loss's unweighted terms, "mse" among them, by which runs are compared.
    """

    def __init__(self, process: Process):
        super().__init__()
        self.process = process

    def forward(
        self, batch: TrainBatch, prediction: Tensor, captured: Mapping[Tap, Any]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        loss = self.process.loss(prediction, batch.x, batch.noise, batch.t, batch.extra.get("mask"))
        return loss.total, dict(loss.terms)
