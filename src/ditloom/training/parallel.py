"""Data parallelism around a training step: none, DDP, or FSDP2; and tensors that are whole or sharded."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from ditloom.contracts.errors import UnknownName, UserError
from ditloom.training.launch import World
from ditloom.training.precision import MasterWeights
from ditloom.training.step import TrainStep


class Alone:
    """One process: the step is called as it is."""

    def __init__(self, step: TrainStep, world: World, compute: torch.dtype):
        self.masters = MasterWeights(step, compute)
        self.module: Callable[..., Any] = step

    @contextlib.contextmanager
    def accumulating(self, last: bool) -> Iterator[None]:
        """Around the forward and backward pass of one micro-batch; `last` of the batch or not."""
        yield

    @contextlib.contextmanager
    def callable_anywhere(self) -> Iterator[None]:
        """While entered, networks may be called outside the training step, as sampling does; on every process."""
        yield


class Replicated(Alone):
    """DDP: every process holds all weights; gradients are averaged over processes.

    In fp32 the processes talk once a batch. With lower-precision gradients they talk at every micro-batch, because
    the sum over micro-batches is kept in fp32 by the master weights.
    """

    def __init__(self, step: TrainStep, world: World, compute: torch.dtype):
        super().__init__(step, world, compute)
        partly = len(step.phases) > 1 or any(True for _ in step.objectives.parameters())
        partly |= any(network.unread for network in step.networks.values())
        self.ddp = DistributedDataParallel(step, gradient_as_bucket_view=True, find_unused_parameters=partly)
        self.module = self.ddp
        self.once = compute == torch.float32

    @contextlib.contextmanager
    def accumulating(self, last: bool) -> Iterator[None]:
        with self.ddp.no_sync() if self.once and not last else contextlib.nullcontext():
            yield


class Sharded(Alone):
    """FSDP2: weights, gradients and optimiser state in shards, gathered block by block in the compute dtype."""

    def __init__(self, step: TrainStep, world: World, compute: torch.dtype):
        _refuse_scalars(step)
        mesh = init_device_mesh(world.device.type, (world.size,))
        policy = MixedPrecisionPolicy(compute, torch.float32, cast_forward_inputs=False)
        for network in step.networks.values():
            for block in network.blocks:
                fully_shard(block, mesh=mesh, mp_policy=policy)
        self.sharded = fully_shard(step, mesh=mesh, mp_policy=policy)
        self.masters = MasterWeights(step, torch.float32)
        self.module = step

    @contextlib.contextmanager
    def accumulating(self, last: bool) -> Iterator[None]:
        self.sharded.set_requires_gradient_sync(last)
        yield

    @contextlib.contextmanager
    def callable_anywhere(self) -> Iterator[None]:
        self.sharded.unshard()
        try:
            yield
        finally:
            self.sharded.reshard()


PARALLEL = {"none": Alone, "ddp": Replicated, "fsdp": Sharded}


def parallelised(name: str, step: TrainStep, world: World, compute: torch.dtype) -> Alone:
    """The step in its wrapper. "auto" is DDP under the launcher, and alone without it."""
    if name == "auto":
        name = "ddp" if world.distributed else "none"
    if name not in PARALLEL:
        raise UnknownName("parallel mode", name, (*PARALLEL, "auto"))
    if name == "none" and world.size > 1:
        raise UserError(f"parallel 'none' cannot train with {world.size} processes: choose 'ddp' or 'fsdp'")
    if name != "none" and not world.distributed:
        raise UserError(f"parallel {name!r} needs several processes: start with torchrun, or choose 'none'")
    return PARALLEL[name](step, world, compute)


def _refuse_scalars(step: nn.Module) -> None:
    scalars = [name for name, parameter in step.named_parameters() if parameter.ndim == 0]
    if scalars:
        raise UserError(f"parameter {scalars[0]} has no dimension and cannot be sharded: give it the shape [1]")


def gathered(tensors: Mapping[str, Tensor], world: World) -> dict[str, Tensor]:
    """Whole tensors on the leader's CPU, and nothing elsewhere; every process must call it."""
    whole: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        if world.leader:
            whole[name] = full.detach().cpu() if isinstance(tensor, DTensor) else full.detach()
    return whole


def like(tensor: Tensor, model: Tensor) -> Tensor:
    """A whole tensor on the device of `model`, sharded as it is."""
    if not isinstance(model, DTensor) or tensor.ndim == 0:
        return tensor.to(model.device)
    placed = tensor.to(model.to_local().device)
    return distribute_tensor(placed, model.device_mesh, model.placements, src_data_rank=None)
