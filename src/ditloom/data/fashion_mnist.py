"""Fashion-MNIST (Xiao et al. 2017): 60,000 + 10,000 grey pictures of clothes, 28x28, 10 classes, MIT licence."""

from __future__ import annotations

import gzip
import hashlib
import io
import lzma
import struct
import tarfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ditloom.contracts.data import Example, SourceInfo
from ditloom.contracts.errors import UnknownName, UserError
from ditloom.contracts.registry import register
from ditloom.data.fetch import cache_folder, fetch_into

CLASSES = (
    "t-shirt or top", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot",
)  # fmt: skip
SPLITS: Mapping[str, str] = {"train": "train", "test": "t10k"}
SYSTEM = Path("/usr/share/datasets/fashion-mnist")
PACKAGE = "dataset-fashion-mnist"
FETCH = ["apt-get", "download", "-qq", PACKAGE]
ADVICE = (
    f"Install the data with `apt-get install {PACKAGE}`, or give path=FOLDER with the four files "
    "train-images-idx3-ubyte.gz, train-labels-idx1-ubyte.gz, t10k-images-idx3-ubyte.gz, t10k-labels-idx1-ubyte.gz."
)


@register("fashion-mnist", paper="Xiao et al. 2017, arXiv:1708.07747")
@dataclass(eq=False)
class FashionMnist:
    """Class-conditional grey pictures, white on black.

    path: folder with the four idx files, plain or gzipped; by default where the Debian package puts them, else
    that package is fetched into the user's cache.  split: "train" or "test".  size: side; above 28 the picture is
    framed in black.
    """

    path: Path | None = None
    split: str = "train"
    size: int = 28
    info: SourceInfo = field(init=False)

    def __post_init__(self) -> None:
        if self.split not in SPLITS:
            raise UnknownName("split", self.split, SPLITS)
        if self.size < 28:
            raise UserError(f"size={self.size}: Fashion-MNIST is 28 pixels wide; expected 28 or more.")
        folder = _folder(self.path)
        self.images = read_idx(folder, f"{SPLITS[self.split]}-images-idx3-ubyte")
        self.labels = read_idx(folder, f"{SPLITS[self.split]}-labels-idx1-ubyte")
        if self.images.shape != (len(self.labels), 28, 28) or not len(self.labels) or self.labels.max() > 9:
            shapes = f"images {self.images.shape} and labels {self.labels.shape}"
            raise UserError(f"{folder} holds {shapes}, expected (N, 28, 28) and (N,) with labels 0 to 9.")
        self.info = SourceInfo("fashion-mnist", 1, (self.size, self.size), CLASSES, False, "MIT (Zalando SE)")

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Example:
        before = (self.size - 28) // 2
        frame = (before, self.size - 28 - before)
        image = np.pad(self.images[index], (frame, frame))[:, :, None]
        label = int(self.labels[index])
        return Example(image, label, None, CLASSES[label], f"{self.split}/{index}")

    def fingerprint(self) -> str:
        digest = hashlib.blake2b(f"fashion-mnist {self.size}".encode(), digest_size=16)
        digest.update(self.labels.tobytes())
        digest.update(self.images.tobytes())
        return digest.hexdigest()


def read_idx(folder: Path, stem: str) -> NDArray[np.uint8]:
    """An array of unsigned bytes in the idx format (LeCun et al., MNIST), plain or gzipped."""
    for path in (folder / stem, folder / f"{stem}.gz"):
        if path.exists():
            try:
                data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
                return parse_idx(data)
            except (OSError, EOFError, zlib.error, ValueError, struct.error) as error:
                raise UserError(f"{path} is not an idx file of bytes: {error}.") from error
    raise UserError(f"{folder} lacks {stem}[.gz]. {ADVICE}")


def parse_idx(data: bytes) -> NDArray[np.uint8]:
    zero, kind, dimensions = struct.unpack(">HBB", data[:4])
    shape = struct.unpack(f">{dimensions}I", data[4 : 4 + 4 * dimensions])
    if zero or kind != 8:
        raise ValueError(f"its magic number is {data[:4].hex()}")
    return np.frombuffer(data, dtype=np.uint8, offset=4 + 4 * dimensions).reshape(shape)


def unpack_deb(deb: Path, folder: Path) -> Path:
    """The idx files of the Debian package (an `ar` archive around a tar) written to `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with tarfile.open(fileobj=io.BytesIO(_data_member(deb.read_bytes())), mode="r:*") as tar:
            for member in tar:
                file = tar.extractfile(member) if member.isreg() and "-ubyte" in member.name else None
                if file is not None:
                    beside = folder / f"{Path(member.name).name}.part"
                    beside.write_bytes(file.read())
                    beside.replace(beside.with_suffix(""))
    except (ValueError, tarfile.TarError, OSError, EOFError, lzma.LZMAError) as error:
        raise UserError(f"{deb} is not a readable Debian package: {error}. {ADVICE}") from error
    return folder


def _data_member(archive: bytes) -> bytes:
    """The member `data.tar.*`: after an 8-byte magic, members of a 60-byte header and an even number of bytes."""
    at = 8
    while archive.startswith(b"!<arch>\n") and at + 60 <= len(archive):
        name, size = archive[at : at + 16], int(archive[at + 48 : at + 58])
        if name.startswith(b"data.tar"):
            return archive[at + 60 : at + 60 + size]
        at += 60 + size + size % 2
    raise ValueError("it has no data.tar")


def _folder(path: Path | None) -> Path:
    if path is not None:
        return Path(path).expanduser()
    if SYSTEM.is_dir():
        return SYSTEM
    cached = cache_folder() / "fashion-mnist"
    if len(list(cached.glob("*-ubyte.gz"))) < 4:
        unpack_deb(fetch_into(cache_folder() / "apt" / f"{PACKAGE}.deb", FETCH, ADVICE), cached)
    return cached
