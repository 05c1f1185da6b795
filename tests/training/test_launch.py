"""One process by default, a clear sentence for a broken launcher, and signals that only set a flag."""

import os
import signal
import threading

import pytest
import torch

from ditloom.contracts.errors import UserError
from ditloom.training.launch import StopRequest, launched


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)


def test_alone_is_the_default():
    with launched("cpu") as world:
        assert (world.rank, world.size, world.leader, world.device.type) == (0, 1, True, "cpu")
        assert world.any(True) and not world.any(False)
        assert world.share({"a": 1}) == {"a": 1}
        assert torch.equal(world.sum(torch.tensor(2.0)), torch.tensor(2.0))
    assert not torch.distributed.is_initialized()


def test_a_half_set_environment_is_one_sentence(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(UserError, match="WORLD_SIZE is ''"), launched("cpu"):
        pass


def test_an_unknown_device_is_one_sentence():
    with pytest.raises(UserError, match="device 'tpu' cannot train"), launched("tpu"):
        pass


def test_a_world_of_one_under_the_launcher_leaves_its_group(monkeypatch):
    values = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    with launched("cpu") as world:
        assert world.distributed and world.any(True) and world.share("x") == "x"
    assert not torch.distributed.is_initialized()


def test_sigterm_sets_the_flag_and_the_old_handler_returns():
    before = signal.getsignal(signal.SIGTERM)
    with StopRequest() as stop:
        assert not stop.requested
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.requested
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_second_ctrl_c_interrupts():
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.requested
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_outside_the_main_thread_it_is_set_by_hand():
    def work():
        with StopRequest() as stop:
            stop.set()
            seen.append(stop.requested)

    seen = []
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [True]
