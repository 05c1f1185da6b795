"""A checkpoint is the old one or the new one after any interruption, and a broken one is named."""

import errno
import json
import multiprocessing
import os
import random
import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ditloom.contracts.errors import UserError
from ditloom.training import checkpoint, durable
from ditloom.training.checkpoint import BrokenCheckpoint, folders, latest, read, save, verify

OPERATIONS = ("open", "write", "fsync", "close", "rename", "mkdir", "makedirs", "unlink", "rmdir")


def content(images: int) -> dict[str, dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(images)
    weights = torch.randn(7, 5, generator=generator)
    return {
        "model": {"blocks.0.weight": weights, "blocks.0.bias": weights[0].bfloat16(), "count": torch.tensor(images)},
        "optimiser": {"weight.step": torch.tensor(3.0), "flags": torch.tensor([True, False]), "none": weights[:0]},
    }


def same(path: Path, images: int) -> bool:
    found, expected = read(path), content(images)
    assert found.images == found.state["images"] == images
    return all(torch.equal(found.tensors[g][n], t) for g, group in expected.items() for n, t in group.items())


class Stopped(BaseException):
    """The process is gone: no cleanup may run after this."""


class MortalOs:
    """The os module until operation `last`, which fails or kills; then nothing works any more.

    A kill also loses half of every file that was written and not synced, as a power cut may.
    """

    def __init__(self, last: int, failure: OSError | None = None):
        self.last, self.failure, self.count, self.dead = last, failure, 0, False
        self.unsynced: dict[int, str] = {}

    def __getattr__(self, name: str):
        real = getattr(os, name)
        return self._wrapped(name, real) if name in OPERATIONS else real

    def _wrapped(self, name, real):
        def call(*args, **kwargs):
            if self.dead:
                raise Stopped
            self.count += 1
            if self.count > self.last and self.failure is not None:
                if name in ("write", "mkdir", "open"):
                    raise self.failure
            elif self.count > self.last:
                self.die()
                raise Stopped
            result = real(*args, **kwargs)
            self.note(name, args, result)
            return result

        return call

    def note(self, name, args, result):
        if name == "open" and len(args) > 1 and args[1] & os.O_WRONLY:
            self.unsynced[result] = str(args[0])
        if name == "fsync":
            self.unsynced.pop(args[0], None)

    def die(self):
        self.dead = True
        for path in self.unsynced.values():
            os.truncate(path, os.path.getsize(path) // 2)


def patched(monkeypatch, fake) -> None:
    monkeypatch.setattr(durable, "os", fake)
    monkeypatch.setattr(checkpoint, "os", fake)


def operations_of_a_save(run: Path, monkeypatch, images: int = 20) -> int:
    counting = MortalOs(10**9)
    with monkeypatch.context() as patch:
        patched(patch, counting)
        save(run, images, content(images), {"images": images}, keep=1)
    return counting.count


def test_a_save_reads_back_exactly_and_with_the_official_reader(tmp_path):
    path = save(tmp_path, 12, content(12), {"images": 12, "loss": 0.1, "names": ["a"]})
    assert same(path, 12)
    assert read(path).state == {"images": 12, "loss": 0.1, "names": ["a"]}
    official = load_file(path / "model.safetensors")
    assert official["blocks.0.bias"].dtype == torch.bfloat16
    assert official["count"].shape == ()


def test_strided_tensors_are_saved_as_they_look(tmp_path):
    strided = torch.arange(12.0).reshape(3, 4).T
    path = save(tmp_path, 1, {"model": {"w": strided, "e": strided[:1].expand(5, 3)}}, {})
    assert torch.equal(read(path).tensors["model"]["w"], strided)
    assert torch.equal(read(path).tensors["model"]["e"], strided[:1].expand(5, 3))


@pytest.mark.parametrize("images", [10, 20], ids=["over itself", "after another"])
def test_a_kill_between_any_two_operations_leaves_the_old_or_the_new(tmp_path, monkeypatch, images):
    total = operations_of_a_save(tmp_path / "count", monkeypatch)
    outcomes = set()
    for last in range(total + 8):
        run = tmp_path / f"{last}"
        save(run, 10, content(10), {"images": 10})
        with monkeypatch.context() as patch:
            patched(patch, MortalOs(last))
            try:
                save(run, images, content(images), {"images": images}, keep=1)
                outcomes.add("done")
            except Stopped:
                pass
        found = latest(run)
        assert found.path is not None and found.broken == ()
        assert same(found.path, read(found.path).images)
        outcomes.add(read(found.path).images)
        path = save(run, 30, content(30), {"images": 30}, keep=1)
        assert folders(run) == [path] and os.listdir(path.parent) == [path.name]
    assert outcomes == {10, images, "done"}


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EACCES])
def test_a_disk_that_refuses_is_one_sentence_and_the_old_checkpoint_stays(tmp_path, monkeypatch, number):
    total = operations_of_a_save(tmp_path / "count", monkeypatch)
    refused = 0
    for last in range(total):
        run = tmp_path / f"{last}"
        old = save(run, 10, content(10), {"images": 10})
        with monkeypatch.context() as patch:
            patched(patch, MortalOs(last, OSError(number, os.strerror(number))))
            try:
                save(run, 20, content(20), {"images": 20}, keep=2)
            except UserError as error:
                refused += 1
                assert os.strerror(number) in str(error) and "\n" not in str(error)
        assert same(old, 10) and latest(run).broken == ()
        if latest(run).path == old:
            assert not [name for name in os.listdir(run / "checkpoints") if name.startswith(".writing")]
    assert refused > 10


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may write anywhere")
def test_a_folder_without_write_permission_is_one_sentence(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(UserError, match="could not save the checkpoint .*Permission denied"):
        save(tmp_path, 1, content(1), {})


def test_a_run_folder_that_is_a_file_is_one_sentence(tmp_path):
    (tmp_path / "run").write_text("")
    with pytest.raises(UserError, match="could not save the checkpoint"):
        save(tmp_path / "run", 1, content(1), {})


def _save_for_ever(run: Path, images: int, begun) -> None:
    begun.set()
    while True:
        save(run, images, content(images), {"images": images}, keep=2)
        images += 1


def test_thirty_five_random_kills_never_leave_nothing(tmp_path):
    context, dice = multiprocessing.get_context("fork"), random.Random(0)
    save(tmp_path, 9, content(9), {"images": 9})
    start = time.monotonic()
    save(tmp_path, 10, content(10), {"images": 10})
    typical, newest = min(time.monotonic() - start, 0.02), 10
    for _ in range(35):
        begun = context.Event()
        child = context.Process(target=_save_for_ever, args=(tmp_path, newest + 1, begun))
        child.start()
        begun.wait()
        time.sleep(dice.uniform(0, 3 * typical))
        os.kill(child.pid, signal.SIGKILL)
        child.join()
        found = latest(tmp_path)
        assert found.path is not None and found.broken == ()
        images = read(found.path).images
        assert images >= newest and same(found.path, images)
        newest = images
    assert newest > 10


def test_the_last_ones_and_the_marked_ones_are_kept(tmp_path):
    for images in (10, 20, 30, 40, 50):
        save(tmp_path, images, content(images), {"images": images}, keep=2, marked=images == 20)
    assert [read(path).images for path in folders(tmp_path)] == [50, 40, 20]


def truncate(path: Path) -> None:
    os.truncate(path / "model.safetensors", 40)


def flip_a_bit(path: Path) -> None:
    raw = bytearray((path / "optimiser.safetensors").read_bytes())
    raw[-1] ^= 1
    (path / "optimiser.safetensors").write_bytes(raw)


def remove_state(path: Path) -> None:
    (path / "state.json").unlink()


def remove_manifest(path: Path) -> None:
    (path / "manifest.json").unlink()


def tear_manifest(path: Path) -> None:
    os.truncate(path / "manifest.json", 30)


def other_format(path: Path) -> None:
    (path / "manifest.json").write_text(json.dumps({"format": "something"}))


DAMAGES = {
    truncate: "model.safetensors holds 40 bytes where",
    flip_a_bit: "optimiser.safetensors does not match its checksum",
    remove_state: "state.json is missing",
    remove_manifest: "manifest.json is missing",
    tear_manifest: "manifest.json cannot be read",
    other_format: "is not of the form",
}


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_a_broken_checkpoint_is_named_and_the_one_before_is_found(tmp_path, damage):
    old, new = (save(tmp_path, images, content(images), {"images": images}) for images in (10, 20))
    damage(new)
    with pytest.raises(BrokenCheckpoint, match=DAMAGES[damage]):
        verify(new)
    found = latest(tmp_path)
    assert found.path == old and len(found.broken) == 1
    assert str(new) in found.broken[0] and DAMAGES[damage] in found.broken[0]
    again = save(tmp_path, 20, content(20), {"images": 20}, keep=2)
    assert same(again, 20) and latest(tmp_path).broken == () and folders(tmp_path) == [again, old]


def test_an_empty_run_has_no_checkpoint(tmp_path):
    assert latest(tmp_path).path is None
    with pytest.raises(BrokenCheckpoint, match="there is no checkpoint folder"):
        verify(tmp_path / "nowhere")
