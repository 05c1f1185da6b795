"""Checkpoint folders: at every moment of a run there is an old whole one or a new whole one.

`run/checkpoints/images-000000012800/` holds one safetensors file for each group of tensors, `state.json`, and
`manifest.json` with the length and SHA-256 of every other file. The folder is written under a hidden name, each file
synced, the manifest last; then the folder is renamed. Nothing here is a pickle.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ditloom.contracts.errors import UserError
from ditloom.training.durable import (
    Written,
    checksum,
    explained,
    json_bytes,
    remove_folder,
    sync_folder,
    tensor_chunks,
    write_file,
)

FORMAT = "ditloom-checkpoint-1"
MANIFEST = "manifest.json"
STATE = "state.json"
NAME = re.compile(r"images-(\d{12})(\.replaced)?")

Tensors = Mapping[str, Mapping[str, torch.Tensor]]


class BrokenCheckpoint(UserError):
    """A checkpoint folder that is not whole; the message says which file is wrong and how."""


@dataclass(frozen=True)
class Checkpoint:
    """What was saved: tensors by group and name, and the JSON state."""

    path: Path
    images: int
    tensors: dict[str, dict[str, torch.Tensor]]
    state: dict[str, Any]


@dataclass(frozen=True)
class Found:
    """The newest whole checkpoint of a run (None if there is none) and a sentence for each newer one that is broken."""

    path: Path | None
    broken: tuple[str, ...] = ()


def save(
    run: Path,
    images: int,
    tensors: Tensors,
    state: Mapping[str, Any],
    *,
    keep: int = 2,
    marked: bool = False,
) -> Path:
    """Save a checkpoint at `images` images seen, then remove all but the last `keep` and the marked ones.

    `tensors` is {group: {name: tensor}}; `state` must be JSON. Raises UserError when the folder cannot be written
    (full disk, read-only); the checkpoints that were there before are then untouched.
    """
    home = run / "checkpoints"
    final = home / f"images-{images:012d}"
    writing = home / f".writing-{final.name}"
    with explained("save the checkpoint", final):
        os.makedirs(home, exist_ok=True)
        _sweep(home)
        try:
            os.mkdir(writing)
            _write(writing, images, tensors, state, marked)
        except OSError:
            with contextlib.suppress(OSError):
                remove_folder(writing)
            raise
        _publish(writing, final)
        _prune(home, images, keep)
    return final


def _write(folder: Path, images: int, tensors: Tensors, state: Mapping[str, Any], marked: bool) -> None:
    files = {
        f"{group}.safetensors": write_file(folder / f"{group}.safetensors", tensor_chunks(content))
        for group, content in tensors.items()
    }
    files[STATE] = write_file(folder / STATE, [json_bytes(dict(state))])
    facts = {name: asdict(written) for name, written in files.items()}
    manifest = {"format": FORMAT, "images": images, "marked": marked, "files": facts}
    write_file(folder / MANIFEST, [json_bytes(manifest)])
    sync_folder(folder)


def _publish(writing: Path, final: Path) -> None:
    """Give the folder its name; one already there steps aside under a name that `latest` still reads."""
    if final.exists():
        aside = final.with_name(final.name + ".replaced")
        if aside.exists():
            remove_folder(aside)
        os.rename(final, aside)
    os.rename(writing, final)
    sync_folder(final.parent)


def _sweep(home: Path) -> None:
    """Remove what a kill left half written or half removed."""
    for name in sorted(os.listdir(home)):
        if name.startswith((".writing-", ".removing-")):
            remove_folder(home / name)


def _prune(home: Path, images: int, keep: int) -> None:
    """Of the checkpoints up to the one just saved, remove all but the last `keep` and the marked ones."""
    paths = [path for path in folders(home.parent) if _images(path) <= images]
    names = {path.name for path in paths}
    replaced = [path for path in paths if path.name.removesuffix(".replaced") in names - {path.name}]
    plain = [path for path in paths if path not in replaced and not _is_kept(path)]
    for path in replaced + plain[max(keep, 1) :]:
        remove_folder(path)


def _is_kept(path: Path) -> bool:
    """Marked, or too broken to tell: neither is removed nor counted."""
    try:
        return bool(manifest_of(path)["marked"])
    except BrokenCheckpoint:
        return True


def _images(path: Path) -> int:
    match = NAME.fullmatch(path.name)
    return int(match[1]) if match else 0


def folders(run: Path) -> list[Path]:
    """All checkpoint folders of a run, newest first, whole or not."""
    home = run / "checkpoints"
    if not home.is_dir():
        return []
    named = [home / name for name in os.listdir(home) if NAME.fullmatch(name)]
    return sorted(named, key=lambda path: (_images(path), path.suffix == ""), reverse=True)


def latest(run: Path) -> Found:
    """The newest checkpoint that passes its checksums; the broken ones met on the way are named."""
    broken: list[str] = []
    for path in folders(run):
        try:
            verify(path)
        except BrokenCheckpoint as error:
            broken.append(str(error))
        else:
            return Found(path, tuple(broken))
    return Found(None, tuple(broken))


def manifest_of(path: Path) -> dict[str, Any]:
    """The manifest of a checkpoint folder; BrokenCheckpoint if it is missing or unreadable."""
    try:
        manifest = json.loads((path / MANIFEST).read_text())
    except FileNotFoundError:
        raise BrokenCheckpoint(f"checkpoint {path} is not whole: {MANIFEST} is missing") from None
    except (OSError, ValueError):
        raise BrokenCheckpoint(f"checkpoint {path} is damaged: {MANIFEST} cannot be read") from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise BrokenCheckpoint(f"checkpoint {path} is not of the form {FORMAT!r} that this version reads")
    return manifest


def verify(path: Path) -> dict[str, Any]:
    """Check every file of a checkpoint against the manifest and return the manifest."""
    if not path.is_dir():
        raise BrokenCheckpoint(f"there is no checkpoint folder at {path}")
    manifest = manifest_of(path)
    for name, fact in manifest["files"].items():
        _verify_file(path, name, Written(**fact))
    return manifest


def _verify_file(folder: Path, name: str, expected: Written) -> None:
    try:
        found = checksum(folder / name)
    except FileNotFoundError:
        raise BrokenCheckpoint(f"checkpoint {folder} is not whole: {name} is missing") from None
    except OSError as error:
        raise BrokenCheckpoint(f"checkpoint {folder} is damaged: {name} cannot be read ({error.strerror})") from error
    if found.bytes != expected.bytes:
        what = f"{name} holds {found.bytes} bytes where {expected.bytes} were written"
        raise BrokenCheckpoint(f"checkpoint {folder} is damaged: {what}")
    if found.sha256 != expected.sha256:
        raise BrokenCheckpoint(f"checkpoint {folder} is damaged: {name} does not match its checksum")


def read(path: Path) -> Checkpoint:
    """Read a checkpoint after checking it; tensors arrive on the CPU."""
    from safetensors.torch import load_file

    manifest = verify(path)
    groups = [name.removesuffix(".safetensors") for name in manifest["files"] if name != STATE]
    tensors = {group: load_file(path / f"{group}.safetensors") for group in groups}
    return Checkpoint(path, manifest["images"], tensors, json.loads((path / STATE).read_text()))
