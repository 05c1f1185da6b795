"""Estimates against what really happened: the allocator's own record of a step, and the memory of a process."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor

from ditloom.backbones.dit import DiTConfig
from ditloom.backbones.mmdit import MMDiTConfig
from ditloom.backbones.u_vit import UViTConfig
from ditloom.contracts.errors import UserError
from ditloom.processes.linear import Linear
from ditloom.training.config import TrainConfig
from ditloom.training.estimate import CPU_ALLOCATOR, Estimate, check_room, estimate, setup, simulated, without_content

PROCESS = Linear()
BACKBONES = {
    "dit": DiTConfig(depth=2, width=64, heads=2, image_size=16, classes=10, learn_sigma=False),
    "u-vit": UViTConfig(depth=2, width=64, heads=2, image_size=16, classes=10),
    "mmdit": MMDiTConfig(depth=2, width=64, heads=2, image_size=16, text_width=32, text_tokens=9, pooled_width=32),
}
CASES = [
    ("dit", {}),
    ("dit", {"precision": "bf16", "micro_batch": 4}),
    ("dit", {"checkpointing": True, "clip": 1.0}),
    ("u-vit", {}),
    ("mmdit", {"precision": "bf16"}),
]


def allocated_in_a_step(backbone, config, micro):
    """Peak of live tensor bytes over the third step, from the profiler's record of every allocation."""
    learner, batch = setup(backbone, PROCESS, config, micro, "cpu")
    batches = [batch] * (config.batch // micro)
    for step in range(2):
        learner.learn(batches, step * config.batch, config.batch)
    masters = learner.masters
    masters.forget_gradients()
    held = [*learner.step.parameters(), *learner.step.buffers(), *masters.named.values(), *masters._buffers.values()]
    held += [t for o in learner.optimisers.values() for state in o.state.values() for t in state.values()]
    held += [t for track in learner.tracks.values() for t in track.averages.values()]
    live = sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in held}.values())
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as record:
        learner.learn(batches, 2 * config.batch, config.batch)
    peak = live
    for event in record.profiler.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    return peak


@pytest.mark.parametrize(("family", "settings"), CASES, ids=str)
def test_the_simulated_peak_is_the_allocator_s(family, settings):
    config = TrainConfig(batch=8, images=8, **settings)
    micro = config.micro_batch or 8
    _, parts = simulated(BACKBONES[family], PROCESS, config, micro, "cpu")
    real = allocated_in_a_step(BACKBONES[family], config, micro)
    assert sum(parts.values()) == pytest.approx(real, rel=0.05)


def test_weights_optimiser_and_averages_are_exact():
    config = TrainConfig(batch=4, precision="bf16", averages=("constant", "power:width=0.1"))
    _, parts = simulated(BACKBONES["dit"], PROCESS, config, 4, "cpu")
    count = BACKBONES["dit"].build().learned_parameters()
    tensors = len(list(BACKBONES["dit"].build().parameters()))
    assert parts["weights"] == count * 6
    assert parts["optimiser"] == count * 8 + tensors * 4
    assert parts["averages"] == count * 4 * 2


def test_it_leaves_nothing_without_content_behind():
    model = BACKBONES["dit"].build()
    x, t, condition = model.example(2)
    before = model(x, t, condition)
    estimate(BACKBONES["dit"], PROCESS, TrainConfig(batch=2))
    after = model(x, t, condition)
    assert not isinstance(after, FakeTensor) and torch.equal(before, after)
    with pytest.raises(RuntimeError), without_content():
        raise RuntimeError
    assert torch.equal(before, model(x, t, condition))


def test_an_estimate_counts_macs_and_images_and_times_real_steps():
    preset = replace(BACKBONES["dit"], depth=1)
    found = estimate(preset, PROCESS, TrainConfig(batch=4, images=30), probe=3)
    assert found.parameters == preset.build().learned_parameters() and found.images == 32
    assert found.images_per_second > 0 and found.total_seconds == pytest.approx(32 / found.images_per_second)
    assert found.to_dict()["memory"] == found.memory and "img/s" in found.lines()[-1]
    assert replace(found, images_per_second=None).total_seconds is None


def test_processes_share_the_batch_and_shards_share_the_weights():
    preset = replace(BACKBONES["dit"], depth=1)
    one = estimate(preset, PROCESS, TrainConfig(batch=8))
    ddp = estimate(preset, PROCESS, TrainConfig(batch=8, parallel="ddp"), processes=4)
    fsdp = estimate(preset, PROCESS, TrainConfig(batch=8, parallel="fsdp"), processes=4)
    assert ddp.weights == one.weights and ddp.activations < one.activations
    assert fsdp.optimiser == pytest.approx(one.optimiser / 4, abs=2) and fsdp.memory < ddp.memory


def test_a_run_that_cannot_fit_is_one_sentence():
    found = Estimate(parameters=1, macs=1, images=1, weights=10**9, optimiser=10**9, averages=0, activations=10**9)
    check_room(found, 3 * 10**9)
    with pytest.raises(UserError, match="needs about 3.0 GB and 2.0 GB are free: set micro_batch lower"):
        check_room(found, 2 * 10**9)


MEASURE = """
import json, sys, torch
from dataclasses import replace
from ditloom.backbones.dit import PRESETS
from ditloom.processes.linear import Linear
from ditloom.training.config import TrainConfig
from ditloom.training.estimate import setup

def of_process(name):
    rows = [line.split() for line in open("/proc/self/status")]
    return next(int(row[1]) * 1024 for row in rows if row[0] == name + ":")

settings = json.loads(sys.argv[1])
torch.mm(torch.ones(64, 64).bfloat16(), torch.ones(64, 64).bfloat16())
torch.nn.Linear(8, 8)(torch.ones(2, 8)).sum().backward()
before = of_process("VmRSS")
preset = replace(PRESETS["DiT-S/2"], learn_sigma=False)
learner, batch = setup(preset, Linear(), TrainConfig(**settings), settings["batch"], "cpu")
for step in range(3):
    learner.learn([batch], step * len(batch.x), len(batch.x))
print(of_process("VmHWM") - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
@pytest.mark.parametrize(
    "settings",
    [
        {"batch": 8, "precision": "bf16"},
        {"batch": 8},
        {"batch": 4, "precision": "bf16", "checkpointing": True},
        {"batch": 8, "precision": "bf16", "compile": True},
    ],
    ids=str,
)
def test_a_process_takes_what_was_estimated(settings):
    from ditloom.backbones.dit import PRESETS

    command = [sys.executable, "-c", MEASURE, json.dumps(settings)]
    taken = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    preset = replace(PRESETS["DiT-S/2"], learn_sigma=False)
    found = estimate(preset, PROCESS, TrainConfig(**settings))
    assert found.memory == pytest.approx(taken, rel=0.1), (found.memory / taken, CPU_ALLOCATOR)
