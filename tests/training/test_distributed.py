"""Two gloo processes on the CPU against one: DDP and FSDP2, accumulation, bf16, objectives with heads, faults."""

import json

import pytest
import torch
from safetensors.torch import load_file

from ditloom.training import checkpoint
from ditloom.training.launch import World
from tests.training import tiny, two_ranks
from tests.two_processes import run_as_two


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    run_as_two("tests.training.two_ranks", folder, timeout=500)
    return folder


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The same run in one process, plain and with the alignment objective."""
    run, found = tmp_path_factory.mktemp("alone"), {}
    for name, objectives in (("plain", None), ("align", two_ranks.aligned())):
        built = two_ranks.build(run / name, World(), objectives)
        built.train()
        found[name] = flat(tiny.weights(built))
    return found


def flat(groups):
    return {f"{group}/{key}": tensor for group, content in groups.items() for key, tensor in content.items()}


def furthest(a, b, group="model"):
    names = [name for name in a if name.startswith(f"{group}/")]
    assert names and a.keys() == b.keys()
    return max(float((a[name].double() - b[name].double()).abs().max()) for name in names)


@pytest.mark.parametrize("name", [name for name in two_ranks.MODES if "bf16" not in name])
def test_twenty_fp32_steps_agree_with_one_process(out, alone, name):
    found = load_file(out / f"{name}.safetensors")
    assert furthest(alone["plain"], found) < 1e-6
    assert furthest(alone["plain"], found, "average-ramped") < 1e-6


@pytest.mark.parametrize("name", ["ddp bf16", "fsdp bf16"])
def test_bf16_stays_near(out, alone, name):
    found = load_file(out / f"{name}.safetensors")
    assert found["model/blocks.0.mlp.fc1.weight"].dtype == torch.float32
    assert 0 < furthest(alone["plain"], found) < 1e-3


@pytest.mark.parametrize("mode", ["ddp", "fsdp"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_an_objective_with_captures_and_a_head_agrees_and_is_off_at_zero(out, alone, mode, checkpointing):
    found = load_file(out / f"align {mode} {checkpointing}.safetensors")
    assert furthest(alone["align"], found) < 1e-6
    assert furthest(alone["align"], found, "heads") < 1e-6


def test_the_objective_with_a_head_changes_the_network(alone):
    plain = {name: tensor for name, tensor in alone["plain"].items() if name.startswith("model/")}
    assert max(float((tensor - alone["align"][name]).abs().max()) for name, tensor in plain.items()) > 1e-4


@pytest.mark.parametrize("mode", ["ddp", "fsdp"])
def test_equal_world_sizes_agree_bit_for_bit_also_through_a_kill_and_a_sample(out, mode):
    first = load_file(out / f"{mode}.safetensors")
    for other in (f"resumed {mode}", f"sampled {mode}"):
        found = load_file(out / f"{other}.safetensors")
        assert first.keys() == found.keys() and all(torch.equal(first[name], found[name]) for name in first), other


def test_a_sharded_average_answers_outside_the_training_step_as_a_replicated_one(out):
    for rank in (0, 1):
        sampled = json.loads((out / f"facts-{rank}.json").read_text())["sampled"]
        assert len(sampled["ddp"]) == 2
        assert sampled["ddp"] == pytest.approx(sampled["fsdp"], abs=1e-4)


def test_a_signal_to_one_process_stops_both_at_the_same_image(out):
    for rank in (0, 1):
        facts = json.loads((out / f"facts-{rank}.json").read_text())
        assert facts["stopped"] is True and facts["images"] == 48
    assert checkpoint.latest(out / "stopped").path.name.endswith("048")


def test_a_full_disk_on_the_leader_is_the_same_sentence_on_both(out):
    sentences = {json.loads((out / f"facts-{rank}.json").read_text())["failure"] for rank in (0, 1)}
    assert len(sentences) == 1 and "No space left on device; training stopped at 40 images" in sentences.pop()


@pytest.mark.parametrize("mode", ["ddp", "fsdp"])
def test_a_checkpoint_of_two_processes_goes_on_in_one(out, alone, mode, tmp_path):
    run = out / f"resumed {mode}"
    built = two_ranks.build(run, World())
    assert built.resume() == 160
    assert furthest(alone["plain"], flat(tiny.weights(built))) < 1e-6
