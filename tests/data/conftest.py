"""Small pictures and data sets made in the test."""

from __future__ import annotations

import io
import tarfile
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
from PIL import Image


def picture_bytes(seed: int, size: tuple[int, int] = (12, 12), kind: str = "PNG") -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    data = io.BytesIO()
    Image.fromarray(pixels).save(data, kind)
    return data.getvalue()


def write_folder(path: Path, files: Mapping[str, bytes]) -> Path:
    for name, data in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(data)
    return path


def write_zip(path: Path, files: Mapping[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return path


def write_tar(path: Path, files: Mapping[str, bytes]) -> Path:
    mode = {".gz": "w:gz", ".xz": "w:xz", ".bz2": "w:bz2"}.get(path.suffix, "w")
    with tarfile.open(path, mode) as archive:  # type: ignore[call-overload]
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Nothing is read from or written to the user's cache."""
    cache = tmp_path / "xdg-cache"
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    return cache / "ditloom"


@pytest.fixture
def picture() -> Callable[..., bytes]:
    return picture_bytes


@pytest.fixture(params=["folder", "zip", "tar", "tar.gz", "tar.xz"])
def container(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[Mapping[str, bytes]], Path]:
    """Writes the same named files as a folder, zip, tar or compressed tar."""

    def write(files: Mapping[str, bytes]) -> Path:
        if request.param == "folder":
            return write_folder(tmp_path / "set", files)
        writer = write_zip if request.param == "zip" else write_tar
        return writer(tmp_path / f"set.{request.param}", files)

    return write


@pytest.fixture
def classes_folder(tmp_path: Path) -> Path:
    """Seven images of the classes ant and bee."""
    names = [f"{kind}/{n}.png" for kind, count in (("ant", 3), ("bee", 4)) for n in range(count)]
    return write_folder(tmp_path / "insects", {name: picture_bytes(i) for i, name in enumerate(names)})
