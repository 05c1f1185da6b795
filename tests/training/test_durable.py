"""Files that are the old ones or the new ones, and a folder held by one process."""

import errno
import os

import numpy as np
import pytest
import torch
from safetensors.torch import load

from ditloom.contracts.errors import UserError
from ditloom.training import durable
from ditloom.training.durable import exclusive, explained, replace_file, tensor_chunks


def test_a_replaced_file_is_whole_and_nothing_is_left_beside_it(tmp_path):
    path = tmp_path / "a.json"
    for content in (b"old", b"new", np.arange(3, dtype=np.uint8)):
        written = replace_file(path, [content, b""])
        assert path.read_bytes() == bytes(content) and written.bytes == 3
    assert os.listdir(tmp_path) == ["a.json"]


@pytest.mark.parametrize("operation", ["write", "fsync", "rename"])
def test_a_failure_keeps_the_old_file(tmp_path, monkeypatch, operation):
    path = tmp_path / "a.json"
    replace_file(path, [b"old"])

    def fail(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(durable.os, operation, fail)
    with pytest.raises(UserError, match=r"could not write .*a.json: No space left"), explained("write", path):
        replace_file(path, [b"new"])
    monkeypatch.undo()
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["a.json"]


def test_short_writes_are_continued(tmp_path, monkeypatch):
    real = os.write
    monkeypatch.setattr(durable.os, "write", lambda handle, view: real(handle, view[:3]))
    replace_file(tmp_path / "a", [b"abcdefgh", b"ij"])
    monkeypatch.undo()
    assert (tmp_path / "a").read_bytes() == b"abcdefghij"


@pytest.mark.parametrize("dtype", durable.SAFETENSORS_NAMES, ids=str)
def test_every_dtype_reads_back_with_the_official_reader(dtype):
    tensors = {"b": torch.arange(7).to(dtype), "a": torch.ones(2, 3).to(dtype), "scalar": torch.tensor(1).to(dtype)}
    raw = b"".join(bytes(memoryview(chunk).cast("B")) for chunk in tensor_chunks(tensors, {"note": "x"}))
    found = load(raw)
    assert found.keys() == tensors.keys() and all(torch.equal(found[name], tensors[name]) for name in tensors)


def test_a_folder_is_held_by_one(tmp_path):
    run, refused = tmp_path / "run", pytest.raises(UserError, match="another process is writing to")
    with exclusive(run), refused, exclusive(run):
        pass
    with exclusive(run):
        pass
