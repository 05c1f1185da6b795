"""DiT-S/2 at 32x32x4, batch 8: inference and a training step against diffusers' DiTTransformer2DModel under autocast.

python -m benchmarks dit_speed
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable

import torch
from torch import Tensor, nn

import ditloom
from benchmarks.timing import interleaved, ratios
from ditloom.contracts.backbone import Backbone
from ditloom.contracts.condition import Condition
from ditloom.contracts.objective import TrainBatch
from ditloom.contracts.registries import PROCESSES
from ditloom.contracts.settings import registered
from ditloom.sites.compiling import compile_blocks
from ditloom.training.learner import STUDENT, Learner
from ditloom.training.objectives.denoise import Denoise
from ditloom.training.optim import AdamW
from ditloom.training.schedules import Constant
from ditloom.training.step import Phase

BATCH, RUNS = 8, 20


def peer() -> nn.Module:
    """diffusers' module of the same shape."""
    from diffusers import DiTTransformer2DModel

    return DiTTransformer2DModel(
        num_attention_heads=6,
        attention_head_dim=64,
        in_channels=4,
        out_channels=8,
        num_layers=12,
        sample_size=32,
        patch_size=2,
        num_embeds_ada_norm=1000,
    )


def peak(dtype: torch.dtype, seconds: float = 1.0) -> float:
    """The best matrix product of this machine in FLOP/s at the shapes of this model's blocks."""
    best = 0.0
    for inner, outer in ((384, 1536), (1536, 384), (384, 1152)):
        a, b = torch.randn(BATCH * 256, inner).to(dtype), torch.randn(inner, outer).to(dtype)
        timing = interleaved({"mm": lambda a=a, b=b: a @ b}, runs=max(5, int(40 * seconds)))["mm"]
        best = max(best, 2 * a.shape[0] * inner * outer / min(timing.seconds))
    return best


def inference() -> dict[str, float]:
    """Images per second of both, and the ratio."""
    ours = ditloom.build("DiT-S/2").eval().to(torch.bfloat16)
    randomise(ours)
    theirs = peer().eval()
    x, t, condition = ours.example(BATCH)
    plain, compiled, frozen = ours, copy.deepcopy(ours), copy.deepcopy(ours)
    compile_blocks(compiled)
    compile_blocks(frozen, frozen=True)
    contenders: dict[str, Callable[[], object]] = {
        "diffusers": lambda: autocast(theirs, x, t, condition),
        "eager": lambda: no_grad(plain, x, t, condition),
        "compiled": lambda: no_grad(compiled, x, t, condition),
        "frozen": lambda: no_grad(frozen, x, t, condition),
    }
    times = interleaved(contenders, RUNS)
    streams, _ = ours.embed(x, ours.preset.time.native(t), ours.prepare(condition))
    flops = 2 * ours.macs(streams.layout) * BATCH
    return {
        "diffusers img/s": BATCH / times["diffusers"].median,
        "eager img/s": BATCH / times["eager"].median,
        "compiled img/s": BATCH / times["compiled"].median,
        "frozen img/s": BATCH / times["frozen"].median,
        "eager over diffusers": ratios(times["diffusers"], times["eager"]),
        "compiled over diffusers": ratios(times["diffusers"], times["compiled"]),
        "frozen over diffusers": ratios(times["diffusers"], times["frozen"]),
        "share of bf16 peak": flops / times["frozen"].median / peak(torch.bfloat16),
    }


def training() -> dict[str, float]:
    """Training steps: forward, backward and optimiser of both, and the ratio."""
    net = ditloom.build("DiT-S/2", learn_sigma=False)
    process = registered(PROCESSES, {"name": "linear", "predicts": "v"})
    phase = Phase(objectives={"denoise": Denoise(process)}, optimiser=AdamW(lr=1e-4), schedule=Constant())
    learner = Learner({STUDENT: net}, process, [phase], precision="bf16", compile=True)
    theirs, step = peer(), train_step_of(learner)
    optimiser = torch.optim.AdamW(theirs.parameters(), lr=1e-4)
    x, t, condition = net.example(BATCH)
    noise = torch.randn_like(x)

    def their_step() -> None:
        with torch.autocast("cpu", torch.bfloat16):
            out = theirs(x, timestep=(t * 999).long(), class_labels=condition.label).sample[:, :4]
            loss = (out - noise).square().mean()
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()

    times = interleaved({"diffusers": their_step, "ours": lambda: step(x, noise, t, condition)}, RUNS)
    return {
        "diffusers img/s": BATCH / times["diffusers"].median,
        "ours img/s": BATCH / times["ours"].median,
        "ours over diffusers": ratios(times["diffusers"], times["ours"]),
    }


def train_step_of(learner: Learner) -> Callable[[Tensor, Tensor, Tensor, Condition], None]:
    """One optimiser step on given tensors through the trainer's own learner."""

    def step(x: Tensor, noise: Tensor, t: Tensor, condition: Condition) -> None:
        batch = TrainBatch(x=x, noise=noise, t=t, condition=condition, indices=range(len(x)))
        learner.learn([batch], 0, len(x))

    return step


def randomise(model: nn.Module) -> None:
    """Zero tensors get small values: a network that is all zero would be unfair to time."""
    for p in model.parameters():
        if not p.any():
            nn.init.normal_(p, std=0.02)


@torch.no_grad()
def no_grad(model: Backbone, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
    """A plain forward."""
    return model(x, t, condition)


@torch.no_grad()
def autocast(model: nn.Module, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
    """The peer as its users run it in bf16 on a CPU."""
    with torch.autocast("cpu", torch.bfloat16):
        return model(x, timestep=(t * 999).long(), class_labels=condition.label).sample


def main() -> None:
    """Print both tables as JSON."""
    torch.manual_seed(0)
    print(json.dumps({"threads": torch.get_num_threads(), "inference": inference(), "training": training()}, indent=2))
