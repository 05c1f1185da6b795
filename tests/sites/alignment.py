"""Walk-through 7 over processes: a training step whose loss reads features and attention logits of the network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from ditloom.contracts.condition import Condition
from ditloom.contracts.method import Tap
from ditloom.sites.compiling import compile_blocks
from ditloom.sites.run import Run
from tests.sites import toys
from tests.sites.walkthroughs import Captures

FAMILIES = ("mmdit", "u-toy")
FEATURES = Tap("block_out", 1, gradient=True)
LOGITS = Tap("logits", 2, gradient=True)
HEADS = Tap("attn_out", 0, gradient=True)
BATCH = 4


class AlignStep(nn.Module):
    """Prediction loss plus the distance of projected features and of an attention map to targets."""

    def __init__(self, name: str):
        super().__init__()
        self.network = toys.make(name)
        self.network.checkpointing = True
        self.head = nn.Linear(64, 8)
        with torch.no_grad():
            self.head.weight.copy_(torch.randn(8, 64, generator=torch.Generator().manual_seed(3)) / 8)
            self.head.bias.zero_()

    def forward(self, x: Tensor, condition: Condition, target: Tensor) -> Tensor:
        captures = Captures([FEATURES, LOGITS, HEADS])
        plan = toys.schedule(self.network, 1, ("cond",))
        run = Run(self.network, [captures], schedule=plan, conditions={"cond": condition})
        prediction = run.predict(x, plan.clock(0, purpose="optimise"))["cond"]
        assert all(len(seen) == 1 for seen in captures.seen.values()), "recomputation must not deliver twice"
        features, logits, heads = (captures.seen[tap][0] for tap in (FEATURES, LOGITS, HEADS))
        aligned = (self.head(features).mean(1) - target).square().mean()
        attention = (logits.softmax(-1).diagonal(dim1=-2, dim2=-1) - 0.1).square().mean()
        return prediction.square().mean() + aligned + attention + heads.square().mean()


def batch(step: AlignStep, rows: slice) -> tuple[Tensor, Condition, Tensor]:
    """Rows of one global batch."""
    x, condition = toys.latent(BATCH), toys.condition(step.network, BATCH)
    target = torch.randn(BATCH, 8, generator=torch.Generator().manual_seed(4))
    return x[rows], condition.rows(rows), target[rows]


def learn(name: str, wrapper: str, compiled: bool, rows: slice) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss on some rows and the gradients after all processes have talked."""
    step = AlignStep(name)
    given = batch(step, rows)
    if compiled:
        compile_blocks(step.network, backend="eager")
    module: Any = step
    if wrapper == "ddp":
        module = DistributedDataParallel(step)
    elif wrapper == "fsdp":
        for block in step.network.blocks:
            fully_shard(block)
        module = fully_shard(step)
    loss = module(*given)
    loss.backward()
    return loss.detach(), {n: whole(p.grad) for n, p in step.named_parameters() if p.grad is not None}


def whole(gradient: Any) -> Tensor:
    """All of a gradient, wherever its parts are."""
    return gradient.full_tensor() if isinstance(gradient, DTensor) else gradient


def cases() -> list[tuple[str, str, bool]]:
    """Families, wrappers, and whether blocks are compiled."""
    return [("mmdit", "ddp", False), ("mmdit", "fsdp", False), ("u-toy", "ddp", True), ("u-toy", "fsdp", True)]


def work(rank: int, world: int, folder: str) -> None:
    """One process: its share of every case; the first one writes what came out."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=world)
    share = BATCH // world
    found = {}
    for case in cases():
        loss, gradients = learn(*case, slice(rank * share, (rank + 1) * share))
        dist.all_reduce(loss)
        found[case] = loss / world, gradients
        torch._dynamo.reset()
    if rank == 0:
        torch.save({repr(k): v for k, v in found.items()}, Path(folder) / "found.pt")
    dist.destroy_process_group()
