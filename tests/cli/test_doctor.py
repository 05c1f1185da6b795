"""`doctor`: what it finds is so."""

import json

import pytest
import torch

from ditloom.cli import machine
from ditloom.cli.commands import doctor as doctor_command
from ditloom.cli.commands.doctor import advice
from ditloom.cli.place import device_of, dtype_of
from ditloom.contracts.errors import UserError


def test_it_finds_versions_extras_and_the_processor(ditloom):
    found = ditloom("doctor", "--seconds", 0, "--json").document
    assert found["versions"]["torch"] == torch.__version__ and found["versions"]["python"]
    assert found["processor"]["cores"] >= 1 and found["processor"]["memory"] > 1e8
    assert found["device"] in ("cpu", "cuda:0", "mps") and found["speed"] == {}
    assert set(found["processor"]["units"]) >= {"avx512_bf16", "amx_bf16"}
    assert machine.installed("no-such-package") is None


def test_extras_come_from_the_package_itself(monkeypatch):
    wanted = ["torch>=2", "tokenizers>=0.20; extra == 'text'", 'no-such_package ; extra == "studio"']
    monkeypatch.setattr(machine.metadata, "requires", lambda name: wanted)
    found = machine.extras()
    assert set(found) == {"text", "studio"} and found["studio"] == {"no-such_package": None}


def test_the_attention_kernel_is_seen_by_calling_it(monkeypatch):
    assert machine.attention_backend("cpu", torch.float32).startswith("fused (")
    assert machine.attention_backend("cpu", torch.bfloat16) == "explicit products"
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        assert machine.attention_backend("cpu", torch.float32) == "fused (math)"


def test_speeds_are_operations_over_time(monkeypatch):
    monkeypatch.setattr(machine, "timed", lambda work, device, seconds: work() is None or 0.5)
    monkeypatch.setitem(machine.SIDES, "cpu", 10)
    assert machine.matmul_speed("cpu", torch.float32, 1) == 2 * 10**3 / 0.5
    found = machine.model_speed("cpu", torch.float32, 1, "DiT-S/8", batch=2)
    assert found["images_per_second"] == 4 and found["flops"] == 2 * 357_974_016 * 2 / 0.5


def test_timing_takes_the_shortest_after_the_first(monkeypatch):
    clock = iter([0, 9, 10, 13, 20, 21, 30, 32, 40, 44])
    monkeypatch.setattr(machine.time, "perf_counter", lambda: next(clock))
    assert machine.timed(lambda: None, "cpu", 5) == 1


def test_speeds_and_shares_are_shown(ditloom, monkeypatch):
    monkeypatch.setattr(machine, "matmul_speed", lambda device, dtype, seconds: 4e9)
    model = {"model": "DiT-S/2", "batch": 4, "images_per_second": 3.0, "flops": 1e9}
    monkeypatch.setattr(machine, "model_speed", lambda device, dtype, seconds: dict(model))
    found = ditloom("doctor", "--json").document["speed"]
    assert found["bf16"]["share"] == 0.25 and found["fp32"]["matmul_flops"] == 4e9
    shown = ditloom("doctor").out
    assert "25%" in shown and "4 G" in shown and "explicit products" in shown


def test_advice():
    found = {
        "speed": {"bf16": {"images_per_second": 30.0}, "fp32": {"images_per_second": 10.0}},
        "extras": {"text": {"tokenizers": None}},
        "processor": {"cores": 8, "threads": 2},
        "device": "cpu",
    }
    said = list(advice(found))
    assert said[0] == "--dtype bf16 is 3.0 times as fast as fp32 here" and "ditloom[text]" in said[1]
    assert "OMP_NUM_THREADS=8" in said[2]
    found["speed"] = {"bf16": {"images_per_second": 10.0}, "fp32": {"images_per_second": 30.0}}
    assert "stay with fp32" in next(advice(found))
    quiet = {"speed": {}, "extras": {}, "processor": {"cores": 2, "threads": 2}, "device": "cpu"}
    assert list(advice(quiet)) == []
    assert doctor_command.NOTICEABLE > 1


def test_seconds_out_of_range(refused):
    assert "--seconds lies between 0 and 600" in refused("doctor", "--seconds", "-1")
    assert "--seconds: expected a number, got 'x'" in refused("doctor", "--seconds", "x")


@pytest.mark.skipif(torch.cuda.is_available(), reason="the machine has a GPU")
def test_devices_that_are_not_there():
    assert device_of("cpu") == "cpu" and device_of("auto") in ("cpu", "mps")
    with pytest.raises(UserError, match="no cuda device"):
        device_of("cuda:1")
    with pytest.raises(UserError, match="unknown device 'cude': did you mean 'cuda'"):
        device_of("cude")
    assert dtype_of("bf16") is torch.bfloat16


@pytest.mark.slow
def test_the_real_thing(ditloom):
    found = ditloom("doctor", "--seconds", 0.1, "--json")
    speed = json.loads(found.out)["speed"]
    assert all(speed[name]["matmul_flops"] > 1e8 and speed[name]["images_per_second"] > 0 for name in ("fp32", "bf16"))
