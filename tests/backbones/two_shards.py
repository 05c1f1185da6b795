"""One of two processes: two training steps of every tiny configuration, sharded, replicated, and alone."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ditloom.contracts.backbone import Backbone
from ditloom.contracts.objective import Objective, TrainBatch
from ditloom.processes.linear import Linear
from ditloom.training.launch import World, launched
from ditloom.training.learner import STUDENT, Learner
from ditloom.training.optim import Adam
from ditloom.training.parallel import gathered
from ditloom.training.step import Phase
from tests.backbones.tiny import TINY, inputs, make

ROWS, STEPS = 4, 2
MODES = {"fsdp": {}, "fsdp checkpointing": {"checkpointing": True}, "ddp": {}}


class Near(Objective):
    """The squared distance to one channel, whatever the prediction's channels are."""

    def forward(
        self, batch: TrainBatch, prediction: Tensor, captured: Mapping[Any, Any]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        return (prediction - batch.noise.mean(1, keepdim=True)).square().flatten(1).mean(1), {}


def batch_of(network: Backbone, world: World, step: int) -> TrainBatch:
    """This process's rows of one global batch."""
    x, t, condition = inputs(network, ROWS)
    mine = slice(world.rank * ROWS // world.size, (world.rank + 1) * ROWS // world.size)
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(step))
    return TrainBatch(x[mine], noise[mine], t[mine], condition.rows(mine), indices=range(ROWS)[mine])


def trained(name: str, world: World, **settings: Any) -> dict[str, Tensor]:
    """The weights after the steps, whole, on the leader."""
    torch.manual_seed(0)  # for buffers that are drawn
    network = make(name)
    # with so large an eps a step goes nearly along the gradient, so that rounding stays small
    phase = Phase(objectives={"near": Near()}, optimiser=Adam(lr=0.5, eps=1.0))
    learner = Learner({STUDENT: network}, Linear(), [phase], world=world, **settings)
    for step in range(STEPS):
        learner.learn([batch_of(network, world, step)], step * ROWS, ROWS)
    return gathered(dict(network.named_parameters()), world)


def furthest(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> float:
    """The largest difference of two sets of weights."""
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).abs().max()) for name in a)


def asked(name: str, world: World) -> dict[str, Any]:
    """By mode how far from training alone, or what went wrong."""
    alone = trained(name, World(), parallel="none")
    found: dict[str, Any] = {"moved": furthest(alone, dict(make(name).named_parameters()))}
    for mode, settings in MODES.items():
        try:
            weights = trained(name, world, parallel=mode.partition(" ")[0], **settings)
            found[mode] = furthest(alone, weights) if world.leader else 0.0
        except Exception as error:
            found[mode] = f"{type(error).__name__}: {error}"
    return found


def main(path: str, names: list[str]) -> None:
    with launched("cpu") as world:
        found = {name: asked(name, world) for name in names or TINY}
        if world.leader:
            with open(path, "w", encoding="utf-8") as file:
                json.dump(found, file)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
