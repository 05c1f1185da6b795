"""CIFAR-10 (Krizhevsky 2009): 50,000 + 10,000 colour photographs, 32x32, 10 classes; a local copy is needed."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np

from ditloom.contracts.data import Example, SourceInfo
from ditloom.contracts.errors import UnknownName, UserError
from ditloom.contracts.registry import register
from ditloom.data.archive import Files, open_files
from ditloom.data.images import centre_crop, decode, on_white, to_array
from ditloom.data.listing import class_names, rows_of

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
SPLITS = ("train", "test")
RECORD = 1 + 3 * 32 * 32


@register("cifar10", paper="Krizhevsky 2009, Learning Multiple Layers of Features from Tiny Images")
@dataclass(eq=False)
class Cifar10:
    """CIFAR-10 from a folder or archive, as images or in the published binary form.

    path: a folder, tar or zip with `train/<class>/` and `test/<class>/`, or one with the published
    `data_batch_1.bin` ... `test_batch.bin`.  split: "train" or "test".
    """

    path: Path
    split: str = "train"
    info: SourceInfo = field(init=False)

    def __post_init__(self) -> None:
        if self.split not in SPLITS:
            raise UnknownName("split", self.split, SPLITS)
        files = open_files(self.path)
        binary = any(name.endswith(".bin") for name in files.sizes)
        self.examples: _Examples = _Records(files, self.split) if binary else _Photos(files, self.split)
        self.info = SourceInfo("cifar10", 3, (32, 32), CLASSES, False, "free with citation (Krizhevsky 2009)")

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> Example:
        return self.examples[index]

    def fingerprint(self) -> str:
        return self.examples.fingerprint()


class _Examples(Protocol):
    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> Example: ...
    def fingerprint(self) -> str: ...


class _Photos:
    """Image files in class folders."""

    def __init__(self, files: Files, split: str):
        self.files, self.split = files, split
        self.rows = rows_of(files, "classes", split)
        class_names(self.rows, CLASSES)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Example:
        row = self.rows[index]
        picture = centre_crop(on_white(decode(self.files.read(row.file), row.file)), 32)
        return Example(to_array(picture), CLASSES.index(row.label or ""), None, row.label, row.file)

    def fingerprint(self) -> str:
        return hashlib.blake2b(f"{self.files.fingerprint()} {self.split}".encode(), digest_size=16).hexdigest()


class _Records:
    """The binary version: a label byte, then 32x32 bytes each of red, green and blue."""

    def __init__(self, files: Files, split: str):
        wanted = "test_batch" if split == "test" else "data_batch_"
        names = [name for name in files.sizes if Path(name).name.startswith(wanted) and name.endswith(".bin")]
        data = b"".join(files.read(name) for name in names)
        if not data or len(data) % RECORD:
            raise UserError(f"{files.path} holds {len(data)} bytes of {wanted}*.bin, expected a multiple of {RECORD}.")
        self.records = np.frombuffer(data, dtype=np.uint8).reshape(-1, RECORD)
        if self.records[:, 0].max() > 9:
            raise UserError(f"{files.path} has labels up to {self.records[:, 0].max()}, expected 0 to 9.")
        self.split = split

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Example:
        label = int(self.records[index, 0])
        image = self.records[index, 1:].reshape(3, 32, 32).transpose(1, 2, 0)
        return Example(image, label, None, CLASSES[label], f"{self.split}/{index}")

    def fingerprint(self) -> str:
        return hashlib.blake2b(self.records.tobytes(), digest_size=16).hexdigest()
