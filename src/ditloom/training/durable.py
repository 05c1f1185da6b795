"""Files and folders that survive a kill: written beside, synced to disk, and only then given their name.

Every operation goes through `os` one call at a time, so that tests can stop the process between any two of them.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ditloom.contracts.errors import UserError

SAFETENSORS_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


@dataclass(frozen=True)
class Written:
    """What a file must hold to be whole: its length in bytes and its SHA-256 in hexadecimal."""

    bytes: int
    sha256: str


@contextlib.contextmanager
def explained(action: str, path: Path) -> Iterator[None]:
    """Say in one sentence what a full disk, a read-only folder or a missing file prevented."""
    try:
        yield
    except OSError as error:
        raise UserError(f"could not {action} {path}: {error.strerror or error}") from error


def write_file(path: Path, chunks: Iterable[Any]) -> Written:
    """Write the chunks (anything with a buffer) to a new file and sync it to disk."""
    digest, length = hashlib.sha256(), 0
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    try:
        for chunk in chunks:
            view = memoryview(chunk).cast("B") if len(chunk) else memoryview(b"")
            digest.update(view)
            length += len(view)
            while view:
                view = view[os.write(handle, view) :]
        os.fsync(handle)
    finally:
        os.close(handle)
    return Written(length, digest.hexdigest())


def replace_file(path: Path, chunks: Iterable[Any]) -> Written:
    """Write a file beside `path`, then give it that name: a reader sees the old content or the new, never a part."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        written = write_file(beside, chunks)
        os.rename(beside, path)
    except OSError:
        with contextlib.suppress(OSError):
            os.unlink(beside)
        raise
    sync_folder(path.parent)
    return written


def sync_folder(path: Path) -> None:
    """Make the names inside a folder durable."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def remove_folder(path: Path) -> None:
    """Remove a folder of plain files under a name that no reader takes for a checkpoint."""
    doomed = path if path.name.startswith(".removing-") else path.with_name(f".removing-{path.name}")
    if doomed != path:
        os.rename(path, doomed)
    for name in os.listdir(doomed):
        os.unlink(doomed / name)
    os.rmdir(doomed)


@contextlib.contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Hold a folder for this process; a second one is refused. The hold ends with the process, however it ends."""
    with explained("open", folder):
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another process is writing to {folder}: wait for it or choose another folder") from None
        except OSError:
            pass  # a file system without locks
        yield
    finally:
        os.close(handle)


def json_bytes(value: Any) -> bytes:
    """JSON with exact floats (Python's shortest form that reads back equal)."""
    return json.dumps(value, indent=1).encode()


def tensor_chunks(tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None) -> Iterator[Any]:
    """The bytes of a safetensors file, one tensor at a time: memory for one tensor, not for a second model."""
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for name in order:
        tensor = tensors[name]
        end = offset + tensor.numel() * tensor.element_size()
        dtype = SAFETENSORS_NAMES[tensor.dtype]
        header[name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for name in order:
        yield tensors[name].detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()


def checksum(path: Path) -> Written:
    """Length and SHA-256 of a file as it stands on disk."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
        return Written(file.tell(), digest.hexdigest())
