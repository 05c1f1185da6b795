"""What `generate` will take before it starts: memory by simulation, time by a few real steps of one batch."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ditloom.cli.bulk import Order
from ditloom.contracts.registries import LATENTS
from ditloom.model import Model
from ditloom.training.estimate import without_content
from ditloom.training.progress import duration
from ditloom.training.resolve import instance

PROBED = (2, 4)


@dataclass(frozen=True)
class GenerateEstimate:
    """Bytes beside Python, torch and the text encoder; MACs of all pictures; seconds unless nothing was run."""

    pictures: int
    evaluations: int
    macs: int
    weights: int
    activations: int
    seconds: float | None = None

    @property
    def memory(self) -> int:
        """The peak of one batch."""
        return self.weights + self.activations

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        rate = None if not self.seconds else self.pictures / self.seconds
        return {**asdict(self), "memory": self.memory, "images_per_second": rate}

    def lines(self) -> list[str]:
        """What a person reads."""
        told = [
            f"{self.pictures:,} pictures, {self.evaluations:,} forwards of a batch, {self.macs / 1e12:.3g} TMACs",
            f"{self.memory / 1e6:,.0f} MB at the peak of a batch:",
            f"  {self.weights / 1e6:>9,.0f} MB  weights",
            f"  {self.activations / 1e6:>9,.0f} MB  activations",
        ]
        if self.seconds:
            told.append(f"{self.pictures / self.seconds:.3g} img/s: {duration(self.seconds)}")
        return told


def estimate_generate(model: Model, order: Order, settings: Mapping[str, Any], probe: bool = True) -> GenerateEstimate:
    """Of an order drawn with these settings of `Model.generate`."""
    size = min(order.batch_size, order.each)
    batch = model.batch([order.inputs[0]] * size, range(size), {**settings, "seed": 0}, settings["negative"])
    branches, steps = len(batch.drawing.guidance.needs), int(settings["steps"])
    batches = -(-order.each // order.batch_size) * len(order.seeds)
    evaluations = batch.drawing.sampler.evaluations(steps)
    weights, activations = simulated(model, batch.shape, size, branches)
    macs = model.surface(batch.shape).total * branches * evaluations * order.total
    seconds = batches * _seconds(model, order, settings, size) if probe else None
    return GenerateEstimate(order.total, evaluations * batches, macs, weights, activations, seconds)


def simulated(model: Model, shape: tuple[int, ...], size: int, branches: int) -> tuple[int, int]:
    """Bytes of the weights, and of the largest of what a forward and the decoding hold beside them."""
    config, dtype = model.config(), model.backbone.dtype
    with without_content() as meter, torch.no_grad():
        latents = instance(LATENTS, config["latents"])
        with made_in(dtype):
            backbone = model.backbone.preset.build()
            _, t, condition = backbone.example(size * branches)
        weights = sum(t.numel() * t.element_size() for part in (backbone, latents) for t in _tensors(part))
        x = torch.zeros(size, *shape)
        meter.peak = meter.live
        backbone(torch.cat([x] * branches).to(dtype), t, condition.to(dtype=dtype))
        latents.decode(x)
        return weights, meter.peak - weights


@contextlib.contextmanager
def made_in(dtype: torch.dtype) -> Iterator[None]:
    """New floating tensors have this dtype: modules without content cannot be converted afterwards."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _tensors(part: nn.Module) -> Iterator[Tensor]:
    yield from part.parameters()
    yield from part.buffers()


def _seconds(model: Model, order: Order, settings: Mapping[str, Any], size: int) -> float:
    """One batch: what does not depend on the number of steps, and as much for every step as between two short runs."""
    inputs = [order.inputs[i % len(order.inputs)] for i in range(size)]
    taken = []
    for steps in (PROBED[0], *PROBED):
        start = time.perf_counter()
        model.generate(inputs, **{**settings, "steps": steps}, batch_size=size)
        taken.append(time.perf_counter() - start)
    per_step = max(taken[2] - taken[1], 0.0) / (PROBED[1] - PROBED[0])
    return max(taken[1] - PROBED[0] * per_step, 0.0) + int(settings["steps"]) * per_step
