"""What a training run will take, before it starts: memory of a step by simulation, time by a few real steps.

The simulation runs the learner itself on tensors that have sizes and no content, and follows every storage from its
birth to its death. It runs uncompiled; compiled blocks keep about as much.
"""

from __future__ import annotations

import contextlib
import sys
import time
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ditloom.contracts.backbone import Backbone, BackboneConfig
from ditloom.contracts.errors import UserError
from ditloom.contracts.objective import TrainBatch
from ditloom.contracts.process import Process
from ditloom.training.config import TrainConfig
from ditloom.training.launch import World
from ditloom.training.learner import STUDENT, Learner
from ditloom.training.progress import duration
from ditloom.training.recipe import learner_of

CPU_ALLOCATOR = 1.12
"""Resident memory of a step over the bytes of its tensors with the C library's allocator: 1.09 to 1.15, measured on
DiT-S/2 with 2 to 16 images, fp32 and bf16, eager, compiled and with activation checkpointing."""


@dataclass(frozen=True)
class Estimate:
    """Bytes of one process (beside those of Python and torch themselves), MACs of one image's forward, and speed.

    weights: in fp32, their lower-precision copies, and buffers. activations: what a step takes on top of weights,
    optimiser and averages, gradients among it. images_per_second is None unless steps were really run.
    """

    parameters: int
    macs: int
    images: int
    weights: int
    optimiser: int
    averages: int
    activations: int
    images_per_second: float | None = None

    @property
    def memory(self) -> int:
        """The peak of a training step."""
        return self.weights + self.optimiser + self.averages + self.activations

    @property
    def total_seconds(self) -> float | None:
        """The whole run."""
        return None if self.images_per_second is None else self.images / self.images_per_second

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {**asdict(self), "memory": self.memory, "total_seconds": self.total_seconds}

    def lines(self) -> list[str]:
        """What a person reads."""
        parts = {"weights": self.weights, "optimiser": self.optimiser, "averages": self.averages}
        parts["gradients and activations"] = self.activations
        told = [f"{self.parameters:,} parameters, {self.macs / 1e9:.3f} GMACs an image"]
        told.append(f"{self.memory / 1e6:,.0f} MB at the peak of a training step:")
        told += [f"  {size / 1e6:>9,.0f} MB  {name}" for name, size in parts.items()]
        if self.images_per_second is not None and self.total_seconds is not None:
            whole = duration(self.total_seconds)
            told.append(f"{self.images_per_second:.3g} img/s, {whole} for {self.images:,} images")
        return told


class Meter(TorchDispatchMode):
    """Bytes of all tensors alive, and their peak. Asked for the value of a tensor without content, it says 0."""

    def __init__(self) -> None:
        super().__init__()
        self.live, self.peak = 0, 0
        self._sizes: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            return 0
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._note(leaf)
        return out

    def _note(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._sizes:
            self._sizes[key] = storage.nbytes()
            self.live += self._sizes[key]
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._forget, key)

    def _forget(self, key: int) -> None:
        self.live -= self._sizes.pop(key)


@contextlib.contextmanager
def without_content() -> Iterator[Meter]:
    """While entered, new tensors have sizes and no content. Not for use beside threads that compute.

    Tables that the package remembers are forgotten before and after: one without content must not outlive this.
    """
    forget_tables()
    try:
        with FakeTensorMode(), Meter() as meter:
            yield meter
    finally:
        forget_tables()


def forget_tables() -> None:
    """Empty every `lru_cache` of the package."""
    for name, module in list(sys.modules.items()):
        if name.startswith("ditloom."):
            for value in list(vars(module).values()):
                if hasattr(value, "cache_clear"):
                    value.cache_clear()


def estimate(
    backbone: BackboneConfig,
    process: Process,
    config: TrainConfig,
    *,
    device: str = "cpu",
    processes: int = 1,
    probe: int = 0,
) -> Estimate:
    """Memory, MACs and, with `probe` steps really run on this machine, the time of a training run.

    processes: each takes its share of the global batch; with parallel "fsdp" also of weights, optimiser and averages.
    """
    share = -(-config.batch // processes)
    micro = min(config.micro_batch or share, share)
    counts, parts = simulated(backbone, process, config, micro, device)
    if config.parallel == "fsdp":
        parts = {name: size if name == "activations" else size // processes for name, size in parts.items()}
    slack = CPU_ALLOCATOR if device == "cpu" else 1.0
    parts = {name: round(size * slack) for name, size in parts.items()}
    speed = probed(backbone, process, config, micro, device, probe) * processes if probe else None
    return Estimate(**counts, images=config.total, **parts, images_per_second=speed)


def simulated(
    backbone: BackboneConfig, process: Process, config: TrainConfig, micro: int, device: str
) -> tuple[dict[str, int], dict[str, int]]:
    """Parameters and MACs; and the bytes of a step of one process with micro-batches of `micro` images, by kind."""
    with without_content() as meter:
        learner, batch = setup(backbone, process, replace(config, compile=False, parallel="none"), micro, device)
        number = 1 if config.batch <= micro else 2
        for step in range(2):
            meter.peak = meter.live
            learner.learn([batch] * number, step * micro, micro * number)
        own = (*learner.step.parameters(), *learner.step.buffers(), *learner.masters.named.values())
        weights = {id(tensor): tensor for tensor in own}
        parts = {
            "weights": sum(tensor.numel() * tensor.element_size() for tensor in weights.values()),
            "optimiser": sum(_bytes(state) for o in learner.optimisers.values() for state in o.state.values()),
            "averages": sum(_bytes(track.averages) for track in learner.tracks.values()),
        }
        parts["activations"] = meter.peak - sum(parts.values())
        network = learner.step.networks[STUDENT]
        return {"parameters": network.learned_parameters(), "macs": macs_of(network)}, parts


def probed(
    backbone: BackboneConfig, process: Process, config: TrainConfig, micro: int, device: str, steps: int
) -> float:
    """Images a second of one process: the median of real steps, after one to warm up and compile."""
    learner, batch = setup(backbone, process, replace(config, parallel="none"), micro, device)
    taken = []
    for step in range(steps + 1):
        start = time.perf_counter()
        learner.learn([batch], step * micro, micro)
        if device == "cuda":
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - start)
    return micro / sorted(taken[1:])[steps // 2]


def setup(
    backbone: BackboneConfig, process: Process, config: TrainConfig, micro: int, device: str
) -> tuple[Learner, TrainBatch]:
    """A learner with fresh weights and a batch of noise."""
    network = backbone.build()
    world = World(device=torch.device(device))
    learner = learner_of(network, process, config, world)
    x, t, condition = network.example(micro, device)
    return learner, TrainBatch(x, torch.randn_like(x), t, condition, list(range(micro)))


def macs_of(network: Backbone) -> int:
    """Multiply-accumulates of one image's forward at the native size."""
    x, t, condition = network.example(1)
    streams, _ = network.embed(x, network.preset.time.native(t), network.prepare(condition))
    return network.macs(streams.layout)


def check_room(found: Estimate, available: int) -> None:
    """Refuse a run that cannot fit."""
    if found.memory > available:
        raise UserError(
            f"a training step needs about {found.memory / 1e9:.1f} GB and {available / 1e9:.1f} GB are free: "
            "set micro_batch lower, or checkpointing"
        )


def _bytes(tensors: Any) -> int:
    return sum(t.numel() * t.element_size() for t in tensors.values() if isinstance(t, Tensor))
