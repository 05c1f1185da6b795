"""Latents of a whole source, encoded once: one safetensors file that is memory-mapped, and its manifest."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ditloom.conditions.borrowed import fingerprint_of
from ditloom.contracts.data import DataSource
from ditloom.contracts.errors import UserError
from ditloom.contracts.latent import LatentSpace

DTYPES = {"float32": ("F32", np.float32), "float16": ("F16", np.float16)}
PROGRESS_EVERY = 16


@dataclass(frozen=True)
class Manifest:
    """What a cache holds; `done` counts the images whose latents are on disk."""

    fingerprint: str
    shape: tuple[int, int, int]
    count: int
    dtype: str
    done: int


class LatentCache:
    """Latents [C, h, w] of every image of a source, read from the memory map."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.manifest = _read_manifest(self.folder / "manifest.json")
        if self.manifest is None or self.manifest.done < self.manifest.count:
            raise UserError(f"no finished latents in {str(folder)!r}")
        self._latents = _open_map(self.folder / "latents.safetensors", self.manifest, "r")

    def __len__(self) -> int:
        return len(self._latents)

    def __getitem__(self, index: int) -> Tensor:
        return torch.from_numpy(self._latents[index].astype(np.float32))

    def rows(self, indices: Sequence[int]) -> Tensor:
        """A batch [B, C, h, w] in float32."""
        return torch.from_numpy(self._latents[np.asarray(indices, dtype=np.int64)].astype(np.float32))


def encode_source(
    source: DataSource,
    space: LatentSpace,
    folder: str | Path,
    *,
    batch: int = 64,
    dtype: str = "float32",
    progress: Callable[[int, int], None] | None = None,
) -> LatentCache:
    """Encode every image of `source` into `folder` and open the result.

    A finished cache of the same data and latent space is opened as it is; an interrupted one continues where its
    progress was last noted; one of other data or another space is refused, never overwritten. `progress(done, count)`
    is called after each batch. Images must have one size. `dtype` is "float32" or "float16".
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    manifest = _begin(source, space, folder, dtype)
    if manifest.done < manifest.count:
        _fill(source, space, folder, manifest, batch, progress)
    return LatentCache(folder)


def space_fingerprint(space: LatentSpace) -> str:
    """Changes with the class, the settings and the weights of a latent space."""
    borrowed = getattr(space, "autoencoder", None)
    weights = borrowed.fingerprint() if borrowed is not None else fingerprint_of(space.state_dict())
    text = f"{type(space).__name__} {json.dumps(space.config(), sort_keys=True)} {weights}"
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def as_images(pictures: Sequence[NDArray[np.uint8]]) -> Tensor:
    """uint8 pictures [H, W, C] of one size to float [B, C, H, W] in [-1, 1]."""
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1


def _begin(source: DataSource, space: LatentSpace, folder: Path, dtype: str) -> Manifest:
    """The manifest of what is there already, or a new one; refuses what does not belong together."""
    if dtype not in DTYPES:
        raise UserError(f"latents are stored as {' or '.join(DTYPES)}, got {dtype!r}")
    if len(source) == 0:
        raise UserError(f"the source {source.info.name!r} is empty: there is nothing to encode")
    text = f"{source.fingerprint()} {space_fingerprint(space)} {dtype}"
    fingerprint = hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
    found = _read_manifest(folder / "manifest.json")
    if found is not None and found.fingerprint != fingerprint:
        raise UserError(f"{folder} holds latents of other data or of another latent space: choose another folder")
    if found is not None and (folder / "latents.safetensors").exists():
        return found
    height, width = source[0].image.shape[:2]
    return Manifest(fingerprint, space.shape((height, width)), len(source), dtype, 0)


@torch.no_grad()
def _fill(
    source: DataSource,
    space: LatentSpace,
    folder: Path,
    manifest: Manifest,
    batch: int,
    progress: Callable[[int, int], None] | None,
) -> None:
    path = folder / "latents.safetensors"
    if not path.exists():
        _create(path, manifest)
    latents, noted = _open_map(path, manifest, "r+"), manifest.done
    for start, images in _batches(source, manifest.done, batch):
        done = start + len(images)
        latents[start:done] = space.encode(images.to(_device(space))).float().cpu().numpy()
        if done == manifest.count or done - noted >= PROGRESS_EVERY * batch:
            latents.flush()
            _write_manifest(folder, Manifest(**{**asdict(manifest), "done": done}))
            noted = done
        if progress is not None:
            progress(done, manifest.count)


def _batches(source: DataSource, first: int, size: int) -> Iterator[tuple[int, Tensor]]:
    shape = source[0].image.shape
    for start in range(first, len(source), size):
        examples = [source[index] for index in range(start, min(start + size, len(source)))]
        for example in examples:
            if example.image.shape != shape:
                raise UserError(
                    f"image {example.name!r} is {example.image.shape} and the first is {shape}: latents are cached for "
                    "images of one size, so resize the source"
                )
        yield start, as_images([example.image for example in examples])


def _device(space: LatentSpace) -> torch.device:
    tensors = [*space.parameters(), *space.buffers()]
    return tensors[0].device if tensors else torch.device("cpu")


def _header(manifest: Manifest) -> bytes:
    """The head of a safetensors file with one tensor: length (8 bytes), JSON padded to 8."""
    name, kind = DTYPES[manifest.dtype]
    shape = [manifest.count, *manifest.shape]
    end = int(np.prod(shape)) * np.dtype(kind).itemsize
    text = json.dumps({"latents": {"dtype": name, "shape": shape, "data_offsets": [0, end]}}).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _create(path: Path, manifest: Manifest) -> None:
    """A file of full length, whose disk space is taken at once so that a full disk shows here."""
    head = _header(manifest)
    length = json.loads(head[8:])["latents"]["data_offsets"][1]
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(beside, "wb") as file:
            file.write(head)
            os.posix_fallocate(file.fileno(), len(head), length)
            os.fsync(file.fileno())
        os.replace(beside, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            beside.unlink()
        raise UserError(f"cannot make room for {length >> 20} MiB of latents at {path}: {error.strerror}") from error


def _open_map(path: Path, manifest: Manifest, mode: Any) -> np.memmap:
    head = _header(manifest)
    shape = (manifest.count, *manifest.shape)
    with open(path, "rb") as file:
        if file.read(len(head)) != head:
            raise UserError(f"{path} does not hold what its manifest says: delete the folder and encode again")
    return np.memmap(path, DTYPES[manifest.dtype][1], mode, offset=len(head), shape=shape)


def _read_manifest(path: Path) -> Manifest | None:
    if not path.exists():
        return None
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        return Manifest(**{**stored, "shape": tuple(stored["shape"])})
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"{path} is not a manifest of latents: {error}") from error


def _write_manifest(folder: Path, manifest: Manifest) -> None:
    beside = folder / f".manifest.{os.getpid()}"
    with open(beside, "w", encoding="utf-8") as file:
        file.write(json.dumps(asdict(manifest), indent=1))
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, folder / "manifest.json")
