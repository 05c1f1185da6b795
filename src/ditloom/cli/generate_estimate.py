"""What drawing will take before it starts: work and memory by a rehearsal, time by a few real steps of one batch."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ditloom.cli.bulk import Order
from ditloom.cli.rehearsal import hollow, made_in, rehearsed
from ditloom.contracts.registries import LATENTS
from ditloom.model import Model
from ditloom.sites.report import Report
from ditloom.training.estimate import without_content
from ditloom.training.progress import duration
from ditloom.training.resolve import instance

PROBED = (2, 4)


@dataclass(frozen=True)
class Bounds:
    """The work of an order and what a batch holds, at one end of what its methods may decide.

    macs: of all pictures; forwards: of one branch of a batch each; held: bytes stored between steps; seconds: unless
    nothing was run.
    """

    macs: int
    forwards: int
    held: int
    seconds: float | None = None


@dataclass(frozen=True)
class GenerateEstimate:
    """Bytes beside Python, torch and the text encoder.

    least_reuse and most_reuse are one and the same where every step is planned. plain_macs: without methods.
    """

    pictures: int
    evaluations: int
    plain_macs: int
    weights: int
    activations: int
    least_reuse: Bounds
    most_reuse: Bounds
    using: tuple[str, ...] = ()

    @property
    def planned(self) -> bool:
        """Whether nothing depends on what a run will see."""
        return self.least_reuse == self.most_reuse

    @property
    def held(self) -> int:
        """What is stored between steps, at most."""
        return max(self.least_reuse.held, self.most_reuse.held)

    @property
    def memory(self) -> int:
        """The peak of one batch, at most."""
        return self.weights + self.activations + self.held

    def to_dict(self) -> dict[str, Any]:
        """Plain values; what depends on decisions is null, and its two ends are given under "between"."""
        ends = {name: [getattr(end, name) for end in (self.most_reuse, self.least_reuse)] for name in _KNOWN}
        found = {name: least if self.planned else None for name, (_, least) in ends.items()}
        rate = None if not found["seconds"] else self.pictures / found["seconds"]
        own = {k: v for k, v in asdict(self).items() if not k.endswith("_reuse")}
        between = None if self.planned else {name: ends[name] for name in _KNOWN}
        return {**own, **found, "memory": self.memory, "images_per_second": rate, "between": between}

    def lines(self) -> list[str]:
        """What a person reads."""
        told = [f"{self.pictures:,} pictures, {self.evaluations:,} forwards of a batch, {self._work()}"]
        if not self.planned:
            told.append("from all reused that may be to nothing reused: what happens depends on what the run sees")
        told.append(f"{self.memory / 1e6:,.0f} MB at the peak of a batch:")
        parts = {"weights": self.weights, "activations": self.activations}
        parts |= {"held between steps": self.held} if self.using else {}
        told += [f"  {size / 1e6:>9,.0f} MB  {name}" for name, size in parts.items()]
        return [*told, *self._time()]

    def _work(self) -> str:
        fewest, most = self.most_reuse.macs, self.least_reuse.macs
        if not self.using:
            return f"{most / 1e12:.3g} TMACs"
        shares = f"{fewest / self.plain_macs:.0%}"
        if self.planned:
            return f"{most / 1e12:.3g} TMACs, {shares} of what it takes without methods"
        shares += f" to {most / self.plain_macs:.0%}"
        return f"{fewest / 1e12:.3g} to {most / 1e12:.3g} TMACs, {shares} of what it takes without methods"

    def _time(self) -> list[str]:
        fast, slow = self.most_reuse.seconds, self.least_reuse.seconds
        if not fast or not slow:
            return []
        if not self.using:
            return [f"{self.pictures / slow:.3g} img/s: {duration(slow)}"]
        rate, told = f"{self.pictures / slow:.3g}", duration(slow)
        if not self.planned:
            rate, told = f"{rate} to {self.pictures / fast:.3g}", f"{duration(fast)} to {told}"
        return [f"{rate} img/s: {told}, if time goes with MACs"]


_KNOWN = ("macs", "forwards", "held", "seconds")


def estimate_generate(model: Model, order: Order, settings: Mapping[str, Any], probe: bool = True) -> GenerateEstimate:
    """Of an order drawn with these settings of `Model.generate`, methods under "using" among them."""
    size = min(order.batch_size, order.each)
    using, drawing = tuple(settings["using"]), {**settings, "seed": 0}
    asked = [order.inputs[0]] * size, range(size), drawing, settings["negative"]
    plain, batch = model.batch(*asked), model.batch(*asked, using)
    branches, batches = len(plain.drawing.guidance.needs), -(-order.each // order.batch_size) * len(order.seeds)
    evaluations = batch.drawing.sampler.evaluations(batch.steps_total)
    (without,) = rehearsed(model, plain)
    reports = rehearsed(model, batch) if using else [without]
    weights, activations = simulated(model, batch.shape, size, branches)
    fixed, per_step = _probed(model, order, settings, size) if probe else (0.0, 0.0)

    def bounds(report: Report) -> Bounds:
        network = per_step * int(settings["steps"]) * report.macs / without.macs
        seconds = batches * (fixed + network) if probe else None
        return Bounds(report.macs * order.total // size, report.forwards * batches, report.bytes_held, seconds)

    return GenerateEstimate(
        pictures=order.total,
        evaluations=evaluations * batches,
        plain_macs=without.macs * order.total // size,
        weights=weights,
        activations=activations,
        least_reuse=bounds(reports[0]),
        most_reuse=bounds(reports[-1]),
        using=using,
    )


def simulated(model: Model, shape: tuple[int, ...], size: int, branches: int) -> tuple[int, int]:
    """Bytes of the weights, and of the largest of what a forward and the decoding hold beside them."""
    config, dtype = model.config(), model.backbone.dtype
    with torch.device("meta"):  # a module without content cannot be laid out otherwise, as some are when made
        latents = instance(LATENTS, config["latents"])
    with without_content() as meter, torch.no_grad():
        latents, backbone = _emptied(latents), hollow(model)
        with made_in(dtype):
            _, t, condition = backbone.example(size * branches)
        weights = sum(t.numel() * t.element_size() for part in (backbone, latents) for t in _tensors(part))
        x = torch.zeros(size, *shape)
        meter.peak = meter.live
        backbone(torch.cat([x] * branches).to(dtype), t, condition.to(dtype=dtype))
        latents.decode(x)
        return weights, meter.peak - weights


def _emptied(part: nn.Module) -> Any:
    """A module with new tensors of the same shapes."""
    for module in part.modules():
        for name, tensor in module.named_parameters(recurse=False):
            setattr(module, name, nn.Parameter(torch.empty(tensor.shape, dtype=tensor.dtype)))
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, torch.empty(buffer.shape, dtype=buffer.dtype))
    return part


def _tensors(part: nn.Module) -> Iterator[Tensor]:
    yield from part.parameters()
    yield from part.buffers()


def _probed(model: Model, order: Order, settings: Mapping[str, Any], size: int) -> tuple[float, float]:
    """Seconds of one batch without methods: what does not depend on the number of steps, and those of every step."""
    inputs = [order.inputs[i % len(order.inputs)] for i in range(size)]
    taken = []
    for steps in (PROBED[0], *PROBED):
        start = time.perf_counter()
        model.generate(inputs, **{**settings, "steps": steps, "using": ()}, batch_size=size)
        taken.append(time.perf_counter() - start)
    per_step = max(taken[2] - taken[1], 0.0) / (PROBED[1] - PROBED[0])
    return max(taken[1] - PROBED[0] * per_step, 0.0), per_step
