"""A folder, tar or zip as named byte strings: listed once, read at random, never extracted.

Every read opens the file anew (some 20 microseconds), so a source may be used by threads, forked and spawned
workers alike. A member whose name leads outside its archive is refused.
"""

from __future__ import annotations

import bz2
import gzip
import hashlib
import lzma
import os
import shutil
import struct
import tarfile
import unicodedata
import zipfile
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from ditloom.contracts.errors import UserError
from ditloom.data.fetch import cache_folder
from ditloom.data.images import CorruptImage

LARGEST_MEMBER = 256 << 20
HASHED_WHOLE = 256 << 20
HASHED_SAMPLE = 256


@dataclass(frozen=True)
class Member:
    """Where one member's bytes lie in the archive; `checksum` is the CRC-32 where the format has one."""

    offset: int
    stored: int
    size: int
    deflated: bool = False
    checksum: int | None = None


class Files(ABC):
    """Named byte strings; names are relative with forward slashes and come in sorted order."""

    path: Path
    sizes: dict[str, int]

    @abstractmethod
    def read(self, name: str) -> bytes:
        """The content of one file; `CorruptImage` if it cannot be read."""

    def find(self, name: str) -> str | None:
        """The listed name equal to `name` up to Unicode normalisation and a leading `./`."""
        return self._by_normal_form.get(_normal(name))

    def fingerprint(self) -> str:
        """Hash of all names and sizes and of the content: whole up to 256 MiB, else 256 evenly spread files."""
        digest = hashlib.blake2b(digest_size=16)
        names = list(self.sizes)
        whole = sum(self.sizes.values()) <= HASHED_WHOLE
        sample = set(names if whole else names[:: max(1, len(names) // HASHED_SAMPLE)])
        for name in names:
            digest.update(f"{name}\0{self.sizes[name]}\0".encode())
            if name in sample:
                digest.update(self._content(name))
        return digest.hexdigest()

    def _content(self, name: str) -> bytes:
        try:
            return self.read(name)
        except CorruptImage as error:
            return str(error).encode()

    def _list(self, sizes: dict[str, int]) -> None:
        outside = next((name for name in sizes if _leads_outside(name)), None)
        if outside is not None:
            raise UserError(f"{self.path} holds a member named {outside!r}, which leads outside it: refused.")
        self.sizes = {name: sizes[name] for name in sorted(sizes) if not _is_hidden(name)}
        self._by_normal_form = {_normal(name): name for name in self.sizes}


class FolderFiles(Files):
    """All files below a folder; links to folders are followed once."""

    def __init__(self, path: Path):
        self.path = path
        sizes, seen = {}, {path.resolve()}
        for folder, below, names in os.walk(path, followlinks=True):
            below[:] = [name for name in sorted(below) if _first_visit(Path(folder, name), seen)]
            for file in (Path(folder, name) for name in names):
                if file.is_file():
                    sizes[file.relative_to(path).as_posix()] = file.stat().st_size
        self._list(sizes)

    def read(self, name: str) -> bytes:
        return _read_range(self.path / name, 0, self.sizes[name], name)


class TarFiles(Files):
    """Regular members of a tar; a compressed one is unpacked to a plain tar in the user's cache once."""

    def __init__(self, path: Path):
        self.path = path
        self.plain = _plain_tar(path)
        try:
            with tarfile.open(self.plain, "r:") as tar:
                members = [member for member in tar if member.isreg() and not member.issparse()]
        except tarfile.TarError as error:
            raise UserError(f"{path} is not a readable tar: {error}.") from error
        self.members = {m.name.removeprefix("./"): Member(m.offset_data, m.size, m.size) for m in members}
        self._list({name: member.size for name, member in self.members.items()})

    def read(self, name: str) -> bytes:
        member = self.members[name]
        return _read_range(self.plain, member.offset, member.size, name)


class ZipFiles(Files):
    """Stored and deflated members of a zip, checked against their CRC-32."""

    def __init__(self, path: Path):
        self.path = path
        try:
            with zipfile.ZipFile(path) as archive:
                entries = [entry for entry in archive.infolist() if not entry.is_dir()]
        except (zipfile.BadZipFile, NotImplementedError) as error:
            raise UserError(f"{path} is not a readable zip: {error}.") from error
        self.members = {entry.filename: _zip_member(entry, path) for entry in entries}
        self._list({name: member.size for name, member in self.members.items()})

    def read(self, name: str) -> bytes:
        member = self.members[name]
        head = _read_range(self.path, member.offset, 30, name)
        if head[:4] != b"PK\3\4":
            raise CorruptImage(name, "the zip holds no member where its directory says")
        start = member.offset + 30 + sum(struct.unpack("<HH", head[26:30]))
        data = _read_range(self.path, start, member.stored, name)
        data = _inflate(data, member.size, name) if member.deflated else data
        if zlib.crc32(data) != member.checksum:
            raise CorruptImage(name, "its CRC-32 is not the one in the zip")
        return data


SUFFIXES: Mapping[str, Callable[[Path], Files]] = {
    ".zip": ZipFiles,
    **dict.fromkeys((".tar", ".tgz", ".tbz2", ".txz", ".tar.gz", ".tar.bz2", ".tar.xz"), TarFiles),
}


def open_files(path: Path | str) -> Files:
    """The folder, tar or zip at `path`; the kind follows from the name."""
    path = Path(path).expanduser()
    if path.is_dir():
        return FolderFiles(path)
    if not path.exists():
        raise UserError(f"{path} does not exist; expected a folder, or a file ending in {', '.join(SUFFIXES)}.")
    for suffix, kind in SUFFIXES.items():
        if path.name.lower().endswith(suffix):
            return kind(path)
    raise UserError(f"{path} is neither a folder nor a file ending in {', '.join(SUFFIXES)}.")


def _normal(name: str) -> str:
    return unicodedata.normalize("NFC", name.removeprefix("./"))


def _leads_outside(name: str) -> bool:
    return name.startswith(("/", "\\")) or ":" in name[:2] or ".." in name.replace("\\", "/").split("/")


def _is_hidden(name: str) -> bool:
    return any(part.startswith((".", "__MACOSX")) for part in PurePosixPath(name).parts)


def _first_visit(folder: Path, seen: set[Path]) -> bool:
    real = folder.resolve()
    fresh = real not in seen
    seen.add(real)
    return fresh


def _read_range(path: Path, offset: int, size: int, name: str) -> bytes:
    if size > LARGEST_MEMBER:
        raise CorruptImage(name, f"it is larger than {LARGEST_MEMBER >> 20} MiB")
    try:
        with open(path, "rb") as file:
            file.seek(offset)
            data = file.read(size)
    except OSError as error:
        raise CorruptImage(name, error.strerror or str(error)) from error
    if len(data) != size:
        raise CorruptImage(name, f"it ends after {len(data)} of its {size} bytes")
    return data


def _inflate(data: bytes, size: int, name: str) -> bytes:
    if size > LARGEST_MEMBER:
        raise CorruptImage(name, f"it is larger than {LARGEST_MEMBER >> 20} MiB")
    try:
        return zlib.decompressobj(-15).decompress(data, size + 1)
    except zlib.error as error:
        raise CorruptImage(name, f"it does not decompress ({error})") from error


def _zip_member(entry: zipfile.ZipInfo, path: Path) -> Member:
    if entry.flag_bits & 1 or entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise UserError(f"{path}: {entry.filename} is encrypted or packed by another method than store or deflate.")
    deflated = entry.compress_type == zipfile.ZIP_DEFLATED
    return Member(entry.header_offset, entry.compress_size, entry.file_size, deflated, entry.CRC)


def _plain_tar(path: Path) -> Path:
    """`path`, or where it is compressed its plain form in the cache, keyed by place, size and time."""
    with open(path, "rb") as file:
        if not file.read(6).startswith((b"\x1f\x8b", b"BZh", b"\xfd7zXZ\0")):
            return path
    about = path.stat()
    key = hashlib.blake2b(f"{path.resolve()} {about.st_size} {about.st_mtime_ns}".encode(), digest_size=12)
    target = cache_folder() / "tar" / f"{key.hexdigest()}.tar"
    return target if target.exists() else _decompressed(path, target)


def _decompressed(path: Path, target: Path) -> Path:
    opener: dict[bytes, Callable[..., Any]] = {b"\x1f": gzip.open, b"B": bz2.open, b"\xfd": lzma.open}
    with open(path, "rb") as file:
        kind = opener[file.read(1)]
    target.parent.mkdir(parents=True, exist_ok=True)
    beside = target.with_name(f"{target.name}.{os.getpid()}.part")
    try:
        with kind(path, "rb") as packed, open(beside, "wb") as plain:
            shutil.copyfileobj(packed, plain, 1 << 20)
            plain.flush()
            os.fsync(plain.fileno())
        beside.replace(target)
    except (OSError, EOFError, lzma.LZMAError) as error:
        raise UserError(f"{path} cannot be decompressed to {target}: {error}.") from error
    finally:
        beside.unlink(missing_ok=True)
    return target
