"""One of two processes: trains in every parallel mode and leaves the results in a folder."""

import json
import os
import signal
import sys
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file

from ditloom.contracts.errors import UserError
from ditloom.training import checkpoint
from ditloom.training.launch import launched
from ditloom.training.objectives.denoise import Denoise
from tests.training import tiny
from tests.training.align import Align

CONFIG = replace(tiny.CONFIG, images=160, batch=8, log_every=40)
MODES = {
    "ddp": {"parallel": "ddp"},
    "fsdp": {"parallel": "fsdp"},
    "ddp accumulated": {"parallel": "ddp", "micro_batch": 2},
    "fsdp accumulated": {"parallel": "fsdp", "micro_batch": 2},
    "ddp bf16": {"parallel": "ddp", "precision": "bf16", "micro_batch": 2},
    "fsdp bf16": {"parallel": "fsdp", "precision": "bf16", "micro_batch": 2},
}


def aligned(until: int = 80):
    return {"denoise": Denoise(tiny.PROCESS), "align": Align(until=until)}


def build(run: Path, world, objectives=None, **changes):
    config = replace(CONFIG, **changes)
    built = tiny.trainer(run, config, world, lr=1e-4)
    if objectives:
        built.learner = tiny.learner(config, world, 1e-4, objectives)
    return built


def keep(out: Path, name: str, built) -> None:
    groups = tiny.weights(built)
    flat = {f"{group}/{key}": tensor for group, content in groups.items() for key, tensor in content.items()}
    if flat:
        save_file(flat, out / f"{name}.safetensors")


def every_mode(out: Path, world) -> None:
    for name, changes in MODES.items():
        built = build(out / name, world, **changes)
        built.train()
        keep(out, name, built)


def objectives_with_heads(out: Path, world) -> None:
    for mode in ("ddp", "fsdp"):
        for checkpointing in (False, True):
            name = f"align {mode} {checkpointing}"
            objectives = aligned()
            built = build(out / name, world, objectives, parallel=mode, checkpointing=checkpointing)
            built.train()
            assert objectives["align"].runs == 10, objectives["align"].runs
            keep(out, name, built)


def resumed(out: Path, world) -> None:
    for mode in ("ddp", "fsdp"):
        run = out / f"resumed {mode}"
        first = build(run, world, parallel=mode)
        for images in first.steps():
            if images == 72:
                first._save(images)
            if images == 96:
                break
        rest = build(run, world, parallel=mode)
        rest.train()
        keep(out, f"resumed {mode}", rest)


def stopped_together(out: Path, world) -> dict:
    built = build(out / "stopped", world, parallel="ddp")
    learn = built.learner.learn

    def interrupted(micro, first, size):
        if world.rank == 1 and first == 40:
            os.kill(os.getpid(), signal.SIGTERM)
        learn(micro, first, size)

    built.learner.learn = interrupted
    outcome = built.train()
    return {"stopped": outcome.stopped, "images": outcome.images}


def failed_together(out: Path, world) -> dict:
    built = build(out / "failed", world, parallel="fsdp", save_every=40)

    def full(*args, **kwargs):
        raise UserError("could not save the checkpoint: No space left on device")

    real, checkpoint.save = checkpoint.save, full
    try:
        built.train()
    except UserError as error:
        return {"failure": str(error)}
    finally:
        checkpoint.save = real
    return {"failure": ""}


def sampled(out: Path, world) -> dict:
    """An average sampled in mid-training, by calling parts of the network outside the training step."""
    outputs = {}
    for mode in ("ddp", "fsdp"):
        built = build(out / f"sampled {mode}", world, parallel=mode, sample_every=80)
        x, t, condition = torch.ones(2, *tiny.SHAPE), torch.tensor([0.3, 0.6]), tiny.feed().conditions([0, 1], [0, 1])

        def sample(network, images, x=x, t=t, condition=condition, mode=mode):
            streams, context = network.embed(x, t.double(), network.prepare(condition))
            prediction = network.head(network.run(streams, context), context)
            outputs.setdefault(mode, []).append(prediction.double().sum().item())
            return b"png"

        built.sample = sample
        built.train()
        keep(out, f"sampled {mode}", built)
    return outputs


def main(out: Path) -> None:
    with launched("cpu") as world:
        every_mode(out, world)
        objectives_with_heads(out, world)
        resumed(out, world)
        facts = stopped_together(out, world) | failed_together(out, world) | {"sampled": sampled(out, world)}
        (out / f"facts-{world.rank}.json").write_text(json.dumps(facts))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
